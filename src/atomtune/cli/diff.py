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
        from atomtune.cli.common import check_top, unshown

        check_top(self.top)
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
        different = [m for m in found.matches if m.kind != "shared"]
        if not different:
            return
        different.sort(key=lambda m: -(m.importance or 0.0))
        print(f"\n{'A':<16} {'B':<16} {'importance':>10} {'likeness':>8}  site")
        for m in different[: self.top]:
            importance = "-" if m.importance is None else f"{m.importance:.4f}"
            likeness = f"{m.likeness:.3f}" if m.a and m.b else "-"
            print(f"{m.a or '-':<16} {m.b or '-':<16} {importance:>10} {likeness:>8}  {m.path}")
        more = unshown(len(different), self.top, ";")
        print(f"atoms matched by {found.by}; likeness: cosine of encoder x cosine of atom{more}", file=sys.stderr)
