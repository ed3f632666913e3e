"""The command line: help without torch, one line for a mistake, data on stdout, and the whole way once."""

import dataclasses
import errno
import inspect
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import atomtune
from atomtune.cli import COMMANDS, FILES, main
from atomtune.cli.common import counted, open_base_of
from atomtune.training import base, checkpoints
from atomtune.training.run import Run

Train = Callable[..., int]
SITE = "layers.0.attn.to_q"


@pytest.fixture
def train(bases: dict[str, Path], kites: Path) -> Train:
    """`atomtune train` on the tiny base, a few steps at one site; further arguments come last and win."""

    def train(out: Path, *more: str, data: Path = kites, base: str | None = None) -> int:
        arguments = ["train", "--base", base or str(bases["lumina2"]), "--data", str(data), "--out", str(out)]
        arguments += ["--concept", "kite", "--class-noun", "toy", "--steps", "3", "--batch-size", "2"]
        arguments += ["--n-atoms", "4", "--unrelated-pictures", "2", "--checkpoint-every", "1", "--lr", "0.1"]
        arguments += [] if "--sites" in more else ["--sites", SITE, "to_out.0"]
        return main([*arguments, *more])

    return train


def mistake(code: int, capsys: pytest.CaptureFixture) -> str:
    """The one line on stderr of a user's mistake."""
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]


# -------------------------------------------------------------------------------------------------------- help


def test_help_of_every_command_answers_without_torch() -> None:
    code = f"""
import sys
from atomtune.cli import main
assert main([]) == main(["--help"]) == main(["--version"]) == 0
for name in {list(COMMANDS)!r}:
    assert main([name, "--help"]) == 0, name
    print("==", name)
heavy = {{"torch", "diffusers", "transformers", "peft", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for name, text in COMMANDS.items():
        assert name in done.stdout
        assert text in done.stdout


def test_every_field_of_a_command_is_in_its_help(capsys: pytest.CaptureFixture) -> None:
    import dataclasses
    import importlib

    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        shown = capsys.readouterr().out
        for field in dataclasses.fields(importlib.import_module(f"atomtune.cli.{FILES.get(name, name)}").Command):
            positional = field.name in ("adapter", "file", "picture", "prompts")
            assert (
                positional or field.name in ("options", "training") or f"--{field.name.replace('_', '-')}" in shown
            ), field.name


def test_an_unknown_command_gets_a_suggestion(capsys: pytest.CaptureFixture) -> None:
    assert "no command 'trian'" in (line := mistake(main(["trian"]), capsys))
    assert line.endswith("Did you mean `train`?")
    assert "Did you mean" not in mistake(main(["xyzzy"]), capsys)


def test_libraries_are_silent_and_a_misspelt_subject_gets_a_suggestion() -> None:
    asked = [sys.executable, "-m", "atomtune", "demo", "--subject", "pineaple"]
    (line,) = subprocess.run(asked, capture_output=True, text=True, check=False).stderr.splitlines()
    assert line.endswith("got 'pineaple'. Did you mean `pineapple`?")


def test_an_unknown_option_gets_a_suggestion(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--data", "x", "--setps", "3"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "--steps" in err


def test_defaults_are_the_librarys() -> None:
    from atomtune import Adapter, atoms, lora, mix
    from atomtune.cli import diff, edit, export, generate, imported, prune
    from atomtune.cli import mix as cli_mix
    from atomtune.training.refit import refit

    same: list[tuple[Any, Callable[..., Any]]] = [
        (generate, Adapter.using),
        (generate, atomtune.generate),
        (prune, Adapter.prune),
        (prune, refit),
        (diff, atoms.diff),
        (export, lora.export_lora),
        (imported, lora.import_lora),
        (edit, atomtune.edit),
    ]
    checked = 0
    for module, function in same:
        given = inspect.signature(function).parameters
        for field in dataclasses.fields(module.Command):
            if field.name in given and isinstance(field.default, (int, float, str)):
                assert field.default == given[field.name].default, (module.__name__, field.name)
                checked += 1
    assert checked > 10
    limits = inspect.signature(mix.conflicts).parameters
    assert cli_mix.Command.limits == (limits["together"].default, limits["along"].default)


# ------------------------------------------------------------------------------------------- the whole way once


def test_train_atoms_prune_generate(train: Train, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, pruned = runs / "cli", tmp_path / "pruned"
    assert train(run) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert f"atomtune generate {run}" in err
    assert "1 x to_q" in err, "what is adapted is told"
    assert re.search(r" 2/3 \[\d\d:\d\d<\d\d:\d\d,", err), "and how long it will take"
    total = 4 * len(json.loads((run / "adapter_config.json").read_text())["sites"])
    assert f"{total} atoms in {run}" in err
    card = (run / "README.md").read_text()
    assert "| concept | kite |" in card
    assert "| command | atomtune train --base " in card

    assert main(["atoms", str(run), "--top", "3"]) == 0
    out, err = capsys.readouterr()
    head, *rows = out.splitlines()
    assert head.split()[0] == "atom"
    assert len(rows) == 3
    assert "importance: change of the prediction on the subject" in err

    assert main(["atoms", str(run), "--top", "1000", "--json", "--formula", "purity"]) == 0
    ranked = json.loads(capsys.readouterr().out)
    assert len(ranked) == total
    assert set(ranked[0]) == {"name", "site", "id", "path", "row", "importance", "density", "purity"}
    assert [r["importance"] for r in ranked] == sorted((r["importance"] for r in ranked), reverse=True)

    assert main(["prune", str(run), "--count", "5", "--out", str(pruned)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{pruned}\n"
    assert f"kept 5 of {total} atoms" in err
    assert main(["atoms", str(pruned), "--json"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)]
    assert len(names) == 5

    pictures = tmp_path / "pictures"
    asked = ["generate", str(pruned), "a kite", "a house", "--out", str(pictures), "--steps", "2", "--seed", "7"]
    assert main([*asked, "--density", "0.8", "--atom", f"{names[0]}=0", "--atom", f"{names[1]}=2"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(pictures / "00007.png"), str(pictures / "00008.png")]
    assert "2 pictures in" in err
    assert [counted(n, "picture") for n in (0, 1)] == ["0 pictures", "1 picture"]
    adapter = atomtune.load(atomtune.open_pipeline(str(json_base(pruned))), pruned)
    with adapter.using(density=0.8, atoms={names[0]: 0.0, names[1]: 2.0}):
        again = atomtune.generate(adapter.pipe, ["a kite", "a house"], seed=7, steps=2)
    for picture, path in zip(again, out.splitlines(), strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(Image.open(path)))

    # Mistakes, each on a run that exists.
    wrong: list[tuple[list[str], str]] = [
        (["generate", str(run), "a kite", "--density", "1.5"], "`density` must be between 0 and 1, got 1.5"),
        (["generate", str(run), "a kite", "--atom", "L0[99]=1"], "no atom L0[99]. Did you mean `L0["),
        (["generate", str(run), "a kite", "--atom", "L0[1]"], "`atom` must be like L17[137]=0.5, each name once, got"),
        (["generate", str(run), "a kite", "--atom", "L0[1]=0", "--atom", "L0[1]=2"], "once, got 'L0[1]=2'"),
        (["generate", str(run), "a kite", "--site", "to_v=0", "--site", "to_v=3"], "once, got 'to_v=3'"),
        (["generate", str(run), "a kite", "--atom", "L0[1]=much"], "`atom` must be like L17[137]=0.5"),
        (["generate", str(run), "a kite", "--strength", "nan"], "`strength` must be a finite number"),
        (["generate", str(run)], "`prompts` must name at least one picture"),
        (["generate", str(run), "a kite", "--device", "warp"], "`device` must be one that torch has here"),
        (["atoms", str(run), "--formula", "best"], "`formula` must be one of effect,"),
        (["atoms", str(run), "--top", "0"], "`top` must be at least 1"),
        (["atoms", str(tmp_path)], "holds no adapter: adapter_config.json is missing"),
        (["atoms", str(tmp_path / "nowhere")], "There is no folder"),
        (["atoms", str(run), "--formula", "effct"], "got 'effct'. Did you mean `effect`?"),
        (["atoms", str(run), "--prompts", "a kite"], "`prompts` are what --curve and --look paint"),
        (["atoms", str(run), "--look", str(run / "options.json")], "`look` must be a folder, got the file"),
        (["prune", str(run), "--out", str(tmp_path / "x")], "`keep` or `count` must be given"),
        (
            ["prune", str(run), "--out", str(tmp_path / "x"), "--keep", "25"],
            "must be a share above 0 and at most 1, got 25. --count",
        ),
        (["prune", str(run), "--out", str(tmp_path / "x"), "--count", "99"], "`count` must be between 1 and"),
        (["import", str(run), "--out", str(tmp_path / "x"), "--prompt", "a kite"], "holds atoms already, and no LoRA"),
        (["import", str(tmp_path), "--out", str(tmp_path / "x"), "--prompt", "a kite"], "`lora` must be a file"),
        (["prune", str(run), "--out", str(pruned), "--keep", "0.5"], "`out` must not exist yet"),
    ]
    for arguments, message in wrong:
        assert message in mistake(main(arguments), capsys), arguments
    assert "`out` exists and is not empty" in mistake(train(run), capsys)


def json_base(folder: Path) -> str:
    return str(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])


# ------------------------------------------------------------------------------------------- stopped on the way


def test_a_base_is_opened_as_its_run_had_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[Any, ...]] = []
    monkeypatch.setattr(base, "open_base", lambda *given, **more: opened.append((*given, more["quantized"])))
    (tmp_path / "config.toml").write_text('dtype = "bfloat16"\nquantize = "nf4"\n')
    open_base_of(tmp_path, "embedded", "cpu")
    open_base_of(tmp_path, "embedded", "cpu", "float16")
    (tmp_path / "config.toml").write_text("half")
    open_base_of(tmp_path, "embedded", "cpu")
    assert opened == [
        ("embedded", "bfloat16", "cpu", "nf4"),
        ("embedded", "float16", "cpu", None),
        ("embedded", "float32", "cpu", None),
    ]


def test_ctrl_c_exits_130_and_resume_goes_on(
    train: Train, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    real = Run._losses

    def losses(self: Run, micro: int) -> Any:
        if micro == 1:
            signal.raise_signal(signal.SIGINT)
        return real(self, micro)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_losses", losses)
        assert train(runs / "ctrl-c") == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert "stopped after step 2; go on with: atomtune train --resume --out" in err
    assert err.splitlines()[-1] == "interrupted"
    assert checkpoints.newest(runs / "ctrl-c")[0] == 2  # type: ignore[index]
    line = mistake(main(["generate", str(runs / "ctrl-c"), "a kite"]), capsys)
    assert "holds no adapter: the run stands at step 2 of 3 (stopped). Go on: atomtune train --resume" in line
    assert main(line.partition(": atomtune ")[2].split()) == 0
    steps = [json.loads(line)["step"] for line in (runs / "ctrl-c" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_nan_exits_2_and_names_the_last_good_checkpoint(
    train: Train, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    real = Run._losses

    def losses(self: Run, micro: int) -> Any:
        return real(self, micro) | ({"silence": torch.tensor(float("nan"))} if micro == 2 else {})

    monkeypatch.setattr(Run, "_losses", losses)
    line = mistake(train(runs / "nan"), capsys)
    assert "step 3: `silence` is not finite" in line
    assert str(checkpoints.folder_of(runs / "nan", 2)) in line


def test_a_full_disk_exits_2_and_earlier_checkpoints_live(
    train: Train, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    real = checkpoints.save_adapter

    def save(model: Any, folder: Path, adapter: str) -> Any:
        if "step-000002" in str(folder):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(model, folder, adapter)

    monkeypatch.setattr(checkpoints, "save_adapter", save)
    line = mistake(train(runs / "full"), capsys)
    assert "No space left on device" in line
    assert "Earlier checkpoints are untouched" in line
    assert checkpoints.newest(runs / "full") == (1, checkpoints.folder_of(runs / "full", 1))


# ----------------------------------------------------------------------------------------------- wrong data


def one_picture(folder: Path, caption: str | None = "a kite") -> Path:
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    if caption is not None:
        (folder / "a.txt").write_text(caption)
    return folder


def text_as_png(folder: Path) -> Path:
    (one_picture(folder) / "a.png").write_text("no picture")
    return folder


DATA: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder, "`data` must be a folder of pictures"),
    "empty": (lambda folder: folder.mkdir() or folder, "No picture to learn from in"),  # type: ignore[func-returns-value]
    "text-as-png": (text_as_png, "a.png (cannot be decoded: it is not a PNG"),
    "no-captions": (lambda folder: one_picture(folder, None), "1 of the pictures have no caption"),
    "no-concept": (lambda folder: one_picture(folder, "a house"), "`concept` must stand in every caption, but 1 of 1"),
}


@pytest.mark.parametrize("kind", DATA)
def test_wrong_data_is_one_line(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture, kind: str) -> None:
    make, message = DATA[kind]
    data = make(tmp_path / "data")
    assert message in mistake(train(tmp_path / "run", data=data), capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sites", "to_qq"], "`target_modules` (--sites): no module is named 'to_qq'. Did you mean `to_q`"),
        (["--sparsifier", "topk", "--k", "9"], "`k` must be between 1 and n_atoms (4), got 9. Lower"),
        (["--steps", "0"], "`steps` must be at least 1, got 0."),
        (["--lr", "nan"], "`lr` must be above 0, got nan."),
        (["--resolution", "50"], "`resolution` must be a multiple of 16 pixels"),
        (["--resume"], "has no options.json"),
        (["--dtype", "float8"], "`dtype` must be one of float32, bfloat16, float16, got 'float8'"),
        (["--device", "warp"], "`device` must be one that torch has here"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_options_are_one_line(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture, more: list[str], message: str
) -> None:
    assert message in mistake(train(tmp_path / "run", *more), capsys)
    assert not (tmp_path / "run").exists()


def test_an_existing_folder_is_one_line(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert "`out` exists and is not empty" in mistake(train(tmp_path), capsys)
    assert "`out` exists and is not empty" in mistake(train(tmp_path / "mine.txt"), capsys)


def test_an_unknown_base_is_one_line(
    train: Train, tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    assert "Did you mean `embedded`?" in mistake(train(tmp_path / "run", base="embeded"), capsys)
    assert "(with model_index.json)" in mistake(train(tmp_path / "run", base=str(tmp_path)), capsys)
    broken = tmp_path / "broken"
    shutil.copytree(bases["lumina2"], broken)
    weights = next((broken / "transformer").glob("*.safetensors"))
    weights.unlink()
    assert f"`base` can't be loaded from {broken}" in mistake(train(tmp_path / "run", base=str(broken)), capsys)
    index = broken / "model_index.json"
    for text, told in (
        ("[]", "must name its pipeline's class: TypeError"),
        ("{}", "must name its pipeline's class: KeyError"),
        ('{"_class_name": "NewerPipeline"}', "must be a pipeline of a known family (AuraFlowPipeline, "),
        ('{"_class_name": ["pipe", "MyPipe"]}', "got ['pipe', 'MyPipe']"),
        ('{"_class_name": "Lumina2Pipeline", "vae": ["diffusers", "NoSuchPart"]}', "`base` can't be loaded from"),
    ):
        index.write_text(text)
        assert told in mistake(train(tmp_path / "run", base=str(broken)), capsys)
    # Offline, as a fault of the network would be.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = mistake(train(tmp_path / "run", base="nobody/nothing"), capsys)
    assert "`base` can't be loaded from nobody/nothing: it is not in the hub's cache here" in line
    assert "stacktrace" not in line
