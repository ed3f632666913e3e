"""Everything that an edit can be told."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from atomtune.errors import UserError
from atomtune.training.options import TrainOptions

TUNING = TrainOptions(gate=False, unrelated_batch=0, unrelated_pictures=1)
"""How an edit trains where nothing is said: on the picture alone, since what goes beside its subject is cut later."""


@dataclass(frozen=True)
class Point:
    """One setting of the dials."""

    purity: float = 0.0
    """Atoms with at least this share of their energy on the subject take part."""
    keep: float = 1.0
    """Of all atoms, the share that takes part, the most important first."""
    strength: float = 1.0

    def __str__(self) -> str:
        return f"purity {self.purity:g}, keep {self.keep:g}, strength {self.strength:g}"


@dataclass(frozen=True)
class EditOptions:
    """What is swept, and how pictures are painted; one value each is one setting."""

    purity: tuple[float, ...] = (0.0, 0.5)
    """Atoms take part that have at least this share of their energy on the subject."""
    keep: tuple[float, ...] = (1.0, 0.5)
    """Shares of the atoms that take part, the most important first."""
    strength: tuple[float, ...] = (1.0, 0.8)
    """Multipliers on the whole adapter."""
    variants: int = 8
    """Pictures to tune on: the picture, and as many less one of it shifted and scaled a little."""
    mirror: bool = False
    """Mirror every second variant; not where words say left or right."""
    quick: bool = False
    """Tune for 50 steps, at few times (after FastEdit)."""
    looks: int = 3
    """Stop when the loss has hardly fallen over so many looks, one every 20 steps. 0: never before the last step."""
    time: tuple[float, float] | None = None
    """From and to of the times at which the adapter takes part; 1 is noise, 0 the picture. None: all."""
    blend: float = 1.0
    """Share of the tuned model's prediction; the rest is the base's for the same words (after SINE)."""
    sampler: int | None = None
    """Steps of the sampler. None: the pipeline's default."""
    guidance: float | None = None
    """Guidance scale. None: the pipeline's default."""
    noise: int = 0
    """Seed of the first edit's noise; the next prompt takes the next."""

    def __post_init__(self) -> None:
        for name in ("purity", "keep", "strength"):
            if not getattr(self, name):
                raise UserError(f"`{name}` must have at least one value, got none.")
        for name in ("purity", "keep"):
            for value in getattr(self, name):
                if not 0 <= value <= 1:
                    raise UserError(f"`{name}` must be between 0 and 1, got {value}.")
        if not all(map(math.isfinite, self.strength)):
            raise UserError(f"`strength` must be finite numbers, got {self.strength}.")
        if self.variants < 1:
            raise UserError(f"`variants` must be at least 1, got {self.variants}.")
        if self.looks < 0:
            raise UserError(f"`looks` must be 0 or more, got {self.looks}.")
        if not 0 <= self.blend <= 1:
            raise UserError(f"`blend` must be between 0 and 1, got {self.blend}.")

    def points(self) -> list[Point]:
        """Every combination."""
        return [Point(*values) for values in itertools.product(self.purity, self.keep, self.strength)]
