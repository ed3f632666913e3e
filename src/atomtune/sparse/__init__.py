"""Sparse codes over dictionary atoms: pure torch, usable alone."""

from .dictionary import Dictionary, stacked_codes
from .ista import ista, spectral_bound
from .penalties import dead_atoms, l0, silence, sparsity
from .sparsifiers import SPARSIFIERS, Sparsifier, anneal_k, make_sparsifier
from .statistics import (
    IMPORTANCE,
    CodeStatistics,
    active_importance,
    importance,
    max_importance,
    mean_importance,
    purity_importance,
)

__all__ = [
    "IMPORTANCE",
    "SPARSIFIERS",
    "CodeStatistics",
    "Dictionary",
    "Sparsifier",
    "active_importance",
    "anneal_k",
    "dead_atoms",
    "importance",
    "ista",
    "l0",
    "make_sparsifier",
    "max_importance",
    "mean_importance",
    "purity_importance",
    "silence",
    "sparsity",
    "spectral_bound",
    "stacked_codes",
]
