"""Fewer atoms for good, trained to do what all of them did."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import tensors
from torch import Tensor

import atomtune
from atomtune.backbones import backbone_of
from atomtune.cli import main
from atomtune.errors import UserError
from atomtune.training import refit
from atomtune.tuner import open_gate

KEEP = 3


def predicted(pipe: Any) -> Tensor:
    """Of noise that no training saw, in the concept's words, the gate open."""
    backbone = backbone_of(pipe)
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    told = backbone.encode_prompts(pipe, ["a big flat kite on a red background, on the left"] * 4)
    with torch.no_grad(), open_gate(pipe.transformer):
        return backbone.predict(pipe.transformer, x, torch.full((4,), 0.6), told)


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).square().mean().item()


def test_what_is_left_comes_nearer_to_the_whole(go: Callable[..., Path], pipe: Any, kites: Path) -> None:
    """Halfway at least, from the cut on; the run, the base and the gate stay as they were."""
    run = go(steps=30, nested=False, contain=False, silence=0.0, distill=0.0)
    kept_files, base = tensors(run), predicted(pipe)
    whole = atomtune.load(pipe, run)
    everything = predicted(pipe)
    assert whole.prune(KEEP) == KEEP
    cut = predicted(pipe)
    names = {atom.name for atom in whole.atoms}
    whole.remove()
    left = atomtune.refit(pipe, run, KEEP, kites, steps=60, progress=False)
    assert {atom.name for atom in left.atoms} == names
    assert distance(predicted(pipe), everything) < 0.5 * distance(cut, everything)
    assert sorted(pipe.transformer.peft_config) == ["default"]
    saved = tensors(left.save(run.with_name(f"{run.name}-few")))
    gate = [key for key in saved if "atom_gate" in key]
    assert gate
    assert all(torch.equal(saved[key], kept_files[key]) for key in gate)
    assert all({"effect", "purity", "reach"} <= found.keys() for found in left.statistics.values())
    left.remove()
    assert torch.equal(predicted(pipe), base)
    assert all(torch.equal(value, kept_files[key]) for key, value in tensors(run).items())


@pytest.mark.parametrize("changes", [{"sparsifier": "topk", "k": 2}, {"data_start": True, "ema": 0.9, "dead": 0.1}])
def test_what_shaped_the_run_shapes_it_no_more(
    go: Callable[..., Path], pipe: Any, kites: Path, changes: dict[str, Any]
) -> None:
    run = go(**changes)
    plain = atomtune.load(pipe, run)
    plain.prune(KEEP)
    cut = predicted(pipe)
    plain.remove()
    left = refit.refit(pipe, run, KEEP, kites, steps=1, progress=False)
    assert len(left.atoms) == KEEP
    assert 0 < distance(predicted(pipe), cut) < 0.1


def test_a_failure_leaves_the_base(
    go: Callable[..., Path], pipe: Any, kites: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = go()

    def fails(*_: Any) -> None:
        raise RuntimeError("no more")

    monkeypatch.setattr(refit.Run, "step", fails)
    with pytest.raises(RuntimeError, match="no more"):
        atomtune.refit(pipe, run, KEEP, kites, progress=False)
    assert not getattr(pipe.transformer, "peft_config", None)


def test_the_command(go: Callable[..., Path], kites: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = go(), tmp_path / "few"
    asked = ["prune", str(run), "--count", str(KEEP), "--out", str(out), "--refit", "2"]
    assert main(asked) == 2
    assert "`refit` and `data` must be given together" in capsys.readouterr().err
    assert main([*asked, "--data", str(kites)]) == 0
    assert "kept 3 of 8 atoms" in capsys.readouterr().err
    again = ["prune", str(out), "--count", "2", "--refit", "2", "--data", str(kites), "--out", str(tmp_path / "x")]
    assert main(again) == 2
    assert f"`refit` needs the folder of a run, with its options.json, got {out}." in capsys.readouterr().err


def test_steps_that_are_none(go: Callable[..., Path], pipe: Any, kites: Path) -> None:
    run = go()
    with pytest.raises(UserError, match="`refit` must be at least 1 step, got 0"):
        atomtune.refit(pipe, run, KEEP, kites, steps=0)
    shutil.rmtree(run)
    with pytest.raises(UserError, match="needs the folder of a run"):
        atomtune.refit(pipe, run, KEEP, kites)
