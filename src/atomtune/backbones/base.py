"""What the rest of atomtune asks of a model family, and nothing more."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from atomtune.errors import UserError

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
    clock: Callable[[Tensor], Tensor]
    """The forward's argument `timestep` -> s."""
    word_tokens: Callable[[Any, str, str], list[int]]
    """(pipe, prompt, words) -> which of its tokens spell the words. Raises UserError where the prompt lacks them."""
    density: str = "logit_normal"
    """How training draws `s`: a key of `training.objective.DENSITIES`."""
    call: Callable[[Any, list[str]], dict[str, Any]] = lambda pipe, prompts: {}
    """(pipe, prompts) -> further arguments of the pipeline's call; they may change its speed, not its picture."""


def spelling(tokenizer: Any, text: str, words: str, start: int = 0) -> list[int]:
    """Which tokens of a text spell these words, in any case and spacing, from the character `start` on.

    Raises UserError where the words are not there.
    """
    pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, words.split())) + r"(?!\w)"
    spans = [match.span() for match in re.compile(pattern, re.IGNORECASE).finditer(text, start)]
    if not spans:
        close = difflib.get_close_matches(words, re.findall(r"\w+", text[start:]), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"`words` must be in every prompt, got {words!r} for {text[start:]!r}.{hint}")
    tokens = tokenizer(text, return_offsets_mapping=True).offset_mapping
    return [i for i, (a, b) in enumerate(tokens) if any(a < end and b > begin for begin, end in spans)]


def denoiser(pipe: Any) -> nn.Module:
    """The network of a pipeline that is adapted."""
    model = getattr(pipe, "transformer", None)
    if model is None:  # not `or`: a compiled model has no truth
        model = pipe.unet
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
