"""Exact readers: what a picture of the world shows, from its pixels alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, UInt8

from atomtune.scenes.render import ground
from atomtune.scenes.world import COLORS, PATTERNS, POSITIONS, SIDE, SIZES, Scene

CAP = 0.15
"""Error (of 1) beyond which a pixel counts as foreground, and no more than that."""


@dataclass(frozen=True)
class Box:
    """The extent of one thing: centre and longest side, in pixels."""

    x: float
    y: float
    side: float

    @property
    def position(self) -> str:
        """Name of the nearest position."""
        return min(POSITIONS, key=lambda p: (POSITIONS[p][0] - self.x) ** 2 + (POSITIONS[p][1] - self.y) ** 2)

    @property
    def size(self) -> str:
        """`small` or `big`, whichever side is nearer."""
        return min(SIZES, key=lambda s: abs(SIZES[s] - self.side))


@dataclass(frozen=True)
class Reading:
    """What a picture shows."""

    color: str
    pattern: str
    boxes: tuple[Box | None, ...]


@cache
def _grounds() -> tuple[tuple[tuple[str, str], ...], Float[np.ndarray, "n 64 64 3"]]:
    keys = tuple((color, pattern) for color in COLORS for pattern in PATTERNS)
    return keys, np.stack([ground(*key) for key in keys])


def _foreground(error: Float[np.ndarray, "64 64"]) -> Bool[np.ndarray, "64 64"]:
    """Pixels off the background, specks removed (a pixel stays with five of its nine neighbours)."""
    hit = np.pad(error > CAP, 1)
    count = sum(np.roll(hit, (dy, dx), (0, 1)).astype(int) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
    return (np.asarray(count) >= 5)[1:-1, 1:-1]


def _box(mask: Bool[np.ndarray, "h w"], left: int) -> Box | None:
    ys, xs = np.nonzero(mask)
    if len(xs) < 16:
        return None
    x0, x1 = np.quantile(xs, (0.01, 0.99))
    y0, y1 = np.quantile(ys, (0.01, 0.99))
    return Box((x0 + x1 + 1) / 2 + left, (y0 + y1 + 1) / 2, max(x1 - x0, y1 - y0) + 1)


def read(picture: UInt8[np.ndarray, "64 64 3"], things: int = 1) -> Reading:
    """Background and boxes of a picture that should hold `things` things (two stand left and right).

    The background is the one of 32 with the least capped error, so that what stands before it hardly counts.
    """
    keys, grounds = _grounds()
    errors = np.abs(grounds - picture.astype(np.float32) / 255).max(-1)
    best = int(np.minimum(errors, CAP).mean((1, 2)).argmin())
    mask = _foreground(errors[best])
    half = SIDE // 2
    boxes = (_box(mask, 0),) if things == 1 else (_box(mask[:, :half], 0), _box(mask[:, half:], half))
    return Reading(*keys[best], boxes)


def attributes(picture: UInt8[np.ndarray, "64 64 3"], asked: Scene) -> dict[str, float]:
    """Whether colour, pattern, background (both), position and size came out as asked: 1.0 or 0.0 each."""
    reading = read(picture, len(asked.things))
    color, pattern = reading.color == asked.color, reading.pattern == asked.pattern
    pairs = list(zip(reading.boxes, asked.things, strict=True))
    return {
        "color": float(color),
        "pattern": float(pattern),
        "background": float(color and pattern),
        "position": float(all(b is not None and b.position == t.position for b, t in pairs)),
        "size": float(all(b is not None and b.size == t.size for b, t in pairs)),
    }


def crops(picture: UInt8[np.ndarray, "64 64 3"], asked: Scene, side: int = 36) -> UInt8[np.ndarray, "n s s 3"]:
    """A window around each thing, where it was found or else where it should be."""
    reading = read(picture, len(asked.things))
    padded = np.pad(picture, ((side, side), (side, side), (0, 0)), mode="edge")
    out = []
    for box, thing in zip(reading.boxes, asked.things, strict=True):
        x, y = (box.x, box.y) if box else POSITIONS[thing.position]
        top, left = round(y) + side // 2, round(x) + side // 2
        out.append(padded[top : top + side, left : left + side])
    return np.stack(out)
