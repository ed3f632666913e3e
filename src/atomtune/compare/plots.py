"""Figures of a summary, as SVG or PNG: the same entries give the same bytes, and no state of matplotlib's changes."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atomtune.compare.tables import ARROWS, BY, MEASURES, Interval, Row, is_base, is_ours, mean_of
from atomtune.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (7.0, 4.7)
"""Inches: 700 pixels wide on a page, at 100 pixels an inch."""
DPI = 200

LINE = ("method", "prior", "gate", "size")
"""What makes entries the points of one method."""
DIAL = (*LINE, "knob", "formula")
"""What makes entries the points of one sweep."""

FAMILIES = {
    "ours": ("#D55E00", "atoms"),
    "low-rank": ("#0072B2", "adalora delora dora gralora hira lora miss olora pissa randlora rslora topk_lora"),
    "orthogonal": ("#009E73", "boft hra oft psoft road"),
    "product": ("#AA4499", "loha lokr"),
    "few numbers": ("#56B4E9", "beft c3a fourierft ia3 ln_tuning pvera shira ssf tinylora unilora vblora vera waveft"),
    "other": ("#7A7A7A", ""),
}
"""Name -> (colour, methods, up to a hyphen or colon); Okabe & Ito's and Tol's colours, told apart by all eyes."""
INK, PALE = "#222222", "#8A8A8A"
MARKERS = "osD^vPX<>pdh8"

KNOBS = {"atoms": "strongest kept", "purity": "pure kept", "random": "random kept", "scale": "scaled", "svd": "SVD kept"}
"""Names of knobs; others go by their own."""
STROKES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)))

STYLE: dict[Any, Any] = {
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.edgecolor": "#9A9A9A",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": INK,
    "axes.labelsize": 10.0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.07,
    "axes.ymargin": 0.08,
    "grid.color": "#EDEDED",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "xtick.minor.size": 0.0,
    "ytick.minor.size": 0.0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.6,
    "legend.labelspacing": 0.35,
    "svg.hashsalt": "atomtune",
}


def trade_off(summary: Iterable[Row], x: str, y: str, path: Path | str) -> Path:
    """One measure against another: every method at full strength, with its knobs' points on thin lines.

    The base is a star. A measure where low is good and whose values differ twentyfold gets a logarithmic axis.
    """
    path = _target(path)
    entries = _drawable(summary, x, y)
    rest = [entry for entry in entries if not is_base(entry)]
    full = [entry for entry in rest if _is_full(entry)]
    with _figure(path) as axes:
        _scale(axes, "x", x, entries)
        _scale(axes, "y", y, entries)
        look = Look(rest)
        for sweep in _sweeps(rest):
            look.draw(axes, sweep, x, y, line=look.stroke(sweep[0]), small=True)
        for entry in full:
            look.draw(axes, [entry], x, y)
        named = {look.name(entry): entry for entry in full if is_ours(entry)}
        for entry in [entry for entry in entries if is_base(entry)][:1]:
            axes.plot(mean_of(entry, x), mean_of(entry, y), "*", color=INK, ms=12, mec="white", mew=0.6, zorder=7)
            named["base"] = entry
        look.legend(axes, sizes=True)
        _mark_better(axes, MEASURES[x].direction, MEASURES[y].direction)
        _label(axes, {name: (mean_of(entry, x), mean_of(entry, y)) for name, entry in named.items()})
    return path


def against_size(summary: Iterable[Row], measure: str, path: Path | str) -> Path:
    """A measure at full strength against trained parameters: a line a method, and the base as a level."""
    path = _target(path)
    base, rest = _apart(summary, measure)
    rest = [entry for entry in rest if _is_full(entry) and mean_of(entry, "trained_parameters") > 0]
    entries = _drawable(rest, "trained_parameters", measure)
    return _lines(base, _groups(entries, LINE[:3]), "trained_parameters", measure, path)


def sweep(summary: Iterable[Row], x: str, y: str, path: Path | str) -> Path:
    """A measure along every knob of every method, `x` being `knob_value` or a measure: atoms beside their controls.

    Every line holds its method's full strength; the base is a level.
    """
    path = _target(path)
    base, rest = _apart(summary, y)
    return _lines(base, _groups(_drawable([e for s in _sweeps(rest) for e in s], x, y), DIAL), x, y, path)


def _lines(base: Sequence[Row], groups: Sequence[list[Row]], x: str, y: str, path: Path) -> Path:
    """A figure with a line a group, and the base as a level."""
    entries = [entry for group in groups for entry in group]
    with _figure(path) as axes:
        _scale(axes, "x", x, entries)
        _scale(axes, "y", y, [*entries, *base])
        look = Look(entries)
        for group in groups:
            look.draw(axes, sorted(group, key=lambda entry: mean_of(entry, x)), x, y, line=look.stroke(group[0]))
        look.legend(axes, level=_level(axes, base, y))
    return path
