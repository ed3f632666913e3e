"""Measures: plain functions from pictures and models to numbers."""

from atomtune.measure.maps import code_maps
from atomtune.measure.pictures import drift, pixel_drift, silence

__all__ = ["code_maps", "drift", "pixel_drift", "silence"]
