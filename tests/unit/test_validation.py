"""Held-out pictures, the best step and the last, early stop, samples, trackers, the hub, quantized bases."""

import dataclasses
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import OPTIONS, log, tensors

import atomtune
from atomtune.backbones import backbone_of
from atomtune.errors import UserError
from atomtune.training import hub, trackers, validation
from atomtune.training.base import KINDS, quantize
from atomtune.training.batch import draw, generator_of
from atomtune.training.options import TrainOptions
from atomtune.training.prepare import pictured, prepare, spoken, unrelated_list
from atomtune.training.run import Run

Go = Callable[..., Path]


@pytest.fixture(scope="module")
def material(shared: Any, kites: Path, runs: Path) -> Any:
    options = TrainOptions(concept="kite", class_noun="toy", unrelated_pictures=2)
    return prepare(shared, backbone_of(shared), kites, options, runs / "validation")


def test_held_out_pictures_are_not_learned_from(shared: Any, material: Any) -> None:
    learned, held = validation.split(material, 1, seed=0)
    assert (len(learned.latents), len(held.latents)) == (2, 1)
    assert set(learned.captions) | set(held.captions) == set(material.captions)
    assert not any(torch.equal(held.latents[0], latent) for latent in learned.latents)
    assert len(learned.items) == 2
    assert {learned.buckets[item.bucket].rows[item.place] for item in learned.items} == {0, 1}
    batches = [draw(learned, backbone_of(shared), OPTIONS, i, generator_of(OPTIONS, i)) for i in range(3)]
    assert {row for batch in batches for row in batch.rows.tolist()} == {0, 1}, "numbered anew"
    assert validation.split(material, 0, seed=0) == (material, material)
    with pytest.raises(UserError, match="`held_out` must leave pictures to learn from: it is 3, and there are 3"):
        validation.split(material, 3, seed=0)


def test_validation_is_the_same_whenever_it_is_asked(shared: Any, material: Any) -> None:
    """Complaint 46: a loss at other noise each time ranks nothing."""
    first, again = (validation.validate(shared.transformer, backbone_of(shared), material, seed) for seed in (0, 0))
    assert first == again
    assert first["validation_drift"] == 0, "the base does not drift from itself"
    assert first["validation_score"] == first["validation_loss"] > 0
    assert validation.validate(shared.transformer, backbone_of(shared), material, 1) != first


def test_drift_is_measured_far_from_the_class_and_loss_where_the_task_counts(shared: Any, material: Any) -> None:
    many = dataclasses.replace(
        material,
        of_class=torch.tensor([True] * 8 + [False] * 24),
        unrelated_latents=material.unrelated_latents[:1].repeat(32, 1, 1, 1),
    )
    rows = validation._far(many).tolist()
    assert len(rows) == 8
    assert (rows[0], rows[-1]) == (8, 31)
    assert validation._far(dataclasses.replace(many, of_class=torch.ones(3, dtype=torch.bool))).tolist() == [0, 1, 2]
    model, backbone = shared.transformer, backbone_of(shared)
    left = torch.zeros(len(material.latents), 1, *material.latents.shape[2:])
    left[..., :4] = 1
    spoilt = material.latents.clone()
    spoilt[..., 4:] = 50
    whole, masked = (
        validation.validate(model, backbone, dataclasses.replace(material, latents=spoilt, weights=w), 0)
        for w in (None, left)
    )
    assert masked["validation_loss"] < whole["validation_loss"] / 2
    learned, _ = validation.split(dataclasses.replace(material, weights=left), 1, seed=0)
    assert learned.weights is not None
    assert len(learned.weights) == 2


def test_prompts_of_the_bases_pictures_are_those_that_are_encoded(shared: Any, material: Any) -> None:
    """Complaint 21: prior preservation with another prompt than the picture's."""
    options = TrainOptions(concept="kite", class_noun="toy", unrelated_pictures=2)
    kept = [p for p in unrelated_list(shared, options) if "kite" not in p]
    painted = pictured(material.captions, tuple(kept), options)
    alone = backbone_of(shared).encode_prompts(shared, list(spoken(painted)))
    for name, value in alone.items():
        assert torch.equal(material.unrelated_conditioning[name], value)


def test_the_best_step_is_the_runs_adapter_and_the_last_is_kept(
    go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Complaint 46: no rule when to stop, and the last step is all there is."""
    scores = iter([3.0, 1.0, 2.0, 2.5, 0.0])
    monkeypatch.setattr(validation, "validate", lambda *_: {"validation_loss": 0.0, "validation_score": next(scores)})
    run = go(steps=6, validate_every=1, patience=2, checkpoint_every=1)
    assert [row["validation_score"] for row in log(run)] == [3.0, 1.0, 2.0, 2.5], "stopped after two without a better"
    assert "is step 2 (1)" in capsys.readouterr().err
    at_two, last = run / "checkpoints/step-000002/adapter", run / "checkpoints/step-000004/adapter"

    def bias(folder: Path) -> list[float]:
        """Sorted, since saving puts atoms in order."""
        return sorted(v for k, t in tensors(folder).items() if k.endswith("atom_dictionary.bias") for v in t.tolist())

    assert bias(run) == bias(at_two)
    assert bias(run / "last") == bias(last)
    assert bias(run) != bias(last)
    go(steps=6, validate_every=1, patience=2, checkpoint_every=1, resume=True)
    assert len(log(run)) == 4, "a run that was stopped early is over"


def test_every_validation_tells_how_far_unrelated_pictures_drift(go: Go) -> None:
    """Complaint 45: every face turns into the trained one, and no number says so."""
    for row in log(go(steps=4, lr=0.2, validate_every=2)):
        assert ("validation_drift" in row) == (row["step"] % 2 == 0)
        if row["step"] % 2 == 0:
            assert row["validation_drift"] > 0
            assert row["validation_score"] == pytest.approx(row["validation_loss"] + row["validation_drift"], abs=2e-6)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_step_sample_validate_step_in_every_precision(go: Go, precision: str) -> None:
    """Complaint 17: fp16 dies on unscaling after a validation."""
    with_pictures = go("with", steps=3, sample_every=1, validate_every=2, ema=0.9, mixed_precision=precision)
    without = go("without", steps=3, mixed_precision=precision)
    plain = [{k: v for k, v in row.items() if not k.startswith("validation")} for row in log(with_pictures)]
    assert plain == log(without), "neither samples, nor validation, nor a mean change what is trained"


def test_samples_are_what_generate_makes_from_the_saved_file(go: Go, pipe: Any) -> None:
    """Complaint 47: samples look right, real use does not."""
    run = go(steps=3, sample_every=3, sample_prompts=("a kite", "a house"), ema=0.5, lr=0.2)
    adapter = atomtune.load(pipe, run / "samples" / "adapter")
    again = atomtune.generate(pipe, ["a kite", "a house"], seed=0)
    adapter.remove()
    base = atomtune.generate(pipe, ["a kite"], seed=0)[0]
    assert not np.array_equal(np.asarray(again[0]), np.asarray(base)), "the adapter is not left out"
    for i, picture in enumerate(again):
        saved = Image.open(run / "samples" / f"step-000003-{i}.png")
        assert np.array_equal(np.asarray(saved), np.asarray(picture))


def test_sampling_leaves_no_memory_behind(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    """Complaint 41: memory grows with each sample."""
    import gc

    counts = []
    real = Run.sample

    def sample(self: Run) -> None:
        real(self)
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            counts.append(sum(isinstance(found, torch.Tensor) for found in gc.get_objects()))

    monkeypatch.setattr(Run, "sample", sample)
    go(steps=5, sample_every=1)
    assert len(counts) == 5
    assert counts[4] <= counts[1]


def test_an_adapter_that_learned_nothing_is_told(
    go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Complaint 32: what is saved is empty, or what it was at step 0."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: None)
    go(steps=1)
    assert "warning: no atom has learned anything" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ trackers


def test_a_first_validation_that_is_not_finite_is_never_the_best(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([float("nan"), 0.5, 0.7])
    found = {"validation_loss": 0.0, "validation_drift": 0.0}
    monkeypatch.setattr(validation, "validate", lambda *_: found | {"validation_score": next(scores)})
    run = go(steps=3, validate_every=1)
    assert "| best step | 2 |" in (run / "README.md").read_text()


def test_curves_reach_tensorboard(go: Go) -> None:
    from tensorboardX.proto.event_pb2 import Event

    run = go(steps=2)
    (path,) = (run / "trackers").rglob("events.out.tfevents.*")
    data, at, seen = path.read_bytes(), 0, {}
    while at < len(data):  # length, its check, the record, its check
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        seen |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        at += size + 16
    assert {("task", 1), ("task", 2), ("lr", 2), ("loss", 1)} <= seen.keys()
    assert seen["loss", 2] == pytest.approx(log(run)[1]["loss"], rel=1e-4)


def test_a_tracker_that_fails_is_left_out(
    go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class Broken:
        requires_logging_directory = False

        def __init__(self, name: str) -> None:
            assert name == "atomtune"

        def start(self) -> None:
            raise ConnectionError("not logged in")

    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "wandb", Broken)
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["wandb"])
    go(steps=1, trackers=("wandb",))
    assert "warning: tracker wandb is left out: ConnectionError: not logged in" in capsys.readouterr().err
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    assert trackers.chosen(None) == ()
    with pytest.raises(UserError, match="`trackers`: wandb is not installed"):
        trackers.chosen(("wandb",))


# ----------------------------------------------------------------------------------------------------------- hub


class FakeHub:
    sent: ClassVar[list[tuple[str, Any]]] = []

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        assert private
        assert exist_ok
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str) -> None:
        import fnmatch

        names = [p.relative_to(folder_path).as_posix() for p in folder_path.rglob("*") if p.is_file()]
        names = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)]
        self.sent.append((repo_id, sorted(names)))


def test_the_finished_adapter_goes_to_the_hub_and_nothing_else(
    go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(hub, "HfApi", FakeHub)
    go(steps=1, hub="me/kite")
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "statistics.safetensors"]
    assert FakeHub.sent == [("me/kite", files)]
    assert "sent to https://hub/me/kite" in capsys.readouterr().err


def test_a_hub_that_fails_costs_nothing(go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def refuse() -> None:
        raise RuntimeError("no network")  # of whatever library the hub's own has

    monkeypatch.setattr(hub, "HfApi", refuse)
    run = go(steps=1, hub="me/kite")
    assert tensors(run)
    assert "warning: not sent to me/kite: no network" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- quantized bases


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trains_on_a_quantized_base(bases: dict[str, Path], kites: Path, runs: Path, kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's and bitsandbytes' own
        pipe = atomtune.open_pipeline(str(bases["sd3"]))
        before = {type(m) for m in pipe.transformer.transformer_blocks.modules()}
        quantize(pipe.transformer, kind)
        site = pipe.transformer.transformer_blocks[0].attn.to_q
        assert type(site) not in before or type(site.weight.data) is not torch.Tensor
        options = TrainOptions(concept="kite", steps=2, batch_size=1, n_atoms=8, unrelated_pictures=2)
        run = runs / f"quantized-{kind}"
        atomtune.train(pipe, kites, run, options, progress=False)
    assert any(atoms.any() for name, atoms in tensors(run).items() if name.endswith(".atoms"))
    assert all(math.isfinite(row["loss"]) for row in log(run))


def test_an_unknown_quantization_is_named() -> None:
    with pytest.raises(UserError, match="`quantize` must be one of int8, fp8, nf4, got 'int3'"):
        quantize(torch.nn.Linear(2, 2), "int3")
