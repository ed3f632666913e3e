"""What people write of atoms: labels, by which they are found, and notes, in a file beside the adapter's."""

import json
import re
from pathlib import Path
from typing import Any

from torch import nn

from atomtune.errors import UserError
from atomtune.files import write_whole

from .model import adapter_config, atom_layers, unwrap

NOTES = "notes.json"
LONGEST = 60
"""Characters of a label."""
_LABEL = re.compile(rf"[^\W_][^\[\]=/,\n]{{0,{LONGEST - 1}}}")

Notes = dict[str, dict[str, str]]
"""By an atom's name (`L17[137]`), its `label` and its `note`, either of which may be missing."""


def notes(model: Any, adapter: str = "default") -> Notes:
    """The labels and notes of an attached adapter's atoms; a change of them is saved with it."""
    found: Notes = vars(adapter_config(model, adapter)).setdefault("notes", {})
    return found


def check_notes(values: Notes, where: str) -> None:
    """Raise UserError on what is no table of labels and notes, on a label that can't be one, or on one used twice."""
    entries = values.items() if isinstance(values, dict) else [("", None)]
    seen: dict[str, str] = {}
    for atom, entry in entries:
        if not isinstance(entry, dict) or not all(
            isinstance(v, str) and k in ("label", "note") for k, v in entry.items()
        ):
            raise UserError(
                f"{where} must give each atom a `label`, a `note` or both, as text, got {entry!r} at {atom!r}."
            )
        label = entry.get("label")
        if label is None:
            continue
        if not _LABEL.fullmatch(label) or re.fullmatch(r"L\d+", label):
            raise UserError(
                f"{where}: a label is 1 to {LONGEST} characters without [ ] = / , and begins with a letter or digit, "
                f"got {label!r} for {atom}."
            )
        if label in seen:
            raise UserError(
                f"{where}: the label {label!r} is used twice, for {seen[label]} and {atom}. Choose another."
            )
        seen[label] = atom


def save_notes(model: Any, folder: str | Path, adapter: str = "default") -> Path:
    """Write the notes alone into the folder that the adapter was loaded from; nothing else there changes."""
    return write_whole(Path(folder) / NOTES, notes_text(unwrap(model), adapter) or "{}\n")


def notes_text(base: nn.Module, adapter: str) -> str:
    """The notes of the atoms that are left; empty where there are none."""
    sites, noted = adapter_config(base, adapter).sites or [], notes(base, adapter)
    present = (
        f"L{sites.index(site)}[{number}]"
        for site, layer in atom_layers(base, adapter).items()
        for number in layer.dictionary(adapter).atom_ids.tolist()
    )
    found = {atom: noted[atom] for atom in present if noted.get(atom)}
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n" if found else ""


def read_notes(folder: Path) -> Notes:
    """The notes in a folder. Raises UserError on a file that is none."""
    path = folder / NOTES
    if not path.exists():
        return {}
    try:
        found: Notes = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} can't be read: {error}.") from error
    check_notes(found, str(path))
    return found
