"""Sheets of atoms and the density curve, as files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from atomtune.adapter import Atoms
from atomtune.atoms import Atom
from atomtune.backbones import backbone_of
from atomtune.data.picture import to_tensor
from atomtune.explore.overlay import overlay, scale_of
from atomtune.files import write_whole
from atomtune.measure.maps import code_maps
from atomtune.measure.painting import curve_svg, density_curve, strips


def png(picture: Image.Image) -> bytes:
    """A picture as the content of a PNG file."""
    picture.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def curve(atoms: Atoms, prompts: Sequence[str], path: Path, **call: Any) -> None:
    """Write the density curve as SVG. Keywords: as `density_curve`."""
    write_whole(path, curve_svg(density_curve(atoms.adapter.pipe, atoms.ranked, prompts, **call)))


def look(atoms: Atoms, shown: Sequence[Atom], prompt: str, folder: Path, **call: Any) -> None:
    """A PNG for each atom: where it fires in the whole adapter's picture; the base's; the atom at 0, 1, 2 and 4.

    Of a mixture, in a folder for each part. Keywords: as `strips`.
    """
    pipe, name = atoms.adapter.pipe, atoms.adapter.name
    painted = strips(pipe, atoms.ranked, [a.name for a in shown], prompt, **call)
    rows = {name: (255 * pictures).round().astype(np.uint8) for name, (pictures, _) in painted.items()}
    whole, backbone = Image.fromarray(rows[shown[0].name][2]), backbone_of(pipe)
    latents = backbone.encode_pictures(pipe, to_tensor(whole)[None].to(pipe.vae.device))
    conditioning = backbone.encode_prompts(pipe, [prompt])
    grids: dict[str, Any] = {}
    for part in dict.fromkeys(a.part for a in shown):
        own = [a for a in shown if a.part == part]
        grids |= code_maps(pipe, backbone, latents, conditioning, own, adapter=part or name)
    for atom, row in rows.items():
        grid = grids.get(atom, np.zeros((1, 1, 1)))[0]  # a site that sees only text
        sheet = np.concatenate([overlay(whole, grid, scale_of(grid)), *row], 1)
        write_whole(folder / f"{atom}.png", png(Image.fromarray(sheet)))
