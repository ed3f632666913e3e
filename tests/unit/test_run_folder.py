"""A run's folder: changed data, who trains there, whether it lives, file modes, config.toml."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import at_step, log, press_ctrl_c, same, tensors

from atomtune.backbones import base_name
from atomtune.data.folder import Scan
from atomtune.errors import UserError
from atomtune.training import run_folder
from atomtune.training.options import TrainOptions
from atomtune.training.pace import Pace
from atomtune.tuner import fingerprint

Go = Callable[..., Path]


def test_changed_data_is_noticed_by_a_resumed_run(
    go: Go, kites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Complaints 10, 11, 25: what a run goes on with is what it began with, or somebody has said otherwise."""
    data = tmp_path / "data"
    shutil.copytree(kites, data)
    with monkeypatch.context() as patch:
        at_step(patch, {1}, press_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            go(data=data, steps=2)
    caption = (data / "1.txt").read_text()
    (data / "1.txt").write_text(f"{caption}, once more")
    shutil.copy(data / "0.png", data / "3.png")
    (data / "3.txt").write_text(caption)
    with pytest.raises(UserError, match=r"1\.png \(changed\), 3\.png \(new\)\. .*--allow-changed-data"):
        go(data=data, steps=2, resume=True)
    run = go(data=data, steps=2, resume=True, allow_changed_data=True)
    assert "warning: data has changed since the run began: 1.png (changed)" in capsys.readouterr().err
    assert len(log(run)) == 2


def test_other_repeats_and_unrelated_prompts_are_changed_data(
    go: Go, kites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, prompts = tmp_path / "data", tmp_path / "prompts.txt"
    shutil.copytree(kites, data)
    prompts.write_text("\n".join(f"a house with {n} doors" for n in range(12)))
    with monkeypatch.context() as patch:
        at_step(patch, {1}, press_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            go(data=data, steps=2, unrelated=prompts)
    (data / "metadata.jsonl").write_text('{"file_name": "0.png", "repeats": 3}\n')
    with pytest.raises(UserError, match=r"0\.png \(changed\)"):
        go(data=data, steps=2, resume=True)
    (data / "metadata.jsonl").unlink()
    prompts.write_text("\n".join(f"a tree with {n} leaves" for n in range(12)))
    with pytest.raises(UserError, match=r"unrelated pictures and prompts \(changed\)"):
        go(data=data, steps=2, resume=True)


def test_of_two_runs_in_one_folder_the_second_changes_nothing(go: Go) -> None:
    """Both found it free, and prepared; one has claimed it since."""
    run = go(steps=2)
    before = (run / "options.json").read_text()
    with (
        pytest.raises(UserError, match="`out` exists and is not empty"),
        run_folder.claimed(run, TrainOptions(seed=9), {}, Scan((), ()), ""),
    ):
        pass
    with (
        run_folder.held(run),
        pytest.raises(UserError, match="is being trained by"),
        run_folder.claimed(run, TrainOptions(seed=9), {}, Scan((), ()), ""),
    ):
        pass
    assert (run / "options.json").read_text() == before


def test_a_run_that_died_before_its_claim_is_started_again(tmp_path: Path) -> None:
    """Killed between two files of the claim: neither a run to go on with nor somebody's folder."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.toml", "data.json", ".options.12-abcdef01.tmp"):
        (run / name).write_text("half")
    run_folder.check_free(run, TrainOptions())
    with pytest.raises(UserError, match="started again without --resume"):
        run_folder.stored(run, TrainOptions())
    (run / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        run_folder.check_free(run, TrainOptions())


def test_a_run_that_died_in_its_last_save_is_put_back(go: Go) -> None:
    """The folder had been moved aside, and the finished adapter had taken its place, or not yet."""
    run = go(steps=2)
    before = {path.relative_to(run) for path in run.rglob("*")}
    run.rename(run.with_name(f".{run.name}.previous"))
    assert go(steps=2, resume=True) == run
    assert before <= {path.relative_to(run) for path in run.rglob("*")}
    run.rename(run.with_name(f".{run.name}.previous"))
    run.mkdir()
    with pytest.raises(UserError, match="not empty"):
        go(steps=2)
    assert (run / "options.json").is_file()


def test_damaged_papers_of_a_run_are_told_in_one_line(go: Go) -> None:
    run = go(steps=2)
    (run / "status.json").unlink()  # or there is nothing left to train
    for name in ("options.json", "data.json"):
        whole = (run / name).read_text()
        for text in (whole[:30], "[]", "[" * 100_000):
            (run / name).write_text(text)
            with pytest.raises(UserError, match=f"{name} (can't be read|must hold a table)"):
                go(steps=2, resume=True)
        (run / name).write_text(whole)
    whole = (run / "options.json").read_text()
    (run / "options.json").write_text(whole.replace('"layers.0.attn.to_q"', "null"))
    with pytest.raises(UserError, match="`sites` must be str, got None"):
        go(steps=2, resume=True)


def test_a_log_loses_lines_that_tell_of_no_step(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"loss": 1}\n[]\n{"step": "x"}\n\xff}\n{"step": 2}\n{"step": 3}\n{"step": 2, "lo')
    run_folder.cut_log(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_mount_point_is_refused_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finished adapter takes the folder's place in one rename, which a mount point does not allow."""
    monkeypatch.setattr(Path, "is_mount", lambda self: True)
    with pytest.raises(UserError, match="mount point"):
        run_folder.check_free(tmp_path, TrainOptions())


def test_what_a_run_leaves_is_for_everybody_who_may_read_the_folder(go: Go) -> None:
    """safetensors' own files are for their owner only."""
    before = os.umask(0o022)
    try:
        run = go(steps=1)
    finally:
        os.umask(before)
    found = {path.relative_to(run).as_posix(): path.stat().st_mode & 0o777 for path in run.rglob("*") if path.is_file()}
    assert {"adapter_model.safetensors", "checkpoints/step-000001/optimizer.safetensors"} <= found.keys()
    assert {name: mode for name, mode in found.items() if mode != 0o644} == {}


def test_status_says_how_a_run_ended_and_config_what_it_was(go: Go, kites: Path) -> None:
    """Complaint 48: one log, one status file."""
    run = go(steps=2)
    status = run_folder.status(run)
    assert status is not None
    assert (status["state"], status["step"], status["steps"]) == ("finished", 2, 2)
    assert status["seconds_per_step"] > 0
    config = tomllib.loads((run / "config.toml").read_text())
    assert config.pop("data") == str(kites)
    assert config.pop("base")
    assert TrainOptions.from_dict(config) == TrainOptions.from_json((run / "options.json").read_text())


def test_a_run_says_what_it_is_without_its_base(go: Go, pipe: Any, kites: Path) -> None:
    """Complaint 39: the file tells neither its base nor the words that call it."""
    run = go(steps=1)
    held = json.loads((run / "adapter_config.json").read_text())
    assert held["base_model_name_or_path"] == base_name(pipe)
    assert held["base_fingerprint"] == fingerprint(pipe.transformer)
    assert held["atomtune_version"] == version("atomtune")
    assert "| concept | kite |" in (run / "README.md").read_text()
    assert tomllib.loads((run / "config.toml").read_text())["concept"] == "kite"
    learned = json.loads((run / "data.json").read_text())
    assert learned.pop("unrelated pictures and prompts")
    captions = {entry["caption"] for entry in learned.values()}
    assert captions == {path.read_text() for path in kites.glob("*.txt")}


def test_a_run_that_is_being_trained_is_left_alone_and_a_dead_one_is_recognised(tmp_path: Path) -> None:
    """Complaint 48: nothing tells a hanging run from a dead one."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "options.json").write_text(TrainOptions().to_json())
    run_folder.set_status(run, "training", 40, 300)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom atomtune.training import run_folder\n"
        f"with run_folder.held(Path({str(run)!r})):\n    print('held', flush=True)\n    time.sleep(300)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"is being trained by process .*, at step 40"), run_folder.held(run):
            pass
        with pytest.raises(UserError, match=r"not empty: .* is training there\)"):
            run_folder.check_free(run, TrainOptions())
    finally:
        other.kill()
        other.communicate()
    with run_folder.held(run):
        pass
    with pytest.raises(UserError, match=r"ended without a word at step 40\)\. .*--resume"):
        run_folder.check_free(run, TrainOptions())


def test_a_slow_step_is_told_once() -> None:
    """Complaint 43: memory spills, and 45 minutes become 56 hours."""
    told: list[str] = []
    pace = Pace(told.append, torch.device("cpu"))
    for step in range(1, 10):
        pace.took(step, 1.0 if step > 1 else 30.0)  # the first steps are always slow
    pace.took(10, 1.0)
    pace.took(11, 2.9)
    assert told == []
    pace.took(12, 3.5)
    pace.took(13, 9.0)
    assert len(told) == 1
    assert told[0].startswith("warning: step 12 took 3.5 s, 3.5 times the median")
    assert pace.facts()["seconds_per_step"] == 1.0


def test_a_schedule_that_differs_from_the_checkpoints_is_told(
    go: Go, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Complaint 29: the learning rate's curve is rescaled in silence after a resume."""
    with monkeypatch.context() as patch:
        at_step(patch, {2}, press_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            go(steps=3)
    run = next(runs.glob("test_a_schedule_that_differs*"))
    options = TrainOptions.from_json((run / "options.json").read_text())
    (run / "options.json").write_text(dataclasses.replace(options, steps=4).to_json())
    go(steps=4, resume=True)
    assert "'steps': 3" in (said := capsys.readouterr().err)
    assert "until step 2, and now" in said
    assert len(log(run)) == 4


def test_the_words_of_a_config_survive(tmp_path: Path) -> None:
    from atomtune.training import config

    odd = {"concept": 'a "b" \\ \x7f\u00e9\U0001f600\n', "lr": 1e-5, "steps": 3, "gate": False, "sites": ["a", "b.0"]}
    path = tmp_path / "config.toml"
    path.write_text(config.text(odd | {"k": None}), encoding="utf-8")
    assert config.read(path, odd) == odd


def test_the_resumed_run_is_the_one_that_was_never_stopped_with_everything_on(
    go: Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complaints 25 to 28, for what is new: another optimizer, a mean of weights, validation, accumulation of 4."""
    more = {
        "optimizer": "muon",
        "schedule": "linear",
        "floor": 0.0,
        "ema": 0.9,
        "held_out": 1,
        "validate_every": 1,
        "grad_accumulation": 4,
        "steps": 4,
        "batch_size": 1,
    }
    through = go("through", **more)
    for number, step in enumerate((1, 3)):
        with monkeypatch.context() as patch:
            at_step(patch, {step}, press_ctrl_c)
            with pytest.raises(KeyboardInterrupt):
                go("stopped", resume=number > 0, **more)
    stopped = go("stopped", resume=True, **more)
    assert log(stopped) == log(through)
    assert same(tensors(stopped), tensors(through))
    assert same(tensors(stopped / "last"), tensors(through / "last"))
    assert json.loads((stopped / "status.json").read_text())["state"] == "finished"
