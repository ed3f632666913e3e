"""Codes read in words of the adapter's own, while the picture follows the prompt.

Atoms fire where training taught them to: beside a word that their captions never had, such as another adapter's style,
they fall silent, and a weighted sum of adapters loses one of them. So each forward is run a second time first, on the
same latents, for this adapter alone and with its own words in the prompt; what its atoms do on the picture is taken
from there. Sparse codes are what can be carried over: they say what is shown where, not how.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from atomtune.backbones import backbone_of, denoiser, named, placed, select, spelling
from atomtune.backbones.base import Conditioning, Layout
from atomtune.errors import UserError, did_you_mean
from atomtune.steering import READING, listening
from atomtune.tuner import assigned, atom_layers, record, unwrap

UNTIL = 0.3
"""Until which time own words hold, where nothing is said: later only the look of a thing changes (LOG.md)."""


@contextmanager
def own_words(pipe: Any, instead: Mapping[str, str], adapter: str = "default", until: float = UNTIL) -> Iterator[None]:
    """Inside, the adapter's codes on picture tokens are those of the prompt with `instead`: {"sepia": "photo"}.

    From noise (s = 1) down to s = `until`; then the prompt has all, which is when a style settles.

    Words are replaced wherever the prompts that the pipeline encodes say them, in any case; an empty text takes them
    out. Codes on prompt tokens and the prompt gate stay the prompt's. A forward costs two. Raises UserError when a
    prompt is encoded that says none of them.
    """
    if not 0 <= until < 1:
        raise UserError(f"`own_until` must be at least 0, the whole way, and below 1, got {until}.")
    if not instead:
        yield
        return
    for said, own in instead.items():
        if not said.strip() or not isinstance(own, str):
            raise UserError(f"`own_words` must map words of the prompt to others, got {said!r}: {own!r}.")
    backbone, model, layers = backbone_of(pipe), denoiser(pipe), atom_layers(pipe, adapter)
    base = unwrap(model)
    conditioning: Conditioning = {}
    """Of the prompts in its own words."""

    def hear(prompts: list[str]) -> None:
        if not _all_say(instead, prompts):
            hint = did_you_mean(next(iter(instead)), " ".join(prompts).split())
            raise UserError(f"`own_words` replaces {', '.join(instead)}, which not every prompt says: {prompts}.{hint}")
        conditioning.update(backbone.encode_prompts(pipe, [reworded(prompt, instead) for prompt in prompts]))

    def before_forward(_: nn.Module, args: Any, given: dict[str, Any]) -> None:
        if READING.get():
            return
        told = named(base, args, given)
        heard = backbone.heard(base, told)
        rows = which(heard.conditioning[backbone.gate_input], "own_words")
        early = heard.s > until - heard.slack
        at = torch.tensor([row if now else -1 for row, now in zip(rows, early, strict=True)])
        for layer in layers.values():
            layer.replaced.pop(adapter, None)
        # Late, the branch without words, or the adapter is off.
        if (at < 0).all() or all(layer.disable_adapters for layer in layers.values()):
            return
        own = _told(told, select(conditioning, at.clamp(min=0)))
        token = READING.set(True)
        try:
            with record(model, adapter) as seen, assigned(model, [adapter] * len(at)):
                model(**own)
        finally:
            READING.reset(token)
        read = backbone.heard(base, own).conditioning
        for path, codes in seen.codes.items():
            values, there = placed(backbone, path, codes[-1], read, heard.grid)
            if there.image.any():
                here = backbone.layout(path, heard.conditioning, heard.grid)
                layers[path].replaced[adapter] = _carried(values, there, here, at >= 0)

    with listening(pipe, hear) as which:
        # Before gates and steerings, which then hear the picture's own forward last.
        handle = model.register_forward_pre_hook(before_forward, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()
            for layer in layers.values():
                layer.replaced.pop(adapter, None)


def reworded(prompt: str, instead: Mapping[str, str]) -> str:
    """The prompt with its words replaced."""
    for said, own in instead.items():
        prompt = own.join(spelling(said).split(prompt))
    return " ".join(prompt.split())


def _all_say(instead: Mapping[str, str], prompts: list[str]) -> bool:
    return all(any(spelling(said).search(prompt) for said in instead) for prompt in prompts)


def _told(given: Mapping[str, Any], own: Conditioning) -> dict[str, Any]:
    """The arguments of a forward with another prompt's conditioning; a U-Net has some of it one level down."""
    below = given.get("added_cond_kwargs") or {}
    inner = {"added_cond_kwargs": below | {k: v for k, v in own.items() if k in below}} if below else {}
    return {**given, **{k: v for k, v in own.items() if k not in below}, **inner}


def _carried(values: Tensor, there: Layout, here: Layout, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Where codes are replaced, (rows, positions, 1), and by what: the k-th picture token's by the k-th's."""
    mask = here.image & rows.to(here.image.device)[:, None]
    codes = values.new_zeros(*here.image.shape, values.shape[-1])
    codes[here.image] = values[there.image]
    return mask.unsqueeze(-1), codes
