"""AuraFlow: two streams, then one of text and picture; eight registers before UMT5, padding attended."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from atomtune.backbones import base
from atomtune.backbones.base import Backbone, Conditioning, Grid, Layout
from atomtune.backbones.noising import shifted
from atomtune.backbones.reading import Reading

REGISTERS = 8
LENGTH = 256


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str]) -> Conditioning:
    embeds, _, _, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds}


def predict(model: nn.Module, latents: Tensor, s: Tensor, conditioning: Conditioning) -> Tensor:
    return model(latents, timestep=s, return_dict=False, **conditioning)[0]


def layout(site: str, conditioning: Conditioning, grid: Grid) -> Layout:
    mask = base.attended(conditioning["encoder_hidden_states"])
    return base.two_streams(site, nn.functional.pad(mask, (REGISTERS, 0), value=True), grid)


def readings(pipe: Any, prompt: str) -> list[Reading]:
    return [Reading(None, "", REGISTERS), Reading(pipe.tokenizer, prompt, LENGTH, padded=True)]


BACKBONE = Backbone(
    family="AuraFlow",
    sites=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    gate_input="encoder_hidden_states",
    gate_mask=None,
    encode_prompts=encode_prompts,
    encode_pictures=base.autoencoded,
    predict=predict,
    grid=base.patches,
    layout=layout,
    heard=base.heard(thousandths=False),
    readings=readings,
    settings=shifted,
)
