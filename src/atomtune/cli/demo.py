"""`atomtune demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """Learn a new subject on the embedded world from four pictures, show its atoms, write a report."""

    out: Path = Path("runs/demo")
    """Folder of the run. The default is made anew; another one must not exist."""
    subject: str = "pineapple"
    """An object that the embedded model has never seen."""
    steps: int = 300
    """Training steps."""
    seed: int = 0
    """Seed of training and of the pictures."""
    prompts: int = 24
    """Unseen prompts to measure on."""

    def run(self) -> None:
        from atomtune.cli import command_line
        from atomtune.demo import demo

        demo(self.out, self.subject, self.steps, self.seed, self.prompts, command_line())
