"""What one micro-batch holds: a function of the seed and its number, the same for every method that trains on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from atomtune.backbones import Backbone, Conditioning, join, select
from atomtune.data.order import visits_at
from atomtune.training import objective
from atomtune.training.options import TrainOptions
from atomtune.training.prepare import Material


@dataclass(frozen=True)
class Batch:
    """Noised pictures, the concept's first, the unrelated ones after them."""

    rows: Tensor
    """Which of the concept's pictures, as indices into the material."""
    x: Tensor
    """Latents at time s."""
    s: Float[Tensor, " batch"]
    target: Tensor
    """What the model should predict of `x`."""
    conditioning: Conditioning
    picks: Tensor
    """Which of the unrelated pictures, as indices into the material."""
    masks: Float[Tensor, "concept tokens"]
    """Share of each of the concept's picture tokens on the subject."""
    weight: Tensor | None
    """What each value of the concept's velocity weighs in the task, with one channel. None: all the same."""

    @property
    def concept(self) -> slice:
        """The concept's rows."""
        return slice(0, len(self.rows))

    @property
    def others(self) -> slice:
        """The unrelated rows."""
        return slice(len(self.rows), None)

    def conditioning_of(self, rows: slice) -> Conditioning:
        """The conditioning of some rows."""
        return select(self.conditioning, torch.arange(len(self.x))[rows])


def draw(
    material: Material, backbone: Backbone, options: TrainOptions, micro: int, generator: torch.Generator
) -> Batch:
    """Micro-batch number `micro`; unrelated pictures, times and noise come from the generator."""
    visits = visits_at(micro, len(material.items), options.batch_size, options.seed, [i.bucket for i in material.items])
    items = [material.items[number] for number, _ in visits]
    bucket = material.buckets[items[0].bucket]
    at = torch.tensor([item.place for item in items])
    view = torch.tensor(
        [(epoch + item.turn) % len(bucket.latents) for item, (_, epoch) in zip(items, visits, strict=True)]
    )
    rows = torch.tensor(bucket.rows)[at]
    latents, conditioning = bucket.latents[view, at], select(material.conditioning, rows)
    picks = torch.empty(0, dtype=torch.long)
    if options.unrelated_rows:
        picks = torch.randint(len(bucket.unrelated_latents), (options.unrelated_rows,), generator=generator)
        latents = torch.cat([latents, bucket.unrelated_latents[picks]])
        conditioning = join(conditioning, select(material.unrelated_conditioning, picks))
    drawn = objective.among(options.times) if options.times else partial(objective.times, backbone)
    s = drawn(len(latents), generator).to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    x, target = backbone.noised(latents, s, noise)
    if options.caption_dropout:
        dropped = torch.rand(len(rows), generator=generator) < options.caption_dropout
        conditioning = _without_words(conditioning, dropped.nonzero().flatten(), material.wordless)
    weight = None if bucket.weights is None else bucket.weights[view, at]
    return Batch(rows, x, s, target, conditioning, picks, bucket.masks[view, at], weight)


def _without_words(conditioning: Conditioning, rows: Tensor, wordless: Conditioning) -> Conditioning:
    """The conditioning with that of no words in some rows."""
    size = len(next(iter(conditioning.values())))
    chosen = torch.arange(size)
    chosen[rows] = size
    return select(join(conditioning, wordless), chosen)


def generator_of(options: TrainOptions, micro: int) -> torch.Generator:
    """The source of a micro-batch's random draws."""
    return torch.Generator().manual_seed(stream(options.seed, micro))


def lots_of(options: TrainOptions, step: int) -> torch.Generator:
    """The source of a step's own draws, which have nothing to do with those of its micro-batches."""
    return torch.Generator().manual_seed(stream(options.seed, (1 << 31) + step))


def stream(seed: int, number: int) -> int:
    """A seed for one of a run's streams of draws: torch's generator on a CPU reads 32 bits of it, and no more."""
    return (seed * 0x9E3779B1 + number) % (1 << 32)
