"""`atomtune mix`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Command:
    """Put adapters side by side, to be used like one; or list which of their atoms conflict."""

    adapter: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="NAME=ADAPTER ...")]
    """Two or more folders of runs or saved adapters, each with a name for its part, such as style=FOLDER."""
    out: Path | None = None
    """Folder for the mixture. None: list the conflicts, and write nothing."""
    top: int = 20
    """How many conflicts to show."""
    weight: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="style=0.7")] = ()
    """Weight of a part, otherwise 1; may be given several times."""
    one_file: bool = False
    """Merge the parts into one plain adapter; each atom keeps its part's gate. Not where atoms compete (topk, ista)."""
    drop_weaker: bool = False
    """Of two atoms that conflict, drop the less important one."""
    limits: tuple[float, float] = (0.3, 0.3)
    """Correlation of codes, and cosine of atoms in either direction, from which two atoms conflict."""
    prompt: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="PROMPT")] = ()
    """What to paint to find conflicts, best with all concepts in it. None: the concepts that the runs were taught."""
    base: str | None = None
    """Base pipeline. None: the one that the first adapter names."""
    allow_other_base: bool = False
    """Load onto a base that is not the adapters'."""
    dtype: str | None = None
    """Precision of the base: float32, bfloat16 or float16. None: as the first run had it, quantized too, or float32."""

    def run(self) -> None:
        from atomtune import mix, surgery
        from atomtune.cli.common import check_top, counted, open_base_of, pairs, unshown
        from atomtune.errors import UserError
        from atomtune.tuner.mixture import check_parts

        folders, weights = pairs("adapter", self.adapter, "NAME=ADAPTER"), pairs("weight", self.weight, "style=0.7")
        check_top(self.top)
        for name, given in {"one_file": self.one_file, "drop_weaker": self.drop_weaker}.items():
            if given and self.out is None:
                raise UserError(f"`{name}` needs `out`, a folder: without it conflicts are only listed.")
        check_parts(folders, weights)
        if self.out and self.out.exists():
            raise UserError(f"`out` must not exist yet: {self.out}. Choose another folder.")
        pipe = open_base_of(Path(next(iter(folders.values()))), self.base, dtype=self.dtype)
        mixture = mix.mix(pipe, folders, weights, allow_other_base=self.allow_other_base)
        if self.out is None or self.drop_weaker:
            together, along = self.limits
            asked = self.prompt or mix.concepts(folders)
            found = mix.conflicts(mixture, asked, together=together, along=along)
            if found:
                width = max(20, *(len(a.title) for c in found[: self.top] for a in (c.first, c.second)))
                print(f"{'atom':<{width}} {'weaker':<{width}} {'correlation':>11} {'cosine':>6}  site")
            for c in found[: self.top]:
                names = f"{c.first.title:<{width}} {c.second.title:<{width}}"
                print(f"{names} {c.together:>11.2f} {c.cosine:>6.2f}  {c.first.path}")
            more = unshown(len(found), self.top, ",")
            print(f"{counted(len(found), 'conflict')} of {len(mixture.atoms)} atoms{more}", file=sys.stderr)
        if self.drop_weaker:
            surgery.drop(mixture, mix.weaker(found))
        if self.out:
            print((mix.merge(mixture) if self.one_file else mixture).save(self.out))
