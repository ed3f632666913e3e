"""`atomtune atoms`."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Command:
    """Rank the atoms of an adapter."""

    adapter: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ADAPTER")]
    """Folder of a run or a saved adapter."""
    top: int = 20
    """How many to show."""
    formula: str = "mean"
    """mean, mean_when_active, maximum or purity."""
    json: bool = False
    """Print JSON, all numbers of each atom."""
    base: str | None = None
    """Base pipeline. None: the one that the adapter names."""
    allow_other_base: bool = False
    """Load onto a base that is not the adapter's."""

    def run(self) -> None:
        from atomtune.atoms import FORMULAS
        from atomtune.cli.common import open_adapter
        from atomtune.errors import UserError

        if self.top < 1:
            raise UserError(f"`top` must be at least 1, got {self.top}.")
        atoms = open_adapter(self.adapter, self.base, self.allow_other_base).atoms.by(self.formula)
        if self.json:
            rows = [{"name": a.name, **dataclasses.asdict(a)} for a in atoms.top(self.top)]
            print(json.dumps([{k: None if v != v else v for k, v in row.items()} for row in rows], indent=1))
            return
        total = sum(a.importance for a in atoms) or 1.0
        print(f"{'atom':<10} {'importance':>10} {'share':>6} {'density':>7} {'purity':>6}  site")
        for a in atoms.top(self.top):
            purity = "-" if a.purity != a.purity else f"{a.purity:.2f}"
            share = a.importance / total
            print(f"{a.name:<10} {a.importance:>10.4f} {share:>6.1%} {a.density:>7.2f} {purity:>6}  {a.path}")
        dead = sum(a.dead for a in atoms)
        print(f"{len(atoms)} atoms, {dead} dead; importance: {FORMULAS[self.formula]}", file=sys.stderr)
