"""`atomtune prune`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Command:
    """Keep the most important atoms for good, in a new folder."""

    adapter: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ADAPTER")]
    """Folder of a run or a saved adapter."""
    out: Path
    """Folder for the pruned adapter."""
    keep: float | None = None
    """Share of the atoms to keep, above 0 and at most 1."""
    count: int | None = None
    """Number of atoms to keep, instead of --keep."""
    formula: str = "effect"
    """effect, focus, mean, mean_when_active, maximum or purity."""
    refit: int | None = None
    """Steps, such as 40, in which what is left learns to do what all atoms did; needs --data."""
    data: Path | None = None
    """What the run learned from, for --refit."""
    base: str | None = None
    """Base pipeline. None: the one that the adapter names."""
    allow_other_base: bool = False
    """Load onto a base that is not the adapter's."""
    dtype: str | None = None
    """Precision of the base: float32, bfloat16 or float16. None: as the run had it, quantized too, or float32."""
    device: str | None = None
    """Where to run, such as cuda. None: cuda where there is one, else cpu."""

    def run(self) -> None:
        from atomtune.cli.common import open_adapter
        from atomtune.errors import UserError

        amount = self.count if self.count is not None else self.keep
        if amount is None or (self.keep is not None and self.count is not None):
            raise UserError("`keep` or `count` must be given, one of them.")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise UserError(f"`keep` must be a share above 0 and at most 1, got {self.keep:g}. --count is a number.")
        if self.out.exists():
            raise UserError(f"`out` must not exist yet: {self.out}. Choose another folder.")
        if (self.refit is None) != (self.data is None):
            raise UserError("`refit` and `data` must be given together: steps, and what the run learned from.")
        adapter = open_adapter(self.adapter, self.base, self.allow_other_base, self.device, self.dtype)
        before = len(adapter.atoms)
        if self.count is not None and not 1 <= self.count <= before:
            raise UserError(f"`count` must be between 1 and the {before} atoms there are, got {self.count}.")
        if self.refit is None or self.data is None:
            adapter.prune(amount, self.formula)
        else:
            from atomtune.training.refit import refit

            adapter.remove()
            adapter = refit(
                adapter.pipe,
                self.adapter,
                amount,
                self.data,
                steps=self.refit,
                formula=self.formula,
                allow_other_base=self.allow_other_base,
            )
        adapter.save(self.out)
        print(self.out)
        print(f"kept {len(adapter.atoms)} of {before} atoms", file=sys.stderr)
