"""True pictures of scenes: sprites composited on backgrounds, exactly reproducible."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter

from atomtune.scenes.world import COLORS, POSITIONS, SIDE, SIZES, STYLES, Scene, Thing

CELL = 48
COLUMNS = 32


@cache
def _sheet(sheet: str, style: str) -> Image.Image:
    path = resources.files("atomtune.scenes").joinpath(f"assets/{sheet}-{style}.webp")
    with path.open("rb") as file:
        return Image.open(file).convert("RGBA")


@cache
def names(sheet: str = "named") -> tuple[str, ...]:
    """Objects on a sheet: `named` (the world's) or `other` (seen by the autoencoder only)."""
    path = resources.files("atomtune.scenes").joinpath(f"assets/{sheet}.json")
    return tuple(json.loads(path.read_text(encoding="utf-8")))


def _pixelated(s: Image.Image) -> Image.Image:
    return s.resize((12, 12), Image.Resampling.BOX).resize(s.size, Image.Resampling.NEAREST)


def _tinted(s: Image.Image, dark: tuple[int, int, int], light: tuple[int, int, int]) -> Image.Image:
    gray = np.asarray(s.convert("RGB").convert("L"), np.float32)[..., None] / 255
    rgb = np.array(dark) * (1 - gray) + np.array(light) * gray
    out = Image.fromarray(rgb.round().astype(np.uint8)).convert("RGBA")
    out.putalpha(s.getchannel("A"))
    return out


def _neon(s: Image.Image) -> Image.Image:
    alpha = s.getchannel("A")
    rim = Image.fromarray(
        np.asarray(alpha.filter(ImageFilter.MaxFilter(3))) - np.asarray(alpha.filter(ImageFilter.MinFilter(5)))
    )
    dark = _tinted(s, (8, 8, 20), (60, 60, 90))
    glow = Image.new("RGBA", s.size, (60, 255, 220, 255))
    out = Image.composite(glow, dark, rim)
    out.putalpha(alpha.filter(ImageFilter.MaxFilter(3)))
    return out


def _pencil(s: Image.Image) -> Image.Image:
    gray = s.convert("RGB").convert("L")
    edges = np.abs(np.asarray(gray, np.float32) - np.asarray(gray.filter(ImageFilter.GaussianBlur(1.5)), np.float32))
    ink = np.clip(255 - edges * 7, 30, 255).astype(np.uint8)
    out = Image.fromarray(ink).convert("RGBA")
    out.putalpha(s.getchannel("A"))
    return out


def _posterized(s: Image.Image) -> Image.Image:
    rgb = np.asarray(s.convert("RGB"), np.float32)
    out = Image.fromarray((np.floor(rgb / 86) * 127).clip(0, 255).astype(np.uint8)).convert("RGBA")
    out.putalpha(s.getchannel("A"))
    return out


NEW_STYLES = {
    "pixelated": _pixelated,
    "sepia": lambda s: _tinted(s, (60, 30, 10), (250, 225, 180)),
    "blueprint": lambda s: _tinted(s, (10, 30, 110), (215, 230, 255)),
    "neon": _neon,
    "pencil": _pencil,
    "posterized": _posterized,
}
"""Styles that the embedded model has never seen; each is a transform of the 3d sprite."""


@cache
def sprite(name: str, style: str, side: int, sheet: str = "named") -> Float[np.ndarray, "side side 4"]:
    """A sprite with premultiplied alpha in [0, 1], its longest side `side` pixels."""
    index = names(sheet).index(name)
    x, y = CELL * (index % COLUMNS), CELL * (index // COLUMNS)
    base = style if style in STYLES else "3d"
    cell = _sheet(sheet, base).crop((x, y, x + CELL, y + CELL))
    if style not in STYLES:
        cell = NEW_STYLES[style](cell)
    cell = cell.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(cell, np.float32) / 255


@cache
def ground(color: str, pattern: str) -> Float[np.ndarray, "64 64 3"]:
    """A background in [0, 1]; the pattern is a darker shade of the colour, with a period of 16 pixels."""
    light = np.array(COLORS[color], np.float32) / 255
    y, x = np.mgrid[:SIDE, :SIDE]
    marks = {
        "plain": np.zeros((SIDE, SIDE), bool),
        "striped": (y // 8) % 2 == 1,
        "checkered": ((x // 8) + (y // 8)) % 2 == 1,
        "dotted": ((x % 16) - 7.5) ** 2 + ((y % 16) - 7.5) ** 2 < 13,
    }[pattern]
    return np.where(marks[..., None], light * 0.72, light).astype(np.float32)


def paste(canvas: Float[np.ndarray, "h w 3"], sprite: np.ndarray, x: int, y: int) -> None:
    """Composite a premultiplied sprite onto `canvas`, in place, its centre at (x, y)."""
    half = sprite.shape[0] // 2
    top, left = y - half, x - half
    window = canvas[top : top + sprite.shape[0], left : left + sprite.shape[1]]
    window *= 1 - sprite[..., 3:]
    window += sprite[..., :3]


def centre(thing: Thing) -> tuple[int, int]:
    """Where a thing's centre lies, in pixels (x, y)."""
    return POSITIONS[thing.position]


def render(scene: Scene) -> UInt8[np.ndarray, "64 64 3"]:
    """The true picture of a scene."""
    canvas = ground(scene.color, scene.pattern).copy()
    for thing in scene.things:
        paste(canvas, sprite(thing.name, thing.style, SIZES[thing.size]), *centre(thing))
    return (canvas * 255).round().clip(0, 255).astype(np.uint8)


def subject_mask(scene: Scene, thing: int = 0) -> Float[np.ndarray, "64 64"]:
    """Share of each pixel that one thing covers, in [0, 1]."""
    mask = np.zeros((SIDE, SIDE), np.float32)
    t = scene.things[thing]
    alpha = sprite(t.name, t.style, SIZES[t.size])[..., 3]
    x, y = centre(t)
    half = alpha.shape[0] // 2
    mask[y - half : y - half + alpha.shape[0], x - half : x - half + alpha.shape[1]] = alpha
    return mask
