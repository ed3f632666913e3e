"""`atomtune train --config`: the command line wins, unknown keys are named, recipes are valid, runs store theirs."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest

from atomtune.cli import main
from atomtune.cli.train import Command, expand
from atomtune.training.options import TrainOptions

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


def read(*arguments: str) -> Command:
    import tyro

    return tyro.cli(Command, args=expand(list(arguments)))


def test_options_of_the_command_line_win(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('data = "pictures"\nsteps = 7\nlr = 1\nnested = false\nsites = ["a", "b"]\nsample_prompts = []\n')
    found = read("--config", str(path))
    assert (found.data, found.options.steps, found.options.lr) == (Path("pictures"), 7, 1.0)
    assert found.options.sites == ("a", "b")
    assert not found.options.nested
    found = read(f"--config={path}", "--steps", "9", "--nested", "--sites", "c", "--data", "others")
    assert (found.data, found.options.steps, found.options.nested) == (Path("others"), 9, True)
    assert found.options.sites == ("c",)


def test_a_resumed_run_is_that_of_its_data_where_no_folder_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/dogs").mkdir(parents=True)
    (tmp_path / "runs/dogs/config.toml").write_text('data = "dogs"\ndtype = "bfloat16"\n')
    assert read("--data", "dogs", "--resume").dtype == "bfloat16"
    assert read("--data", "dogs").dtype == "float32"
    assert main(["train", "--data", "dogs", "--resume=true"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("setps = 3", "unknown option 'setps'. Did you mean `steps`?"),
        ("steps = ", "can't be read"),
        ("[train]\nsteps = 3", "unknown option 'train'."),
        ("steps = 2026-01-01", "`steps` must be a value"),
        ("config = 'x'", "unknown option 'config'."),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture, text: str, message: str) -> None:
    """Complaint 49: an unknown key was dropped for months."""
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    assert main(["train", "--data", "x", "--config", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert message in err


def test_a_value_of_the_wrong_kind_names_its_option(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text('steps = "many"')
    assert main(["train", "--data", "x", "--config", str(path)]) == 2
    assert "--steps" in capsys.readouterr().err
    assert main(["train", "--data", "x", "--config", str(tmp_path / "none.toml")]) == 2
    assert "can't be read" in capsys.readouterr().err


def test_every_option_survives_the_file(tmp_path: Path) -> None:
    """Whatever a command line says, its config.toml says again."""
    from atomtune.training import config

    changed: dict[str, Any] = {}
    for field in dataclasses.fields(TrainOptions):
        now, kind = field.default, str(field.type)
        if field.name in ("optimizer", "schedule", "mixed_precision", "trackers", "hub"):
            changed[field.name] = {"trackers": ("wandb",), "hub": "me/it", "schedule": "linear"}.get(
                field.name, {"optimizer": "lion", "mixed_precision": "bf16"}.get(field.name)
            )
        elif kind.startswith("tuple[float"):
            changed[field.name] = (0.25, 1.0)
        elif kind.startswith("tuple"):
            changed[field.name] = ("one", "two words")
        elif kind.startswith("bool"):
            changed[field.name] = not now
        elif kind.startswith("int"):
            changed[field.name] = (now or 1) + 2
        elif kind.startswith("float"):
            changed[field.name] = now / 2 + 0.15
        else:
            changed[field.name] = Path("a/b.txt") if kind.startswith("Path") else f'it\'s "{field.name}"'
    options = TrainOptions(**changed)
    assert all(getattr(options, f.name) != f.default for f in dataclasses.fields(options))
    path = tmp_path / "config.toml"
    path.write_text(config.text({"data": "d", **options.to_dict()}))
    assert read("--config", str(path)).options == options


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid(path: Path) -> None:
    found = read("--config", str(path), "--data", "pictures")
    assert found.base != Command(Path()).base or path.stem == "embedded"
    assert tomllib.loads(path.read_text()).keys() >= {"base", "lr", "steps"}
    assert "not been tried" in path.read_text() or path.stem == "embedded"


def test_every_family_has_a_recipe() -> None:
    from atomtune.backbones import BACKBONES

    assert {b.family.lower().replace(" ", "-") for b in BACKBONES.values()} <= {path.stem for path in RECIPES}
