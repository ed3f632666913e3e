"""Sana: linear attention; the picture attends to Gemma, padding masked, with an instruction before the prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from atomtune.backbones import base
from atomtune.backbones.base import Backbone, Conditioning, Grid, Heard, Layout
from atomtune.backbones.noising import shifted
from atomtune.backbones.reading import Reading

LENGTH = 300


def _instruction(pipe: Any) -> list[str]:
    """What the pipeline's call puts before a prompt unless it is told otherwise."""
    return base.default_of(pipe, "complex_human_instruction")


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str]) -> Conditioning:
    """No words are what guidance steps away from: without the instruction."""
    return base.bare(prompts, pipe.encode_prompt(prompts, "" in prompts, complex_human_instruction=_instruction(pipe)))


def predict(model: nn.Module, latents: Tensor, s: Tensor, conditioning: Conditioning) -> Tensor:
    timestep = s * 1000 * model.config.timestep_scale  # type: ignore[union-attr, operator]
    return model(latents, timestep=timestep, return_dict=False, **conditioning)[0]


def layout(site: str, conditioning: Conditioning, grid: Grid) -> Layout:
    return base.cross_attention(site, conditioning["encoder_attention_mask"].bool(), grid)


def heard(model: nn.Module, given: dict[str, Any]) -> Heard:
    latents, scale = given["hidden_states"], 1000 * model.config.timestep_scale  # type: ignore[union-attr, operator]
    return Heard((given["timestep"].float() / scale).expand(len(latents)), base.patches(model, latents), given)


def readings(pipe: Any, prompt: str) -> list[Reading]:
    """Of the tokens, the first and the last 299 are kept; the pipeline lowers capitals."""
    before = "\n".join(_instruction(pipe))
    told = len(pipe.tokenizer.encode(before))
    text = prompt.lower().strip()
    return [Reading(pipe.tokenizer, text, told + LENGTH - 2, before=before, cut=slice(1, told - 1))]


BACKBONE = Backbone(
    family="Sana",
    sites=("to_q", "to_k", "to_v"),
    gate_input="encoder_hidden_states",
    gate_mask="encoder_attention_mask",
    encode_prompts=encode_prompts,
    encode_pictures=base.autoencoded,
    predict=predict,
    grid=base.patches,
    layout=layout,
    heard=heard,
    readings=readings,
    settings=shifted,
    call=lambda pipe, prompts: {"use_resolution_binning": False},
)
