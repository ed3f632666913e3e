"""Pictures that are the same, or nearly: what is shown twice is learned twice as hard."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from atomtune.data.folder import Sample
from atomtune.data.picture import SCANNED, open_picture

NEAR = 6
"""Bits of 64, at most, in which nearly equal pictures differ."""
NEAR_COLOR = 12.0
"""Levels of 255, at most, in which their colours differ on average: plain grounds have equal bits in any colour."""


@dataclass(frozen=True)
class Twins:
    """Two pictures, by name, and in how many of 64 bits they differ; None: the same file, byte for byte."""

    first: str
    second: str
    distance: int | None


def difference_hash(picture: Image.Image) -> int:
    """64 bits: on a grid of 9 x 8 means of gray, whether each is darker than the one to its right."""
    gray = picture.convert("L").resize((9, 8), Image.Resampling.BOX)
    values = np.asarray(gray, dtype=np.int16)
    return int.from_bytes(np.packbits(values[:, 1:] > values[:, :-1]).tobytes(), "big")


def twins(samples: Sequence[Sample]) -> list[Twins]:
    """All pairs of equal files, and of pictures that look alike."""
    found: list[Twins] = []
    first: dict[str, str] = {}
    hashes, colors = [], []
    for sample in samples:
        if sample.digest in first:
            found.append(Twins(first[sample.digest], sample.path.name, None))
            continue
        first[sample.digest] = sample.path.name
        picture = open_picture(sample.path, max_pixels=SCANNED)
        hashes.append(difference_hash(picture))
        colors.append(_colors(picture))
    names, bits_of, colors_of = list(first.values()), np.array(hashes, dtype=np.uint64), np.array(colors)
    for i in range(len(names) - 1):
        bits = np.bitwise_count(bits_of[i] ^ bits_of[i + 1 :])
        apart = np.abs(colors_of[i + 1 :] - colors_of[i]).mean(1)
        alike = np.flatnonzero((bits <= NEAR) & (apart <= NEAR_COLOR))
        found += [Twins(names[i], names[i + 1 + j], int(bits[j])) for j in alike.tolist()]
    return found


def _colors(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.resize((8, 8), Image.Resampling.BOX), dtype=np.float32).ravel()
