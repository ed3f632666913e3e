"""Fewer atoms for good, trained to do what all of them did."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import tensors
from torch import Tensor

import atomtune
from atomtune.backbones import backbone_of
from atomtune.cli import main
from atomtune.errors import UserError
from atomtune.training import refit
from atomtune.tuner import open_gate

KEEP = 3


def scale_weights(base: Path) -> None:
    """Another base of the same shape."""
    path = next((base / "transformer").glob("*.safetensors"))
    values = {key: 1.01 * value for key, value in load_file(path).items()}
    save_file(values, path, {"format": "pt"})


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


@pytest.mark.parametrize(
    "changes",
    [
        {"sparsifier": "topk", "k": 2},
        {"sparsifier": "batch_topk", "k": 2},
        {"data_start": True, "ema": 0.9, "dead": 0.1},
        {"buckets": True, "caption_dropout": 0.5, "grad_accumulation": 2, "gradient_checkpointing": True},
        {"unrelated_batch": 0},
    ],
)
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


@pytest.mark.parametrize("where", ["step", "described"])
def test_a_failure_leaves_the_base(
    go: Callable[..., Path], pipe: Any, kites: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    run = go()

    def fails(*_: Any) -> None:
        raise RuntimeError("no more")

    monkeypatch.setattr(*((refit.Run, "step", fails) if where == "step" else (refit, where, fails)))
    with pytest.raises(RuntimeError, match="no more"):
        atomtune.refit(pipe, run, KEEP, kites, progress=False)
    assert not getattr(pipe.transformer, "peft_config", None)


@pytest.mark.parametrize("name", ["default", "whole"])
def test_an_adapter_of_the_user_stays(go: Callable[..., Path], pipe: Any, kites: Path, name: str) -> None:
    run = go()
    own = atomtune.load(pipe, run, name=name)
    with pytest.raises(UserError, match="`refit` attaches adapters named default and whole"):
        atomtune.refit(pipe, run, KEEP, kites, progress=False)
    assert list(pipe.transformer.peft_config) == [name]
    own.remove()


def test_what_is_trainable_stays_so_and_another_adapter_as_it_is(
    go: Callable[..., Path], pipe: Any, kites: Path
) -> None:
    run = go()
    style = atomtune.load(pipe, run, name="style")
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in pipe.transformer.named_parameters()}
    left = atomtune.refit(pipe, run, KEEP, kites, steps=2, progress=False)
    after = dict(pipe.transformer.named_parameters())
    assert all(after[k].requires_grad == flag and torch.equal(after[k], value) for k, (flag, value) in before.items())
    assert not any(p.requires_grad for k, p in after.items() if k not in before)
    left.remove()
    style.remove()


def test_pictures_that_were_held_out_stay_so(
    go: Callable[..., Path], pipe: Any, kites: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = go(held_out=1, validate_every=3)
    seen = []
    monkeypatch.setattr(refit, "described", lambda _, __, material: seen.append(len(material.items)))
    atomtune.refit(pipe, run, KEEP, kites, steps=1, progress=False)
    assert seen == [2]


def test_a_term_that_is_not_finite(
    go: Callable[..., Path], pipe: Any, kites: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = go()
    monkeypatch.setattr(refit.Run, "losses", lambda *_: {"task": torch.tensor(torch.nan), "l0": torch.tensor(0.0)})
    with pytest.raises(UserError, match=r"`refit` is not finite at step 1\. Give fewer steps"):
        atomtune.refit(pipe, run, KEEP, kites, progress=False)


def test_the_command(
    go: Callable[..., Path], pipe: Any, kites: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out, other_base = go(), tmp_path / "few", tmp_path / "base"
    shutil.copytree(pipe.config._name_or_path, other_base)
    scale_weights(other_base)
    asked = ["prune", str(run), "--count", str(KEEP), "--out", str(out), "--refit", "2"]
    assert main(asked) == 2
    assert "`refit` and `data` must be given together" in capsys.readouterr().err
    other = [*asked, "--data", str(kites), "--base", str(other_base), "--allow-other-base"]
    with pytest.warns(UserWarning, match="another base"):
        assert main([*other, "--out", str(tmp_path / "other")]) == 0
    capsys.readouterr()
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
