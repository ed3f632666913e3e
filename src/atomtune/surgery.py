"""Acts on single atoms: keep, drop, name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from atomtune.adapter import Adapter
from atomtune.atoms import find_each
from atomtune.tuner.notes import Notes, check_notes, notes


def keep(adapter: Adapter, names: Iterable[str]) -> int:
    """Keep only the atoms of these names or labels, for good; returns how many. Raises UserError on unknown ones."""
    atoms = adapter.atoms
    chosen = {atoms[name] for name in names}
    return adapter.keep([a for a in atoms if a in chosen])


def drop(adapter: Adapter, names: Iterable[str]) -> int:
    """Remove the atoms of these names or labels, for good; returns how many are left."""
    atoms = adapter.atoms
    gone = {atoms[name] for name in names}
    return adapter.keep([a for a in atoms if a not in gone])


def name(adapter: Adapter, labels: Mapping[str, str], texts: Mapping[str, str] | None = None) -> None:
    """Give atoms labels, by which they are then found, and notes; an empty one is taken away.

    Raises UserError, and changes nothing, on unknown atoms and on labels that are taken or can't be one.
    """
    atoms = adapter.atoms
    # Of the atoms that are left: the label of a dropped one is free.
    fresh: Notes = {a.name: {"label": a.label, "note": a.note} for a in atoms}
    for field, values in (("label", labels), ("note", texts or {})):
        for atom, text in find_each(atoms.ranked, values).items():
            fresh[atom.name][field] = text.strip()
    fresh = {atom: {k: v for k, v in entry.items() if v} for atom, entry in fresh.items() if any(entry.values())}
    check_notes(fresh, "`name`")
    there = notes(adapter.pipe, adapter.name)
    there.clear()
    there.update(fresh)
