"""`atomtune compare`: a small grid from the command to its table, and again without measuring anything."""

import dataclasses
import json
from pathlib import Path

import pytest

from atomtune.cli import main
from atomtune.compare import measure, tasks
from atomtune.compare.cells import Cell
from atomtune.compare.grid import Grid, best_rates, write_report
from atomtune.compare.methods import METHODS

QUICK = ["--set", "steps=1", "unrelated_pictures=2", "--sampler", "1", "--seeds", "0", "--sizes", "4"]


def test_a_grid_is_measured_once_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["compare", "--subjects", "cow", "--methods", "base", "atoms", "ssf", *QUICK, "--out", str(tmp_path)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("# customization")
    for column in ("similarity", "alignment", "drift", "bleed", "hypervolume", "atoms", "ssf", "base"):
        assert column in out
    stored = json.loads((tmp_path / "results/customization.json").read_text())
    methods = {row["method"] for row in stored["rows"]}
    assert methods == {"base", "atoms", "ssf"}
    assert str(tmp_path) not in json.dumps(stored)
    full = [r for r in stored["rows"] if r["method"] == "atoms" and r["knob"] == "full"]
    assert {r["gate"] for r in full} == {True, False}
    turned = {"full", "atoms", "scale", "contain", "beside", "contain-beside", "own-words", "own-strong", "refit"}
    assert {r["knob"] for r in stored["rows"] if r["method"] == "atoms"} == turned
    assert (tmp_path / "results/customization-alignment.svg").is_file()
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").glob("*.json")}
    assert len(written) == 3
    assert main(arguments) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").glob("*.json")} == written
    added = ["compare", "--subjects", "cow", "--methods", "truth", *QUICK, "--out", str(tmp_path), "--add"]
    assert main(added) == 0
    grown = json.loads((tmp_path / "results/customization.json").read_text())
    assert [row for row in grown["rows"] if row["method"] != "truth"] == stored["rows"]
    assert {row["method"] for row in grown["rows"]} == methods | {"truth"}
    assert grown["cells"].items() > stored["cells"].items()
    assert len(grown["command"].splitlines()) == 2
    capsys.readouterr()
    monkeypatch.setitem(METHODS, "ssf", dataclasses.replace(METHODS["ssf"], version=99))
    assert main(added) == 2
    assert "`add` would keep rows of ssf that were measured by an earlier version" in capsys.readouterr().err
    assert main([*added, "--sampler", "2"]) == 2
    assert "`add` needs a result with settings" in capsys.readouterr().err
    assert json.loads((tmp_path / "results/customization.json").read_text()) == grown


def test_rates_are_those_that_the_stored_search_chose() -> None:
    rows = json.loads((Path(__file__).parents[2] / "benchmarks/results/tuning.json").read_text())["rows"]
    best = best_rates(rows)
    assert {"atoms", "lora", "full"} <= best.keys()
    assert {name: METHODS[name].lr for name in best} == best


def cell(task: str, method: str, subject: str) -> Cell:
    options = {"steps": 1, "unrelated_pictures": 2}
    return Grid(task, (method,), (subject,), (0,), (4,), sampler=1, options=options).cells()[0]


def test_editing_turns_every_knob(tmp_path: Path) -> None:
    rows = measure.work(cell("editing-bare", "lora", "cow"), tmp_path)
    assert {r["knob"] for r in rows} == {
        "full",
        "scale",
        "atoms",
        "purity",
        "beside",
        "random",
        "svd",
        "own-words",
        "own-strong",
    }
    assert {r["edit"] for r in rows} == {"all", "style", "pair", "position", "size", "color", "pattern"}
    keys = [(r["knob"], r["knob_value"], r["formula"], r["gate"], r["edit"]) for r in rows]
    assert len(keys) == len(set(keys))


def test_a_quarter_of_the_asks_of_a_subject_or_a_style_come_first_in_pairs() -> None:
    for task, asks_of in (("customization", tasks.subject_asks), ("style", tasks.style_asks)):
        for subject in tasks.TASKS[task].subjects:
            kinds = [ask.kind for ask in asks_of(subject)]
            assert kinds[:6] == ["pair"] * 6
            assert "pair" not in kinds[6:]


def test_a_report_without_the_bases_of_all_is_written_still(tmp_path: Path) -> None:
    row = {"task": "style", "knob": "full", "knob_value": 1.0, "similarity": 0.5, "alignment": 1.0, "drift": 0.1}
    rows = [row | {"method": m, "subject": s, "seed": 0, "size": 4} for m in ("lora", "base") for s in ("a", "b")]
    rows[-1] = {"task": "style", "method": "base", "subject": "b", "seed": 0, "error": "killed"}
    text = write_report(rows, "style", tmp_path, "style", "c").read_text()
    assert "hypervolume" in text


def test_two_adapters_taught_apart_share_a_picture(tmp_path: Path) -> None:
    rows = measure.work(cell("mixing", "atoms", "dog face x pixelated"), tmp_path)
    turned = {(knob.name, knob.value, True) for knob in measure.TOGETHER} | {("full", 1.0, False)}
    assert {(r["knob"], r["knob_value"], r["gate"]) for r in rows} == turned
    assert len(list((tmp_path / "fits").glob("*/facts.json"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "customisation"], "`task` must be one of"),
        (["--methods", "lora", "--seeds"], "`seeds` must name at least one"),
        (["--methods", "lorra"], "Did you mean `lora`"),
        (["--subjects", "pinapple"], "Did you mean `pineapple`"),
        (["--set", "stebs=3"], "Did you mean `steps`"),
        (["--methods", "lora", "--set", "ema=0.9"], "`set`: the loop of lora knows no `ema`"),
        (["--task", "both", "--methods", "dora"], "`methods` of both must have parts that add up, got dora"),
        (["--processes", "0"], "`processes` must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["compare", "--out", str(tmp_path / "out"), *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out/results").exists()
