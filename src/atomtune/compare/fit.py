"""Training one method on one lesson, on equal terms, and keeping what came of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from atomtune import atoms as atom_dials
from atomtune.adapter import Adapter, load
from atomtune.backbones import Backbone, backbone_of, denoiser
from atomtune.compare.cells import code_digest
from atomtune.compare.controls import attach_autoencoded, attach_factors, factors, rotated, train_gate
from atomtune.compare.methods import METHODS
from atomtune.compare.rivals import Rival, attach_rival
from atomtune.errors import UserError
from atomtune.files import exclusive
from atomtune.scenes.render import render
from atomtune.scenes.world import Scene
from atomtune.training import objective
from atomtune.training.batch import draw, generator_of
from atomtune.training.ends import NAME, attach_atoms, conclude, training_mode
from atomtune.training.optimizers import schedule
from atomtune.training.options import TrainOptions
from atomtune.training.prepare import Material, prepare
from atomtune.training.refit import fewer
from atomtune.training.run import Run
from atomtune.tuner import base_only, override_gate, read_gates, remove_adapter, save

ROOMS = ("sparse", "tuner", "backbones", "data", "training", "scenes", "measure", "editing")
LINES = ("effect", "atoms", "adapter", "steering", "own_words", "sampling", "lora", "mix")
COMPARED = ("fit", "measure", "methods", "tasks", "controls", "rivals", "plain_rivals")
CODE = tuple(f"atomtune.{part}" for part in (*ROOMS, *LINES, *(f"compare.{part}" for part in COMPARED)))
"""Source that decides what a cell measures."""

COMPONENTS = ("lora", "rslora")
"""Rivals that are kept as rank-one components, so that they have every dial that atoms have."""


@dataclass(frozen=True)
class Lesson:
    """What a method is shown: pictures of scenes with captions, and the words for what is new in them."""

    shots: tuple[tuple[Scene, str], ...]
    concept: str
    class_noun: str | None

    def write(self, folder: Path) -> None:
        """The pictures and captions as files, as a user would bring them."""
        folder.mkdir(parents=True)
        for i, (shot, caption) in enumerate(self.shots):
            Image.fromarray(render(shot)).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(caption + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Fit:
    """One training: a method, its options, its size in ranks of LoRA, and a lesson."""

    method: str
    options: TrainOptions
    size: int
    lesson: Lesson
    base: str
    """Fingerprint of the base."""

    @property
    def key(self) -> str:
        """What tells this training from every other, the code that does it included."""
        given = {"options": self.options.essence(), "version": METHODS[self.method].version, "code": code_digest(CODE)}
        plain = dataclasses.asdict(self) | given
        return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Knob:
    """How a trained method is turned down, and how far."""

    name: str = "full"
    """full, scale, contain, beside, contain-beside (both), atoms (a density, by a formula), purity (a threshold) or
    random (a density). What is not turned but made anew has names of its own: svd, refit (densities), own-words,
    own-strong (until which time)."""
    value: float = 1.0
    formula: str | None = None


@dataclass
class Tuned:
    """A trained method, attached to a pipeline."""

    pipe: Any
    facts: dict[str, Any]
    """trained_parameters, bytes, train_seconds, and what the gate's calibration measured."""
    adapter: Adapter | None = None
    rival: Rival | None = None

    def turned(self, knob: Knob) -> AbstractContextManager[Any]:
        """Inside, the knob is turned. Raises UserError where the method has no such knob."""
        if knob.name == "full":
            return nullcontext()
        if self.rival is not None:
            if knob.name != "scale":
                raise UserError(f"`knob` must be full or scale for this method, got {knob.name!r}.")
            return self.rival.scaled(knob.value)
        assert self.adapter is not None
        if knob.name == "scale":
            return self.adapter.using(strength=knob.value)
        if knob.name in ("contain", "beside", "contain-beside"):
            contain, beside = (knob.value * (dial in knob.name) for dial in ("contain", "beside"))
            return self.adapter.using(contain=contain, beside=beside)
        if knob.name == "atoms":
            return self.adapter.using(density=knob.value, formula=knob.formula or "effect")
        if knob.name == "purity":
            return self.adapter.using(purity=knob.value)
        return atom_dials.strengths(self.pipe, at_random(self.adapter, knob.value), self.adapter.name)

    @property
    def gated(self) -> bool:
        """Whether it has a prompt gate."""
        return "gate_silent_share" in self.facts

    def gate(self, on: bool) -> AbstractContextManager[None]:
        """The gate as it is, or held open."""
        assert self.adapter is not None
        return nullcontext() if on else override_gate(denoiser(self.pipe), 1.0, self.adapter.name)

    def wide_open(self, prompts: Sequence[str]) -> bool:
        """Whether the gate stands at 1 for all of them, so that holding it open changes nothing."""
        assert self.adapter is not None
        given = backbone_of(self.pipe).encode_prompts(self.pipe, list(prompts))
        return bool((read_gates(denoiser(self.pipe), given)[self.adapter.name] == 1).all())

    def reading(self, own_words: Mapping[str, str], until: float) -> AbstractContextManager[None]:
        """Inside, codes are read in words of its own, down to a time."""
        assert self.adapter is not None
        return self.adapter.worded(own_words, until)

    def remove(self) -> None:
        """The pipeline is the base again."""
        (self.adapter or self.rival).remove()  # type: ignore[union-attr]


def at_random(adapter: Adapter, density: float) -> dict[str, torch.Tensor]:
    """Strengths by site for a share of the atoms, drawn by lot: the control of every ranking."""
    drawn = list(adapter.atoms)
    random.Random(0).shuffle(drawn)
    return atom_dials.dialled(drawn, density)


def obtain(fit: Fit, pipe: Any, folder: Path, name: str = NAME) -> Tuned:
    """The trained method, attached under a name: from `folder` if it is there, else trained and kept there."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / fit.key
    with exclusive(folder / f"{fit.key}.lock"):
        if not (kept / "facts.json").is_file():
            _train(fit, pipe, folder, kept)
    facts = json.loads((kept / "facts.json").read_text(encoding="utf-8"))
    if (kept / "adapter").is_dir():
        return Tuned(pipe, facts, adapter=load(pipe, kept / "adapter", name=name))
    name_of = METHODS[fit.method].rival
    assert name_of is not None
    rival = attach_rival(name_of, denoiser(pipe), _sites(pipe, fit), fit.size, fit.options.seed)
    rival.load(load_file(kept / "rival.safetensors"))
    return Tuned(pipe, facts, rival=rival)


def refitted(fit: Fit, pipe: Any, folder: Path, keep: float) -> Tuned:
    """A trained method again, cut to a share of its components, which are then trained to do what all of them did."""
    facts = json.loads((folder / fit.key / "facts.json").read_text(encoding="utf-8"))

    def material() -> Material:
        with tempfile.TemporaryDirectory() as data, base_only(denoiser(pipe)):
            fit.lesson.write(Path(data) / "data")
            return prepare(pipe, backbone_of(pipe), Path(data) / "data", fit.options, folder / "run")

    return Tuned(pipe, facts, adapter=fewer(pipe, folder / fit.key / "adapter", material, fit.options, keep))


def singular(fit: Fit, pipe: Any, folder: Path) -> Tuned:
    """A trained LoRA again, its components turned into singular vectors; they rank by singular value."""
    tuned = obtain(fit, pipe, folder)
    assert tuned.adapter is not None
    parts = {
        site: (layer.dictionary(NAME).encoder.detach().clone(), layer.dictionary(NAME).atoms.detach().clone())
        for site, layer in atom_dials.atom_layers(pipe, NAME).items()
    }
    remove_adapter(pipe, NAME)
    plain = dataclasses.replace(fit.options, gate=False)
    turned = rotated(parts)
    attach_factors(pipe, backbone_of(pipe), turned, plain)
    # Both factors hold the root of the singular value: it is the square of their norm.
    statistics = {
        site: {"effect": up.square().sum(1), "density": torch.ones(len(up)), "purity": torch.full((len(up),), math.nan)}
        for site, (_, up) in turned.items()
    }
    return Tuned(pipe, tuned.facts, adapter=Adapter(pipe, statistics))


def _sites(pipe: Any, fit: Fit) -> tuple[str, ...]:
    return tuple(fit.options.sites or backbone_of(pipe).sites)


def _train(fit: Fit, pipe: Any, folder: Path, kept: Path) -> None:
    backbone, base = backbone_of(pipe), denoiser(pipe)
    fresh = Path(tempfile.mkdtemp(prefix=f".{fit.key}-", dir=folder))
    try:
        fit.lesson.write(fresh / "data")
        # `prepare` keeps what is slow beside the run: one cache for all trainings of this folder.
        material = prepare(pipe, backbone, fresh / "data", fit.options, folder / "run")
        begin = time.monotonic()
        if METHODS[fit.method].rival is None:
            facts = _fit_atoms(pipe, backbone, material, fit, fresh)
        else:
            facts = _fit_rival(pipe, backbone, base, material, fit, fresh)
        facts |= {"train_seconds": round(time.monotonic() - begin, 1), "bytes": _bytes(fresh)}
        shutil.rmtree(fresh / "data")
        (fresh / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        shutil.rmtree(kept, ignore_errors=True)
        os.replace(fresh, kept)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*.safetensors") if p.name != "statistics.safetensors")


def _fit_atoms(pipe: Any, backbone: Backbone, material: Material, fit: Fit, out: Path) -> dict[str, Any]:
    attach_atoms(pipe, backbone, fit.options)
    with training_mode(denoiser(pipe), fit.options):
        run = Run(pipe, backbone, material, fit.options, out, PartialState(cpu=True))
        losses = [run.step(step)["loss"] for step in range(fit.options.steps)]
    trained = sum(p.numel() for p in run.parameters())
    run.end()
    adapter, gate_report = conclude(pipe, backbone, material, fit.options)
    active = [float(s["density"].sum()) for s in adapter.statistics.values()]
    adapter.save(out / "adapter")
    adapter.remove()
    return {"trained_parameters": trained, "active": sum(active) / len(active), **_ends(losses), **gate_report}


def _fit_rival(
    pipe: Any, backbone: Backbone, base: nn.Module, material: Material, fit: Fit, out: Path
) -> dict[str, Any]:
    name = METHODS[fit.method].rival
    assert name is not None
    rival = attach_rival(name, base, _sites(pipe, fit), fit.size, fit.options.seed)
    losses = train_rival(backbone, base, material, rival, fit.options)
    facts = {"trained_parameters": sum(p.numel() for p in rival.parameters()), **_ends(losses)}
    if name not in COMPONENTS:
        save_file({k: v.contiguous() for k, v in rival.state().items()}, out / "rival.safetensors")
        rival.remove()
        return facts
    parts = factors(base)
    rival.remove()
    if METHODS[fit.method].autoencoded:
        facts["autoencoder_error"] = attach_autoencoded(pipe, backbone, material, parts, fit.options)
    else:
        attach_factors(pipe, backbone, parts, fit.options)
    if fit.options.gated:
        train_gate(pipe, backbone, material, fit.options)
    adapter, gate_report = conclude(pipe, backbone, material, fit.options)
    save(pipe, out / "adapter", statistics=adapter.statistics)
    adapter.remove()
    return facts | gate_report


def _ends(losses: list[float]) -> dict[str, float]:
    tail = losses[-max(1, len(losses) // 10) :]
    return {"final_loss": sum(tail) / len(tail)}


SCHEDULED = ("schedule", "warmup", "floor")
"""Options of the learning rate, as `optimizers.schedule` takes them."""


def train_rival(
    backbone: Backbone, base: nn.Module, material: Material, rival: Rival, options: TrainOptions
) -> list[float]:
    """The loop that the atoms have, without what only atoms have: same batches, optimizer, schedule and priors."""
    optimizer = torch.optim.AdamW(rival.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.0)
    losses = []
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * schedule(step, options.steps, *(getattr(options, name) for name in SCHEDULED))
        batch = draw(material, backbone, options, step, generator_of(options, step))
        predicted = backbone.predict(base, batch.x, batch.s, batch.conditioning)
        concept, others = batch.concept, batch.others
        terms = [objective.error(predicted[concept], batch.target[concept], batch.weight)]
        if options.unrelated_rows and options.prior:
            terms.append(options.prior * objective.error(predicted[others], batch.target[others]))
        if options.unrelated_rows and options.distill:
            with torch.no_grad(), rival.off():
                plain = backbone.predict(base, batch.x[others], batch.s[others], batch.conditioning_of(others))
            terms.append(options.distill * objective.error(predicted[others], plain))
        extra = rival.penalty()
        if extra is not None:
            terms.append(extra)
        loss = torch.stack(terms).sum()
        if not torch.isfinite(loss):
            raise UserError(f"The loss of {rival.name} is not finite at step {step + 1}. Lower `lr`.")
        loss.backward()
        nn.utils.clip_grad_norm_(rival.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses
