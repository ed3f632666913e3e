"""Lumina2, and the embedded model: one stream of text, then picture; Gemma, padding masked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from atomtune.backbones.base import (
    Backbone,
    Conditioning,
    Grid,
    Heard,
    Layout,
    autoencoded,
    bare,
    patches,
    picture,
    words,
)
from atomtune.backbones.reading import Reading


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str]) -> Conditioning:
    """No words are what guidance steps away from: without what stands before a prompt."""
    return bare(prompts, pipe.encode_prompt(prompts, "" in prompts, **call(pipe, prompts)))


def predict(model: nn.Module, latents: Tensor, s: Tensor, conditioning: Conditioning) -> Tensor:
    """The model's clock runs from noise (0) to picture (1), and so does its velocity."""
    return -model(hidden_states=latents, timestep=1 - s, return_dict=False, **conditioning)[0]


def layout(site: str, conditioning: Conditioning, grid: Grid) -> Layout:
    """Joint layers see the real text tokens, then the picture's, then padding; refiners see one kind."""
    mask = conditioning["encoder_attention_mask"].bool()
    if site.startswith("context_refiner"):
        return words(mask)
    if site.startswith("noise_refiner"):
        return picture(mask, grid)
    lengths, tokens = mask.sum(1, keepdim=True), grid[0] * grid[1]
    at = torch.arange(int(lengths.max()) + tokens, device=mask.device)
    real = at < lengths + tokens
    return Layout(real=real, image=real & (at >= lengths), grid=grid)


def heard(model: nn.Module, given: dict[str, Any]) -> Heard:
    latents = given["hidden_states"]
    return Heard(1 - given["timestep"].float().expand(len(latents)), patches(model, latents), given)


def readings(pipe: Any, prompt: str) -> list[Reading]:
    return [Reading(pipe.tokenizer, prompt, 256, before=f"{pipe.system_prompt} <Prompt Start> ")]


def call(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    """A text length just long enough, in steps of 32: padding is masked, but it is computed."""
    texts = [f"{pipe.system_prompt} <Prompt Start> {prompt}" for prompt in prompts]
    longest = max(len(ids) for ids in pipe.tokenizer(texts).input_ids)
    return {"max_sequence_length": min(256, -(-longest // 32) * 32)}


BACKBONE = Backbone(
    family="Lumina2",
    sites=("to_q", "to_k", "to_v", "to_out.0"),
    gate_input="encoder_hidden_states",
    gate_mask="encoder_attention_mask",
    encode_prompts=encode_prompts,
    encode_pictures=autoencoded,
    predict=predict,
    grid=patches,
    layout=layout,
    heard=heard,
    readings=readings,
    density="logit_normal",  # without its shift, which in its own script's clock favours clean pictures
    call=call,
)
