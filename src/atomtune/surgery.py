"""Acts on single atoms: keep, drop, name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from atomtune.adapter import Adapter
from atomtune.atoms import find_each
from atomtune.errors import UserError
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
    entries = {a: {"label": a.label, "note": a.note} for a in atoms}
    for field, values in (("label", labels), ("note", texts or {})):
        for atom, text in find_each(atoms.ranked, values).items():
            entries[atom][field] = text.strip()
    fresh: dict[str, Notes] = {a.part or adapter.name: {} for a in atoms}  # a mixture's lie with its parts
    for a, entry in entries.items():
        if any(entry.values()):
            fresh[a.part or adapter.name][replace(a, part="").name] = {k: v for k, v in entry.items() if v}
    for found in fresh.values():
        check_notes(found, "`name`")
    for a, entry in entries.items():
        if entry["label"] and any(b.is_at(entry["label"]) for b in atoms):
            raise UserError(f"`name`: a label must not be a site's name, got {entry['label']!r} for {a.name}.")
    for part, found in fresh.items():
        there = notes(adapter.pipe, part)
        there.clear()
        there.update(found)
