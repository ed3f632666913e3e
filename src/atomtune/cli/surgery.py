"""`atomtune surgery`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Command:
    """Keep or drop single atoms for good, label them, and write notes beside them."""

    adapter: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ADAPTER")]
    """Folder of a run or a saved adapter."""
    name: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="L17[137]=leaves")] = ()
    """A label, by which the atom is found from then on; empty takes it away. May be given several times."""
    note: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="leaves=TEXT")] = ()
    """A note beside an atom."""
    keep: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="L17[137]")] = ()
    """An atom to keep; those that are not named go."""
    drop: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="L17[137]")] = ()
    """An atom to remove."""
    out: Path | None = None
    """Folder for the result. None: labels and notes are written where the adapter is."""
    base: str | None = None
    """Base pipeline. None: the one that the adapter names."""
    allow_other_base: bool = False
    """Load onto a base that is not the adapter's."""

    def run(self) -> None:
        from atomtune import surgery
        from atomtune.cli.common import open_adapter, pairs
        from atomtune.errors import UserError
        from atomtune.tuner.mixture import is_mixture, saved_parts
        from atomtune.tuner.notes import save_notes

        if not (self.name or self.note or self.keep or self.drop):
            raise UserError("`name`, `note`, `keep` or `drop` must be given: nothing else is done here.")
        if self.out is None and (self.keep or self.drop):
            raise UserError("`out` must be given with --keep and --drop, which write a new adapter. Add --out FOLDER.")
        if self.out is not None and self.out.exists():
            raise UserError(f"`out` must be a folder that does not exist yet, got {self.out}. Choose another.")
        adapter = open_adapter(self.adapter, self.base, self.allow_other_base)
        if self.name or self.note:
            surgery.name(adapter, pairs("name", self.name), pairs("note", self.note))
        for act, names in ((surgery.keep, self.keep), (surgery.drop, self.drop)):
            if names:
                act(adapter, names)
        if self.out:
            print(adapter.save(self.out))
            return
        folders = saved_parts(self.adapter)[0] if is_mixture(self.adapter) else {adapter.name: self.adapter}
        for name, folder in folders.items():
            print(save_notes(adapter.pipe, folder, name))
