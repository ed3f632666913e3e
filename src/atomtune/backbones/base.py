"""What the rest of atomtune asks of a model family, and nothing more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

Conditioning = dict[str, Tensor]
"""What the model is told beside the latents, each tensor with the batch first."""


@dataclass(frozen=True)
class Layout:
    """Which positions of a site's input are real (not padding), and which lie on the picture, row by row."""

    real: Bool[Tensor, "batch positions"]
    image: Bool[Tensor, "batch positions"]


@dataclass(frozen=True)
class Backbone:
    """A model family, as plain functions.

    Time `s` runs from 0 (clean) to 1 (noise): x_s = (1 - s) x0 + s noise, and the target is v = noise - x0
    (rectified flow, arXiv 2209.03003). Each family maps this to its own convention.
    """

    family: str
    sites: tuple[str, ...]
    """Ends of the names of the linear layers that are adapted by default."""
    gate_input: str
    """Argument of the model's forward with the prompt embeddings `(batch, tokens, width)`."""
    gate_mask: str | None
    """Argument with their mask, if the family has one."""
    encode_prompts: Callable[[Any, list[str]], Conditioning]
    """(pipe, prompts) -> conditioning."""
    encode_pictures: Callable[[Any, Float[Tensor, "batch 3 height width"]], Tensor]
    """(pipe, pixels in [-1, 1]) -> latents as the model takes them."""
    predict: Callable[[nn.Module, Tensor, Float[Tensor, " batch"], Conditioning], Tensor]
    """(model, latents at s, s, conditioning) -> v, of the latents' shape."""
    grid: Callable[[nn.Module, Tensor], tuple[int, int]]
    """(model, latents) -> rows and columns of picture tokens."""
    layout: Callable[[str, Conditioning, int], Layout]
    """(site, conditioning, number of picture tokens) -> where the site's positions lie."""
    density: str = "logit_normal"
    """How training draws `s`: a key of `training.objective.DENSITIES`."""
    call: Callable[[Any, list[str]], dict[str, Any]] = lambda pipe, prompts: {}
    """(pipe, prompts) -> further arguments of the pipeline's call; they may change its speed, not its picture."""


def denoiser(pipe: Any) -> nn.Module:
    """The network of a pipeline that is adapted."""
    model = getattr(pipe, "transformer", None) or pipe.unet
    assert isinstance(model, nn.Module)
    return model


def select(conditioning: Conditioning, rows: Tensor) -> Conditioning:
    """The conditioning of some rows of a batch."""
    return {name: value[rows] for name, value in conditioning.items()}


def join(first: Conditioning, second: Conditioning) -> Conditioning:
    """Two batches of conditioning as one.

    Prompts of different lengths are filled up with zeros: only a family that masks its padding has them.
    """
    return {name: torch.cat(_same_length(value, second[name])) for name, value in first.items()}


def _same_length(*tensors: Tensor) -> list[Tensor]:
    """Tensors `(batch, length, ...)`, all as long as the longest."""
    if len({t.shape[1:] for t in tensors}) == 1:
        return list(tensors)
    longest = max(t.shape[1] for t in tensors)
    return [nn.functional.pad(t, (0, 0) * (t.ndim - 2) + (0, longest - t.shape[1])) for t in tensors]
