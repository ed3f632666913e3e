"""Many concepts over one frozen base in one process: a batch holds rows of several, each row has its own adapter."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import reduce
from pathlib import Path
from typing import Any, BinaryIO

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from atomtune.backbones import Backbone, Conditioning, Grid, backbone_of, base_name, denoiser, join, select
from atomtune.backbones.base import Layout
from atomtune.errors import UserError
from atomtune.training import run_folder
from atomtune.training.batch import Batch, draw, generator_of
from atomtune.training.encode import weights_key
from atomtune.training.ends import attach_atoms, check_checkpointing, conclude, learned_nothing, training_mode
from atomtune.training.options import TrainOptions
from atomtune.training.prepare import prepare
from atomtune.training.run import Run, interruptible
from atomtune.training.run_folder import say
from atomtune.tuner import activate, assigned, base_only, discard_adapters, record

TOGETHER = 8
"""Concepts that share a forward, by default: memory grows with them."""
OWN = ("concept", "class_noun", "caption", "caption_extension", "caption_column", "trigger", "seed")
"""Options in which the concepts may differ."""
ALONE = (
    "buckets",
    "shard",
    "sparsity",
    "dead",
    "validate_every",
    "held_out",
    "sample_every",
    "patience",
    "trackers",
    "hub",
)
"""Options that `atomtune train` alone has: what they do reads a whole batch, or would not be shared."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A concept to learn: its pictures, where its run goes, and its options."""

    data: Path
    out: Path
    options: TrainOptions


def train_many(
    pipe: Any,
    jobs: Sequence[Job],
    *,
    together: int = TOGETHER,
    resume: bool = False,
    command: str = "",
    settings: dict[str, Any] | None = None,
    progress: bool = True,
) -> list[Path]:
    """Train an adapter for each job; returns their run folders, each as a run of its own would have left it.

    Each is, to rounding, what `train` gives by itself: the same batches, noise, clipping and optimizer. Up to
    `together` of them share a forward, the base's predictions of unrelated pictures are made once for all, and so is
    what lies in the cache. Nothing is left attached. With `resume` those that have begun go on, each from its newest
    whole checkpoint, and finished ones are left alone; `train` can go on with one of them too. Raises UserError before
    anything is trained on options that can't be trained together.
    """
    check(jobs, together)
    base, backbone, left = denoiser(pipe), backbone_of(pipe), list(jobs)
    processes = PartialState(cpu=pipe.vae.device.type == "cpu")
    if processes.num_processes > 1:
        raise UserError(f"Many concepts are trained in one process, got {processes.num_processes}. Share out the list.")
    for job in jobs:
        run_folder.mend(job.out)
    begun = {job.out for job in jobs if resume and (job.out / run_folder.OPTIONS).is_file()}
    if resume:
        left = [_as_begun(job, begun) for job in jobs if not run_folder.is_finished(job.out)]
    if not left:
        return [job.out for job in jobs]
    check(left, together)
    check_checkpointing(base, backbone, left[0].options)
    names: list[str] = []
    try:
        with ExitStack() as stack:
            prepared, base_key = [], weights_key(base)  # which reads all of them: once for all jobs
            for number, job in enumerate(left):
                if job.out not in begun:
                    run_folder.check_free(job.out, job.options)
                attach_atoms(pipe, backbone, job.options, f"job{number}")
                names.append(f"job{number}")
                with base_only(base):
                    prepared.append(prepare(pipe, backbone, job.data, job.options, job.out, base_key))
                if job.out in begun:
                    run_folder.check_data(job.out, prepared[-1].scan, prepared[-1].beside, allow_changed=False)
            runs: list[Run] = []
            # Once nothing is known to be wrong with any: a second try finds all folders free.
            for name, job, material in zip(names, left, prepared, strict=True):
                run_folder.tell(material.scan, material.said)
                if job.out in begun:
                    stack.enter_context(run_folder.held(job.out))
                else:
                    own = {**(settings or {}), "data": job.data, "base": base_name(pipe)}
                    claimed = run_folder.claimed(job.out, job.options, own, material.scan, material.beside)
                    stack.enter_context(claimed)
                runs.append(Run(pipe, backbone, material, job.options, job.out, processes, name=name))
                if job.out in begun:
                    runs[-1].resume()
            _check_shapes(runs)
            stack.enter_context(training_mode(base, left[0].options))
            for run in runs:
                stack.enter_context(run.told())
            _steps(runs, together, progress)
            for run in runs:
                _finish(run, command)
    finally:
        discard_adapters(base, *names)
    return [job.out for job in jobs]


def _as_begun(job: Job, begun: Collection[Path]) -> Job:
    """The job, with the options that its run began with if it has begun."""
    return dataclasses.replace(job, options=run_folder.stored(job.out, job.options)) if job.out in begun else job


def check(jobs: Sequence[Job], together: int) -> None:
    """Raise UserError where jobs can't be trained together."""
    if not jobs or together < 1:
        raise UserError(f"At least one concept, and one at once, must be trained, got {len(jobs)} and {together}.")
    first, plain = jobs[0].options, TrainOptions()
    for name in ALONE:
        if getattr(first, name) != getattr(plain, name):
            raise UserError(f"`{name}` is for `atomtune train`: many concepts can't be trained together with it.")
    if first.sparsifier == "batch_topk":
        raise UserError("`sparsifier` must not be batch_topk, whose codes depend on the rest of the batch.")
    for job in jobs[1:]:
        for field in dataclasses.fields(TrainOptions):
            mine, its = (getattr(options, field.name) for options in (job.options, first))
            if field.name not in OWN and mine != its:
                raise UserError(
                    f"`{field.name}` must be the same for all concepts trained together: it is {its} for "
                    f"{jobs[0].out} and {mine} for {job.out}."
                )
        if [other.out for other in jobs].count(job.out) > 1:
            raise UserError(f"`out` must be different for each concept, got {job.out} twice.")


def _check_shapes(runs: Sequence[Run]) -> None:
    shapes = {run.run: tuple(run.material.latents.shape[1:]) for run in runs}
    if len(set(shapes.values())) > 1:
        raise UserError(f"Concepts trained together must have latents of one size, got {shapes}. Give --resolution.")


def _steps(runs: Sequence[Run], together: int, progress: bool) -> None:
    """All steps of all runs; where some are ahead, since their last checkpoint is, the others catch up first."""
    o, begin = runs[0].options, min(run.done for run in runs)
    with ExitStack() as stack:
        logs = {run.run: stack.enter_context(run_folder.log_of(run.run / run_folder.LOG)) for run in runs}
        bar = tqdm(total=o.steps, initial=begin, disable=not progress, unit="step", dynamic_ncols=True)
        stack.enter_context(bar)
        asked_to_stop = stack.enter_context(interruptible())
        for step in range(begin, o.steps):
            now = [run for run in runs if run.done == step]
            _together(now, step, together, logs)
            for run in now:
                if run.done % o.checkpoint_every == 0 or run.over() or asked_to_stop():
                    run.checkpoint()
            bar.update()
            if asked_to_stop():
                say(f"stopped after step {step + 1}; go on with the same command and --resume")
                raise KeyboardInterrupt


def _together(runs: Sequence[Run], step: int, together: int, logs: Mapping[Path, BinaryIO]) -> None:
    """One step of several runs, so many at once."""
    begin, plain = time.monotonic(), Plain()
    terms: list[dict[str, float]] = []
    for start in range(0, len(runs), together):
        terms += _step(runs[start : start + together], step, plain)
    seconds = (time.monotonic() - begin) / len(runs)
    for run, found in zip(runs, terms, strict=True):
        run.done += 1
        run.pace.took(run.done, seconds)
        run_folder.note(logs[run.run], run.line(found | run.speed(seconds)))


def _step(runs: Sequence[Run], step: int, plain: Plain) -> list[dict[str, float]]:
    """One optimizer step of several runs; returns the terms of each."""
    terms: list[dict[str, float]] = [{} for _ in runs]
    with ExitStack() as stack:
        for run in runs:
            run.begin(step)
            stack.enter_context(run.taking_part(step))
        # In backward too: gradient checkpointing runs the forward again.
        o = runs[0].options
        names = [run.name for run in runs for _ in range(o.batch_size + o.unrelated_rows)]
        stack.enter_context(assigned(runs[0].base, names))
        for part in range(runs[0].options.grad_accumulation):
            losses = joint_losses(runs, [run.micro(step, part) for run in runs], plain)
            totals = [run.total(step, found, own) for run, found, own in zip(runs, losses, terms, strict=True)]
            torch.stack(totals).sum().backward()
    return [run.update(step, own) for run, own in zip(runs, terms, strict=True)]


def joint_losses(runs: Sequence[Run], micros: Sequence[int], plain: Plain) -> list[dict[str, Tensor]]:
    """What `Run._losses` gives of each run's micro-batch, by one forward over the rows of all.

    Each row must be assigned its run's adapter.
    """
    first = runs[0]
    generators = [generator_of(run.options, micro) for run, micro in zip(runs, micros, strict=True)]
    batches = [
        draw(run.material, run.backbone, run.options, micro, generator)
        for run, micro, generator in zip(runs, micros, generators, strict=True)
    ]
    x, s = torch.cat([batch.x for batch in batches]), torch.cat([batch.s for batch in batches])
    conditioning = reduce(join, [batch.conditioning for batch in batches])
    with ExitStack() as stack:
        recordings = [stack.enter_context(record(first.base, run.name)) for run in runs]
        stack.enter_context(first.autocast())
        predicted = first.backbone.predict(first.base, x, s, conditioning)
    found, start = [], 0
    layouts: dict[tuple[str, Grid], Layout] = {}
    for run, batch, generator, recording in zip(runs, batches, generators, recordings, strict=True):
        rows = slice(start, start + len(batch.x))
        start = rows.stop
        backbone = _among(run.backbone, conditioning, rows, layouts)
        others = plain.predictions(run, batch) if run.needs_base else None
        found.append(run.losses(batch, backbone, generator, recording, predicted[rows], others))
    return found


def _among(
    backbone: Backbone, conditioning: Conditioning, rows: slice, known: dict[tuple[str, Grid], Layout]
) -> Backbone:
    """The backbone, as some rows of a larger batch see it: padded to the longest prompt of all."""

    def layout(site: str, _: Conditioning, grid: Grid) -> Layout:
        if (site, grid) not in known:
            known[site, grid] = backbone.layout(site, conditioning, grid)
        whole = known[site, grid]
        return Layout(whole.real[rows], whole.image[rows], whole.grid)

    return dataclasses.replace(backbone, layout=layout)


class Plain:
    """The base's predictions of a step's unrelated rows: of rows that several concepts have, once."""

    def __init__(self) -> None:
        self.known: dict[tuple[bytes, ...], Tensor] = {}

    def predictions(self, run: Run, batch: Batch) -> Tensor:
        """Those of a batch."""
        x, s, given = batch.x[batch.others], batch.s[batch.others], batch.conditioning_of(batch.others)
        keys = [tuple(_bytes(x[row], s[row], select(given, torch.tensor([row])))) for row in range(len(x))]
        fresh = [row for row, key in enumerate(keys) if key not in self.known]
        if fresh:
            rows = torch.tensor(fresh)
            with run.autocast():
                made = run._base_prediction(x[rows], s[rows], select(given, rows))
            self.known.update((keys[row], one) for row, one in zip(fresh, made, strict=True))
        return torch.stack([self.known[key] for key in keys])


def _bytes(x: Tensor, s: Tensor, conditioning: Conditioning) -> Iterator[bytes]:
    for value in (x, s, *conditioning.values()):
        for tensor in value if isinstance(value, list) else [value]:
            yield _trimmed(tensor).float().cpu().numpy().tobytes()


def _trimmed(tensor: Tensor) -> Tensor:
    """Without the zeros at its end that only fill up a batch."""
    if tensor.ndim < 2 or len(tensor) != 1:
        return tensor
    used = (tensor != 0).flatten(2).any(-1) if tensor.ndim > 2 else tensor != 0
    return tensor[:, : int(used.nonzero()[:, 1].max()) + 1] if used.any() else tensor


def _finish(run: Run, command: str) -> None:
    """Calibrate, measure and save one adapter, as the end of a run of its own does."""
    o = run.options
    activate(run.base, run.name)
    run.end()
    adapter, gate_report = conclude(run.pipe, run.backbone, run.material, o, run.name)
    if learned_nothing(run.base, run.name):
        say(f"warning: no atom of {run.run} has learned anything. Raise --lr or --steps.")
    meta = {"command": command, "concept": o.concept, "steps": run.done, "seed": o.seed}
    adapter.save(run.run, meta | gate_report)
