"""What an adapter did to pictures, from pairs painted with the same noise; plain functions over arrays."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8


def pixel_drift(base: UInt8[np.ndarray, "n h w 3"], adapted: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, " n"]:
    """Mean absolute difference of the pixels, each in [0, 1]."""
    return np.abs(base.astype(np.float64) - adapted.astype(np.float64)).mean((1, 2, 3)) / 255


def drift(base: Float[np.ndarray, "n d"], adapted: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """(1 - cos) / 2 between features of base and adapted pictures, as in PEFT's image benchmark; 0 for equal ones."""
    norms = np.linalg.norm(base, axis=1) * np.linalg.norm(adapted, axis=1)
    found = np.clip(1 - (base * adapted).sum(1) / np.maximum(norms, 1e-12), 0, 2) / 2
    return np.where((base == adapted).all(1), 0.0, found)


def silence(base: UInt8[np.ndarray, "n h w 3"], adapted: UInt8[np.ndarray, "n h w 3"]) -> float:
    """Share of pairs that are the same bit for bit."""
    return float((base == adapted).all((1, 2, 3)).mean())
