"""Intervals, hypervolumes and tables: against brute force, and with holes in the rows."""

import itertools
import math
from typing import Any

import numpy as np
import pytest

from atomtune.compare import tables
from atomtune.compare.tables import (
    MEASURES,
    Interval,
    base_reference,
    best,
    cells_of,
    difference,
    hypervolume,
    interval,
    markdown,
    method_hypervolume,
    overlaps,
    ratio,
    summarise,
)
from atomtune.errors import UserError

SUBJECTS = ("cow", "drum", "fox", "kite", "mug")


def row(method: str, subject: str, seed: int = 0, **values: Any) -> dict[str, Any]:
    known = {"task": "customization", "size": 16, "prior": "distill", "gate": None}
    point = {"knob": "full", "knob_value": 1.0, "formula": None}
    return {**known, "method": method, "subject": subject, "seed": seed, **point, **values}


def failure(method: str, subject: str, seed: int) -> dict[str, Any]:
    return {"task": "customization", "method": method, "subject": subject, "seed": seed, "error": "out of memory"}


def benchmark() -> list[dict[str, Any]]:
    """Ours contained, lora alike but drifting; two seeds of five subjects."""
    rows = []
    for i, (subject, seed) in enumerate(itertools.product(SUBJECTS, (0, 1))):
        noise = 0.001 * (i % 7)
        rows += [
            row("base", subject, seed, prior=None, similarity=0.5 + noise, alignment=0.95, drift=0.0),
            row("lora", subject, seed, similarity=0.92 + noise, alignment=0.7, drift=0.04 + noise),
            row("atoms", subject, seed, similarity=0.921 + noise, alignment=0.8, drift=0.004 + noise / 9),
        ]
    return rows


def of(low: float, high: float) -> Interval:
    return Interval((low + high) / 2, low, high, 3, 3)


# Intervals


def test_the_mean_is_of_the_subjects_means() -> None:
    found = interval({"a": [0.0, 0.0, 0.0, 0.0], "b": [1.0]})
    assert (found.mean, found.subjects, found.cells, found.missing) == (0.5, 2, 5, 0)


def test_missing_values_are_left_out_and_counted() -> None:
    found = interval({"a": [1.0, None], "b": [math.nan, 3.0], "c": [None]})
    assert (found.mean, found.subjects, found.cells, found.missing) == (2.0, 2, 2, 3)


def test_no_values_and_one_subject_have_no_interval() -> None:
    nothing, one = interval({}), interval({"a": [1.0, 2.0]})
    assert math.isnan(nothing.mean)
    assert (nothing.subjects, nothing.cells) == (0, 0)
    assert one.mean == 1.5
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert math.isnan(interval({"a": [None]}).mean)


def test_the_bootstrap_is_that_of_every_resample() -> None:
    values = {"a": [0.0], "b": [1.0, 2.0], "c": [5.0], "d": [2.3, 2.5], "e": [-4.4]}
    means = [np.mean(draw) for draw in itertools.product((0.0, 1.5, 5.0, 2.4, -4.4), repeat=5)]
    for level in (0.5, 0.9):
        found = interval(values, level=level, resamples=100_000)
        bounds = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
        assert (found.low, found.high) == pytest.approx(tuple(bounds), abs=0.03)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        subjects = random.normal(0, 1, 20)
        found = interval({f"{i:02}": s + random.normal(0, 0.3, 3) for i, s in enumerate(subjects)}, resamples=400)
        hits += found.low <= 0 <= found.high
    assert 0.88 <= hits / 300 <= 0.98


def test_a_seed_of_a_subject_is_no_subject() -> None:
    few = interval({"a": [0.0] * 50, "b": [1.0] * 50})
    assert (few.low, few.high) == (0.0, 1.0)


def test_the_order_of_rows_changes_nothing() -> None:
    random = np.random.default_rng(0)
    values = {name: [*random.normal(size=3)] for name in "abcdefgh"}
    assert interval(values) == interval({k: values[k][::-1] for k in reversed(values)})
    assert interval(values) != interval(values, seed=1)


def test_other_statistics() -> None:
    values = {"a": [0.0], "b": [1.0], "c": [50.0]}
    found = interval(values, np.median, resamples=200)
    assert (found.mean, found.low, found.high) == (1.0, 0.0, 50.0)


def test_a_level_outside_is_told() -> None:
    with pytest.raises(ValueError, match="between 0 and 1, got 95"):
        interval({"a": [1.0], "b": [2.0]}, level=95)


def test_the_difference_is_paired() -> None:
    a = {"cow": {0: 1.1, 1: 2.1}, "fox": {0: 50.1}, "mug": {0: 7.0}}
    b = {"cow": {1: 2.0, 0: 1.0, 2: 9.0}, "fox": {0: 50.0}, "kite": {0: None}}
    found = difference(a, b)
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert (found.subjects, found.cells, found.missing) == (2, 3, 3)


def test_the_ratio_is_of_means_over_the_same_subjects() -> None:
    a = {"cow": {0: 1.0, 1: 3.0}, "fox": {0: 40.0}, "mug": {0: 7.0}}
    b = {"cow": {0: 2.0, 1: 6.0}, "fox": {0: 80.0}, "mug": {0: None}}
    found = ratio(a, b)
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert (found.subjects, found.cells, found.missing) == (2, 3, 1)


def test_a_ratio_to_zero_is_unknown() -> None:
    found = ratio({"cow": {0: 1.0}, "fox": {0: 1.0}}, {"cow": {0: 0.0}, "fox": {0: 0.0}})
    assert all(math.isnan(v) for v in (found.mean, found.low, found.high))
    assert math.isnan(ratio({}, {}).mean)


def test_an_unknown_bound_excludes_nothing() -> None:
    assert overlaps(of(0, 1), of(1, 2))
    assert not overlaps(of(0, 1), of(1.1, 2))
    assert not overlaps(of(1.1, 2), of(0, 1))
    assert overlaps(of(0, 3), of(1, 2))
    assert overlaps(interval({"a": [0.0]}), of(1, 2))


# Hypervolumes


def by_grid(points: np.ndarray, reference: np.ndarray) -> float:
    """The union of the boxes, cell by cell of the grid that their faces make."""
    axes = [np.unique([reference[d], *points[:, d][points[:, d] > reference[d]]]) for d in range(3)]
    total = 0.0
    for low in itertools.product(*(range(len(axis) - 1) for axis in axes)):
        high = np.array([axis[i + 1] for axis, i in zip(axes, low, strict=True)])
        size = np.prod([axis[i + 1] - axis[i] for axis, i in zip(axes, low, strict=True)])
        total += size * bool((points >= high).all(1).any())
    return float(total)


def fronts() -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(0)
    found = []
    for n in (1, 2, 3, 6, 9):
        points = random.uniform(-0.3, 1, (n, 3))
        found.append((points, np.zeros(3)))
        found.append((np.concatenate([points, points, points - 0.1]), np.full(3, -0.1)))
        found.append((np.round(points, 1), np.array([0.2, 0.0, -0.1])))
    return found


@pytest.mark.parametrize(("points", "reference"), fronts())
def test_hypervolume_is_the_grids(points: np.ndarray, reference: np.ndarray) -> None:
    assert hypervolume(points, reference) == pytest.approx(by_grid(points, reference), abs=1e-12)


def test_hypervolume_is_the_share_of_random_points_below() -> None:
    random = np.random.default_rng(1)
    points, darts = random.uniform(0, 1, (12, 3)), random.uniform(0, 1, (100_000, 3))
    share = (darts[:, None] <= points[None]).all(2).any(1).mean()
    assert hypervolume(points, (0, 0, 0)) == pytest.approx(share, abs=0.006)


def test_hypervolume_of_the_simplest() -> None:
    cube = np.array([[2.0, 3.0, 4.0]])
    assert hypervolume(cube, (1, 1, 1)) == 6
    assert hypervolume(np.array([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 2.0]]), (0, 0, 0)) == 4
    assert hypervolume(np.concatenate([cube, cube, cube - 0.5]), (1, 1, 1)) == 6
    assert hypervolume(cube, (2, 0, 0)) == 0
    assert hypervolume(np.empty((0, 3)), (0, 0, 0)) == 0
    assert hypervolume(np.concatenate([cube, [[0.0, 99.0, 99.0]]]), (1, 1, 1)) == 6


@pytest.mark.parametrize("points", [np.ones((2, 2)), np.ones(3), np.full((1, 3), np.nan)])
def test_hypervolume_refuses_what_it_cannot_measure(points: np.ndarray) -> None:
    with pytest.raises(ValueError, match="`points`"):
        hypervolume(points, (0, 0, 0))


def test_a_methods_hypervolume_is_that_of_its_points() -> None:
    rows = benchmark()
    for subject in SUBJECTS:
        half = {"knob": "atoms", "knob_value": 0.5, "formula": "mean"}
        rows.append(row("atoms", subject, similarity=0.7, alignment=0.9, drift=0.001, **half))
        rows.append(row("atoms", subject, 1, similarity=0.8, alignment=1.0, drift=0.003, **half))
    found = {entry["method"]: entry for entry in method_hypervolume(rows, base_reference(rows))}
    assert found["atoms"]["points"] == 2
    assert found["base"]["hypervolume"].mean == 0
    assert overlaps(found["lora"]["hypervolume"], found["lora"]["hypervolume"])
    assert not overlaps(found["lora"]["hypervolume"], found["atoms"]["hypervolume"])
    expected = []
    for subject in SUBJECTS:
        own = [r for r in rows if r["subject"] == subject]
        base = np.mean([r["similarity"] for r in own if r["method"] == "base"])
        full = [r for r in own if r["method"] == "atoms" and r["knob"] == "full"]
        similarity, drift = (np.mean([r[m] for r in full]) for m in ("similarity", "drift"))
        points = np.array([[similarity, 0.8, 1 - drift], [0.75, 0.95, 0.998]])
        expected.append(by_grid(points, np.array([base, 0, 0])))
    one = found["atoms"]["hypervolume"]
    assert one.mean == pytest.approx(np.mean(expected))
    whole = interval({subject: [v] for subject, v in zip(SUBJECTS, expected, strict=True)})
    assert (one.low, one.high) == pytest.approx((whole.low, whole.high))
    assert (one.subjects, one.cells, one.missing) == (5, 10, 0)


def test_rows_without_a_measure_are_no_points() -> None:
    rows = benchmark()
    rows[2]["drift"] = None
    rows += [row("atoms", s, similarity=1.0, alignment=1.0, knob="scale", knob_value=0.8) for s in SUBJECTS]
    found = {entry["method"]: entry for entry in method_hypervolume(rows, base_reference(rows))}
    assert found["atoms"]["points"] == 1
    assert found["atoms"]["hypervolume"].missing == 1
    assert found["atoms"]["hypervolume"].cells == 9


def test_every_subject_needs_a_reference() -> None:
    rows = benchmark()
    with pytest.raises(UserError, match="none for kite"):
        method_hypervolume(rows, {s: (0, 0, 0) for s in SUBJECTS if s != "kite"})


# Summaries


def test_a_summary_has_an_entry_an_operating_point() -> None:
    rows = benchmark()
    rows += [row("atoms", s, knob="scale", knob_value=0.5, similarity=0.7) for s in SUBJECTS]
    summary = summarise(rows)
    assert [(e["method"], e["knob"]) for e in summary] == [
        ("atoms", "full"),
        ("atoms", "scale"),
        ("base", "full"),
        ("lora", "full"),
    ]
    lora = summary[-1]
    own = [r["similarity"] for r in rows if r["method"] == "lora"]
    assert lora["similarity"].mean == pytest.approx(np.mean(own))
    assert lora["similarity"].cells == 10
    assert (lora["subjects"], lora["seeds"], lora["failed"]) == (5, 2, 0)
    assert "silence" not in lora
    assert math.isnan(summary[1]["drift"].mean)


def test_failed_cells_are_counted_where_they_are_lacking() -> None:
    rows = [r for r in benchmark() if not (r["method"] == "lora" and r["subject"] == "fox" and r["seed"] == 1)]
    rows += [failure("lora", "fox", 1), failure("lora", "fox", 1), failure("lora", "cow", 0), failure("oft", "cow", 0)]
    found = {entry["method"]: entry for entry in summarise(rows)}
    assert {name: entry["failed"] for name, entry in found.items()} == {"atoms": 0, "base": 0, "lora": 1, "oft": 1}
    assert (found["lora"]["similarity"].cells, found["lora"]["similarity"].missing) == (9, 0)
    assert math.isnan(found["oft"]["similarity"].mean)
    assert (found["oft"]["subjects"], found["oft"]["seeds"]) == (0, 0)


def test_a_failure_that_says_where_counts_there_only() -> None:
    rows = [
        row("lora", s, gate=gate, prior=p) for s in SUBJECTS[1:] for gate in (True, False) for p in ("none", "data")
    ]
    rows.append({**failure("lora", "cow", 0), "prior": "data"})
    assert [(e["prior"], e["failed"]) for e in summarise(rows)] == [("data", 1)] * 2 + [("none", 0)] * 2


def test_two_rows_of_one_cell_are_never_averaged() -> None:
    rows = [*benchmark(), row("lora", "cow", 0, lr=1.0, similarity=0.1)]
    with pytest.raises(UserError, match="got two of lora for cow, seed 0"):
        summarise(rows)
    assert len(summarise(rows, by=(*tables.BY, "lr"))) == 4


def test_two_tasks_are_never_mixed() -> None:
    rows = [*benchmark(), row("lora", "cow", 0, task="style")]
    with pytest.raises(UserError, match="got customization, style"):
        summarise(rows)
    assert len(summarise(rows, by=("task", *tables.BY))) == 4


def test_without_subjects_every_seed_stands_for_one() -> None:
    cells = cells_of([{"method": "lora", "seed": s, "score": s / 4} for s in range(3)], "score")
    found = interval(cells)
    assert (found.mean, found.subjects) == (0.25, 3)


def test_the_best_is_the_best_in_its_direction() -> None:
    summary = summarise(benchmark())
    for measure, method in (("similarity", "atoms"), ("drift", "base")):
        found = best(summary, measure)
        assert found is not None
        assert found["method"] == method
    found = best(benchmark(), "drift", among=lambda r: r["method"] == "lora")
    assert found is not None
    assert found["drift"] == 0.04
    assert best(summary, "silence") is None
    with pytest.raises(ValueError, match="no better or worse"):
        best(summary, "trained_parameters")


# Markdown


def test_the_table() -> None:
    rows = [*benchmark(), failure("lora", "yak", 0)]
    text = markdown(summarise(rows), ("similarity", "alignment", "drift"), command="atomtune compare")
    assert text == (
        "| method |           similarity ↑ | alignment ↑ |                       drift ↓ | failed |\n"
        "| ------ | ---------------------: | ----------: | ----------------------------: | -----: |\n"
        "| atoms  | 0.923 (0.922 to 0.925) |     **80%** | **0.0043 (0.0041 to 0.0044)** |        |\n"
        "| lora   | 0.922 (0.921 to 0.924) |         70% |     0.0424 (0.0412 to 0.0436) |      1 |\n"
        "| base   | 0.502 (0.501 to 0.504) |         95% |                        0.0000 |        |\n"
        "\n"
        "5 subjects x 2 seeds, mean (95% interval, bootstrap over subjects). ↑ higher is better, ↓ lower. "
        "Bold: the better of ours and the best rival, where their intervals do not overlap.\n"
        "\n"
        "`atomtune compare`"
    )


def entry(method: str, low: float, high: float, measure: str = "similarity", **keys: Any) -> dict[str, Any]:
    return {"method": method, "subjects": 3, "seeds": 1, "failed": 0, measure: of(low, high), **keys}


def test_bold_is_whichever_is_better() -> None:
    assert "**0.850 (0.800 to 0.900)**" in markdown(
        [entry("lora", 0.8, 0.9), entry("dora", 0.1, 0.2), entry("atoms", 0.6, 0.7), entry("base", 0.99, 1)],
        ["similarity"],
    )
    assert "**" not in markdown([entry("lora", 0.8, 0.9), entry("atoms", 0.7, 0.8)], ["similarity"])
    assert "**" not in markdown([entry("atoms", 0.7, 0.8), entry("base", 0.1, 0.2)], ["similarity"])
    two = [entry("lora", 1, 2, "trained_parameters"), entry("atoms", 3, 4, "trained_parameters")]
    assert "**" not in markdown(two, ["trained_parameters"])


def test_columns_order_and_what_is_not_there() -> None:
    summary = [
        entry("lora", 0.1, 0.2, knob_value=0.5, gate=True, size=16),
        entry("lora", 0.8, 0.9, knob_value=0.25, gate=False, size=16),
        {"method": "a|b", "failed": 0, "subjects": 0, "seeds": 0, "similarity": interval({"cow": [None]})},
    ]
    labels = {"method": "method", "knob_value": "kept", "gate": "gate", "size": "rank"}
    lines = markdown(summary, ["similarity", "silence"], labels, order="knob_value").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:5]]
    assert cells == [
        ["a\\|b", "", "", "", "", ""],
        ["lora", "0.25", "no", "16", "0.850 (0.800 to 0.900)", ""],
        ["lora", "0.5", "yes", "16", "0.150 (0.100 to 0.200)", ""],
    ]
    assert len({len(line) for line in lines[:5]}) == 1
    assert markdown(summary, ["similarity"]).splitlines()[4].startswith("| a\\|b")


def test_a_little_is_told_from_nothing() -> None:
    summary = [
        entry("lora", 0.00001, 0.00003, "drift"),
        entry("dora", 0, 0, "drift"),
        entry("oft", 1e-3, 3e-3, "silence"),
    ]
    text = markdown(summary, ["drift", "silence"])
    assert "<0.0001" in text
    assert " 0.0000 " in text
    assert "<1%" in text


def test_the_caption_counts() -> None:
    one = summarise([row("lora", "cow", similarity=0.5, drift=None), row("dora", "cow", 1, similarity=0.5, drift=0.1)])
    assert "1 subject x 1 seed, mean. ↑" in markdown(one, ["similarity"])
    rows = [r for r in benchmark() if r["subject"] != "cow" or r["method"] == "atoms"]
    rows[0]["similarity"] = None
    text = markdown(summarise(rows), ["similarity"])
    assert "4 to 5 subjects x 2 seeds" in text
    assert "1 values not measured" in text


def test_every_measure_has_a_name_a_direction_and_a_format() -> None:
    assert len({m.label for m in MEASURES.values()}) == len(MEASURES)
    for measure in MEASURES.values():
        assert measure.direction in tables.ARROWS
        assert format(0.5, measure.format)
