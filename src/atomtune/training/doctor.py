"""What a run would meet, told before it starts: everything that would stop it, at once, and what it will cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atomtune.backbones import Backbone, backbone_of, denoiser
from atomtune.data.folder import Sample, Scan, survey
from atomtune.data.sheet import contact_sheet
from atomtune.data.twins import Twins, twins
from atomtune.data.views import Size, kept
from atomtune.errors import UserError
from atomtune.training import memory, optimizers, prepare, run_folder, validation
from atomtune.training.loop import NAME, attach_atoms, check_checkpointing, sites_of
from atomtune.training.memory import Measured, Memory
from atomtune.training.options import TrainOptions
from atomtune.training.run_folder import say
from atomtune.training.trackers import chosen
from atomtune.tuner import adapter_config, prompt_gate, remove_adapter

CUT = 0.1
"""Share of a picture that may be cut off before it is told."""


@dataclass(frozen=True)
class Picture:
    """One picture as the run would take it."""

    name: str
    caption: str
    caption_source: str
    lost: str
    """The words at the caption's end that the base does not read."""
    size: Size
    seen: Size
    """What it is brought to."""
    cut: float
    """Share of it that is cut off."""
    enlarged: float
    """By how much; 1 or less where it is not."""
    mask: bool
    clear: bool
    """Whether a part of it is transparent, which white will lie under."""


@dataclass(frozen=True)
class Adapted:
    """What would be trained."""

    sites: str
    atoms: int
    parameters: int
    gate: bool
    file_bytes: int
    """Of the adapter's own file."""


@dataclass(frozen=True)
class Cost:
    """What the run would do."""

    steps: int
    shown: int
    """Pictures shown, the concept's only."""
    epochs: float
    unrelated: int
    """Unrelated pictures that are shown."""
    painted: int
    """Pictures that the base paints first, where they are not cached."""
    measured: Measured | None
    """None: not measured."""

    @property
    def seconds(self) -> float | None:
        """Of painting and of all steps. None: not measured."""
        m = self.measured
        return None if m is None else self.painted * m.seconds_per_painting + self.steps * m.seconds_per_step


@dataclass(frozen=True)
class Report:
    """What was found; None is what could not be looked at for a problem."""

    problems: tuple[str, ...]
    """What would stop the run."""
    warnings: tuple[str, ...]
    skipped: dict[str, list[str]]
    """Files that are no pictures to learn from, by reason."""
    twins: tuple[Twins, ...]
    pictures: tuple[Picture, ...]
    adapted: Adapted | None
    cost: Cost | None
    memory: Memory | None


def examine(
    open_base: Callable[[], Any],
    data: Path,
    options: TrainOptions,
    *,
    out: Path | None = None,
    resume: bool = False,
    allow_changed_data: bool = False,
    measure: int | None = None,
    sheet: Path | None = None,
) -> Report:
    """Look at all that a run with these arguments would read; nothing is trained, and of the run nothing is written.

    `measure`: a number of steps of full size to time. `sheet`: a file for a contact sheet of what the model sees.
    Raises UserError only on these two.
    """
    if measure is not None and measure < 1:
        raise UserError(f"`measure` must be at least 1 step, got {measure}.")
    found = _Findings()
    if out is not None:
        with found.kept():
            options = run_folder.stored(out, options) if resume else run_folder.check_free(out, options)
    with found.kept():
        chosen(options.trackers)
    scan = _data(found, data, options)
    if resume and out is not None and scan is not None:
        with found.kept():
            run_folder.check_data(out, scan, allow_changed_data)
    scan = scan or Scan((), ())
    pipe: Any = None
    with found.kept():
        pipe = open_base()
    same = tuple(twins(scan.samples))
    pictures: tuple[Picture, ...] = ()
    adapted, cost, needed = None, None, None
    if pipe is not None:
        backbone = backbone_of(pipe)
        pictures = _pictures(found, pipe, backbone, scan.samples, options)
        if sheet is not None and pictures:
            _write_sheet(sheet, scan.samples, pictures)
        with found.attached(pipe, backbone, options):
            adapted = _adapted(pipe, backbone, options)
            if pictures:
                cost, needed = _needs(found, pipe, backbone, scan.samples, options, measure)
    _warn(found, pictures, same, options, cost, needed)
    skipped = {k: names for k, names in scan.by_reason().items() if k not in ("caption", "mask")}
    return Report(
        tuple(found.problems), tuple(found.warnings), skipped, same, pictures, adapted, cost, needed
    )


class _Findings:
    """Problems and warnings so far."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.warnings: list[str] = []

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, a user's mistake ends the block and is kept, and so is memory that is too small."""
        try:
            yield
        except UserError as error:
            self.problems.append(str(error))
        except torch.OutOfMemoryError as error:
            self.problems.append(f"out of memory: {str(error).splitlines()[0]}")

    @contextmanager
    def attached(self, pipe: Any, backbone: Backbone, options: TrainOptions) -> Iterator[None]:
        """Inside, a fresh adapter is attached; afterwards the pipeline is the base again."""
        base = denoiser(pipe)
        with self.kept():
            check_checkpointing(base, backbone, options)
        try:
            with self.kept():
                attach_atoms(pipe, backbone, options)
                yield
                return
            yield from ()
        finally:
            if NAME in (getattr(base, "peft_config", None) or {}):
                remove_adapter(base, NAME)


def _data(found: _Findings, data: Path, options: TrainOptions) -> Scan | None:
    with found.kept():
        seen = survey(data, **options.scanning)
        found.problems += seen.problems
        scan, added = prepare.triggered(seen.scan, options)
        found.warnings += added
        for reason in dict.fromkeys(item.reason for item in scan.skipped):
            kind, _, advice = reason.partition(": ")
            if kind in ("caption file not used", "caption without a picture", "mask without a picture"):
                names = [item.path.name for item in scan.skipped if item.reason == reason]
                found.warnings.append(f"{kind}: {few(names)}: {advice}")
        return scan
    return None
