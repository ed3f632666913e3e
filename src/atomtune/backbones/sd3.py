"""Stable Diffusion 3 and 3.5: two streams; two CLIPs and T5, padding attended."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from atomtune.backbones.base import (
    Backbone,
    Conditioning,
    Grid,
    Layout,
    attended,
    autoencoded,
    heard,
    patches,
    two_streams,
)
from atomtune.backbones.noising import shifted
from atomtune.backbones.reading import Reading


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str]) -> Conditioning:
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, prompts, prompts, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def predict(model: nn.Module, latents: Tensor, s: Tensor, conditioning: Conditioning) -> Tensor:
    return model(hidden_states=latents, timestep=s * 1000, return_dict=False, **conditioning)[0]


def layout(site: str, conditioning: Conditioning, grid: Grid) -> Layout:
    return two_streams(site, attended(conditioning["encoder_hidden_states"]), grid)


def readings(pipe: Any, prompt: str) -> list[Reading]:
    """The two CLIPs share their positions; T5's follow."""
    length = pipe.tokenizer_max_length
    return [Reading(pipe.tokenizer, prompt, length, padded=True), Reading(pipe.tokenizer_3, prompt, 256, padded=True)]


BACKBONE = Backbone(
    family="SD3",
    sites=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    gate_input="encoder_hidden_states",
    gate_mask=None,
    encode_prompts=encode_prompts,
    encode_pictures=autoencoded,
    predict=predict,
    grid=patches,
    layout=layout,
    heard=heard(),
    readings=readings,
    density="logit_normal",
    settings=shifted,
)
