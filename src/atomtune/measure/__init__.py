"""Measures: plain functions from pictures to numbers."""

from atomtune.measure.pictures import drift, pixel_drift, silence

__all__ = ["drift", "pixel_drift", "silence"]
