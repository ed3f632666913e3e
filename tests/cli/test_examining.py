"""`atomtune doctor` and `train --dry-run`: what a run would meet, told before it starts."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from atomtune.cli import main

Told = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def data(kites: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kites, tmp_path / "data"))


@pytest.fixture
def told(data: Path, tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> Told:
    """The exit code and the JSON of a run that stays small."""

    def tell(*arguments: str) -> tuple[int, dict[str, Any]]:
        places = ["--data", str(data), "--out", str(tmp_path / "run"), "--base", str(bases["lumina2"])]
        code = main(["doctor", *places, "--concept", "kite", "--n-atoms", "2", "--steps", "4", "--json", *arguments])
        return code, json.loads(capsys.readouterr().out)

    return tell


def test_pictures_and_captions_worth_a_look_are_told(data: Path, told: Told, tmp_path: Path) -> None:
    """Complaint 5: a caption that is longer than the base reads."""
    (data / "0.txt").write_text("a kite " + "far away " * 300)
    Image.new("RGB", (10, 10), "red").save(data / "tiny.png")
    (data / "tiny.txt").write_text("a kite")
    code, report = told("--sheet", str(tmp_path / "sheet.png"))
    assert (code, report["problems"]) == (0, [])
    assert any("caption of 0.png is longer than the base reads" in line for line in report["warnings"])
    lost = report["pictures"][0]["lost"]
    assert lost
    assert (data / "0.txt").read_text().strip().endswith(lost)
    assert any("enlarged: tiny.png" in line for line in report["warnings"])
    assert report["memory"]["phases"]["a step"] > report["memory"]["weights"] > 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 0
    assert not (tmp_path / "run").exists()


def test_an_unknown_site_is_a_problem_beside_the_others(data: Path, told: Told) -> None:
    (data / "0.png").write_bytes(b"no picture")
    code, report = told("--sites", "to_nowhere", "--resolution", "7")
    assert code == 1
    assert any("0.png" in line for line in report["problems"])
    assert any("to_nowhere" in line for line in report["problems"])
    assert any("`resolution`" in line for line in report["problems"])


def test_an_existing_folder_is_a_problem_and_the_cost_is_told_still(data: Path, told: Told, tmp_path: Path) -> None:
    (data / "0.png").write_bytes(b"no picture")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    code, report = told()
    assert code == 1
    first, second = report["problems"]
    assert first.startswith("`out` exists")
    assert "0.png" in second
    assert report["cost"]["steps"] == 4
    assert report["memory"]["weights"] > 0


def test_where_no_picture_is_left_the_reasons_are_counted(data: Path, told: Told) -> None:
    """Complaint 6: it says why nothing is left, and which flag helps."""
    code, report = told("--max-pixels", "9", "--skip-broken")
    assert code == 1
    assert "3 x too large" in report["problems"][0]
    assert "--max-pixels" in report["problems"][0]


def test_a_dry_run_trains_and_writes_nothing(
    data: Path, tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Complaint 4: nobody saw which captions were read; here each picture's, and where it is from."""
    out = tmp_path / "run"
    arguments = ["train", "--data", str(data), "--out", str(out), "--base", str(bases["lumina2"])]
    assert main([*arguments, "--concept", "kite", "--n-atoms", "2", "--steps", "4", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "Nothing would stop the run." in told
    for i in range(3):
        assert re.search(rf"^{i}\.png .* {(data / f'{i}.txt').read_text()} \(sidecar\)$", told, re.MULTILINE)
    assert not out.exists()
    assert list(tmp_path.iterdir()) == [data]
    assert main([*arguments, "--concept", "cow", "--dry-run"]) == 1
    assert "`concept` must stand in every caption" in capsys.readouterr().out
