"""How good an adapter is, by two numbers that a later step can be compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from atomtune.backbones import Backbone, Conditioning, select
from atomtune.errors import UserError
from atomtune.training import objective
from atomtune.training.prepare import Material
from atomtune.tuner import base_only

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
ROWS = 8
"""At most this many unrelated pictures, and pictures in a forward."""


def split(material: Material, number: int, seed: int) -> tuple[Material, Material]:
    """What is learned from, and what is validated on: `number` pictures drawn by the seed, or with 0 all of them."""
    if not number:
        return material, material
    total = len(material.latents)
    check(total, number)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    kept, held = order[number:].sort().values, order[:number].sort().values
    return _rows(material, kept), _rows(material, held)


def check(total: int, number: int) -> None:
    """Raises UserError where of `total` pictures none would be left to learn from."""
    if number >= max(total, 1):
        raise UserError(f"`held_out` must leave pictures to learn from: it is {number}, and there are {total}.")


def _rows(material: Material, rows: Tensor) -> Material:
    """Material of some pictures alone, numbered anew."""
    number = {row: new for new, row in enumerate(rows.tolist())}
    kept = [dataclasses.replace(b, rows=tuple(number.get(row, -1) for row in b.rows)) for b in material.buckets]
    return dataclasses.replace(
        material,
        captions=tuple(material.captions[i] for i in rows.tolist()),
        latents=material.latents[rows],
        conditioning=select(material.conditioning, rows),
        masks=material.masks[rows],
        weights=None if material.weights is None else material.weights[rows],
        buckets=tuple(kept),
        items=tuple(item for item in material.items if kept[item.bucket].rows[item.place] >= 0),
    )


@torch.no_grad()
def validate(base: nn.Module, backbone: Backbone, material: Material, seed: int) -> dict[str, float]:
    """Loss on pictures, drift on unrelated ones, and their sum, which ranks checkpoints; lower is better.

    Both are mean squared errors of predictions, at the same times and noise whenever it is asked: against what is true,
    and against the base's own.
    """
    loss = drift = 0.0
    for at, x, s, target, conditioning in _noised(backbone, material.latents, material.conditioning, seed):
        predicted = backbone.predict(base, x, s, conditioning)
        weight = None if material.weights is None else material.weights[at]
        loss += objective.error(predicted, target, weight).item() * len(x) / len(material.latents) / len(TIMES)
    rows = _far(material)
    unrelated, given = material.unrelated_latents[rows], select(material.unrelated_conditioning, rows)
    for _, x, s, _, conditioning in _noised(backbone, unrelated, given, seed + 1):
        adapted = backbone.predict(base, x, s, conditioning)
        with base_only(base):
            plain = backbone.predict(base, x, s, conditioning)
        drift += objective.error(adapted, plain).item() * len(x) / len(unrelated) / len(TIMES)
    return {"validation_loss": loss, "validation_drift": drift, "validation_score": loss + drift}


def _far(material: Material) -> Tensor:
    """Which unrelated pictures drift is measured on: some that lie evenly, none of the concept's class if there are."""
    every = material.far
    return every[torch.linspace(0, len(every) - 1, min(ROWS, len(every))).long()]


def _noised(
    backbone: Backbone, latents: Tensor, conditioning: Conditioning, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Conditioning]]:
    """(rows, x, s, target, conditioning) of a few pictures at a time."""
    generator = torch.Generator().manual_seed(seed)
    for time in TIMES:
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        x, target = backbone.noised(latents, torch.full((len(latents),), time, device=latents.device), noise)
        for at in torch.arange(len(latents)).split(ROWS):
            s = torch.full((len(at),), time, device=latents.device)
            yield at, x[at], s, target[at], select(conditioning, at)
