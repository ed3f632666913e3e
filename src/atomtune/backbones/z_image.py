"""Z-Image: one stream of picture, then text, each filled up to a multiple of 32; lists of Qwen3's tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from atomtune.backbones import base
from atomtune.backbones.base import Backbone, Conditioning, Grid, Heard, Layout
from atomtune.backbones.noising import shifted
from atomtune.backbones.reading import Reading, around

UNIT = 32
"""Tokens of each kind are filled up to a multiple of this, and what fills them up is attended."""


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str]) -> Conditioning:
    """The pipeline overwrites the list that it is given."""
    embeds, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    return {"cap_feats": embeds}


def predict(model: nn.Module, latents: Tensor, s: Tensor, conditioning: Conditioning) -> Tensor:
    """The model's clock runs from noise (0) to picture (1), and so does its velocity."""
    out = model(list(latents[:, :, None]), (1000 - 1000 * s) / 1000, return_dict=False, **conditioning)[0]
    return -torch.stack(out)[:, :, 0]


def grid(model: nn.Module, latents: Tensor) -> Grid:
    patch: int = model.config.all_patch_size[0]  # type: ignore[union-attr, index, assignment]
    return latents.shape[-2] // patch, latents.shape[-1] // patch


def layout(site: str, conditioning: Conditioning, grid: Grid) -> Layout:
    """Joint layers see the picture's tokens, filled up, then the text's, filled up, then padding."""
    embeds, tokens = conditioning["cap_feats"], grid[0] * grid[1]
    lengths = torch.tensor([[_filled(len(one))] for one in embeds], device=embeds[0].device)
    at = torch.arange(int(lengths.max()), device=lengths.device)
    if site.startswith("context_refiner"):
        return base.words(at < lengths)
    at = torch.arange(_filled(tokens) + (0 if site.startswith("noise_refiner") else len(at)), device=at.device)
    image = (at < tokens).expand(len(embeds), -1)
    return Layout(real=image | (at >= _filled(tokens)) & (at < _filled(tokens) + lengths), image=image, grid=grid)


def _filled(tokens: int) -> int:
    return -(-tokens // UNIT) * UNIT


def heard(model: nn.Module, given: dict[str, Any]) -> Heard:
    pictures = given["x"]
    return Heard(1 - given["t"].float().expand(len(pictures)), grid(model, pictures[0]), given)


def readings(pipe: Any, prompt: str) -> list[Reading]:
    def render(text: str) -> str:
        messages = [{"role": "user", "content": text}]
        return pipe.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )

    before, after = around(render)
    return [Reading(pipe.tokenizer, prompt, 512, before=before, after=after)]


BACKBONE = Backbone(
    family="Z-Image",
    sites=("to_q", "to_k", "to_v", "to_out.0"),
    gate_input="cap_feats",
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
