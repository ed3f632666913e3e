"""Everything that an edit can be told."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields
from typing import Any

from atomtune.errors import UserError
from atomtune.training.options import TrainOptions

TUNING = TrainOptions(gate=False, unrelated_batch=0, unrelated_pictures=1)
"""How an edit trains where nothing is said: on the picture alone, since what goes beside its subject is cut later."""


@dataclass(frozen=True)
class Point:
    """One setting of the dials."""

    purity: float = 0.0
    """Atoms with at least this share of their energy on the subject take part."""
    beside: float = 0.0
    """They fire above this share of what they reached beside the subject."""
    keep: float = 1.0
    """Of all atoms, the share that takes part, the most important first."""
    strength: float = 1.0

    @property
    def dials(self) -> dict[str, Any]:
        """As `Adapter.using` takes them."""
        return {"density" if name == "keep" else name: value for name, value in vars(self).items()}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in vars(self).items())


SWEPT = tuple(field.name for field in fields(Point))
"""Options of a sweep that are dials."""


@dataclass(frozen=True)
class EditOptions:
    """What is swept, and how pictures are painted; one value each is one setting."""

    purity: tuple[float, ...] = (0.0, 0.4)
    """Atoms take part that have at least this share of their energy on the subject."""
    beside: tuple[float, ...] = (0.0, 0.5)
    """They fire only above this share of what they reached beside the subject in the picture."""
    keep: tuple[float, ...] = (1.0,)
    """Shares of the atoms that take part, the most important first."""
    strength: tuple[float, ...] = (1.0, 0.8)
    """Multipliers on the whole adapter."""
    variants: int = 1
    """Pictures to tune on: the picture, and as many less one of it shifted and scaled a little, which blurs it."""
    mirror: bool = False
    """Mirror every second variant; not where words say left or right."""
    quick: bool = False
    """Tune for 50 steps, at few times (after FastEdit), unless `steps` and `times` say other ones."""
    looks: int = 10
    """Stop when the loss has hardly fallen over so many looks, one every 20 steps; 3 stops at about 200. 0: never."""
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
        for name in SWEPT:
            if not getattr(self, name):
                raise UserError(f"`{name}` must have at least one value, got none.")
        for name in ("purity", "beside", "keep"):
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
        if self.sampler is not None and self.sampler < 1:
            raise UserError(f"`sampler` must be at least 1 step, got {self.sampler}.")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UserError(f"`guidance` must be a finite number, got {self.guidance}.")
        if not 0 <= self.noise < 2**62:
            raise UserError(f"`noise` must be a seed of 0 or more, got {self.noise}.")

    def points(self) -> list[Point]:
        """Every combination."""
        return [Point(*values) for values in itertools.product(*(getattr(self, name) for name in SWEPT))]
