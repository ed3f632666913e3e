"""The strip of an edit: the source, then one column a point of the sweep, each with its label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from atomtune.editing.options import Point
from atomtune.editing.sweep import Edit, Edits, best
from atomtune.explore.sheets import labelled, png
from atomtune.files import write_whole


def marked(found: Sequence[Edit]) -> Point | None:
    """The best point; None where all of them measure the same."""
    measured = {(e.prompt, e.seed): (e.likeness, e.alignment) for e in found}
    same = all(measured[e.prompt, e.seed] == (e.likeness, e.alignment) for e in found)
    return None if same else best(found)


def strip(source: Image.Image, found: Sequence[Edit], chosen: Point | None) -> Image.Image:
    """The edits of one prompt, labelled, the chosen point, if any, marked."""
    columns: list[tuple[Image.Image, list[str]]] = [(source, ["source"])]
    for e in found:
        marks = ["* best"] if e.point == chosen else []
        dials = str(e.point).split(", ")
        columns.append((e.picture, [*dials, f"likeness {e.likeness:.3f}", f"alignment {e.alignment:+.3f}", *marks]))
    return labelled(found[0].prompt, columns)


def save_edits(edits: Edits, folder: Path) -> list[Path]:
    """Write strips/NN.png, a strip for each prompt, and pictures/NN-PP.png, each edit; returns the strips."""
    chosen, strips = marked(edits.found), []
    for number, seed in enumerate(dict.fromkeys(e.seed for e in edits.found)):
        own = [e for e in edits.found if e.seed == seed]
        for place, e in enumerate(own):
            write_whole(folder / "pictures" / f"{number:02d}-{place:02d}.png", png(e.picture))
        strips.append(write_whole(folder / "strips" / f"{number:02d}.png", png(strip(edits.source, own, chosen))))
    return strips
