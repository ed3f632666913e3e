"""`atomtune diff`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Command:
    """Say what became of the atoms of one adapter in another."""

    adapter: Annotated[tyro.conf.Positional[tuple[Path, Path]], tyro.conf.arg(metavar="A B")]
    """Folders of two runs or saved adapters of one base."""
    alike: float = 0.5
    """Of adapters that were trained apart, atoms are the same ones down to this likeness."""
    top: int = 20
    """How many atoms that differ to show."""
    json: bool = False
    """Print JSON, all atoms."""

    def run(self) -> None:
        from atomtune.atoms import diff

        found = diff(*self.adapter, alike=self.alike)
        if self.json:
            print(json.dumps(dataclasses.asdict(found), indent=1))
            return
        kinds = Counter(m.kind for m in found.matches)
        for kind in ("shared", "changed", "only A", "only B"):
            print(f"{kind:<8} {kinds[kind]:>6}")
        print(f"{'gate':<8} {found.gate:>6}")
        for name, (a, b) in found.settings.items():
            print(f"{name:<8} {a} -> {b}")
        print(f"\n{'A':<16} {'B':<16} {'likeness':>8}  site")
        different = [m for m in found.matches if m.kind != "shared"]
        different.sort(key=lambda m: m.likeness or 0.0, reverse=found.by == "likeness")
        for m in different[: self.top]:
            likeness = "-" if m.likeness is None else f"{m.likeness:.3f}"
            print(f"{m.a or '-':<16} {m.b or '-':<16} {likeness:>8}  {m.path}")
        print(f"atoms matched by {found.by}; likeness: cosine of encoder x cosine of atom", file=sys.stderr)
