"""HunyuanDiT: the picture attends to BERT and T5, padding masked; a learned variance is left alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from atomtune.backbones import base
from atomtune.backbones.base import Backbone, Conditioning, Grid, Layout
from atomtune.backbones.noising import scheduled, step
from atomtune.backbones.reading import Reading

FACTOR = 8
"""Pixels of a latent."""
ORIGINAL = (1024, 1024)
"""The size that a picture is said to have had."""


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str]) -> Conditioning:
    told: dict[str, Any] = {"device": pipe._execution_device, "do_classifier_free_guidance": False}
    bert, _, bert_mask, _ = pipe.encode_prompt(prompts, max_sequence_length=77, text_encoder_index=0, **told)
    t5, _, t5_mask, _ = pipe.encode_prompt(prompts, max_sequence_length=256, text_encoder_index=1, **told)
    return {
        "encoder_hidden_states": bert,
        "text_embedding_mask": bert_mask,
        "encoder_hidden_states_t5": t5,
        "text_embedding_mask_t5": t5_mask,
    }


def predict(model: nn.Module, latents: Tensor, s: Tensor, conditioning: Conditioning) -> Tensor:
    """Half of the channels are the learned variance."""
    size = (*ORIGINAL, *(FACTOR * n for n in latents.shape[-2:]), 0, 0)
    out = model(
        latents,
        step(s).to(latents.dtype),
        image_meta_size=latents.new_tensor([size]).repeat(len(latents), 1),
        style=torch.zeros(len(latents), dtype=torch.long, device=latents.device),
        image_rotary_emb=_rotary(model, latents),
        return_dict=False,
        **conditioning,
    )[0]
    return out.chunk(2, dim=1)[0]


def _rotary(model: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Positions as the pipeline has them: on the grid of a picture of 512 pixels."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    grid = base.patches(model, latents)
    crops = get_resize_crop_region_for_grid(grid, 512 // FACTOR // model.config.patch_size)
    width = model.inner_dim // model.num_heads
    return get_2d_rotary_pos_embed(width, crops, grid, device=latents.device, output_type="pt")


def layout(site: str, conditioning: Conditioning, grid: Grid) -> Layout:
    masks = [conditioning[name] for name in ("text_embedding_mask", "text_embedding_mask_t5")]
    return base.cross_attention(site, torch.cat(masks, 1).bool(), grid)


def readings(pipe: Any, prompt: str) -> list[Reading]:
    return [Reading(pipe.tokenizer, prompt, 77), Reading(pipe.tokenizer_2, prompt, 256)]


BACKBONE = Backbone(
    family="HunyuanDiT",
    sites=("to_q", "to_k", "to_v", "to_out.0"),
    gate_input="encoder_hidden_states",
    gate_mask="text_embedding_mask",
    encode_prompts=encode_prompts,
    encode_pictures=base.autoencoded,
    predict=predict,
    grid=base.patches,
    layout=layout,
    heard=base.heard(),
    readings=readings,
    settings=scheduled,
    call=lambda pipe, prompts: {"use_resolution_binning": False},
)
