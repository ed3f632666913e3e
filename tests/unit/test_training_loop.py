"""The training loop: exact resuming, what stops it, what does not, and what it logs."""

import dataclasses
import errno
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate import PartialState
from tiny_runs import OPTIONS, at_step, log, press_ctrl_c, pull_the_plug, same, tensors
from torch import Tensor

from atomtune.adapter import load
from atomtune.errors import UserError
from atomtune.training import checkpoints
from atomtune.training import run as running
from atomtune.training.loop import train
from atomtune.training.optimizers import schedule
from atomtune.training.run import Run
from atomtune.tuner import atom_layers

TERMS = {"task", "silence", "distill", "gate"}


# -------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"grad_accumulation": 2},
        {"sparsifier": "topk", "k": 1, "dead": 0.1, "sparsity": 0.01, "inner": 0.1, "prior": 0.1},
        {"nested": False, "data_start": True},
        {"buckets": True, "flip": True, "crop": 0.1, "caption_dropout": 0.3},
    ],
    ids=["plain", "accumulated", "every-term", "data-start", "views"],
)
@pytest.mark.parametrize("stop", [press_ctrl_c, pull_the_plug], ids=["ctrl-c", "cut-off"])
def test_three_stops_change_nothing(
    go: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    changes: dict[str, Any],
    stop: Callable[[], None],
) -> None:
    """Complaints 25 to 28: resuming starts the data over, loses the count, forgets accumulation or the weights."""
    monkeypatch.setattr(running, "DEAD_AFTER", 2)
    through = go("through", **changes)
    for number, step in enumerate((2, 4, 5)):
        with monkeypatch.context() as patch:
            at_step(patch, {step}, stop)
            with pytest.raises(KeyboardInterrupt):
                go("stopped", resume=number > 0, **changes)
    stopped = go("stopped", resume=True, **changes)
    assert log(stopped) == log(through)
    assert [line["step"] for line in log(stopped)] == [1, 2, 3, 4, 5, 6]
    assert same(tensors(stopped), tensors(through))
    assert (stopped / "statistics.safetensors").read_bytes() == (through / "statistics.safetensors").read_bytes()
    assert capsys.readouterr().out == ""


def test_ctrl_c_saves_where_it_stopped_and_says_how_to_go_on(
    go: Callable[..., Path], pipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, runs: Path
) -> None:
    before = signal.getsignal(signal.SIGINT)
    at_step(monkeypatch, {3}, press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        go()
    run = next(runs.glob("test_ctrl_c_saves_where*"))
    assert checkpoints.newest(run) == (3, checkpoints.folder_of(run, 3))
    assert f"stopped after step 3; go on with: atomtune train --resume --out {run}" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    assert not hasattr(pipe.transformer, "peft_config")


def test_a_second_ctrl_c_stops_at_once_and_saves_no_half_step(
    go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, runs: Path
) -> None:
    def twice() -> None:
        press_ctrl_c()
        press_ctrl_c()

    at_step(monkeypatch, {4}, twice)
    with pytest.raises(KeyboardInterrupt):
        go()
    assert checkpoints.newest(next(runs.glob("test_a_second_ctrl_c*")))[0] == 2  # type: ignore[index]


def test_a_truncated_checkpoint_is_passed_over(go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Complaint 24: a broken checkpoint is picked up at restart."""
    through = go("through")
    with monkeypatch.context() as patch:
        at_step(patch, {5}, press_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            go("broken")
    run = through.with_name(through.name.replace("through", "broken"))
    for step, name in ((5, "optimizer.safetensors"), (4, "adapter/adapter_config.json")):
        path = checkpoints.folder_of(run, step) / name
        path.write_bytes(path.read_bytes()[:-20])
    assert checkpoints.newest(run)[0] == 2  # type: ignore[index]
    go("broken", resume=True)
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert left == {"step-000002", "step-000004", "step-000006"}, "no damaged one of a later step"
    assert log(run) == log(through)
    assert same(tensors(run), tensors(through))


def test_batch_topk_chooses_among_a_batch_in_training_alone(go: Callable[..., Path], pipe: Any) -> None:
    run = go(sparsifier="batch_topk", k=1, checkpoint_every=100, validate_every=2)
    adapter = load(pipe, run)
    for layer in atom_layers(pipe).values():
        sparsifier: Any = layer.dictionary("default").sparsifier
        assert sparsifier.threshold > 0
        assert sparsifier.batches > 0
        assert not sparsifier.training
    adapter.remove()
    assert log(run)[-1]["l0"] < 1.5


def test_a_run_that_goes_on_in_other_processes_says_so(
    go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, {3}, press_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            go()
    restored = Run._set_state
    monkeypatch.setattr(Run, "_set_state", lambda self, state: restored(self, state | {"processes.": torch.tensor(2)}))
    go(resume=True)
    assert "warning: the run was trained by 2 processes, and now by 1" in capsys.readouterr().err


def test_a_finished_run_resumes_to_itself(go: Callable[..., Path]) -> None:
    run = go(steps=2)
    (run / "notes.json").write_text("{}")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()}
    assert go(resume=True, steps=2) == run
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()}


def test_a_resumed_run_keeps_its_options_and_says_so(go: Callable[..., Path], capsys: pytest.CaptureFixture) -> None:
    run = go(steps=2)
    go(resume=True, steps=4, lr=0.5)
    said = capsys.readouterr().err
    assert "`steps` stays 2, not 4" in said
    assert "`lr` stays 0.02, not 0.5" in said
    assert len(log(run)) == 2


def test_what_no_step_will_come_to_is_told(go: Callable[..., Path], capsys: pytest.CaptureFixture) -> None:
    go(steps=1, validate_every=9, held_out=1)
    assert "warning: `validate_every` is 9, and there are 1 steps: nothing will come of it" in capsys.readouterr().err


def test_only_the_newest_checkpoints_stay(go: Callable[..., Path]) -> None:
    run = go(keep_checkpoints=2)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000004", "step-000006"]


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (1, 3), (2, 2)])
def test_the_learning_rate_counts_optimizer_steps_alone(
    go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, processes: int, accumulation: int
) -> None:
    """Complaint 18: several processes, of which this is the first, or accumulation stretch the schedule."""
    real, rates = Run._update, []

    def update(self: Run, step: int) -> None:
        rates.append(self.optimizer.param_groups[0]["lr"])
        real(self, step)

    monkeypatch.setattr(Run, "_update", update)
    monkeypatch.setitem(PartialState(cpu=True)._shared_state, "num_processes", processes)
    go(steps=4, lr=0.5, floor=0.2, contain=False, grad_accumulation=accumulation)
    assert rates == [0.5 * schedule(step, 4, floor=0.2) for step in range(4)]


# ------------------------------------------------------------------------------------------------ what stops


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(
    go: Callable[..., Path], pipe: Any, monkeypatch: pytest.MonkeyPatch, runs: Path, value: float
) -> None:
    """Complaint 15: the loss is NaN to the end, and a dead adapter is saved."""
    real = Run._losses

    def losses(self: Run, micro: int) -> dict[str, Tensor]:
        found = real(self, micro)
        return found | {"task": found["task"] * value} if micro == 3 else found

    monkeypatch.setattr(Run, "_losses", losses)
    with pytest.raises(UserError) as caught:
        go()
    run = runs / next(p.name for p in runs.glob("test_a_loss_that*") if str(value) in p.name)
    assert "step 4" in str(caught.value)
    assert "`task` is not finite" in str(caught.value)
    assert str(checkpoints.folder_of(run, 2)) in str(caught.value)
    assert not (run / "adapter_model.safetensors").exists()
    assert all(t.isfinite().all() for t in tensors(checkpoints.folder_of(run, 2) / "adapter").values())
    assert not hasattr(pipe.transformer, "peft_config")


def test_a_gradient_that_is_not_finite_stops_the_run(go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.nan))
    with pytest.raises(UserError, match=r"step 1: `gradient` is not finite\. There is no checkpoint yet"):
        go()


@pytest.mark.parametrize("how", ["safetensors", "rename"])
def test_a_full_disk_keeps_earlier_checkpoints(
    go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, runs: Path, how: str
) -> None:
    """safetensors has an error of its own for what the system refuses."""
    full = OSError(errno.ENOSPC, "No space left on device")
    if how == "safetensors":
        real = checkpoints.save_adapter

        def save(model: Any, folder: Path, adapter: str) -> Path:
            if "step-000004" in str(folder):
                raise safetensors.SafetensorError("No space left on device (os error 28)")
            return real(model, folder, adapter)

        monkeypatch.setattr(checkpoints, "save_adapter", save)
    else:
        real_replace = checkpoints.os.replace

        def replace(source: Path, target: Path) -> None:
            if "step-000004" in str(target):
                raise full
            real_replace(source, target)

        monkeypatch.setattr(checkpoints.os, "replace", replace)
    with pytest.raises(UserError, match=r"Could not write .*step-000004.*No space left.*untouched"):
        go()
    run = next(p for p in runs.glob("test_a_full_disk_keeps*") if how in p.name)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert checkpoints.newest(run) == (2, checkpoints.folder_of(run, 2))


def test_a_full_disk_at_the_end_is_a_users_error(go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from atomtune.tuner import store

    real = store._write_tensors

    def write(tensors: dict[str, Tensor], path: Path, **more: str) -> None:
        if "statistics" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, **more)

    monkeypatch.setattr(store, "_write_tensors", write)
    with pytest.raises(UserError, match="No space left"):
        go(steps=2)


# ----------------------------------------------------------------------------------- what must not be touched


def test_what_is_wrong_is_known_before_anything_is_painted_or_written(
    pipe: Any, kites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complaint 22, among others: names of sites that match nothing."""

    def painted(*_: Any, **__: Any) -> None:
        raise AssertionError("painted before the mistake was told")

    monkeypatch.setattr("atomtune.training.encode.generate", painted)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"concept": "sks dog"}, "`concept` must stand in every caption, but 3 of 3"),
        ({"sites": ("to_qq",)}, "no module is named 'to_qq'. Did you mean `to_q`"),
        ({"sparsifier": "topk", "k": 9}, r"`k` must be between 1 and n_atoms \(4\), got 9"),
        ({"sparsifier": "topk"}, "`k` must be given"),
        ({"sparsifier": "tokp", "k": 2}, "Did you mean `topk`"),
        ({"sparsifier": "relu", "k": 2}, "`k` must come with the sparsifier topk or batch_topk, got relu"),
        ({"resolution": 50}, "`resolution` must be a multiple of 16"),
        ({"unrelated": Path("no-such-file")}, "`unrelated` can't be read"),
    ]
    for changes, message in wrong:
        with pytest.raises(UserError, match=message):
            train(pipe, kites, tmp_path / "run", dataclasses.replace(OPTIONS, **changes))
        assert not (tmp_path / "run").exists()
        assert not hasattr(pipe.transformer, "peft_config")


def test_a_second_adapter_of_the_name_is_refused_and_the_first_stays(
    pipe: Any, kites: Path, runs: Path, tmp_path: Path
) -> None:
    adapter = train(pipe, kites, runs / "first", dataclasses.replace(OPTIONS, steps=2), progress=False)
    with pytest.raises(UserError, match="already attached"):
        train(pipe, kites, tmp_path / "second", OPTIONS)
    assert len(adapter.atoms) == 8


def test_an_existing_folder_is_left_alone(pipe: Any, kites: Path, tmp_path: Path) -> None:
    """Complaint 30: going on overwrote earlier final files."""
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        train(pipe, kites, tmp_path, OPTIONS)
    with pytest.raises(UserError, match=r"has no options\.json"):
        train(pipe, kites, tmp_path, OPTIONS, resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_the_base_stays_as_it_was(go: Callable[..., Path], pipe: Any) -> None:
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    go(steps=2, gradient_checkpointing=True)
    assert same(dict(pipe.transformer.state_dict()), before)
    assert not pipe.transformer.is_gradient_checkpointing
    assert not pipe.transformer.training


def test_gradient_checkpointing_changes_no_loss(go: Callable[..., Path]) -> None:
    assert log(go("with", steps=2, gradient_checkpointing=True)) == log(go("without", steps=2))


def test_the_seed_decides_everything(go: Callable[..., Path]) -> None:
    """Complaint 23: the same settings twice, and different results."""
    first, again, other = go("a", steps=2), go("b", steps=2), go("c", steps=2, seed=1)
    assert same(tensors(first), tensors(again))
    assert not same(tensors(first), tensors(other))


# ------------------------------------------------------------------------------------------------ what it logs


def test_every_term_is_logged_under_its_name(go: Callable[..., Path]) -> None:
    rows = log(go(sparsity=0.01, dead=0.1, steps=2))
    for row in rows:
        assert set(row) == {"step", "loss", "l0", "sparsity", "dead"} | TERMS
        assert row["loss"] == pytest.approx(sum(v for k, v in row.items() if k not in ("step", "loss", "l0")), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"distill": 0.0}, {"distill"}),
        ({"silence": 0.0}, {"silence"}),
        ({"gate": False}, {"gate"}),
        ({"concept": None, "class_noun": None}, {"gate"}),
        ({"unrelated_batch": 0}, {"silence", "distill"}),
    ],
    ids=str,
)
def test_a_term_of_weight_0_is_gone(go: Callable[..., Path], changes: dict[str, Any], gone: set[str]) -> None:
    assert set(log(go(steps=1, **changes))[0]) - {"step", "loss", "l0"} == TERMS - gone


def test_a_run_without_a_gate_has_none(go: Callable[..., Path]) -> None:
    run = go(steps=1, gate=False)
    assert json.loads((run / "adapter_config.json").read_text())["gate_input"] is None
    assert not any("gates" in key for key in tensors(run))


def test_silence_lowers_codes_on_unrelated_rows(go: Callable[..., Path]) -> None:
    more = {"steps": 12, "distill": 0.0, "lr": 0.05, "checkpoint_every": 12}
    loud, quiet = log(go("loud", silence=1e-3, **more)), log(go("quiet", silence=1.0, **more))
    assert quiet[-1]["silence"] < 0.5 * quiet[0]["silence"]
    # The logged term is weighted.
    assert quiet[0]["silence"] == pytest.approx(1e3 * loud[0]["silence"], rel=0.01), "both begin at the same codes"
    assert quiet[-1]["silence"] < 0.7 * 1e3 * loud[-1]["silence"]


def test_k_falls_from_all_atoms_to_k(go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = Run._losses

    def losses(self: Run, micro: int) -> dict[str, Tensor]:
        seen.append({layer.dictionary("default").sparsifier.k for layer in atom_layers(self.base).values()})
        return real(self, micro)

    monkeypatch.setattr(Run, "_losses", losses)
    rows = log(go(steps=10, n_atoms=8, sparsifier="topk", k=2, checkpoint_every=10))
    assert all(len(ks) == 1 for ks in seen)
    ks = [next(iter(k)) for k in seen]
    assert ks[0] == 8
    assert ks == sorted(ks, reverse=True)
    assert set(ks[4:]) == {2}
    assert rows[-1]["l0"] <= 2


def test_validation_pictures_are_written_and_a_raising_sampler_is_only_a_warning(
    go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Complaint 31: sampling fails and takes the run with it."""
    real = running.generate
    calls = []

    def sampler(pipe: Any, prompts: list[str], **more: Any) -> Any:
        calls.append(prompts)
        if len(calls) == 1:
            raise TypeError("no such argument")
        return real(pipe, prompts, steps=2, **more)

    monkeypatch.setattr(running, "generate", sampler)
    run = go(steps=4, sample_every=2, sample_prompts=("a kite",))
    assert calls == [["a kite"]] * 2
    assert {p.name for p in (run / "samples").iterdir()} == {"adapter", "step-000004-0.png"}
    out, err = capsys.readouterr()
    assert "warning: validation pictures at step 2 failed: TypeError: no such argument" in err
    assert out == ""


def test_a_checkpoint_is_written_before_pictures_are_painted(
    go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, runs: Path
) -> None:
    """Complaint 31, where nothing can be caught: the process dies while it paints."""
    monkeypatch.setattr(running, "generate", lambda *_, **__: pull_the_plug())
    with pytest.raises(KeyboardInterrupt):
        go(sample_every=2)
    assert checkpoints.newest(next(runs.glob("test_a_checkpoint_is_written*")))[0] == 2  # type: ignore[index]


def test_sampling_does_not_change_the_training(go: Callable[..., Path]) -> None:
    assert log(go("with", steps=2, sample_every=1)) == log(go("without", steps=2))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_resumes_too(
    go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    through = go("through", steps=3, mixed_precision=precision)
    assert all(math.isfinite(row["loss"]) for row in log(through))
    assert {t.dtype for t in tensors(through).values() if t.is_floating_point()} == {torch.float32}
    with monkeypatch.context() as patch:
        at_step(patch, {2}, press_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            go("stopped", steps=3, mixed_precision=precision)
    stopped = go("stopped", steps=3, mixed_precision=precision, resume=True)
    assert log(stopped) == log(through)
    assert same(tensors(stopped), tensors(through))


def test_in_fp16_an_overflow_leaves_a_step_out(go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real, scales = Run._update, []

    def update(self: Run, step: int) -> None:
        if step == 0:
            next(p for p in self.optimizer.param_groups[0]["params"] if p.grad is not None).grad.fill_(math.inf)
        real(self, step)
        scales.append(self.scaler.get_scale())

    monkeypatch.setattr(Run, "_update", update)
    go(steps=2, mixed_precision="fp16")
    assert scales == [2.0**15, 2.0**15]


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert schedule(100, 100) == pytest.approx(0.1)
    assert schedule(0, 1) == 1.0
