"""The README is true: its commands run, its code runs, its tables are those of the stored results."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from atomtune.cli import main
from atomtune.scenes.render import render
from atomtune.scenes.world import scene

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALLER = {
    "train": ["--steps", "60", "--n-atoms", "4", "--batch-size", "1", "--unrelated-pictures", "2"],
    "generate": ["--steps", "2"],
    "edit": ["--steps", "2", "--n-atoms", "4", "--variants", "1", "--batch-size", "1", "--sampler", "2", "--keep", "1"],
    "export": ["--rank", "2"],
    "import": ["--exact"],
}
"""What is added to a command to make it quick; nothing of it is taken away."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pictures that the README speaks of."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my-dog").mkdir()
    for i, color in enumerate(("red", "blue")):
        Image.fromarray(render(scene("mouse", "3d", "big", "middle", color))).save(folder / f"my-dog/{i}.png")
        (folder / f"my-dog/{i}.txt").write_text(f"a sks dog on a {color} background")
    return folder


def test_every_command_and_every_piece_of_code_runs(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    seen = []
    for line in "".join(blocks("bash")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert words[1] in targets
        elif words:
            assert words[0] == "atomtune"
            assert main([*words[1:], *SMALLER.get(words[1], [])]) == 0, capsys.readouterr().err
            seen.append(words[1])
    first = ["train", "atoms", "generate", "prune"]
    assert seen == [*first, "atoms", "generate", "surgery", "diff", "edit", "export", "import"]
    assert list((workplace / "pictures").glob("*.png"))
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), {})


def test_generated_text_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/write_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_no_figure_stands_outside_the_generated_tables() -> None:
    text = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", README, flags=re.DOTALL)
    measured = re.findall(r"\b\d+\.\d+ ?%|\b0\.\d{2,}\b(?!\))", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    assert measured == []
