"""Exact scores of pictures that were asked for as scenes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image

from atomtune.scenes.judge import load, look
from atomtune.scenes.read import attributes, crops
from atomtune.scenes.render import render
from atomtune.scenes.world import Scene


def arrays(pictures: Sequence[Image.Image]) -> UInt8[np.ndarray, "n 64 64 3"]:
    """Pictures as one array."""
    return np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])


def score(pictures: Sequence[Image.Image], asked: Sequence[Scene]) -> list[dict[str, float]]:
    """Row by row: what came out as asked.

    `color`, `pattern`, `background`, `position`, `size` are exact readings; `named`, `styled` and `similarity` the
    judge's; `true_distance` is the mean squared error to the true rendering, pixels in [0, 1].
    """
    stack = arrays(pictures)
    rows = look(list(stack), list(asked))
    for row, picture, scene in zip(rows, stack, asked, strict=True):
        row |= attributes(picture, scene)
        difference = picture.astype(np.float64) - render(scene)
        row["true_distance"] = float((difference**2).mean()) / 255**2
    return rows


@torch.no_grad()
def features(pictures: Sequence[Image.Image], asked: Sequence[Scene]) -> Float[np.ndarray, "n 128"]:
    """The judge's features of the first thing in each picture."""
    windows = [crops(picture, scene)[0] for picture, scene in zip(arrays(pictures), asked, strict=True)]
    return load()(torch.from_numpy(np.stack(windows)))[0].double().numpy()


def mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Column means."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
