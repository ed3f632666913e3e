"""What one micro-batch holds: a function of the seed and its number, the same for every method that trains on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from atomtune.backbones import Backbone, Conditioning, join, select
from atomtune.data.order import batch_at
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
    rows = torch.tensor(batch_at(micro, len(material.latents), options.batch_size, options.seed))
    latents, conditioning = material.latents[rows], select(material.conditioning, rows)
    if options.unrelated_rows:
        picks = torch.randint(len(material.unrelated_latents), (options.unrelated_rows,), generator=generator)
        latents = torch.cat([latents, material.unrelated_latents[picks]])
        conditioning = join(conditioning, select(material.unrelated_conditioning, picks))
    s = objective.times(backbone, len(latents), generator).to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    x, target = backbone.noised(latents, s, noise)
    return Batch(rows, x, s, target, conditioning)


def generator_of(options: TrainOptions, micro: int) -> torch.Generator:
    """The source of a micro-batch's random draws."""
    return torch.Generator().manual_seed((options.seed << 32) + micro)
