"""Fewer atoms for good: what is left of an adapter is trained to do what all of it did."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from atomtune.adapter import Adapter, load
from atomtune.backbones import backbone_of, denoiser
from atomtune.errors import UserError
from atomtune.training import run_folder
from atomtune.training.batch import Batch
from atomtune.training.ends import NAME, described, training_mode
from atomtune.training.options import TrainOptions
from atomtune.training.prepare import Material, prepare
from atomtune.training.run import Run
from atomtune.tuner import assigned, base_only, open_gate, remove_adapter

STEPS = 40
"""Steps, where nothing is said: at the run's own rate they are a fifth of its cost (LOG.md)."""
WHOLE = "whole"
"""Name of the adapter that is learned from, while it is."""
AS_TRAINED: dict[str, Any] = {
    "nested": False,
    "gate": False,
    "data_start": False,
    "k": None,
    "ema": 0.0,
    "dead": 0.0,
    "silence": 0.0,
}
"""Of a run's options: dictionaries and the gate stay as they are, and silence is learned from the whole adapter."""


def refit(
    pipe: Any,
    run: str | Path,
    keep: float | int,
    data: str | Path,
    *,
    steps: int = STEPS,
    formula: str = "effect",
    progress: bool = True,
) -> Adapter:
    """A run's adapter with a share (or number) of its atoms, trained to predict what all of them did; attached.

    `data` is what the run learned from. On its pictures the target is the whole adapter's prediction, and the terms on
    unrelated ones are the run's own; the gate stays as it is. Cut, then trained from a teacher: Hinton et al. 2015,
    arXiv 1503.02531. Raises UserError where `run` is not a run's folder, before anything is attached.
    """
    run, base, backbone = Path(run), denoiser(pipe), backbone_of(pipe)
    if not (run / run_folder.OPTIONS).is_file():
        raise UserError(f"`refit` needs the folder of a run, with its {run_folder.OPTIONS}, got {run}.")
    if steps < 1:
        raise UserError(f"`refit` must be at least 1 step, got {steps}.")
    options = run_folder.stored(run, TrainOptions())
    with base_only(base):
        material = prepare(pipe, backbone, Path(data), options, run)
    run_folder.check_data(run, material.scan, allow_changed=True)
    return fewer(pipe, run, material, options, keep, steps=steps, formula=formula, progress=progress)


def fewer(
    pipe: Any,
    folder: Path,
    material: Material,
    options: TrainOptions,
    keep: float | int,
    *,
    steps: int = STEPS,
    formula: str = "effect",
    name: str = NAME,
    progress: bool = False,
) -> Adapter:
    """`refit` of the adapter in a folder, on pictures that are prepared, by a run of these options."""
    base, backbone, processes = denoiser(pipe), backbone_of(pipe), PartialState(cpu=pipe.vae.device.type == "cpu")
    given = dataclasses.replace(options, steps=steps, **AS_TRAINED)

    def taught(batch: Batch) -> Tensor:
        rows = batch.concept
        with torch.no_grad(), run.autocast(), open_gate(base, WHOLE), assigned(base, [WHOLE] * len(batch.rows)):
            told = backbone.predict(base, batch.x[rows], batch.s[rows], batch.conditioning_of(rows))
        return torch.cat([told.to(batch.target), batch.target[batch.others]])

    try:
        load(pipe, folder, name=WHOLE)
        load(pipe, folder, name=name).prune(keep, formula)
        with training_mode(base, given):
            run = Run(pipe, backbone, material, given, folder, processes, name=name)
            run.teacher = taught
            for step in tqdm(range(steps), disable=not progress, unit="step", dynamic_ncols=True):
                run.step(step)
    except BaseException:
        if name in (getattr(base, "peft_config", None) or {}):
            remove_adapter(base, name)
        raise
    finally:
        if WHOLE in (getattr(base, "peft_config", None) or {}):
            remove_adapter(base, WHOLE)
    return described(pipe, backbone, material, name)
