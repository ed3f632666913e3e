"""Tiny pipelines whose picture attends to the text."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny_parts import (
    bert,
    bert_tokenizer,
    clip,
    clip_tokenizer,
    deep,
    gemma_tokenizer,
    kl,
    randomize,
    seed,
    small,
    t5,
    t5_tokenizer,
)
from transformers import Gemma2Config, Gemma2Model

SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def _pixart(pipeline: Any, sized: bool) -> Any:
    """`sized`: the model is told the picture's size, as alpha's is at 1024 pixels."""
    seed()
    tokenizer = t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=12 if sized else 8,
        num_layers=2,
        cross_attention_dim=48 if sized else 32,
        caption_channels=32,
        sample_size=128 if sized else 8,
        use_additional_conditions=sized,
        interpolation_scale=1,
    )
    randomize(transformer)
    return pipeline(
        tokenizer=tokenizer,
        text_encoder=t5(tokenizer),
        vae=kl(0.13025),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    )


def pixart_sigma() -> PixArtSigmaPipeline:
    return _pixart(PixArtSigmaPipeline, sized=False)


def pixart_alpha() -> PixArtAlphaPipeline:
    return _pixart(PixArtAlphaPipeline, sized=True)


def sana() -> SanaPipeline:
    seed()
    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    tokenizer = gemma_tokenizer("\n".join(instruction[:-1]))
    text = Gemma2Config(vocab_size=len(tokenizer), max_position_embeddings=4096, **small(query_pre_attn_scalar=8))
    transformer = SanaTransformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=16,
        timestep_scale=0.5,
    )
    randomize(transformer)
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(text).eval(),
        vae=deep(0.41407),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def hunyuan_dit() -> HunyuanDiTPipeline:
    """Its text encoders have different widths."""
    seed()
    tokenizer, tokenizer_2 = bert_tokenizer(), t5_tokenizer()
    transformer = HunyuanDiT2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=4,
        activation_fn="gelu-approximate",
        cross_attention_dim=24,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
    )
    randomize(transformer)
    return HunyuanDiTPipeline(
        vae=kl(0.13025),
        text_encoder=bert(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        scheduler=DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.02, prediction_type="v_prediction"
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5(tokenizer_2),
        tokenizer_2=tokenizer_2,
    )


def _unet(**config: Any) -> UNet2DConditionModel:
    """Attention at the finest level too, so that sites see pictures of two sizes."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=2,
        **config,
    )
    randomize(unet)
    return unet.eval()


def sdxl() -> StableDiffusionXLPipeline:
    seed()
    tokenizer = clip_tokenizer()
    unet = _unet(
        cross_attention_dim=48,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    return StableDiffusionXLPipeline(
        vae=kl(0.13025),
        text_encoder=clip(tokenizer, projected=False),
        text_encoder_2=clip(tokenizer, 32),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **SD_BETAS),
        add_watermarker=False,
    )


def sd15() -> StableDiffusionPipeline:
    seed()
    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=kl(0.18215),
        text_encoder=clip(tokenizer, 32, projected=False),
        tokenizer=tokenizer,
        unet=_unet(cross_attention_dim=32),
        scheduler=PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **SD_BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
