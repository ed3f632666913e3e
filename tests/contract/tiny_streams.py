"""Tiny pipelines whose text is a stream beside or in the picture's."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_parts import clip, clip_tokenizer, deep, kl, qwen_tokenizer, randomize, seed, small, t5, t5_tokenizer
from torch import nn
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from atomtune.scenes.model import TEXT_WIDTH, build_pipeline

DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def sd3() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5: three text encoders, two streams, a block with a second attention."""
    seed()
    tokenizer, tokenizer_3, vae = clip_tokenizer(), t5_tokenizer(), kl(1.5305, 0.0609)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    randomize(transformer)
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=t5(tokenizer_3),
        tokenizer_3=tokenizer_3,
    )


def lumina2() -> Any:
    """The embedded model's own pipeline, its transformer and autoencoder smaller still."""
    seed()
    vae = deep()
    vae.register_to_config(shift_factor=0.1)
    pipe = build_pipeline(vae)
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 32, 32),
        cap_feat_dim=TEXT_WIDTH,
    )
    randomize(transformer)
    pipe.register_modules(transformer=transformer.eval())
    return pipe


def flux(guided: bool = True) -> FluxPipeline:
    """FLUX.1-dev; not guided: schnell."""
    seed()
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guided,
    )
    randomize(transformer)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**(DYNAMIC if guided else {})),
        vae=kl(0.3611, 0.1159),
        text_encoder=clip(tokenizer, 32, projected=False),
        tokenizer=tokenizer,
        text_encoder_2=t5(tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=transformer.eval(),
    )


def _flux2(guided: bool) -> dict[str, Any]:
    vae = AutoencoderKLFlux2(block_out_channels=(4, 4, 4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=1)
    vae.bn.running_mean.uniform_(-0.5, 0.5)
    vae.bn.running_var.uniform_(0.5, 2)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guided,
    )
    randomize(transformer)
    scheduler = FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    return {"vae": vae.eval(), "transformer": transformer.eval(), "scheduler": scheduler}


def flux2() -> Flux2Pipeline:
    """Its layers 10, 20 and 30 are the text, so it has as many; a tokenizer serves as its processor."""
    seed()
    tokenizer = qwen_tokenizer()
    vision = small(8, 1, 1, image_size=28, patch_size=14)
    config = Mistral3Config(
        text_config={"model_type": "mistral", "vocab_size": len(tokenizer), **small(8, 30, 1)},
        vision_config={"model_type": "pixtral", **vision},
    )
    text = Mistral3ForConditionalGeneration(config).eval()
    return Flux2Pipeline(text_encoder=text, tokenizer=tokenizer, **_flux2(guided=True))


def klein() -> Flux2KleinPipeline:
    seed()
    tokenizer = qwen_tokenizer()
    text = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **small(8, 27, 1))).eval()
    return Flux2KleinPipeline(text_encoder=text, tokenizer=tokenizer, **_flux2(guided=False))


def qwen_image() -> QwenImagePipeline:
    """4 pixels a latent."""
    seed()
    tokenizer = qwen_tokenizer()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    sizes = small(vocab_size=len(tokenizer), rope_parameters=rope, bos_token_id=0, eos_token_id=0)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    randomize(transformer)
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        vae=vae.eval(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=sizes, vision_config=vision)
        ).eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )


def z_image() -> ZImagePipeline:
    seed()
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    randomize(transformer)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl(0.3611, 0.1159),
        text_encoder=Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **small())).eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )


def aura_flow() -> AuraFlowPipeline:
    seed()
    tokenizer = t5_tokenizer()
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    )
    randomize(transformer)
    for name, parameter in transformer.named_parameters():
        if ".attn." in name:  # else so small a model hardly hears what it is told
            nn.init.normal_(parameter, std=0.5)
    return AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=t5(tokenizer, UMT5EncoderModel, UMT5Config),
        vae=kl(0.13025),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
