"""The strip of an edit: the source, then one column a point of the sweep, each with its label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from atomtune.editing.options import Point
from atomtune.editing.sweep import Edit, Edits, best
from atomtune.explore.sheets import png
from atomtune.files import write_whole

SIDE = 160
"""Least width of a column, in pixels."""
LINE = 14
"""Height of a line of a label, in pixels."""


def marked(found: Sequence[Edit]) -> Point | None:
    """The best point; None where all of them measure the same."""
    measured = {(e.prompt, e.seed): (e.likeness, e.alignment) for e in found}
    same = all(measured[e.prompt, e.seed] == (e.likeness, e.alignment) for e in found)
    return None if same else best(found)


def strip(source: Image.Image, found: Sequence[Edit], chosen: Point | None) -> Image.Image:
    """The edits of one prompt, labelled, the chosen point, if any, marked."""
    labels = [["source"]]
    for e in found:
        marks = ["* best"] if e.point == chosen else []
        dials = str(e.point).split(", ")
        labels.append([*dials, f"likeness {e.likeness:.3f}", f"alignment {e.alignment:+.3f}", *marks])
    scale = max(1, -(-SIDE // source.width))
    width, height = source.width * scale, source.height * scale
    sheet = Image.new("RGB", (len(labels) * (width + 4), height + LINE * 8 + 4), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(LINE - 3)
    draw.text((2, 1), found[0].prompt, fill="black", font=font)
    for column, (picture, lines) in enumerate(zip([source, *(e.picture for e in found)], labels, strict=True)):
        left = column * (width + 4)
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, LINE + 2))
        for row, line in enumerate(lines):
            draw.text((left + 2, height + LINE * (row + 1) + 2), line, fill="black", font=font)
    return sheet


def save_edits(edits: Edits, folder: Path) -> list[Path]:
    """Write strips/NN.png, a strip for each prompt, and pictures/NN-PP.png, each edit; returns the strips."""
    chosen, strips = marked(edits.found), []
    for number, seed in enumerate(dict.fromkeys(e.seed for e in edits.found)):
        own = [e for e in edits.found if e.seed == seed]
        for place, e in enumerate(own):
            write_whole(folder / "pictures" / f"{number:02d}-{place:02d}.png", png(e.picture))
        strips.append(write_whole(folder / "strips" / f"{number:02d}.png", png(strip(edits.source, own, chosen))))
    return strips
