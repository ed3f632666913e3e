"""What of a picture a step sees: its size, and the part that is cut out; functions of seed, content and number."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atomtune.errors import UserError

Size = tuple[int, int]
"""Width and height in pixels."""

SLIMMEST = 2.0
"""Longer side by shorter side of a bucket, at most."""


@dataclass(frozen=True)
class View:
    """A part of the fitted picture, of the same shape, perhaps mirrored; in shares of its width and height."""

    left: float = 0.0
    top: float = 0.0
    share: float = 1.0
    mirrored: bool = False


WHOLE = View()


def view_of(digest: str, number: int, *, crop: float = 0.0, flip: bool = False, seed: int = 0) -> View:
    """View `number` of a picture (by its digest): the first is the whole, of the others every second is mirrored.

    `crop` is the largest share of each side that is cut away, in [0, 1).
    """
    if not 0 <= crop < 1:
        raise UserError(f"`crop` must be a share of 0 or more and below 1, got {crop}.")
    if number == 0:
        return WHOLE
    # RandomState, for its stream stays the same in every version of NumPy.
    words = np.frombuffer(hashlib.sha256(f"{digest}/{seed}/{number}".encode()).digest(), dtype="<u4")
    shrink, x, y = np.random.RandomState(words).random_sample(3).tolist()
    share = 1 - crop * shrink
    return View(x * (1 - share), y * (1 - share), share, flip and number % 2 == 1)


def sizes(side: int, unit: int) -> tuple[Size, ...]:
    """Sizes of about `side` x `side` pixels and never more, square to twice as long, sides multiples of a step.

    The step is a sixteenth of the side, rounded up to a multiple of `unit`; the square comes first.
    """
    step = max(1, -(-side // (16 * unit))) * unit
    found = {(side, side)}
    for width in range(step, side, step):
        height = side * side // width // step * step
        if height <= SLIMMEST * width:
            found |= {(width, height), (height, width)}
    return tuple(sorted(found, key=lambda size: (size != (side, side), size)))


def nearest(width: int, height: int, among: Sequence[Size]) -> Size:
    """The size that cuts the least off a picture; the first of equals."""
    return max(among, key=lambda size: (round(kept(width, height, size), 9), -among.index(size)))


def kept(width: int, height: int, size: Size) -> float:
    """Share of a picture that is left when it is cut to the shape of `size`."""
    ratio = width * size[1] / (height * size[0])
    return min(ratio, 1 / ratio)
