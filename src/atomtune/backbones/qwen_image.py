"""Qwen-Image: two streams; latents packed 2 x 2, of a video autoencoder; Qwen2.5-VL, padding masked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from atomtune.backbones import base
from atomtune.backbones.base import Backbone, Conditioning, Grid, Heard, Layout
from atomtune.backbones.noising import shifted
from atomtune.backbones.reading import Reading


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str]) -> Conditioning:
    """Of as many tokens as the pipeline paints with, which gives no mask where nothing is padded."""
    embeds, mask = pipe.encode_prompt(prompts, max_sequence_length=base.default_of(pipe, "max_sequence_length"))
    mask = embeds.new_ones(embeds.shape[:2], dtype=torch.long) if mask is None else mask
    return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}


@torch.no_grad()
def encode_pictures(pipe: Any, pixels: Tensor) -> Tensor:
    """A picture is a video of one frame."""
    latents = pipe.vae.encode(pixels.to(pipe.vae.dtype)[:, :, None]).latent_dist.mode()[:, :, 0]
    config = pipe.vae.config
    mean, deviation = (latents.new_tensor(v).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
    return (latents - mean) / deviation


def predict(model: nn.Module, latents: Tensor, s: Tensor, conditioning: Conditioning) -> Tensor:
    mask = conditioning["encoder_hidden_states_mask"]
    told = conditioning | {"encoder_hidden_states_mask": None if mask.all() else mask}
    shapes = [[(1, *base.patches(model, latents))]] * len(latents)
    packed = model(hidden_states=base.pack(latents), timestep=s, img_shapes=shapes, return_dict=False, **told)[0]
    return base.unpack(packed, latents)


def layout(site: str, conditioning: Conditioning, grid: Grid) -> Layout:
    mask = conditioning.get("encoder_hidden_states_mask")
    real = base.attended(conditioning["encoder_hidden_states"]) if mask is None else mask.bool()
    return base.two_streams(site, real, grid)


def heard(model: nn.Module, given: dict[str, Any]) -> Heard:
    (_, rows, columns), told = given["img_shapes"][0][0], given["timestep"]
    return Heard(told.float().expand(len(given["hidden_states"])), (rows, columns), given, base.slack(told))


def readings(pipe: Any, prompt: str) -> list[Reading]:
    """The template's tokens before the prompt are taken out again."""
    before, _, after = pipe.prompt_template_encode.partition("{}")
    cut = pipe.prompt_template_encode_start_idx
    length = base.default_of(pipe, "max_sequence_length") + cut
    return [Reading(pipe.tokenizer, prompt, length, before=before, after=after, cut=slice(cut))]


BACKBONE = Backbone(
    family="Qwen-Image",
    sites=("to_q", "to_k", "to_v", "to_out.0"),
    gate_input="encoder_hidden_states",
    gate_mask="encoder_hidden_states_mask",
    encode_prompts=encode_prompts,
    encode_pictures=encode_pictures,
    predict=predict,
    grid=base.patches,
    layout=layout,
    heard=heard,
    readings=readings,
    settings=shifted,
)
