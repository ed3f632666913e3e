"""The figures: whole files of the same bytes for the same rows, nothing of matplotlib's left changed, names apart."""

import builtins
import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from atomtune.compare import plots
from atomtune.compare.plots import against_size, place_labels, sweep, trade_off
from atomtune.compare.tables import summarise
from atomtune.errors import UserError

matplotlib = pytest.importorskip("matplotlib")

METHODS = ("lora", "dora", "oft", "lokr", "vera", "full", "atoms", "atoms-soft")


def benchmark(subjects: int = 4) -> list[dict[str, Any]]:
    """Eight methods in two sizes, with and without a gate; two with knobs; drift over four decades, and none."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(subjects):
        known = {"task": "customization", "subject": f"s{i}", "seed": 0}
        full = {"knob": "full", "knob_value": 1.0}
        base = {"similarity": 0.5 + i / 100, "alignment": 0.95, "drift": 0.0, "size": 0}
        rows.append({**known, **full, **base, "method": "base"})
        for (rank, method), size, gate in itertools.product(enumerate(METHODS), (8, 16), (True, False)):
            noise = random.normal(size=3)
            one = {
                **known,
                "method": method,
                "prior": "distill",
                "size": size,
                "gate": gate,
                "similarity": 0.9 - rank / 100 + noise[0] / 100,
                "alignment": 0.6 + rank / 30 + noise[1] / 50,
                "drift": 0.0 if gate and method == "atoms" else 10 ** (-2 - rank / 3 + noise[2] / 5),
                "trained_parameters": 9000 * size,
            }
            rows.append({**one, **full})
            if method in ("lora", "atoms") and gate and size == 16:
                dials = itertools.product(("atoms", "scale", "random"), (0.5, 0.25))
                for knob, value in (*dials, ("purity", 0.4), ("purity", 0.6)):
                    turned = {"knob": knob, "knob_value": value, "similarity": one["similarity"] - 0.2 * (1 - value)}
                    rows.append({**one, **turned, "formula": "mean" if knob == "atoms" else None})
    return rows


SUMMARY = summarise(benchmark(), resamples=200)
LARGE = [entry for entry in SUMMARY if entry["size"] in (0, 16)]
SOME = [entry for entry in SUMMARY if entry["method"] in ("base", "lora", "oft", "atoms")]
FEW = [entry for entry in SUMMARY if entry["method"] in ("base", "lora", "atoms") and entry["size"] in (0, 16)]

FIGURES: dict[str, Callable[[list[dict[str, Any]], Path], Path]] = {
    "alignment": lambda summary, path: trade_off(summary, "similarity", "alignment", path),
    "drift": lambda summary, path: trade_off(summary, "drift", "similarity", path),
    "size": lambda summary, path: against_size(summary, "similarity", path),
    "sweep": lambda summary, path: sweep(summary, "knob_value", "alignment", path),
}


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of every figure that is written, instead of its file."""
    found = []

    def write(figure: Any, path: Path) -> Path:
        found.append(figure.axes[0])
        return path

    monkeypatch.setattr(plots, "_write", write)
    return found


def words(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts if text.get_text()]


@pytest.mark.parametrize("name", FIGURES)
def test_the_same_entries_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    for suffix in (".svg", ".png") if name == "drift" else (".svg",):
        first = FIGURES[name](FEW, tmp_path / f"first{suffix}").read_bytes()
        with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.hashsalt": "other"}):
            second = FIGURES[name](FEW[::-1], tmp_path / "deeper" / f"second{suffix}").read_bytes()
        assert first == second


def test_the_files_are_whole(tmp_path: Path) -> None:
    path = trade_off(FEW, "similarity", "alignment", str(tmp_path / "a.svg"))
    text = path.read_text(encoding="utf-8")
    assert ElementTree.fromstring(text).attrib["width"] == "504pt"
    assert not re.search(r"\d{4}-\d\d-\d\d|dc:date", text)
    with Image.open(trade_off(FEW, "similarity", "alignment", tmp_path / "a.png")) as picture:
        assert picture.size == (1400, 940)
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
        assert not {"Software", "Creation Time"} & set(picture.info)


def test_nothing_of_matplotlibs_is_changed(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    FIGURES["alignment"](FEW, tmp_path / "a.svg")
    assert dict(matplotlib.rcParams) == before


def test_pyplot_is_not_imported_and_nothing_early(tmp_path: Path) -> None:
    code = (
        "import sys\nimport atomtune.compare.plots as plots\nassert 'matplotlib' not in sys.modules\n"
        "row = {'method': 'lora', 'similarity': 0.5, 'drift': 0.1}\n"
        f"plots.trade_off([row], 'similarity', 'drift', {str(tmp_path / 'a.svg')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_a_missing_matplotlib_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def none(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", none)
    with pytest.raises(UserError, match=re.escape("atomtune[compare]")):
        FIGURES["alignment"](FEW, tmp_path / "a.svg")


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    path = tmp_path / "a.svg"
    path.write_text("before")

    def stop(self: Any, where: Path, **rest: Any) -> None:
        where.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", stop)
    with pytest.raises(OSError, match="disk full"):
        FIGURES["alignment"](FEW, path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.svg"]
    assert path.read_text() == "before"


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape("must end in .svg or .png, got a.pdf")):
        trade_off(LARGE, "similarity", "alignment", tmp_path / "a.pdf")
    with pytest.raises(UserError, match="no entry of the summary holds both `similarity` and `silence`"):
        trade_off(LARGE, "similarity", "silence", tmp_path / "a.svg")
    with pytest.raises(UserError, match="got likeness"):
        trade_off(LARGE, "likeness", "silence", tmp_path / "a.svg")
    with pytest.raises(UserError, match="nothing to draw"):
        sweep([e for e in LARGE if e["knob"] == "full"], "knob_value", "alignment", tmp_path / "a.svg")
    assert list(tmp_path.iterdir()) == []


def test_every_method_is_named_once(axes: list[Any], tmp_path: Path) -> None:
    trade_off(LARGE, "similarity", "alignment", tmp_path / "a.svg")
    found = words(axes[0])
    assert sorted(w for w in found if w.removesuffix(" + gate") in METHODS) == sorted(
        [*METHODS, *(f"{m} + gate" for m in METHODS)]
    )
    for word in ("base", "better", "atoms kept", "components kept"):
        assert found.count(word) == 1
    assert found.count("scaled") == 2


def test_the_names_do_not_overlap(axes: list[Any], tmp_path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for x, y in (("similarity", "alignment"), ("drift", "similarity")):
        trade_off(LARGE, x, y, tmp_path / "a.svg")
        renderer = FigureCanvasAgg(axes[-1].figure).get_renderer()
        boxes = [text.get_window_extent(renderer) for text in axes[-1].texts if text.get_text()]
        frame = axes[-1].get_window_extent(renderer).padded(2)
        for a, b in itertools.combinations(boxes, 2):
            assert not a.overlaps(b)
        for box in boxes:
            assert frame.containsx(box.x0)
            assert frame.containsx(box.x1)


def test_the_arrow_points_to_the_good_corner(axes: list[Any], tmp_path: Path) -> None:
    trade_off(FEW, "similarity", "alignment", tmp_path / "a.svg")
    trade_off(FEW, "similarity", "drift", tmp_path / "a.svg")
    trade_off(FEW, "trained_parameters", "drift", tmp_path / "a.svg")
    moves = []
    for one in axes:
        (arrow,) = (text for text in one.texts if getattr(text, "arrow_patch", None) is not None)
        moves.append(tuple(np.round(np.array(arrow.xy) - np.array(arrow.xyann), 6)))
    assert all(move > 0 for move in moves[0])
    assert moves[1][0] > 0 > moves[1][1]
    assert moves[2][0] == 0 > moves[2][1]


def test_drift_is_logarithmic_where_it_spreads(axes: list[Any], tmp_path: Path) -> None:
    trade_off(SOME, "similarity", "drift", tmp_path / "a.svg")
    some = [e for e in SOME if not e["gate"] and e["method"] != "base"]
    trade_off(some, "similarity", "drift", tmp_path / "a.svg")
    trade_off([e for e in some if e["method"] in ("lora", "oft")], "similarity", "drift", tmp_path / "a.svg")
    assert [one.get_yscale() for one in axes] == ["symlog", "log", "linear"]
    low, high = axes[1].get_ylim()
    assert 1e-6 < low < high < 1


def test_a_line_joins_the_points_of_a_knob_and_full_strength(axes: list[Any], tmp_path: Path) -> None:
    atoms = [e for e in LARGE if e["method"] == "atoms" and e["gate"]]
    trade_off(atoms, "similarity", "alignment", tmp_path / "a.svg")
    lines = [line for line in axes[0].lines if len(line.get_xdata()) == 3]
    assert len(lines) == 4
    full = next(e["similarity"].mean for e in atoms if e["knob"] == "full")
    at = {e["knob_value"]: e["similarity"].mean for e in atoms if e["knob"] == "purity"}
    ends = sorted(tuple(line.get_xdata()) for line in lines)
    assert sum(xs[-1] == full for xs in ends) == 3
    # Purity is a threshold, so that nothing is removed at 0.
    assert (full, at[0.4], at[0.6]) in ends


def test_a_sweep_has_the_controls_beside_ours(axes: list[Any], tmp_path: Path) -> None:
    sweep(LARGE, "knob_value", "similarity", tmp_path / "a.svg")
    names = {
        f"{method}, {knob}"
        for method, own in (("atoms", "atoms kept"), ("lora", "components kept"))
        for knob in (own, "scaled", "kept at random", "pure ones kept")
    }
    assert names <= set(words(axes[0]))
    curves = [line for line in axes[0].lines if len(line.get_xdata()) == 3 and line.get_linestyle() != "None"]
    assert sorted({tuple(line.get_xdata()) for line in curves}) == [(0.0, 0.4, 0.6), (0.25, 0.5, 1.0)]
    assert len(axes[0].collections) - sum(hasattr(c, "get_segments") for c in axes[0].collections) == 2
    assert axes[0].get_ylabel() == "similarity ↑"


def test_a_method_with_and_without_a_gate_is_filled_and_hollow(axes: list[Any], tmp_path: Path) -> None:
    legends = []
    for entries in (FEW, [e for e in FEW if (e["method"] == "lora") == bool(e["gate"])]):
        trade_off(entries, "similarity", "alignment", tmp_path / "a.svg")
        legends.append([text.get_text() for legend in axes[-1].figure.legends for text in legend.get_texts()])
    assert legends == [["no gate", "with the gate"], []]


def test_sizes_are_logarithmic_and_only_full_strength_counts(axes: list[Any], tmp_path: Path) -> None:
    against_size(SOME, "similarity", tmp_path / "a.svg")
    assert axes[0].get_xscale() == "log"
    curves = [
        line for line in axes[0].lines if line.get_linestyle() == "-" and line.get_transform() == axes[0].transData
    ]
    assert {tuple(line.get_xdata()) for line in curves} == {(72_000, 144_000)}
    assert len(curves) == 2 * 3


def test_a_base_far_away_is_a_number_at_the_edge(axes: list[Any], tmp_path: Path) -> None:
    against_size(SOME, "similarity", tmp_path / "a.svg")
    assert "base 0.515 ↓" in words(axes[0])
    assert axes[0].get_ylim()[0] > 0.6
    against_size(SOME, "alignment", tmp_path / "a.svg")
    assert "base" in words(axes[1])


def test_one_subject_and_one_method_can_be_drawn(tmp_path: Path) -> None:
    summary = summarise([row for row in benchmark(subjects=1) if row["method"] in ("base", "atoms")])
    for name, draw in FIGURES.items():
        assert draw(summary, tmp_path / f"{name}.svg").exists()
    point = [e for e in summary if e["method"] == "atoms" and e["knob"] == "full"][:1]
    assert against_size(point, "alignment", tmp_path / "point.svg").exists()
    assert trade_off([e for e in summary if e["method"] == "base"], "drift", "similarity", tmp_path / "a.svg").exists()


def test_places_are_free_where_there_is_room() -> None:
    random = np.random.default_rng(0)
    anchors = [random.uniform(60, 240, (1, 2)) for _ in range(12)]
    marks = np.concatenate([np.concatenate([a - 4, a + 4], 1) for a in anchors])
    sizes = np.tile([40.0, 9.0], (12, 1))
    found = place_labels(anchors, sizes, marks, marks, np.array([0.0, 0.0, 300.0, 300.0]))
    for (anchor, box), own in zip(found, anchors, strict=True):
        assert (anchor == own[0]).all()
        assert box[2:] - box[:2] == pytest.approx(sizes[0])
        assert (box >= 0).all()
        assert (box <= 300).all()
    boxes = np.array([*(box for _, box in found), *marks])
    shared = plots._overlap(boxes[:12], boxes)
    assert shared.sum() == pytest.approx(12 * 360)


def test_a_label_may_choose_among_its_anchors() -> None:
    anchors = [np.array([[20.0, 50.0], [180.0, 50.0]])]
    wall = np.array([[120.0, 0.0, 200.0, 100.0]])
    ((anchor, _),) = place_labels(anchors, np.array([[30.0, 9.0]]), wall, wall[:0], np.array([0.0, 0.0, 200.0, 100.0]))
    assert anchor[0] == 20
    assert place_labels([], np.empty((0, 2)), wall, wall, np.array([0.0, 0.0, 200.0, 100.0])) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01, "0.01"), (1e-3, "0.001"), (1e-4, "10⁻⁴"), (1e-12, "10⁻¹²"), (2e-4, "0.0002"), (-1, "")],
)
def test_small_ticks_are_powers(value: float, text: str) -> None:
    assert plots._decade(value, 0) == text


def test_colours_and_names_of_families() -> None:
    assert plots._color("atoms-topk") == plots._color("atoms:silence=0.01") == plots.OURS
    assert plots._color("lora") == plots._color("dora") != plots._color("oft")
    assert plots._color("full") == plots.OTHER
    every = list(itertools.chain(*(names.split() for _, names in plots.FAMILIES.values())))
    assert len(every) == len(set(every))
    assert len({color for color, _ in plots.FAMILIES.values()} | {plots.OURS, plots.OTHER}) == len(plots.FAMILIES) + 2
