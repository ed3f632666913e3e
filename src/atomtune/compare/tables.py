"""From rows of the benchmark to numbers with intervals, and from those to Markdown; numpy only."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from atomtune.errors import UserError

Row = Mapping[str, Any]
"""One measured operating point of one trained cell, or a failed cell (with `error`)."""

Cells = Mapping[str, Mapping[Any, float | None]]
"""By subject and seed, one value; None where it was not measured."""

Statistic = Literal["mean"] | Callable[[np.ndarray], Any]
"""What becomes of the subjects' means: their mean, or such as `np.median`."""

BY = ("method", "prior", "gate", "size", "knob", "knob_value", "formula")
"""What tells operating points apart."""


class Measure(NamedTuple):
    """How a measure is called, which way is better (1 up, -1 down, 0 neither), and how its values are printed."""

    label: str
    direction: int
    format: str


MEASURES = {
    "hypervolume": Measure("hypervolume", 1, ".3f"),
    "similarity": Measure("similarity", 1, ".3f"),
    "object_accuracy": Measure("named right", 1, ".0%"),
    "alignment": Measure("alignment", 1, ".0%"),
    "background": Measure("background", 1, ".0%"),
    "position": Measure("position", 1, ".0%"),
    "size_right": Measure("size right", 1, ".0%"),
    "style": Measure("style right", 1, ".0%"),
    "style_change": Measure("style changed", 1, ".0%"),
    "both": Measure("object and style right", 1, ".0%"),
    "other": Measure("other object right", 1, ".0%"),
    "drift": Measure("drift", -1, ".4f"),
    "pixel_drift": Measure("pixel drift", -1, ".4f"),
    "bleed": Measure("bleed", -1, ".4f"),
    "inner_leak": Measure("inner leak", -1, ".4f"),
    "inner_error": Measure("inner error", -1, ".4f"),
    "silence": Measure("silence", 1, ".0%"),
    "true_distance": Measure("distance to the truth", -1, ".4f"),
    "score": Measure("score", 1, ".3f"),
    "forgetting": Measure("forgetting", -1, ".3f"),
    "identical_output": Measure("identical output", 1, ".0%"),
    "density": Measure("atoms kept", 0, ".0%"),
    "trained_parameters": Measure("trained parameters", 0, ",.0f"),
    "bytes": Measure("bytes", -1, ",.0f"),
    "train_seconds": Measure("seconds of training", -1, ",.0f"),
}
"""Every measure that a table or a figure can show: the one place for their names and directions."""

ARROWS = {1: "↑", -1: "↓", 0: ""}


@dataclass(frozen=True)
class Interval:
    """A statistic over subjects with its bootstrap interval.

    `mean` is NaN without values; `low` and `high` are NaN with fewer than two subjects, which say nothing of others.
    `cells` counts the values that took part, `missing` those that were not measured.
    """

    mean: float
    low: float
    high: float
    subjects: int
    cells: int
    missing: int = 0
    level: float = 0.95


def interval(
    values: Mapping[str, Sequence[float | None] | Mapping[Any, float | None]],
    statistic: Statistic = "mean",
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """The mean of the subjects' means, with its cluster bootstrap over subjects.

    A resample draws subjects with replacement and takes all their seeds; percentile interval (Efron 1979; clusters as
    in Davison & Hinkley 1997, section 3.8). Values that are None or not finite are left out and counted.
    """
    present = {subject: _present(inner) for subject, inner in values.items()}
    missing = sum(len(inner) - len(present[subject]) for subject, inner in values.items())
    means = np.array([_mean(present[subject]) for subject in sorted(present) if present[subject]])
    of = np.mean if statistic == "mean" else statistic

    def over(draws: Int[np.ndarray, "resamples subjects"]) -> Float[np.ndarray, " resamples"]:
        return means[draws].mean(1) if statistic == "mean" else np.apply_along_axis(of, 1, means[draws])

    value = float(of(means)) if len(means) else math.nan
    low, high = _bounds(over, len(means), resamples, seed, level)
    return Interval(value, low, high, len(means), sum(map(len, present.values())), missing, level)


def difference(
    a: Cells, b: Cells, statistic: Statistic = "mean", resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """`interval` of a minus b, paired by subject and seed; a cell that only one of them has counts as missing."""
    pairs = _pairs(a, b)
    values = {
        subject: {k: None if x is None or y is None else x - y for k, (x, y) in inner.items()}
        for subject, inner in pairs.items()
    }
    return interval(values, statistic, resamples, seed, level)


def ratio(a: Cells, b: Cells, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """The mean of a over the mean of b on the cells that both have, both means over the same resampled subjects.

    Its bounds are NaN where a resample's mean of b is zero.
    """
    every = _pairs(a, b)
    pairs = {s: [(x, y) for x, y in inner.values() if x is not None and y is not None] for s, inner in every.items()}
    subjects = sorted(s for s in pairs if pairs[s])
    means = np.array([[_mean([p[side] for p in pairs[s]]) for s in subjects] for side in (0, 1)])

    def over(draws: Int[np.ndarray, "resamples subjects"]) -> Float[np.ndarray, " resamples"]:
        return _divide(means[0][draws].mean(1), means[1][draws].mean(1))

    value = float(_divide(means[0].mean(), means[1].mean())) if subjects else math.nan
    low, high = _bounds(over, len(subjects), resamples, seed, level)
    cells = sum(map(len, pairs.values()))
    return Interval(value, low, high, len(subjects), cells, sum(map(len, every.values())) - cells, level)


def cells_of(rows: Iterable[Row], measure: str) -> dict[str, dict[Any, float | None]]:
    """A measure by subject and seed, failed cells left out; where rows name no subject, every seed stands for one."""
    cells: dict[str, dict[Any, float | None]] = {}
    for row in rows:
        if row.get("error"):
            continue
        subject, seed = _cell(row)
        if seed in cells.setdefault(subject, {}):
            raise UserError(
                f"`rows` must hold one row a subject and seed, got two of {row.get('method')} for {subject}, "
                f"seed {seed}. Add what tells them apart to `by`, or pass one of them."
            )
        cells[subject][seed] = row.get(measure)
    return cells


def hypervolume(points: Float[np.ndarray, "n d"], reference: Sequence[float]) -> float:
    """Volume that the points dominate above the reference, all coordinates to be maximised, exactly.

    The S metric of Zitzler & Thiele (1999), by slicing along the last coordinate (While et al. 2006): made for a few
    dozens of points. A point that is not above the reference in every coordinate adds nothing.
    """
    floor = np.asarray(reference, dtype=np.float64)
    heights = np.asarray(points, dtype=np.float64)
    if heights.size == 0:
        return 0.0
    if heights.ndim != 2 or heights.shape[1:] != floor.shape:
        raise ValueError(f"`points` must be (n, {len(floor)}) as the reference is, got {heights.shape}")
    if not (np.isfinite(heights).all() and np.isfinite(floor).all()):
        raise ValueError("`points` and `reference` must be finite")
    heights = heights - floor
    return _dominated(heights[(heights > 0).all(1)])


def _dominated(heights: Float[np.ndarray, "n d"]) -> float:
    """Volume of the union of the boxes from the origin to each point."""
    if heights.shape[1] == 1 or not len(heights):
        return float(heights.max(initial=0.0))
    heights = heights[np.argsort(-heights[:, -1], kind="stable")]
    slabs = heights[:, -1] - np.append(heights[1:, -1], 0.0)
    return sum(float(slab) * _dominated(heights[: i + 1, :-1]) for i, slab in enumerate(slabs) if slab > 0)


def base_reference(rows: Iterable[Row]) -> dict[str, tuple[float, float, float]]:
    """By subject, the reference of `method_hypervolume`: the base's own similarity, alignment 0, drift 1."""
    cells = cells_of((row for row in rows if row.get("method") == "base"), "similarity")
    present = {subject: _present(inner) for subject, inner in cells.items()}
    return {subject: (_mean(values), 0.0, 0.0) for subject, values in present.items() if values}


def method_hypervolume(
    rows: Sequence[Row],
    reference: Mapping[str, Sequence[float]],
    by: Sequence[str] = ("method", "prior", "gate", "size"),
    measures: Sequence[str] = ("similarity", "alignment", "drift"),
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> list[dict[str, Any]]:
    """What a method's operating points dominate together, by subject, as a summary with the measure `hypervolume`.

    A subject's point is the mean over its seeds, and counts where no other has more of them; where lower is better, its
    coordinate is 1 - value. `reference` holds a point a subject in the same coordinates, as `base_reference` makes it.
    Rows that lack one of the measures are left out, and counted as missing unless all rows of their operating point do;
    `points` counts the operating points that took part: for a subject at most.
    """
    summary = []
    for key, members, failed in _groups(rows, by):
        volumes: dict[str, list[float | None]] = {}
        parts = [_split(part, measures) for part in _operating_points(members)]
        complete = [row for whole, _ in parts for row in whole]
        counted = 0
        for subject in {_cell(row)[0] for row in members}:
            if subject not in reference:
                raise UserError(f"`reference` must have a point for every subject, got none for {subject}")
            own = [row for row in complete if _cell(row)[0] == subject]
            whole_points = _operating_points(own)
            seeds = max(map(len, whole_points), default=0)
            points = [_point(part, measures) for part in whole_points if len(part) == seeds]
            counted = max(counted, len(points))
            volumes[subject] = [hypervolume(np.array(points), reference[subject]) if points else None]
        found = interval(volumes, "mean", resamples, seed, level)
        cells = {_cell(row) for row in complete}
        entry = _entry(by, key, members, failed) | {"points": counted}
        counts = {"cells": len(cells), "missing": sum(len(lacking) for whole, lacking in parts if whole)}
        summary.append(entry | {"hypervolume": replace(found, **counts)})
    return summary


def summarise(
    rows: Sequence[Row],
    by: Sequence[str] = BY,
    measures: Sequence[str] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> list[dict[str, Any]]:
    """One entry an operating point: its keys, `subjects`, `seeds`, `failed`, and an Interval for each measure.

    Default measures: all of `MEASURES` that some row holds. `failed` counts the failed cells that the entry lacks: a
    failed row counts for every entry that it does not contradict, an absent or null field contradicting nothing.
    """
    if measures is None:
        measures = [m for m in MEASURES if m not in by and any(row.get(m) is not None for row in rows)]
    summary = []
    for key, members, failed in _groups(rows, by):
        found = {m: interval(cells_of(members, m), "mean", resamples, seed, level) for m in measures}
        summary.append(_entry(by, key, members, failed) | found)
    return summary


def is_ours(entry: Row) -> bool:
    """Whether the method is one of atomtune's own: their names start with `atoms`."""
    return str(entry.get("method")).startswith("atoms")


def is_base(entry: Row) -> bool:
    return entry.get("method") == "base"


def is_reference(entry: Row) -> bool:
    """Whether it is no method: the base, or the truth."""
    return entry.get("method") in ("base", "truth")


def overlaps(a: Interval, b: Interval) -> bool:
    """Whether the intervals share a point; an unknown bound excludes nothing."""
    return not (a.high < b.low or b.high < a.low)


def best(entries: Iterable[Row], measure: str, among: Callable[[Row], bool] | None = None) -> Row | None:
    """The entry of a summary, or the row, with the best value of a measure: the first of equals, None without any."""
    direction = MEASURES[measure].direction
    if not direction:
        raise ValueError(f"`{measure}` has no better or worse")
    found = [(mean_of(entry, measure), entry) for entry in entries if among is None or among(entry)]
    found = [(value, entry) for value, entry in found if not math.isnan(value)]
    return max(found, key=lambda pair: direction * pair[0])[1] if found else None


def mean_of(entry: Row, measure: str) -> float:
    """A measure of an entry or a row as a number, NaN where there is none."""
    value = entry.get(measure)
    value = value.mean if isinstance(value, Interval) else value
    return math.nan if value is None else float(value)


def markdown(
    summary: Sequence[Row],
    measures: Sequence[str],
    labels: Mapping[str, str] | None = None,
    order: str | None = None,
    command: str = "",
) -> str:
    """A Markdown table with "mean (low to high)" cells, its caption, and the command that made the rows.

    `command` has a line a command. `labels` holds the columns that name a row, key -> header (default: the method); a
    column tells the seeds where they differ. The rows go by `order`, a measure
    (default: the first; best on top, base and truth last) or a key. In each column the better of our best and the best
    rival's is bold, where their intervals do not overlap; base and truth are no rivals.
    """
    labels = {"method": "method"} if labels is None else labels
    order = measures[0] if order is None else order
    entries = sorted(summary, key=lambda entry: _rank(entry, order))
    bold = {(id(entry), m) for m in measures if (entry := _winner(entries, m)) is not None}
    headers = [*labels.values(), *(f"{MEASURES[m].label} {ARROWS[MEASURES[m].direction]}".strip() for m in measures)]
    lines = []
    for entry in entries:
        values = [_value_text(entry.get(m), m) for m in measures]
        values = [f"**{v}**" if (id(entry), m) in bold else v for v, m in zip(values, measures, strict=True)]
        lines.append([*(_key_text(entry.get(k)) for k in labels), *values])
    if any(entry.get("failed") for entry in entries):
        headers.append("failed")
        lines = [[*line, str(entry.get("failed") or "")] for line, entry in zip(lines, entries, strict=True)]
    if len({entry["seeds"] for entry in entries if entry.get("seeds") and not is_reference(entry)}) > 1:
        headers.append("seeds")
        lines = [[*line, str(entry.get("seeds", ""))] for line, entry in zip(lines, entries, strict=True)]
    table = _table(headers, lines, left=len(labels))
    after = ["", _caption(entries, measures, bool(bold)), *(f"\n`{line}`" for line in command.splitlines())]
    return "\n".join([*table, *after])


def _present(values: Sequence[float | None] | Mapping[Any, float | None]) -> list[float]:
    inner = values.values() if isinstance(values, Mapping) else values
    return [float(v) for v in inner if v is not None and math.isfinite(v)]


def _mean(values: Sequence[float]) -> float:
    """The mean, the same in whatever order."""
    return math.fsum(values) / len(values)


def _divide(a: Any, b: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(b == 0, np.nan, np.divide(a, b))


@lru_cache(maxsize=64)
def _draws(subjects: int, resamples: int, seed: int) -> Int[np.ndarray, "resamples subjects"]:
    return np.random.default_rng(seed).integers(subjects, size=(resamples, subjects))


def _bounds(
    over: Callable[[np.ndarray], np.ndarray], subjects: int, resamples: int, seed: int, level: float
) -> tuple[float, float]:
    """Quantiles of a statistic over resampled subjects."""
    if not 0 < level < 1:
        raise ValueError(f"`level` must be between 0 and 1, got {level}")
    if subjects < 2:
        return math.nan, math.nan
    low, high = np.quantile(over(_draws(subjects, resamples, seed)), ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def _pairs(a: Cells, b: Cells) -> dict[str, dict[Any, tuple[float | None, float | None]]]:
    """By subject and seed of either, what both hold, None where it is missing or not finite."""

    def get(cells: Cells, subject: str, seed: Any) -> float | None:
        value = cells.get(subject, {}).get(seed)
        return value if value is not None and math.isfinite(value) else None

    return {
        subject: {
            seed: (get(a, subject, seed), get(b, subject, seed)) for seed in {*a.get(subject, {}), *b.get(subject, {})}
        }
        for subject in {*a, *b}
    }


def _cell(row: Row) -> tuple[str, Any]:
    """Subject and seed of a row."""
    subject, seed = row.get("subject"), row.get("seed")
    return f"seed {seed}" if subject is None else str(subject), seed


def _groups(rows: Sequence[Row], by: Sequence[str]) -> list[tuple[tuple[Any, ...], list[Row], int]]:
    """(values of `by`, rows, number of failed cells) of every group, sorted."""
    tasks = {row.get("task") for row in rows}
    if len(tasks) > 1 and "task" not in by:
        raise UserError(f"`rows` must be of one task, got {', '.join(sorted(map(str, tasks)))}. Add task to `by`.")
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if not row.get("error"):
            groups.setdefault(tuple(row.get(k) for k in by), []).append(row)
    failed: dict[tuple[Any, ...], set[tuple[str, Any]]] = {}
    for row in rows:
        if row.get("error"):
            own = tuple(row.get(k) for k in by)
            homes = [key for key in groups if all(o is None or o == k for o, k in zip(own, key, strict=True))]
            for key in homes or [own]:
                if _cell(row) not in map(_cell, groups.get(key, ())):
                    failed.setdefault(key, set()).add(_cell(row))
    keys = sorted({**groups, **failed}, key=lambda key: tuple(map(_sortable, key)))
    return [(key, groups.get(key, []), len(failed.get(key, ()))) for key in keys]


def _entry(by: Sequence[str], key: Sequence[Any], members: Sequence[Row], failed: int) -> dict[str, Any]:
    cells = {_cell(row) for row in members}
    subjects = [subject for subject, _ in cells]
    seeds = max(map(subjects.count, subjects), default=0)
    return dict(zip(by, key, strict=True)) | {"subjects": len(set(subjects)), "seeds": seeds, "failed": failed}


def _operating_points(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows by operating point."""
    points: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        points.setdefault(tuple(row.get(k) for k in BY), []).append(row)
    return list(points.values())


def _split(rows: Sequence[Row], measures: Sequence[str]) -> tuple[list[Row], list[Row]]:
    """The rows that have all the measures, and those that do not."""
    whole = [len(_present([row.get(m) for m in measures])) == len(measures) for row in rows]
    return [r for r, w in zip(rows, whole, strict=True) if w], [r for r, w in zip(rows, whole, strict=True) if not w]


def _point(rows: Sequence[Row], measures: Sequence[str]) -> list[float]:
    """Means over the seeds of one subject's operating point, 1 - mean where lower is better."""
    means = [_mean(_present(cells)) for m in measures for cells in cells_of(rows, m).values()]
    return [1 - v if MEASURES[m].direction < 0 else v for v, m in zip(means, measures, strict=True)]


def _sortable(value: Any) -> tuple[int, float, str]:
    """None, then numbers, then words."""
    if value is None:
        return 0, 0.0, ""
    return (1, float(value), "") if isinstance(value, bool | int | float) else (2, 0.0, str(value))


def _rank(entry: Row, order: str) -> tuple[Any, ...]:
    """Best first, unknown after, base and truth last; ties and keys in ascending order."""
    keys = tuple(_sortable(entry.get(k)) for k in BY)
    if order not in MEASURES or MEASURES[order].direction == 0:
        value = entry.get(order)
        return _sortable(value.mean if isinstance(value, Interval) else value), *keys
    value = mean_of(entry, order)
    return (
        is_reference(entry),
        math.isnan(value),
        0.0 if math.isnan(value) else -MEASURES[order].direction * value,
        keys,
    )


def _winner(entries: Sequence[Row], measure: str) -> Row | None:
    """The better of our best and the best rival, if their intervals exclude each other."""
    if not MEASURES[measure].direction:
        return None
    ours = best(entries, measure, is_ours)
    rival = best(entries, measure, lambda entry: not (is_ours(entry) or is_reference(entry)))
    if ours is None or rival is None or overlaps(ours[measure], rival[measure]):
        return None
    return best((ours, rival), measure)


def _value_text(value: Interval | None, measure: str) -> str:
    if value is None or math.isnan(value.mean):
        return ""
    mean, low, high = (_number(v, MEASURES[measure].format) for v in (value.mean, value.low, value.high))
    return mean if math.isnan(value.low) or mean == low == high else f"{mean} ({low} to {high})"


def _number(value: float, form: str) -> str:
    """The number, told from zero: <0.0001 rather than 0.0000 where it is more than that."""
    text = format(value, form)
    return "<" + re.sub(r"0(%?)$", r"1\1", text) if value > 0 and not re.search("[1-9]", text) else text


def _key_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _table(headers: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of a Markdown table whose source is aligned too: the first `left` columns left, the others right."""
    widths = [max(3, *map(len, column)) for column in zip(headers, *lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return [line(headers), line(rule), *map(line, lines)]


def _caption(entries: Sequence[Row], measures: Sequence[str], bold: bool) -> str:
    def span(counts: Iterable[int], one: str) -> str:
        known = sorted({c for c in counts if c}) or [0]
        number = str(known[0]) if len(known) == 1 else f"{known[0]} to {known[-1]}"
        return f"{number} {one}" if known == [1] else f"{number} {one}s"

    found = [entry[m] for entry in entries for m in measures if isinstance(entry.get(m), Interval)]
    trained = [entry for entry in entries if not is_reference(entry)] or entries
    subjects = span((entry.get("subjects", 0) for entry in trained), "subject")
    seeds = span((entry.get("seeds", 0) for entry in trained), "seed")
    levels = {f"{value.level:.0%}" for value in found if not math.isnan(value.low)}
    parts = [
        f"{subjects} x {seeds}, mean"
        + (f" ({' and '.join(sorted(levels))} interval, bootstrap over subjects)" if levels else "")
    ]
    if any(MEASURES[m].direction for m in measures):
        parts.append("↑ higher is better, ↓ lower")
    if bold:
        parts.append("Bold: the better of ours and the best rival, where their intervals do not overlap")
    if missing := sum(value.missing for value in found if value.cells):
        parts.append(f"{missing} values not measured")
    return ". ".join(parts) + "."
