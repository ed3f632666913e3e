"""Sheets of atoms and the density curve, as files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from atomtune.adapter import Atoms
from atomtune.atoms import Atom
from atomtune.backbones import backbone_of
from atomtune.data.picture import to_tensor
from atomtune.explore.overlay import overlay, scale_of
from atomtune.files import write_whole
from atomtune.measure.maps import code_maps
from atomtune.measure.painting import curve_svg, density_curve, strips

SIDE = 160
"""Least width of a picture, in pixels."""
LINE = 14
"""Height of a line of text, in pixels."""
STRENGTHS = (0.0, 1.0, 2.0, 4.0)
"""Of an atom, on its sheet."""


def png(picture: Image.Image) -> bytes:
    """A picture as the content of a PNG file."""
    picture.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def labelled(title: str, columns: Sequence[tuple[Image.Image, Sequence[str]]]) -> Image.Image:
    """Pictures of one size beside each other, no narrower than `SIDE`, with lines of text below each."""
    size = columns[0][0].size
    scale = max(1, -(-SIDE // size[0]))
    width, height = size[0] * scale, size[1] * scale
    lines = max(len(label) for _, label in columns)
    sheet = Image.new("RGB", (len(columns) * (width + 4), height + LINE * (lines + 1) + 4), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(LINE - 3)
    draw.text((2, 1), title, fill="black", font=font)
    for column, (picture, label) in enumerate(columns):
        left = column * (width + 4)
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, LINE + 2))
        for row, line in enumerate(label):
            draw.text((left + 2, height + LINE * (row + 1) + 2), line, fill="black", font=font)
    return sheet


def curve(atoms: Atoms, prompts: Sequence[str], path: Path, **call: Any) -> None:
    """Write the density curve as SVG. Keywords: as `density_curve`."""
    pipe, name = atoms.adapter.pipe, atoms.adapter.name
    write_whole(path, curve_svg(density_curve(pipe, atoms.ranked, prompts, adapter=name, **call)))


def look(atoms: Atoms, shown: Sequence[Atom], prompt: str, folder: Path, **call: Any) -> None:
    """A PNG for each atom: where it fires in the whole adapter's picture; the base's; the atom at 0, 1, 2 and 4.

    Of a mixture, in a folder for each part. Keywords: as `strips`.
    """
    pipe, name = atoms.adapter.pipe, atoms.adapter.name
    painted = strips(pipe, atoms.ranked, [a.name for a in shown], prompt, strengths=STRENGTHS, adapter=name, **call)
    rows = {name: (255 * pictures).round().astype(np.uint8) for name, (pictures, _) in painted.items()}
    whole, backbone = Image.fromarray(rows[shown[0].name][2]), backbone_of(pipe)
    latents = backbone.encode_pictures(pipe, to_tensor(whole)[None].to(pipe.vae.device))
    conditioning = backbone.encode_prompts(pipe, [prompt])
    grids: dict[str, Any] = {}
    for part in dict.fromkeys(a.part for a in shown):
        own = [a for a in shown if a.part == part]
        grids |= code_maps(pipe, backbone, latents, conditioning, own, adapter=part or name)
    labels = ["base", *(f"atom at {s:g}{' (whole adapter)' * (s == 1)}" for s in STRENGTHS)]
    for atom in shown:
        grid = grids.get(atom.name, np.zeros((1, 1, 1)))[0]  # a site that sees only text
        columns = [(overlay(whole, grid, scale_of(grid)), ["where it fires"])]
        columns += [(Image.fromarray(row), [label]) for row, label in zip(rows[atom.name], labels, strict=True)]
        write_whole(folder / f"{atom.name}.png", png(labelled(f"{atom.title}: {prompt}", columns)))
