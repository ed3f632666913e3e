"""`atomtune many`."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from atomtune.cli.train import BASE, Planned
from atomtune.training import config
from atomtune.training.options import TrainOptions


@dataclass(frozen=True)
class Command:
    """Train many concepts at once over one base, as a file lists them."""

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """A TOML file: options of `atomtune train` for all, then a [[concepts]] table for each, with its data,
    and maybe out, concept, class_noun, trigger, seed and what it says of captions. Paths are as from where you are."""
    together: int = 8
    """Concepts that share a forward; memory grows with them."""
    resume: bool = False
    """Go on with those that have begun, from their newest whole checkpoints; finished ones are left alone."""

    def run(self) -> None:
        from atomtune.cli import command_line
        from atomtune.training.many import OWN, Job, check, train_many

        shared = [*BASE, *(field.name for field in dataclasses.fields(TrainOptions))]
        concepts = config.read_concepts(self.file, shared, ("data", "out", *OWN))
        plans = [tyro.cli(Planned, args=config.arguments(given), prog="atomtune many") for given in concepts]
        jobs = [Job(plan.data, plan.folder, plan.options) for plan in plans]
        check(jobs, self.together)
        done = train_many(
            plans[0].open(),
            jobs,
            together=self.together,
            resume=self.resume,
            command=command_line(),
            settings=plans[0].settings,
        )
        for run in done:
            print(f"  atomtune atoms {run}", file=sys.stderr)
