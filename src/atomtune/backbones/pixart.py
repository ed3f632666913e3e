"""PixArt-Sigma and alpha: the picture attends to T5, padding masked; a learned variance is left alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from atomtune.backbones import base
from atomtune.backbones.base import Backbone, Conditioning, Grid, Layout
from atomtune.backbones.noising import scheduled, step
from atomtune.backbones.reading import Reading

FACTOR = 8
"""Pixels of a latent."""


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str]) -> Conditioning:
    embeds, mask, _, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def predict(model: nn.Module, latents: Tensor, s: Tensor, conditioning: Conditioning) -> Tensor:
    """Half of the channels are the learned variance, where the model has one."""
    told: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        height, width = (FACTOR * n for n in latents.shape[-2:])
        size = latents.new_tensor([height, width]).repeat(len(latents), 1)
        told = {"resolution": size, "aspect_ratio": latents.new_full((len(latents), 1), height / width)}
    out = model(latents, timestep=step(s), added_cond_kwargs=told, return_dict=False, **conditioning)[0]
    return out[:, : latents.shape[1]]


def layout(site: str, conditioning: Conditioning, grid: Grid) -> Layout:
    return base.cross_attention(site, conditioning["encoder_attention_mask"].bool(), grid)


def readings(pipe: Any, prompt: str, length: int) -> list[Reading]:
    """The pipeline lowers capitals."""
    return [Reading(pipe.tokenizer, prompt.lower().strip(), length)]


BACKBONE = Backbone(
    family="PixArt-Sigma",
    sites=("to_q", "to_k", "to_v", "to_out.0"),
    gate_input="encoder_hidden_states",
    gate_mask="encoder_attention_mask",
    encode_prompts=encode_prompts,
    encode_pictures=base.autoencoded,
    predict=predict,
    grid=base.patches,
    layout=layout,
    heard=base.heard(),
    readings=partial(readings, length=300),
    settings=scheduled,
    call=lambda pipe, prompts: {"use_resolution_binning": False, "clean_caption": False},
)
ALPHA = replace(BACKBONE, family="PixArt-alpha", readings=partial(readings, length=120))
