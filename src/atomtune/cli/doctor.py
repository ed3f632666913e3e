"""`atomtune doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from atomtune.cli.train import Planned, expand

__all__ = ["Command", "expand"]


@dataclass(frozen=True)
class Command(Planned):
    """Say what a run would meet and cost: pictures, captions, sites, memory, time; exit code 1 where it would stop."""

    sheet: Path | None = None
    """Picture file for a contact sheet of what the model sees."""
    measure: int | None = None
    """Time this many steps of full size, and the painting of a picture; nothing of them is kept. None: none."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        self.examine(self.json, sheet=self.sheet, measure=self.measure)
