"""The demo runs to its end, in miniature, on a subject that is free for tests."""

import json
import re
from pathlib import Path

import pytest

from atomtune.cli import main


def test_the_demo_writes_its_report_and_its_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    arguments = ["demo", "--out", str(out), "--subject", "cow", "--steps", "2", "--prompts", "2"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert str(out / "report.html") in printed.out
    rows = json.loads((out / "result.json").read_text())["rows"]
    assert [row["density"] for row in rows] == [1.0, 0.5, 0.25, 0.1, 0.0]
    wanted = "subject object_accuracy similarity background position base_background base_position drift silence"
    wanted += " trained_parameters atoms atoms_kept density train_seconds"
    assert set(wanted.split()) <= set(rows[0])
    assert rows[-1]["atoms_kept"] == 0
    page = (out / "report.html").read_text()
    assert "--subject cow --steps 2" in re.sub(r"<[^>]+>", "", page), "the command that made it"
    assert page.count("<img") > 30


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--subject", "panda"], "never seen"),
        (["--prompts", "0"], "`prompts` must be at least 1"),
        (["--out", "."], "`out` exists"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
