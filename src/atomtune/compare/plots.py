"""Figures of a summary, as SVG or PNG: the same entries give the same bytes, and no state of matplotlib's changes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atomtune.compare.tables import ARROWS, BY, MEASURES, Interval, Row, is_base, is_ours, is_reference, mean_of
from atomtune.errors import UserError
from atomtune.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE, DPI = (7.0, 4.7), 200
"""Inches: 700 pixels wide on a page, at 100 pixels an inch; PNGs have twice as many."""

LINE = ("method", "prior", "gate", "size")
SWEEP = (*LINE, "knob", "formula")
"""What makes entries the points of one method, and of one sweep of it."""

THRESHOLDS = ("purity", "contain", "beside", "contain-beside")
"""Knobs at which 0 removes nothing; of the others it is 1."""

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

KNOBS = {"atoms": "strongest kept", "purity": "pure kept", "random": "random kept", "scale": "scaled"}
STROKES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)))

STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.edgecolor": "#9A9A9A",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#EDEDED",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.bottom": False,
    "ytick.left": False,
    "legend.frameon": False,
    "legend.labelspacing": 0.35,
    "svg.hashsalt": "atomtune",
}


def trade_off(summary: Iterable[Row], x: str, y: str, path: Path | str) -> Path:
    """One measure against another: every method at full strength, with its knobs' points on thin lines.

    The base is a star. A measure where low is good and whose values differ twentyfold gets a logarithmic axis.
    """
    entries = _drawable(summary, x, y)
    base, rest = _apart(entries, y)
    # The last one of a method gets its name: with a gate, and large.
    full = sorted((entry for entry in rest if _is_full(entry)), key=lambda entry: bool(entry.get("gate")))
    look = Look(rest)
    with _figure(path) as axes:
        _scale(axes, "x", x, entries)
        _scale(axes, "y", y, entries)
        for points in _sweeps(rest):
            look.draw(axes, points, x, y, joined=True, small=True)
        for entry in full:
            look.draw(axes, [entry], x, y)
        for entry in base:
            axes.plot(mean_of(entry, x), mean_of(entry, y), "*", color=INK, ms=12, mec="white", mew=0.6, zorder=7)
        look.legend(axes)
        _better(axes, MEASURES[x].direction, MEASURES[y].direction)
        # Variants of a method lie close together: the legend has their names.
        ours = [entry for entry in full if is_ours(entry) and ":" not in entry["method"]]
        named = {look.name(entry): entry for entry in [*ours, *base]}
        _label(axes, {name: (mean_of(entry, x), mean_of(entry, y)) for name, entry in named.items()})
    return Path(path)


def against_size(summary: Iterable[Row], measure: str, path: Path | str) -> Path:
    """A measure at full strength against trained parameters: a line a method, and the base as a level."""
    x = "trained_parameters"
    base, rest = _apart(summary, measure)
    # The axis tells the size.
    full = [{**entry, "size": None} for entry in rest if _is_full(entry) and mean_of(entry, x) > 0]
    return _lines(_groups(_drawable(full, x, measure), LINE), base, x, measure, path)


def sweep(summary: Iterable[Row], x: str, y: str, path: Path | str) -> Path:
    """A measure along every knob of every method, `x` being `knob_value` or a measure: atoms beside their controls.

    Every line holds its method's full strength; the base is a level.
    """
    base, rest = _apart(summary, y)
    points = [entry for points in _sweeps(rest) for entry in points]
    return _lines(_groups(_drawable(points, x, y), SWEEP), base, x, y, path)


def _lines(groups: list[list[Row]], base: Sequence[Row], x: str, y: str, path: Path | str) -> Path:
    """A line a group; the base as a level, or only as a number in the legend where it is far off."""
    look = Look([entry for group in groups for entry in group])
    with _figure(path) as axes:
        _scale(axes, "x", x, look.entries)
        _scale(axes, "y", y, [*look.entries, *base])
        for group in groups:
            look.draw(axes, sorted(group, key=lambda entry: mean_of(entry, x)), x, y, joined=True)
        low, high = axes.get_ylim()
        levels = [mean_of(entry, y) for entry in base]
        if levels and (axes.get_yscale() != "linear" or 2 * low - high <= levels[0] <= 2 * high - low):
            axes.axhline(levels[0], color=INK, lw=0.9, ls="--", zorder=2)
        look.legend(axes, [f"{level:{MEASURES[y].format}}" for level in levels])
    return Path(path)


# From entries to lines


def _drawable(summary: Iterable[Row], x: str, y: str) -> list[Row]:
    """The entries that have both."""
    for measure in (x, y):
        if measure not in MEASURES and measure != "knob_value":
            raise UserError(f"a figure's measure must be one of {', '.join(MEASURES)}, got {measure}")
    found = [entry for entry in summary if not (math.isnan(mean_of(entry, x)) or math.isnan(mean_of(entry, y)))]
    if not found:
        raise UserError(f"nothing to draw: no entry of the summary holds both `{x}` and `{y}`")
    return found


def _apart(summary: Iterable[Row], measure: str) -> tuple[list[Row], list[Row]]:
    """The base, if it has the measure, and all others, in an order of their own: ours last."""
    entries = sorted(summary, key=lambda entry: (is_ours(entry), *(str(entry.get(k)).rjust(12) for k in BY)))
    base = [entry for entry in entries if is_base(entry) and not math.isnan(mean_of(entry, measure))]
    return base[:1], [entry for entry in entries if not is_reference(entry)]


def _groups(entries: Iterable[Row], by: Sequence[str]) -> list[list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for entry in entries:
        groups.setdefault(tuple(entry.get(k) for k in by), []).append(entry)
    return list(groups.values())


def _is_full(entry: Row) -> bool:
    return entry.get("knob") in (None, "full") or (entry["knob"] == "scale" and entry.get("knob_value") == 1)


def _sweeps(entries: Sequence[Row]) -> list[list[Row]]:
    """The points of every knob of every method, with its full strength as one of them."""
    sweeps = _groups([entry for entry in entries if not _is_full(entry)], SWEEP)
    for points in sweeps:
        same = [e for e in entries if _is_full(e) and all(e.get(k) == points[0].get(k) for k in LINE)]
        end = {"knob_value": 0.0 if points[0]["knob"] in THRESHOLDS else 1.0}
        points += [{**entry, **{k: points[0].get(k) for k in SWEEP}, **end} for entry in same[:1]]
        points.sort(key=lambda entry: float(entry["knob_value"]))
    return sweeps


def _family(method: str) -> str:
    name = re.split("[-:]", method)[0]
    return next((family for family, (_, names) in FAMILIES.items() if name in names.split()), "other")


# Marks


class Look:
    """Colours by family, markers by method, strokes by knob, sizes by rank; hollow is without a gate where both are."""

    def __init__(self, entries: Sequence[Row]) -> None:
        self.entries = entries
        dialled = [entry for entry in entries if not _is_full(entry)]
        self.gate = any(len({entry.get("gate") for entry in own}) > 1 for own in _groups(entries, ["method"]))
        self.formula = len({entry.get("formula") for entry in dialled if entry.get("formula")}) > 1
        found = sorted((list(FAMILIES).index(_family(str(e["method"]))), self.name(e)) for e in entries)
        self.families = {name: list(FAMILIES)[i] for i, name in found}
        self.markers = dict(zip(self.families, cycle(MARKERS)))
        self.sizes = sorted({entry["size"] for entry in entries if entry.get("size")})
        self.strokes = dict(zip(dict.fromkeys(map(self.knob, dialled)), cycle(STROKES)))

    def name(self, entry: Row) -> str:
        return re.sub("[:,]", "\n", str(entry["method"]))

    def knob(self, entry: Row) -> str:
        if self.formula and entry.get("formula"):
            return f"kept by {entry['formula']}".replace("_", " ")
        return KNOBS.get(str(entry.get("knob")), str(entry.get("knob")))

    def magnify(self, size: int | None) -> float:
        return 0.8 + 0.4 * (self.sizes.index(size) + 0.5) / len(self.sizes) if size else 1.0

    def mark(self, name: str, filled: bool = True) -> dict[str, Any]:
        color = FAMILIES[self.families[name]][0]
        fill = {"mfc": color, "mec": "white", "mew": 0.5} if filled else {"mfc": "white", "mec": color, "mew": 1.2}
        return {"color": color, "marker": self.markers[name], **fill}

    def draw(self, axes: Axes, points: list[Row], x: str, y: str, joined: bool = False, small: bool = False) -> None:
        """Points with their intervals; ours larger and on top."""
        ours, first = is_ours(points[0]), points[0]
        look = self.mark(self.name(first), not self.gate or bool(first.get("gate")))
        look |= {"ecolor": (look["color"], 0.2 if small else 0.5), "ls": "none"}
        look |= {"lw": 1.6, "elinewidth": 1.2, "zorder": 5} if ours else {"lw": 1.0, "elinewidth": 0.9, "zorder": 3}
        if joined:
            look["ls"] = self.strokes.get(self.knob(first), "-")
        (xs, x_reach), (ys, y_reach) = _means(points, x), _means(points, y)
        size = (8.5 if ours else 6.5) * (0.75 if small else self.magnify(first.get("size")))
        axes.errorbar(xs, ys, y_reach, x_reach, ms=size, **look)

    def legend(self, axes: Axes, levels: Sequence[str] = ()) -> None:
        """At the right: methods by family, then what else the marks tell."""
        from matplotlib.lines import Line2D

        def dot(**look: Any) -> Line2D:
            return Line2D([], [], **{"ls": "none", "marker": "o", "color": PALE, "ms": 6, **look})

        parts: dict[str, list[tuple[Line2D, str]]] = {}
        for name, family in self.families.items():
            parts.setdefault(family, []).append((dot(**self.mark(name)), name))
        parts["gate"] = [(dot(), "with"), (dot(mfc="white", mew=1.2), "without")] if self.gate else []
        parts["rank"] = [(dot(ms=6.5 * self.magnify(s)), str(s)) for s in self.sizes if len(self.sizes) > 1]
        parts["knobs"] = [(Line2D([], [], color=PALE, ls=stroke), knob) for knob, stroke in self.strokes.items()]
        parts["base"] = [(Line2D([], [], color=INK, lw=0.9, ls="--"), level) for level in levels]
        title = dot(marker="")
        rows = [row for part, own in parts.items() if own for row in ((title, part), *own)]
        look: dict[str, Any] = {"loc": "outside right upper", "ncols": max(1, math.ceil(len(rows) / 28))}
        legend = axes.figure.legend([handle for handle, _ in rows], [name for _, name in rows], **look)
        for (handle, _), text in zip(rows, legend.get_texts(), strict=True):
            if handle is title:
                text.set(color=PALE, style="italic")


def _means(points: Sequence[Row], measure: str) -> tuple[np.ndarray, np.ndarray]:
    """Means (n,), and how far their intervals reach below and above them (2, n)."""
    means = np.array([mean_of(entry, measure) for entry in points])
    spans = [(v.low, v.high) if isinstance(v := entry.get(measure), Interval) else (math.nan,) * 2 for entry in points]
    low, high = np.array(spans).T
    return means, np.nan_to_num(np.maximum([means - low, high - means], 0))


def _better(axes: Axes, right: int, up: int) -> None:
    """The word outside the good corner, and an arrow to there."""
    word = "better " + "↙←↖↓ ↑↘→↗"[3 * right + up + 4] if right or up else ""
    look: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "color": PALE}
    look |= {"style": "italic", "ha": "left" if right < 0 else "right", "va": "top" if up < 0 else "bottom"}
    axes.annotate(word, (right >= 0, up >= 0), (0, -20 if up < 0 else 5), **look)


def _label(axes: Axes, names: dict[str, tuple[float, float]]) -> None:
    """Names at their points, each on the side that has the most room."""
    from matplotlib.patheffects import withStroke

    figure: Any = axes.figure
    figure.draw_without_rendering()  # lays out: transData now gives points
    marked = [line.get_xydata() for line in axes.lines if line.get_marker() in (*MARKERS, "*")]
    taken = axes.transData.transform(np.concatenate(marked))
    low, high = np.array(axes.bbox.extents).reshape(2, 2)
    for name, at in names.items():
        half = np.array([3.1 * max(map(len, name.split("\n"))), 5.5 * (1 + name.count("\n"))])
        sides = np.array([(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)])
        offsets = sides * (half + np.where(sides.all(1, keepdims=True), 3, 6))
        spots = axes.transData.transform(at) + offsets
        room = np.abs((spots[:, None] - taken) / (half + 4)).max(2).min(1).clip(max=1.5)
        best = int((room - 2 * ((spots - half < low) | (spots + half > high)).any(1)).argmax())
        taken = np.concatenate([taken, spots[best : best + 1]])
        look: dict[str, Any] = {"color": INK if name == "base" else FAMILIES["ours"][0], "weight": "bold", "zorder": 9}
        look |= {"path_effects": [withStroke(linewidth=2.2, foreground="white")], "ha": "center", "va": "center"}
        axes.annotate(name, at, offsets[best], textcoords="offset points", **look)


# Axes and files


def _scale(axes: Axes, which: str, measure: str, entries: Sequence[Row]) -> None:
    """Label, scale and ticks of the axis of a measure."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    known = MEASURES.get(measure)
    axis, set_scale = getattr(axes, f"{which}axis"), getattr(axes, f"set_{which}scale")
    axis.set_label_text(f"{known.label} {ARROWS[known.direction]}".strip() if known else "share kept, or strength")
    values = [mean_of(entry, measure) for entry in entries]
    positive = [v for v in values if v > 0] or [1.0]
    least, most = min(positive), max(positive)
    if measure == "trained_parameters":
        set_scale("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if most > 8 * least else (1, 1.5, 2, 3, 4, 5, 6, 8)))
        axis.set_major_formatter(EngFormatter(sep=""))
        axis.set_minor_formatter(NullFormatter())
    elif known and known.direction < 0 and min(values) >= 0 and most > 20 * least:
        least = max(least, most * 1e-5)
        if min(values) >= least:
            set_scale("log")
        else:
            set_scale("symlog", linthresh=10 ** math.floor(math.log10(least)), linscale=0.4)
    else:
        axis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
        if known is None or known.format.endswith("%"):
            axis.set_major_formatter(lambda value, _: f"{100 * value:g}%")


@contextmanager
def _figure(path: Path | str) -> Iterator[Axes]:
    """Axes in our look, whatever the user's settings are; the file is written at the end, and the settings are back."""
    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise UserError(f"`path` must end in .svg or .png, got {path.name}")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("figures need matplotlib: pip install 'atomtune[compare]'") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=SIZE, dpi=72, layout="constrained", facecolor="white")
        yield figure.add_subplot()
        _write(figure, path)


def _write(figure: Figure, path: Path) -> None:
    """Write the file, making its folder; another file there is replaced at once or not at all."""
    nameless: dict[str, Any] = {"Date": None, "Creator": "atomtune"} if path.suffix == ".svg" else {"Software": None}
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], dpi=DPI, metadata=nameless)
    write_whole(path, drawn.getvalue())
