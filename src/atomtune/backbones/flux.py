"""FLUX.1, dev and schnell: two streams, then one of text and picture; latents packed 2 x 2; T5, padding attended."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from atomtune.backbones import base
from atomtune.backbones.base import Backbone, Conditioning, Grid, Heard, Layout
from atomtune.backbones.noising import shifted
from atomtune.backbones.reading import Reading

GUIDANCE = 3.5
"""Of a model that is told it: what its pipeline paints with, and the official script trains with."""
LENGTH = 512


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str]) -> Conditioning:
    embeds, pooled, _ = pipe.encode_prompt(prompts, prompts, max_sequence_length=LENGTH)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def predict(model: nn.Module, latents: Tensor, s: Tensor, conditioning: Conditioning) -> Tensor:
    rows, columns = grid(model, latents)
    at = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
    embeds = conditioning["encoder_hidden_states"]
    packed = model(
        hidden_states=base.pack(latents),
        timestep=s,
        guidance=torch.full_like(s, GUIDANCE) if model.config.guidance_embeds else None,  # type: ignore[union-attr]
        txt_ids=embeds.new_zeros(embeds.shape[1], 3),
        img_ids=at.to(embeds),
        return_dict=False,
        **conditioning,
    )[0]
    return base.unpack(packed, latents)


def grid(model: nn.Module, latents: Tensor) -> Grid:
    return latents.shape[-2] // 2, latents.shape[-1] // 2


def layout(site: str, conditioning: Conditioning, grid: Grid) -> Layout:
    return base.two_streams(site, base.attended(conditioning["encoder_hidden_states"]), grid)


def heard(model: nn.Module, given: dict[str, Any]) -> Heard:
    """Rows and columns are the last coordinates of the picture's tokens."""
    rows, columns = (int(n) + 1 for n in given["img_ids"][..., 1:3].flatten(0, -2).amax(0).tolist())
    told = given["timestep"]
    return Heard(told.float().expand(len(given["hidden_states"])), (rows, columns), given, base.slack(told))


def readings(pipe: Any, prompt: str) -> list[Reading]:
    return [Reading(pipe.tokenizer_2, prompt, LENGTH, padded=True)]


BACKBONE = Backbone(
    family="FLUX.1",
    sites=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    gate_input="encoder_hidden_states",
    gate_mask=None,
    encode_prompts=encode_prompts,
    encode_pictures=base.autoencoded,
    predict=predict,
    grid=grid,
    layout=layout,
    heard=heard,
    readings=readings,
    settings=shifted,
)
