"""Stable Diffusion XL and 1.5: a U-Net, whose sites see the picture at their own level; CLIP, padding attended."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from atomtune.backbones import base
from atomtune.backbones.base import Backbone, Conditioning, Grid, Heard, Layout
from atomtune.backbones.noising import scheduled, step
from atomtune.backbones.reading import Reading
from atomtune.errors import UserError

FACTOR = 8
"""Pixels of a latent."""


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str]) -> Conditioning:
    embeds, _ = pipe.encode_prompt(prompts, pipe._execution_device, 1, False)
    return {"encoder_hidden_states": embeds}


@torch.no_grad()
def encode_prompts_xl(pipe: Any, prompts: list[str]) -> Conditioning:
    """No words are zeros where the pipeline makes them so for guidance."""
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    if pipe.config.force_zeros_for_empty_prompt:
        spoken = embeds.new_tensor([prompt != "" for prompt in prompts])
        embeds, pooled = embeds * spoken.view(-1, 1, 1), pooled * spoken.view(-1, 1)
    return {"encoder_hidden_states": embeds, "text_embeds": pooled}


def predict(model: nn.Module, latents: Tensor, s: Tensor, conditioning: Conditioning) -> Tensor:
    return model(latents, step(s), return_dict=False, **conditioning)[0]


def predict_xl(model: nn.Module, latents: Tensor, s: Tensor, conditioning: Conditioning) -> Tensor:
    """A picture that was neither scaled nor cropped."""
    size = [FACTOR * n for n in latents.shape[-2:]]
    told = {
        "text_embeds": conditioning["text_embeds"],
        "time_ids": latents.new_tensor([[*size, 0, 0, *size]]).repeat(len(latents), 1),
    }
    embeds = conditioning["encoder_hidden_states"]
    return model(latents, step(s), embeds, added_cond_kwargs=told, return_dict=False)[0]


def grid(model: nn.Module, latents: Tensor) -> Grid:
    return latents.shape[-2], latents.shape[-1]


def layout(site: str, conditioning: Conditioning, grid: Grid, levels: int = 4) -> Layout:
    """Each block down halves the picture, rounding up; those up mirror them."""
    found = re.match(r"(down|mid|up)_block(?:s\.(\d+))?\.", site)
    if found is None:
        raise UserError(f"`sites`: {site} reads no tokens of the picture or the prompt. Leave it out.")
    kind, number = found[1], int(found[2] or 0)
    level = {"down": number, "mid": levels - 1, "up": levels - 1 - number}[kind]
    rows, columns = (-(-n // 2**level) for n in grid)
    return base.cross_attention(site, base.attended(conditioning["encoder_hidden_states"]), (rows, columns))


def heard(model: nn.Module, given: dict[str, Any]) -> Heard:
    latents = given["sample"]
    s = torch.as_tensor(given["timestep"], device=latents.device).float() / 1000
    return Heard(s.expand(len(latents)), grid(model, latents), given)


def readings(pipe: Any, prompt: str) -> list[Reading]:
    """The two CLIPs of SDXL share their positions."""
    return [Reading(pipe.tokenizer, prompt, pipe.tokenizer.model_max_length, padded=True)]


def settings(pipe: Any) -> dict[str, Any]:
    levels = len(pipe.unet.config.block_out_channels)
    return scheduled(pipe) | {"layout": partial(layout, levels=levels)}


SD15 = Backbone(
    family="SD 1.5",
    sites=("to_q", "to_k", "to_v", "to_out.0"),
    gate_input="encoder_hidden_states",
    gate_mask=None,
    encode_prompts=encode_prompts,
    encode_pictures=base.autoencoded,
    predict=predict,
    grid=grid,
    layout=layout,
    heard=heard,
    readings=readings,
    settings=settings,
)
SDXL = replace(SD15, family="SDXL", encode_prompts=encode_prompts_xl, predict=predict_xl)
