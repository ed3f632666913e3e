"""`atomtune atoms`."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro


@dataclass(frozen=True)
class Command:
    """Rank the atoms of an adapter."""

    adapter: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ADAPTER")]
    """Folder of a run or a saved adapter."""
    top: int = 20
    """How many to show."""
    formula: str = "effect"
    """effect, focus, mean, mean_when_active, maximum or purity."""
    json: bool = False
    """Print JSON, all numbers of each atom."""
    curve: Path | None = None
    """SVG file for the density curve: how close fewer atoms come to the whole adapter's pictures."""
    look: Path | None = None
    """Folder for a sheet of each atom: where it fires, then the base's picture and the atom at 0, 1, 2 and 4."""
    prompts: tuple[str, ...] = ()
    """What --curve and --look paint; --look takes the first. Empty: the run's concept."""
    steps: int | None = None
    """Steps of their sampler. None: the pipeline's default."""
    base: str | None = None
    """Base pipeline. None: the one that the adapter names."""
    allow_other_base: bool = False
    """Load onto a base that is not the adapter's."""

    def run(self) -> None:
        from atomtune.atoms import FORMULAS
        from atomtune.cli.common import check_top, counted, open_adapter
        from atomtune.errors import UserError

        check_top(self.top)
        if self.curve and self.curve.suffix != ".svg":
            raise UserError(f"`curve` must end in .svg, got {self.curve}.")
        if self.look and self.look.exists() and not self.look.is_dir():
            raise UserError(f"`look` must be a folder, got the file {self.look}.")
        if self.prompts and not (self.curve or self.look):
            raise UserError("`prompts` are what --curve and --look paint. Give one of them.")
        atoms = open_adapter(self.adapter, self.base, self.allow_other_base).atoms.by(self.formula)
        if self.curve or self.look:
            self._paint(atoms)
        if self.json:
            rows = [{"name": a.name, **dataclasses.asdict(a)} for a in atoms.top(self.top)]
            # No entry for a label, note or part that is not there.
            found = [{k: None if v != v else v for k, v in row.items() if v != ""} for row in rows]
            print(json.dumps(found, indent=1))
            return
        total = sum(a.importance for a in atoms) or 1.0
        width = max(10, *(len(a.title) for a in atoms.top(self.top)))
        print(f"{'atom':<{width}} {'importance':>10} {'share':>6} {'density':>7} {'purity':>6}  site")
        for a in atoms.top(self.top):
            purity = "-" if a.purity != a.purity else f"{a.purity:.2f}"
            share = a.importance / total
            row = f"{a.title:<{width}} {a.importance:>10.4f} {share:>6.1%} {a.density:>7.2f} {purity:>6}  {a.path}"
            print(f"{row}  {a.note}".rstrip())
        dead = sum(a.dead for a in atoms)
        print(f"{counted(len(atoms), 'atom')}, {dead} dead; importance: {FORMULAS[self.formula]}", file=sys.stderr)

    def _paint(self, atoms: Any) -> None:
        """Write what --curve and --look ask for, and say where."""
        from atomtune.adapter import concept_of
        from atomtune.cli.common import counted
        from atomtune.errors import UserError
        from atomtune.explore import sheets

        concept = concept_of(self.adapter)
        prompts = self.prompts or ((f"a {concept}",) if concept else ())
        if not prompts:
            raise UserError(f"`prompts` must say what to paint: {self.adapter} names no concept.")
        call: dict[str, Any] = {} if self.steps is None else {"num_inference_steps": self.steps}
        if self.curve:
            sheets.curve(atoms, prompts, self.curve, **call)
            print(self.curve, file=sys.stderr)
        if self.look:
            shown = atoms.top(self.top)
            sheets.look(atoms, shown, prompts[0], self.look, **call)
            print(f"{counted(len(shown), 'sheet')} in {self.look}", file=sys.stderr)
