"""The figures: whole files of the same bytes for the same rows, and nothing of matplotlib's left changed."""

import builtins
import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from PIL import Image

from atomtune.compare import plots
from atomtune.compare.plots import against_size, sweep, trade_off
from atomtune.compare.tables import summarise
from atomtune.errors import UserError

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
    found: list[Any] = []
    monkeypatch.setattr(plots, "_write", lambda figure, path: found.append(figure.axes[0]))
    return found


def words(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def legend(axes: Any) -> list[str]:
    return [text.get_text() for one in axes.figure.legends for text in one.get_texts()]


def joined(axes: Any) -> list[tuple[float, ...]]:
    """The values of x of every line that joins points."""
    return [
        tuple(line.get_xdata())
        for line in axes.lines
        if line.get_linestyle() != "None" and line.get_transform() == axes.transData
    ]


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

    def stop(self: Any, where: Any, **rest: Any) -> None:
        where.write(b"half")
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


def test_every_method_is_in_the_legend_and_ours_beside_its_point(axes: list[Any], tmp_path: Path) -> None:
    trade_off(LARGE, "similarity", "alignment", tmp_path / "a.svg")
    found = legend(axes[0])
    for word in (*METHODS, "ours", "low-rank", "with", "without", "strongest kept", "scaled"):
        assert found.count(word) == 1
    assert "rank" not in found
    assert sorted(words(axes[0])) == ["atoms", "atoms-soft", "base", "better ↗"]
    trade_off(SUMMARY, "similarity", "alignment", tmp_path / "a.svg")
    found = legend(axes[1])
    assert found[found.index("rank") :][:3] == ["rank", "8", "16"]


def test_names_stay_inside_and_apart(axes: list[Any], tmp_path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for x, y in (("similarity", "alignment"), ("drift", "similarity")):
        trade_off(LARGE, x, y, tmp_path / "a.svg")
        renderer = FigureCanvasAgg(axes[-1].figure).get_renderer()
        boxes = [text.get_window_extent(renderer) for text in axes[-1].texts if "better" not in text.get_text()]
        frame = axes[-1].get_window_extent(renderer).padded(2)
        for a, b in itertools.combinations(boxes, 2):
            assert not a.overlaps(b)
        for box in boxes:
            assert frame.containsx(box.x0)
            assert frame.containsx(box.x1)


def test_options_of_a_method_and_formulas_of_a_knob_are_told_apart(axes: list[Any], tmp_path: Path) -> None:
    own = [e for e in FEW if e["method"] == "atoms" and e["gate"]]
    other = [{**e, "method": "atoms:k=4,lr=0.1", "formula": e["formula"] and "mean_when_active"} for e in own]
    trade_off([*own, *other], "similarity", "alignment", tmp_path / "a.svg")
    assert {"atoms", "atoms\nk=4\nlr=0.1", "kept by mean", "kept by mean when active"} <= set(legend(axes[0]))


def test_better_stands_at_the_good_corner(axes: list[Any], tmp_path: Path) -> None:
    for x, y in (("similarity", "alignment"), ("similarity", "drift"), ("trained_parameters", "drift")):
        trade_off(FEW, x, y, tmp_path / "a.svg")
    marks = [next(text for text in one.texts if "better" in text.get_text()) for one in axes]
    assert [mark.get_text() for mark in marks] == ["better ↗", "better ↘", "better ↓"]
    assert [mark.xy for mark in marks] == [(1, 1), (1, 0), (1, 0)]


def test_bars_are_the_intervals(axes: list[Any], tmp_path: Path) -> None:
    entry = next(e for e in FEW if e["method"] == "lora" and e["knob"] == "full")
    trade_off([entry], "similarity", "alignment", tmp_path / "a.svg")
    (across,), (upright,) = (bars.get_segments() for bars in axes[0].collections)
    assert across[:, 0] == pytest.approx([entry["similarity"].low, entry["similarity"].high])
    assert upright[:, 1] == pytest.approx([entry["alignment"].low, entry["alignment"].high])


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
    ends = sorted(joined(axes[0]))
    assert [len(xs) for xs in ends] == [3] * 4
    full = next(e["similarity"].mean for e in atoms if e["knob"] == "full")
    at = {e["knob_value"]: e["similarity"].mean for e in atoms if e["knob"] == "purity"}
    assert sum(xs[-1] == full for xs in ends) == 3
    # Purity is a threshold, so that nothing is removed at 0.
    assert (full, at[0.4], at[0.6]) in ends


def test_a_sweep_has_the_controls_beside_ours(axes: list[Any], tmp_path: Path) -> None:
    sweep(LARGE, "knob_value", "similarity", tmp_path / "a.svg")
    assert {"atoms", "lora", "strongest kept", "scaled", "random kept", "pure kept"} <= set(legend(axes[0]))
    lines = joined(axes[0])
    assert len(lines) == 2 * 4
    assert set(lines) == {(0.0, 0.4, 0.6), (0.25, 0.5, 1.0)}
    assert axes[0].get_ylabel() == "similarity ↑"


def test_a_method_with_and_without_a_gate_is_filled_and_hollow(axes: list[Any], tmp_path: Path) -> None:
    for entries in (FEW, [e for e in FEW if (e["method"] == "lora") == bool(e["gate"])]):
        trade_off(entries, "similarity", "alignment", tmp_path / "a.svg")
    assert ["gate" in legend(one) for one in axes] == [True, False]
    hollow = [[line for line in one.lines if line.get_markerfacecolor() == "white"] for one in axes]
    assert [len(lines) for lines in hollow] == [2, 0]


def test_sizes_are_logarithmic_and_only_full_strength_counts(axes: list[Any], tmp_path: Path) -> None:
    against_size(SOME, "similarity", tmp_path / "a.svg")
    assert axes[0].get_xscale() == "log"
    assert joined(axes[0]) == [(72_000, 144_000)] * 2 * 3
    assert "rank" not in legend(axes[0])


def test_a_base_far_away_is_only_a_number(axes: list[Any], tmp_path: Path) -> None:
    for measure in ("similarity", "alignment", "drift"):
        against_size(SOME, measure, tmp_path / "a.svg")
    assert [legend(one)[-2:] for one in axes] == [["base", "0.515"], ["base", "95%"], ["base", "0.0000"]]
    assert axes[0].get_ylim()[0] > 0.6
    assert [any(tuple(line.get_xdata()) == (0, 1) for line in one.lines) for one in axes] == [False, True, True]


def test_one_subject_and_one_method_can_be_drawn(tmp_path: Path) -> None:
    summary = summarise([row for row in benchmark(subjects=1) if row["method"] in ("base", "atoms")])
    for name, draw in FIGURES.items():
        assert draw(summary, tmp_path / f"{name}.svg").exists()
    point = [e for e in summary if e["method"] == "atoms" and e["knob"] == "full"][:1]
    assert against_size(point, "alignment", tmp_path / "point.svg").exists()
    assert trade_off([e for e in summary if e["method"] == "base"], "drift", "similarity", tmp_path / "a.svg").exists()


def test_colours_and_names_of_families() -> None:
    assert plots._family("atoms-topk") == plots._family("atoms:silence=0.01") == "ours"
    assert plots._family("lora") == plots._family("dora") != plots._family("oft")
    assert plots._family("full") == "other"
    every = list(itertools.chain(*(names.split() for _, names in plots.FAMILIES.values())))
    assert len(every) == len(set(every))
    assert len({color for color, _ in plots.FAMILIES.values()}) == len(plots.FAMILIES)
