"""Figures of a summary, as SVG or PNG: the same entries give the same bytes, and no state of matplotlib's changes."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

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

FAMILIES = {
    "low-rank": ("#0072B2", "adalora delora dora gralora hira lora miss olora pissa randlora rslora topk_lora"),
    "orthogonal": ("#009E73", "boft hra oft psoft road"),
    "product": ("#AA4499", "loha lokr"),
    "few numbers": ("#56B4E9", "beft c3a fourierft ia3 ln_tuning pvera shira ssf tinylora unilora vblora vera waveft"),
}
"""Name -> (colour, methods, up to a hyphen or colon); Okabe & Ito's and Tol's colours, told apart by all eyes."""
OURS, OTHER, INK, PALE = "#D55E00", "#7A7A7A", "#222222", "#8A8A8A"
LEADER = 9.0
"""Points between a label and its anchor from which on a line joins them."""
MARKERS = "sD^vPX<>pdh8"
KNOBS: dict[str, tuple[Any, str, float]] = {
    "atoms": ("-", "components kept", 1.0),
    "components": ("--", "components kept", 1.0),
    "purity": ((0, (4, 1, 1, 1)), "pure ones kept", 0.0),
    "random": ((0, (1, 3)), "kept at random", 1.0),
    "scale": ("-.", "scaled", 1.0),
    "svd": (":", "SVD", 1.0),
}
"""Line style, name and value at full strength of a knob; others have a plain line, their own name and 1."""

OPENED = ("atoms", "purity")
"""Knobs that choose among atoms; the others are controls."""

HOLLOW = {"prior": ("no prior", "with a prior"), "gate": ("no gate", "with the gate")}
"""Setting -> names of hollow and filled markers: of the first of these in which a method differs from itself."""

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.edgecolor": "#9A9A9A",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": INK,
    "axes.labelsize": 10.0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#EDEDED",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "xtick.minor.size": 0.0,
    "ytick.minor.size": 0.0,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "svg.hashsalt": "atomtune",
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Series:
    """The points of one line: `xs`, `ys` and their intervals, (n,) and (n, 2), and how it looks."""

    label: str
    entries: list[Row]
    ours: bool
    color: str
    marker: str
    filled: bool
    line: Any
    xs: np.ndarray
    ys: np.ndarray
    x_spans: np.ndarray
    y_spans: np.ndarray


def trade_off(summary: Iterable[Row], x: str, y: str, path: Path | str) -> Path:
    """One measure against another: every operating point with its intervals, a knob's points joined, full ones named.

    The base is a star. A measure where low is good and whose values differ twentyfold gets a logarithmic axis.
    """
    path = _target(path)
    entries = _drawable(summary, x, y)
    with _style():
        figure, axes = _figure()
        every = _series([entry for entry in entries if not is_base(entry)], LINE, x, y)
        axis_x, axis_y = (_axis(axes, which, m, entries) for which, m in (("x", x), ("y", y)))
        labels = [label for one in every for label in _cloud(axes, one, axis_x, axis_y)]
        for entry in [entry for entry in entries if is_base(entry)][:1]:
            at = np.array([[mean_of(entry, x), mean_of(entry, y)]])
            axes.plot(*at.T, "*", color=INK, ms=12, mec="white", mew=0.6, zorder=7)
            labels.append(Label("base", at, INK))
        _legend(figure, every, entries)
        _finish(figure, axes, labels, (MEASURES[x].direction, MEASURES[y].direction))
        return _write(figure, path)


def against_size(summary: Iterable[Row], measure: str, path: Path | str) -> Path:
    """A measure at full strength against trained parameters: a line a method, ours with a band, the rest with bars."""
    path = _target(path)
    base, rest = _apart(summary, measure)
    rest = [entry for entry in rest if _is_full(entry) and mean_of(entry, "trained_parameters") > 0]
    entries = _drawable(rest, "trained_parameters", measure)
    with _style():
        figure, axes = _figure()
        every = _series(entries, LINE[:3], "trained_parameters", measure)
        axes.set_xscale("log")
        axes.set_xlabel(MEASURES["trained_parameters"].label)
        _log_ticks(axes, [x for one in every for x in one.xs])
        floor = _axis(axes, "y", measure, [*entries, *base])
        labels = [_line(axes, one, floor) for one in every]
        labels += _level(axes, base, measure)
        _legend(figure, every, entries)
        _finish(figure, axes, labels, (0, 0))
        return _write(figure, path)


def sweep(summary: Iterable[Row], x: str, y: str, path: Path | str) -> Path:
    """A measure along every knob of every method, `x` being `knob_value` or a measure: atoms beside their controls.

    Every line holds its method's full strength, at the value that KNOBS gives; the base is a level.
    """
    path = _target(path)
    base, rest = _apart(summary, y)
    entries = _drawable(_with_ends(rest), x, y)
    with _style():
        figure, axes = _figure()
        every = _series(entries, (*LINE, "knob", "formula"), x, y)
        _axis(axes, "x", x, entries)
        floor = _axis(axes, "y", y, [*entries, *base])
        labels = [_line(axes, one, floor) for one in every]
        labels += _level(axes, base, y)
        _legend(figure, every, entries)
        _finish(figure, axes, labels, (0, 0))
        return _write(figure, path)


# From entries to series


def _is_full(entry: Row) -> bool:
    return entry.get("knob") in (None, "full") or (entry["knob"] == "scale" and entry.get("knob_value") == 1)


def _apart(summary: Iterable[Row], measure: str) -> tuple[list[Row], list[Row]]:
    """The base, if it has the measure, and all others."""
    entries = sorted(summary, key=_words)
    base = [entry for entry in entries if is_base(entry) and not math.isnan(mean_of(entry, measure))]
    return base[:1], [entry for entry in entries if not is_base(entry)]


def _drawable(summary: Iterable[Row], x: str, y: str) -> list[Row]:
    """The entries that have both, in an order of their own."""
    for measure in (x, y):
        if measure not in MEASURES and measure != "knob_value":
            raise UserError(f"a figure's measure must be one of {', '.join(MEASURES)}, got {measure}")
    found = [entry for entry in summary if not (math.isnan(mean_of(entry, x)) or math.isnan(mean_of(entry, y)))]
    if not found:
        raise UserError(f"nothing to draw: no entry of the summary holds both `{x}` and `{y}`")
    return sorted(found, key=_words)


def _words(entry: Row) -> tuple[Any, ...]:
    """What sorts entries: ours last, so that they lie on top."""
    keys = (str(entry.get(k)).rjust(12) for k in BY if k != "knob_value")
    return is_ours(entry), *keys, float(entry.get("knob_value") or 0)


def _with_ends(entries: list[Row]) -> list[Row]:
    """Every sweep with the full strength of its method as a point of it, if it lacks one there."""
    sweeps: dict[tuple[Any, ...], list[Row]] = {}
    for entry in entries:
        if not _is_full(entry):
            sweeps.setdefault(tuple(entry.get(k) for k in (*LINE, "knob", "formula")), []).append(entry)
    for full in filter(_is_full, entries):
        for (*line, knob, formula), members in sweeps.items():
            end = _knob(members[0])[2]
            if line == [full.get(k) for k in LINE] and end not in [entry.get("knob_value") for entry in members]:
                members.append({**full, "knob": knob, "formula": formula, "knob_value": end})
    return [entry for members in sweeps.values() for entry in members]


def _series(entries: Sequence[Row], by: Sequence[str], x: str, y: str) -> list[Series]:
    """The entries by line, each in the order of x; named by what differs in this figure."""
    methods = sorted({str(entry["method"]) for entry in entries}, key=lambda m: (not m.startswith("atoms"), m))
    markers = "o" + MARKERS if methods and methods[0].startswith("atoms") else MARKERS
    hollow = _hollow(entries)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for entry in entries:
        groups.setdefault(tuple(entry.get(k) for k in by), []).append(entry)
    found = []
    for members in groups.values():
        first = members[0]
        members.sort(key=lambda entry: mean_of(entry, x))
        one = Series(
            label=_label(first, entries, by),
            entries=members,
            ours=is_ours(first) and ("knob" not in by or first.get("knob") in OPENED),
            color=_color(str(first["method"])),
            marker=markers[methods.index(str(first["method"])) % len(markers)],
            filled=hollow is None or first.get(hollow) not in (None, False, "none"),
            line=_knob(first)[0] if "knob" in by else "-",
            xs=np.array([mean_of(entry, x) for entry in members]),
            ys=np.array([mean_of(entry, y) for entry in members]),
            x_spans=np.array([_span(entry, x) for entry in members]),
            y_spans=np.array([_span(entry, y) for entry in members]),
        )
        found.append(one)
    return found


def _hollow(entries: Sequence[Row]) -> str | None:
    """The setting that hollow markers lack."""
    methods = {entry.get("method") for entry in entries}
    same = [[entry for entry in entries if entry.get("method") == method] for method in methods]
    return next((key for key in HOLLOW if any(_differ(own, key) for own in same)), None)


def _family(method: str) -> str:
    name = re.split("[-:]", method)[0]
    if name.startswith("atoms"):
        return "atoms"
    return next((family for family, (_, names) in FAMILIES.items() if name in names.split()), "other")


def _color(method: str) -> str:
    family = _family(method)
    return OURS if family == "atoms" else FAMILIES[family][0] if family in FAMILIES else OTHER


def _label(entry: Row, entries: Sequence[Row], by: Sequence[str]) -> str:
    """The method and whatever of its settings is not the same all over the figure."""
    same_method = [other for other in entries if other["method"] == entry["method"]]
    parts = [str(entry["method"])]
    if _differ(entries, "prior") and entry.get("prior") not in (None, "none"):
        parts.append(f" + {entry['prior']}")
    if _differ(entries, "gate") and entry.get("gate"):
        parts.append(" + gate")
    if "size" in by and _differ(same_method, "size"):
        parts.append(f" {entry.get('size')}")
    if "knob" in by:
        parts.append(f", {_knob_label(entry, same_method)}")
    return "".join(parts)


def _knob_label(entry: Row, entries: Sequence[Row]) -> str:
    """The knob, and the formula where it goes by several."""
    same_knob = [other for other in entries if other.get("knob") == entry.get("knob")]
    return _knob(entry)[1] + (f" by {entry.get('formula')}" if _differ(same_knob, "formula") else "")


def _differ(entries: Sequence[Row], key: str) -> bool:
    return len({entry.get(key) for entry in entries}) > 1


def _knob(entry: Row) -> tuple[Any, str, float]:
    """Line style, name and value at full strength of an entry's knob."""
    name = str(entry.get("knob") or "full")
    line, words, end = KNOBS.get(name, ("-", name, 1.0))
    return line, "atoms kept" if name == "atoms" and is_ours(entry) else words, end


def _span(entry: Row, measure: str) -> tuple[float, float]:
    """The interval; the mean itself where there is none."""
    value = entry.get(measure)
    if isinstance(value, Interval) and not math.isnan(value.low):
        return value.low, value.high
    return mean_of(entry, measure), mean_of(entry, measure)


def _sweeps(one: Series) -> Iterator[tuple[Row, list[int]]]:
    """For each knob and formula an entry of it and the numbers of its points, full strength among them."""
    kinds = [None if _is_full(entry) else (str(entry.get("knob")), str(entry.get("formula"))) for entry in one.entries]
    full = [i for i, kind in enumerate(kinds) if kind is None][:1]
    for kind in sorted({kind for kind in kinds if kind}):
        own = [i for i, other in enumerate(kinds) if other == kind]
        first = one.entries[own[0]]
        values = {i: float(one.entries[i].get("knob_value") or 0) for i in own} | {i: _knob(first)[2] for i in full}
        yield first, sorted(values, key=lambda i: values[i])


# Marks


def _cloud(axes: Axes, one: Series, floor_x: float, floor_y: float) -> list[Label]:
    """A method's operating points: full strength large and named, its knobs' points small on lines with their names."""
    full = [i for i, entry in enumerate(one.entries) if _is_full(entry)]
    at = np.stack([one.xs, one.ys], 1)
    _crosses(axes, one, floor_x, floor_y, full)
    labels = [Label(one.label, at[full[:1] or [0]], one.color, bold=one.ours)]
    for entry, points in _sweeps(one):
        # A control of ours is no more than a rival's.
        ours = one.ours and entry.get("knob") in OPENED
        axes.plot(*at[points].T, color=one.color, linestyle=_knob(entry)[0], lw=2.0 if ours else 1.0, zorder=3)
        inner = [i for i in points if i not in full]
        _dots(axes, replace(one, ours=ours), inner, 0.65)
        labels.append(Label(_knob_label(entry, one.entries), at[inner], one.color, 7.5))
    _dots(axes, one, full, 1.0)
    return labels


def _crosses(axes: Axes, one: Series, floor_x: float, floor_y: float, full: list[int]) -> None:
    """Intervals both ways, fainter where the point is not the full strength."""
    for i, (x, y) in enumerate(zip(one.xs, one.ys, strict=True)):
        look: dict[str, Any] = {
            "color": one.color,
            "lw": 1.3 if one.ours else 0.9,
            "alpha": 0.55 if i in full else 0.22,
            "zorder": 2,
        }
        axes.plot(np.maximum(one.x_spans[i], floor_x), (y, y), solid_capstyle="butt", **look)
        axes.plot((x, x), np.maximum(one.y_spans[i], floor_y), solid_capstyle="butt", **look)


def _dots(axes: Axes, one: Series, which: list[int], scale: float) -> None:
    axes.plot(
        one.xs[which],
        one.ys[which],
        linestyle="none",
        marker=one.marker,
        ms=(8.5 if one.ours else 6.5) * scale,
        mfc=one.color if one.filled else "white",
        mec=("white" if one.filled and not one.ours else INK) if one.filled else one.color,
        mew=0.4 if one.filled else 1.2 * scale,
        zorder=6 if one.ours else 4,
    )


def _line(axes: Axes, one: Series, floor: float) -> Label:
    """A line with its points and intervals, and the label that may stand at any of its points."""
    low, high = np.maximum(one.y_spans, floor).T
    if one.ours and len(one.xs) > 1:
        axes.fill_between(one.xs, low, high, color=one.color, alpha=0.13, lw=0, zorder=1)
    else:
        axes.vlines(one.xs, low, high, color=one.color, lw=0.9, alpha=0.45, zorder=2)
    axes.plot(one.xs, one.ys, color=one.color, linestyle=one.line, lw=2.2 if one.ours else 1.2, zorder=3)
    _dots(axes, one, list(range(len(one.xs))), 0.8)
    return Label(one.label, np.stack([one.xs, one.ys], 1), one.color, bold=one.ours)


def _level(axes: Axes, base: Sequence[Row], measure: str) -> list[Label]:
    """The base's value across the figure, named at one of its sides; no line, but a number, where it is not near."""
    for entry in base:
        y = mean_of(entry, measure)
        if _near(axes, y):
            axes.axhline(y, color=INK, lw=0.9, linestyle=(0, (5, 3)), zorder=1)
            return [Label("base", np.array([[math.nan, y]]), INK)]
        down = y < axes.dataLim.y0
        edge = -math.inf if down else math.inf
        return [Label(f"base {y:{MEASURES[measure].format}} {'↓' if down else '↑'}", np.array([[math.nan, edge]]), INK)]
    return []


def _near(axes: Axes, y: float) -> bool:
    """Whether a level leaves what is drawn so far at least half of a linear axis."""
    low, high = axes.dataLim.intervaly
    return axes.get_yscale() != "linear" or high <= low or 2 * low - high <= y <= 2 * high - low


def _legend(figure: Figure, every: Sequence[Series], entries: Sequence[Row]) -> None:
    """Families by colour, where there are several; what a hollow marker means, where there are both."""
    from matplotlib.lines import Line2D

    names = {_family(str(one.entries[0]["method"])): one.color for one in every}
    ordered = [name for name in ("atoms", *FAMILIES, "other") if name in names]
    plain: dict[str, Any] = {"linestyle": "none", "marker": "o", "ms": 6.0}
    handles = [Line2D([], [], color=names[n], label="atoms (ours)" if n == "atoms" else n, **plain) for n in ordered]
    handles = handles if len(handles) > 2 else []
    if (hollow := _hollow([entry for entry in entries if not is_base(entry)])) is not None:
        without, with_it = HOLLOW[hollow]
        handles += [
            Line2D([], [], mfc="white", mec=PALE, mew=1.2, label=without, **plain),
            Line2D([], [], color=PALE, label=with_it, **plain),
        ]
    if handles:
        look: dict[str, Any] = {"handletextpad": 0.1, "columnspacing": 1.4, "borderaxespad": 0.3}
        columns = len(handles) if len(handles) < 7 else math.ceil(len(handles) / 2)
        figure.legend(handles=handles, ncols=columns, loc="outside upper center", **look)


# Axes


def _axis(axes: Axes, which: str, measure: str, entries: Sequence[Row]) -> float:
    """Scale, ticks and label of the axis of a measure; the least value that can be drawn there."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    known = MEASURES.get(measure)
    label = f"{known.label} {ARROWS[known.direction]}".strip() if known else "share kept, or strength"
    getattr(axes, f"set_{which}label")(label)
    values = [v for v in (mean_of(entry, measure) for entry in entries) if not math.isnan(v)]
    positive = [v for v in values if v > 0]
    axis = getattr(axes, f"{which}axis")
    if known and known.direction < 0 and min(values) >= 0 and positive and max(positive) > 20 * min(positive):
        least = max(min(positive), max(positive) * 1e-5)
        decade = 10 ** math.floor(math.log10(least))
        if min(values) < least:
            getattr(axes, f"set_{which}scale")("symlog", linthresh=decade, linscale=0.4)
        else:
            getattr(axes, f"set_{which}scale")("log")
        axis.set_major_formatter(FuncFormatter(_decade))
        return 0.0 if min(values) < least else least / 3
    percent = known.format.endswith("%") if known else max(values) <= 1
    share = percent or measure in ("similarity", "hypervolume")
    axis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))

    def text(value: float, _: int) -> str:
        if share and not -1e-9 <= value <= 1 + 1e-9:
            return ""
        step = np.diff(axis.get_majorticklocs()).min(initial=1.0) * (100 if percent else 1)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return f"{value * 100:.{digits}f}%" if percent else f"{value:,.{digits}f}"

    axis.set_major_formatter(FuncFormatter(text))
    return -math.inf


def _decade(value: float, _: int) -> str:
    """0.01, but 10 to the power of minus five; nothing below zero."""
    if value < 0:
        return ""
    if value == 0 or value >= 1e-3 or abs(math.log10(value) - round(math.log10(value))) > 1e-9:
        return f"{value:g}"
    return f"10{str(round(math.log10(value))).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def _log_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Round numbers of parameters in words: 20k, 1M."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    spread = max(values) / min(values)
    few, more, most = (1.0,), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axes.xaxis.set_major_locator(LogLocator(subs=few if spread > 200 else more if spread > 8 else most))
    axes.xaxis.set_minor_formatter(NullFormatter())

    def words(value: float, _: int) -> str:
        unit = next((u for u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= u[0]), (1.0, ""))
        return f"{value / unit[0]:g}{unit[1]}"

    axes.xaxis.set_major_formatter(FuncFormatter(words))


# Labels


@dataclass(frozen=True)
class Label:
    """A name that may stand beside any of its anchors, (n, 2) in data units; an x of NaN is the axes' side."""

    text: str
    anchors: np.ndarray
    color: str
    points: float = 8.5
    bold: bool = False


@dataclass(frozen=True)
class Places:
    """Where a label may stand, anchors (c, 2), boxes (c, 4), tails (c, t, 4) along leaders, and their costs (c,)."""

    anchors: np.ndarray
    boxes: np.ndarray
    tails: np.ndarray
    costs: np.ndarray

    def clashes(self, boxes: np.ndarray, tails: np.ndarray) -> np.ndarray:
        """What each place costs beside other labels' boxes (n, 4) and tails (n, t, 4): (c,)."""
        crossing = _overlap(self.tails.reshape(-1, 4), boxes).reshape(len(self.boxes), -1).sum(1)
        crossed = _overlap(self.boxes, tails.reshape(-1, 4)).sum(1)
        return 6 * _overlap(self.boxes, boxes).sum(1) + 10 * (crossing + crossed)


def place_labels(
    anchors: Sequence[Float[np.ndarray, "k 2"]],
    sizes: Float[np.ndarray, "n 2"],
    obstacles: Float[np.ndarray, "m 4"],
    marks: Float[np.ndarray, "o 4"],
    bounds: Float[np.ndarray, " 4"],
) -> list[tuple[Float[np.ndarray, " 2"], Float[np.ndarray, " 4"]]]:
    """For each label its anchor and its box (x0, y0, x1, y1), near one of its anchors and clear of all else.

    Boxes keep off `obstacles`, the leaders of those that stand far off `marks`. A sum of overlaps (in square points)
    and distances is lowered one label at a time, from a few starting orders.
    """
    places = [_places(own, size, obstacles, marks, bounds) for own, size in zip(anchors, sizes, strict=True)]
    random = np.random.default_rng(0)
    finest: tuple[float, list[int]] = (math.inf, [])
    for _ in range(6):
        chosen = [int(place.costs.argmin()) for place in places]
        order = [int(i) for i in random.permutation(len(chosen))]
        total = math.inf
        for _ in range(20):
            before, total = total, 0.0
            for i in order:
                costs = places[i].costs
                if others := [(places[k], c) for k, c in enumerate(chosen) if k != i]:
                    boxes, tails = (
                        np.stack([getattr(place, what)[c] for place, c in others]) for what in ("boxes", "tails")
                    )
                    costs = costs + places[i].clashes(boxes, tails)
                chosen[i] = int(costs.argmin())
                total += float(costs.min())
            if total >= before:
                break
        if total < finest[0] - 1e-9:
            finest = total, list(chosen)
    return [(places[i].anchors[c], places[i].boxes[c]) for i, c in enumerate(finest[1])]


def _places(
    anchors: Float[np.ndarray, "k 2"],
    size: Float[np.ndarray, " 2"],
    obstacles: Float[np.ndarray, "m 4"],
    marks: Float[np.ndarray, "o 4"],
    bounds: Float[np.ndarray, " 4"],
) -> Places:
    """A label's places around its anchors, and what they cost by themselves."""
    around, out = np.meshgrid(np.arange(24) * math.pi / 12, (6.0, 9.0, 13.0, 19.0, 27.0, 37.0, 49.0, 63.0, 80.0))
    angles, radii = around.ravel(), out.ravel()
    shift = np.stack([np.cos(angles) * (radii + size[0] / 2), np.sin(angles) * (radii + size[1] / 2)], 1)
    centres = (anchors[:, None] + shift).reshape(-1, 2)
    boxes = np.concatenate([centres - size / 2, centres + size / 2], 1)
    own = np.repeat(anchors, len(shift), 0)
    near = np.clip(own, boxes[:, :2], boxes[:, 2:])
    length = np.hypot(*(near - own).T)
    # Along the leader, from where it leaves its own marker to where it meets the label.
    start = own + (near - own) * np.minimum(6 / np.maximum(length, 1e-9), 1)[:, None]
    steps = start[:, None] + (near - start)[:, None] * np.linspace(0, 0.95, 6)[:, None]
    half = np.where(length > LEADER, 0.8, 0.0)[:, None, None]
    tails = np.concatenate([steps - half, steps + half], 2)
    outside = np.maximum(bounds[:2] - boxes[:, :2], 0).sum(1) + np.maximum(boxes[:, 2:] - bounds[2:], 0).sum(1)
    crossed = _overlap(tails.reshape(-1, 4), marks).reshape(len(boxes), -1).sum(1)
    # To the right is where a reader looks first.
    distance = np.tile(radii - 1.5 * np.cos(angles), len(anchors))
    # A line is best named where it is alone.
    centres = (marks[:, :2] + marks[:, 2:]) / 2
    crowd = (np.hypot(*(anchors[:, None] - centres[None]).T) < 25).sum(0)
    distance += 6 * np.repeat(crowd - crowd.min(initial=10**6), len(radii))
    costs = 2 * _overlap(boxes, obstacles).sum(1) + 10 * crossed + 40 * outside + size.prod() / 160 * distance
    keep = np.argsort(costs, kind="stable")[:150]
    return Places(own[keep], boxes[keep], tails[keep], costs[keep])


def _overlap(a: Float[np.ndarray, "n 4"], b: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "n m"]:
    """Shared area of every box of a with every box of b."""
    width = np.minimum(a[:, None, 2], b[None, :, 2]) - np.maximum(a[:, None, 0], b[None, :, 0])
    height = np.minimum(a[:, None, 3], b[None, :, 3]) - np.maximum(a[:, None, 1], b[None, :, 1])
    return np.maximum(width, 0) * np.maximum(height, 0)


def _finish(figure: Figure, axes: Axes, labels: Sequence[Label], better: tuple[int, int]) -> None:
    """Freeze the layout, then put the arrow and the labels where nothing else is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    axes.margins(0.07, 0.08)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    renderer = FigureCanvasAgg(figure).get_renderer()
    points = 72 / figure.dpi
    bounds = np.array(axes.get_window_extent(renderer).extents) * points
    marks, lines = _marks(axes, points), _strokes(axes, points)
    obstacles = np.concatenate([marks, lines])
    if better != (0, 0):
        obstacles = np.concatenate([obstacles, _arrow(axes, better, obstacles, bounds)[None]])
    halo = _halo()
    texts, anchors = [], []
    for label in labels:
        look: dict[str, Any] = {
            "color": label.color if label.bold else _dark(label.color),
            "fontsize": label.points + label.bold,
            "zorder": 9,
            "path_effects": halo,
        }
        texts.append(axes.text(0, 0, label.text, weight="bold" if label.bold else "normal", **look))
        anchors.append(_in_points(axes, label.anchors, points))
    boxes = [text.get_window_extent(renderer) for text in texts]
    sizes = np.array([(box.width * points + 1, box.height * points) for box in boxes]).reshape(-1, 2)
    for text, (anchor, box) in zip(texts, place_labels(anchors, sizes, obstacles, marks, bounds), strict=True):
        corner = axes.transAxes.inverted().transform(box[:2] / points)
        text.set(x=corner[0], y=corner[1], transform=axes.transAxes, va="bottom", ha="left")
        near = np.clip(anchor, box[:2], box[2:])
        if np.hypot(*(near - anchor)) > LEADER:
            ends = axes.transAxes.inverted().transform(np.stack([near, anchor]) / points)
            axes.plot(*ends.T, transform=axes.transAxes, color=text.get_color(), lw=0.6, alpha=0.6, zorder=5)


def _in_points(axes: Axes, anchors: Float[np.ndarray, "k 2"], points: float) -> Float[np.ndarray, "k 2"]:
    """Data units to points; an x of NaN becomes five places along the axes, an infinite y one of their edges."""
    if np.isnan(anchors).any():
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        y = min(max(anchors[0, 1], bottom), top)
        ends = axes.transData.transform([(left, y), (right, y)])
        return np.linspace(ends[0], ends[1], 5) * points
    return np.asarray(axes.transData.transform(anchors)) * points


def _marks(axes: Axes, points: float) -> Float[np.ndarray, "m 4"]:
    """Boxes of every marker, in points."""
    boxes = [np.empty((0, 4))]
    for line in axes.lines:
        if line.get_marker() not in ("", "None", None):
            at = np.asarray(line.get_transform().transform(line.get_xydata())) * points
            half = line.get_markersize() / 2 + 1
            boxes.append(np.concatenate([at - half, at + half], 1))
    return np.concatenate(boxes)


def _strokes(axes: Axes, points: float) -> Float[np.ndarray, "m 4"]:
    """Boxes along every line and bar, in points."""
    paths = [line.get_transform().transform(line.get_xydata()) for line in axes.lines if line.get_linestyle() != "None"]
    for collection in axes.collections:
        if hasattr(collection, "get_segments"):
            paths += [axes.transData.transform(segment) for segment in collection.get_segments()]
    return np.concatenate([np.empty((0, 4)), *(_dense(path * points) for path in paths if len(path) > 1)])


def _dense(path: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "m 4"]:
    """Boxes along a line, one every three points."""
    parts = [np.linspace(a, b, max(2, int(np.hypot(*(b - a)) / 3) + 1)) for a, b in pairwise(path)]
    at = np.concatenate(parts)
    return np.concatenate([at - 1.5, at + 1.5], 1)


def _arrow(
    axes: Axes, better: tuple[int, int], obstacles: Float[np.ndarray, "m 4"], bounds: Float[np.ndarray, " 4"]
) -> Float[np.ndarray, " 4"]:
    """An arrow named "better" that points to the good corner, in the free place nearest to it; its box in points."""
    size = np.array([64.0, 30.0]) if all(better) else np.array([86.0, 14.0] if better[0] else [40.0, 40.0])
    room = bounds[2:] - bounds[:2] - size - 8
    steps = np.stack(np.meshgrid(np.linspace(0, 1, 25), np.linspace(0, 1, 25)), -1).reshape(-1, 2)
    good = np.array([(1 + b) / 2 if b else 0.5 for b in better])
    corners = bounds[:2] + 4 + steps * room
    boxes = np.concatenate([corners, corners + size], 1)
    cost = _overlap(boxes, obstacles).sum(1) + 60 * np.abs(steps - good).sum(1)
    box = boxes[int(cost.argmin())]
    middle = (box[:2] + box[2:]) / 2
    reach = np.array(better) * 12.0
    # The word stands behind the arrow, seen from the corner.
    word = middle - np.array([better[0] * 14.0, 0.0]) if better[0] else middle
    tip = middle + np.array([better[0] * 18.0, 0.0])
    scale = axes.figure.dpi / 72
    to_axes = axes.transAxes.inverted()
    start, end = (to_axes.transform(p * scale) for p in (tip - reach, tip + reach))
    look: dict[str, Any] = {
        "arrowstyle": "-|>",
        "color": PALE,
        "lw": 1.4,
        "shrinkA": 0,
        "shrinkB": 0,
        "mutation_scale": 11,
    }
    axes.annotate("", tuple(end), tuple(start), "axes fraction", "axes fraction", arrowprops=look, zorder=1)
    at = to_axes.transform(word * scale)
    axes.text(
        at[0], at[1], "better", transform=axes.transAxes, ha="center", va="center", color=PALE, style="italic", zorder=1
    )
    return box


def _dark(color: str) -> tuple[float, ...]:
    """The colour as ink: small letters need more contrast than marks."""
    from matplotlib.colors import to_rgb

    return tuple(0.72 * part for part in to_rgb(color))


def _halo() -> list[Any]:
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2.2, foreground="white")]


# Files


@contextmanager
def _style() -> Iterator[None]:
    """The look of every figure, whatever the user's settings are, and those again afterwards."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("figures need matplotlib: pip install 'atomtune[compare]'") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _figure() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained", facecolor="white")
    return figure, figure.add_subplot()


def _target(path: Path | str) -> Path:
    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise UserError(f"`path` must end in .svg or .png, got {path.name}")
    return path


def _write(figure: Figure, path: Path) -> Path:
    """Write the file, making its folder; another file there is replaced at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nameless: dict[str, Any] = {"Date": None, "Creator": "atomtune"} if path.suffix == ".svg" else {"Software": None}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(unfinished, format=path.suffix[1:], metadata=nameless)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
