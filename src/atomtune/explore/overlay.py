"""A map over a picture: one hue, zero transparent, the same scale for all pictures of an atom."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from PIL import Image

HUE = (11, 110, 107)
"""The report's accent."""


def scale_of(maps: Float[np.ndarray, "pictures rows columns"]) -> float:
    """The 99th percentile of the sizes of codes that are not zero; 1 where all are."""
    fired = np.abs(maps[np.nan_to_num(maps) != 0])
    return float(np.quantile(fired, 0.99)) if len(fired) else 1.0


def overlay(picture: Image.Image, grid: Float[np.ndarray, "rows columns"], scale: float) -> Image.Image:
    """The picture in pale gray, the map over it; codes of size `scale` and beyond are fully in colour."""
    gray = np.asarray(picture.convert("L"), np.float64)[..., None] * 0.45 + 140
    share = np.clip(np.abs(grid) / scale, 0, 1)
    mask = Image.fromarray((share * 255).round().astype(np.uint8)).resize(picture.size, Image.Resampling.NEAREST)
    weight = np.asarray(mask, np.float64)[..., None] / 255
    out = gray * (1 - weight) + np.array(HUE, np.float64) * weight
    return Image.fromarray(out.round().astype(np.uint8))
