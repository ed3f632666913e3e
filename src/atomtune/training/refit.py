"""Fewer atoms for good: what is left of an adapter is trained to do what all of it did."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from atomtune.adapter import Adapter, load
from atomtune.backbones import backbone_of, denoiser
from atomtune.errors import UserError
from atomtune.training import run_folder, validation
from atomtune.training.batch import Batch
from atomtune.training.ends import NAME, described, training_mode
from atomtune.training.options import TrainOptions
from atomtune.training.prepare import Material, prepare
from atomtune.training.run import Run
from atomtune.tuner import assigned, base_only, discard_adapters, open_gate

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
    allow_other_base: bool = False,
    progress: bool = True,
) -> Adapter:
    """A run's adapter with a share (or number) of its atoms, trained to predict what all of them did; attached.

    `data` is what the run learned from. On its pictures the target is the whole adapter's prediction, and the terms on
    unrelated ones are the run's own; the gate stays as it is. Cut, then trained from a teacher: Hinton et al. 2015,
    arXiv 1503.02531. Raises UserError, with nothing attached, where `run` is not a run's folder, on what `load` and
    `prune` refuse, where an adapter named `default` or `whole` is attached already, and on bad data.
    """
    run, backbone = Path(run), backbone_of(pipe)
    if not (run / run_folder.OPTIONS).is_file():
        raise UserError(f"`refit` needs the folder of a run, with its {run_folder.OPTIONS}, got {run}.")
    options = run_folder.stored(run, TrainOptions())

    def material() -> Material:
        with base_only(denoiser(pipe)):
            found = prepare(pipe, backbone, Path(data), options, run)
        run_folder.check_data(run, found.scan, found.beside, allow_changed=True)
        return validation.split(found, options.held_out, options.seed)[0]

    return fewer(
        pipe,
        run,
        material,
        options,
        keep,
        steps=steps,
        formula=formula,
        allow_other_base=allow_other_base,
        progress=progress,
    )


def fewer(
    pipe: Any,
    folder: Path,
    material: Callable[[], Material],
    options: TrainOptions,
    keep: float | int,
    *,
    steps: int = STEPS,
    formula: str = "effect",
    allow_other_base: bool = False,
    progress: bool = False,
) -> Adapter:
    """`refit` of the adapter in a folder by a run of these options, on what `material` prepares once all is checked."""
    if steps < 1:
        raise UserError(f"`refit` must be at least 1 step, got {steps}.")
    base, backbone, processes = denoiser(pipe), backbone_of(pipe), PartialState(cpu=pipe.vae.device.type == "cpu")
    given = dataclasses.replace(options, steps=steps, **AS_TRAINED)

    def taught(batch: Batch) -> Tensor:
        rows = batch.concept
        with torch.no_grad(), run.autocast(), open_gate(base, WHOLE), assigned(base, [WHOLE] * len(batch.rows)):
            told = backbone.predict(base, batch.x[rows], batch.s[rows], batch.conditioning_of(rows))
        return torch.cat([told.to(batch.target), batch.target[batch.others]])

    with _whole_and_cut(pipe, folder, keep, formula, allow_other_base):
        prepared = material()
        with training_mode(base, given):
            run = Run(pipe, backbone, prepared, given, folder, processes)
            run.teacher = taught
            for step in tqdm(range(steps), disable=not progress, unit="step", dynamic_ncols=True):
                try:
                    run.step(step)
                except UserError as error:
                    raise UserError(f"`refit` is not finite at step {step + 1}. Give fewer steps.") from error
            return described(pipe, backbone, prepared)


@contextmanager
def _whole_and_cut(pipe: Any, folder: Path, keep: float | int, formula: str, allow_other_base: bool) -> Iterator[None]:
    """Inside, an adapter is attached twice, whole and cut; afterwards the cut one is left, after an error neither."""
    base = denoiser(pipe)
    flags = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    if {NAME, WHOLE} & (getattr(base, "peft_config", None) or {}).keys():
        raise UserError(f"`refit` attaches adapters named {NAME} and {WHOLE}: remove or rename yours first.")
    try:
        load(pipe, folder, name=WHOLE, allow_other_base=allow_other_base)
        load(pipe, folder, name=NAME, allow_other_base=allow_other_base).prune(keep, formula)
        yield
    except BaseException:
        discard_adapters(base, NAME)
        raise
    finally:
        discard_adapters(base, WHOLE)
        base.requires_grad_(False)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
