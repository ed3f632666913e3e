"""What a run would meet, told before it starts: everything that would stop it, at once, and what it will cost."""

from __future__ import annotations

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
from atomtune.training.ends import NAME, attach_atoms, check_checkpointing, kinds_of
from atomtune.training.memory import Measured, Memory
from atomtune.training.options import TrainOptions
from atomtune.training.run_folder import say
from atomtune.training.trackers import chosen
from atomtune.tuner import atom_layers, discard_adapters, prompt_gate

CUT = 0.1
"""Share of a picture that may be cut off before it is told."""
STRAY = ("caption file not used", "caption without a picture", "mask without a picture")
"""Reasons why a file is passed over that point to a mistake."""


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

    sites: dict[str, int]
    """How many layers of each name."""
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
            run_folder.check_data(out, scan, None, allow_changed_data)
    scan = scan or Scan((), ())
    pipe: Any = None
    with found.kept():
        pipe = open_base()
    same = tuple(twins(scan.samples))
    pictures: tuple[Picture, ...] = ()
    adapted, cost, needed = None, None, None
    found.apart = len(found.problems)
    if pipe is not None:
        backbone = backbone_of(pipe)
        pictures = _pictures(found, pipe, backbone, scan.samples, options)
        if sheet is not None and pictures:
            _write_sheet(sheet, scan.samples, pictures)
        with prepare.unlogged():
            adapted, cost, needed = _adapt(found, pipe, backbone, scan.samples, options, measure)
    _warn(found, pictures, same, options, cost, needed)
    skipped = {k: names for k, names in scan.by_reason().items() if k not in ("caption", "mask")}
    return Report(tuple(found.problems), tuple(found.warnings), skipped, same, pictures, adapted, cost, needed)


class _Findings:
    """Problems and warnings so far."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.apart = 0
        """How many of them say nothing of what the rest of the run would cost."""
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


def _data(found: _Findings, data: Path, options: TrainOptions) -> Scan | None:
    with found.kept():
        seen = survey(data, **options.scanning)
        found.problems += seen.problems
        scan, added = prepare.triggered(seen.scan, options)
        found.warnings += added
        for reason in dict.fromkeys(item.reason for item in scan.skipped):
            kind, _, advice = reason.partition(": ")
            if kind in STRAY:
                names = [item.path.name for item in scan.skipped if item.reason == reason]
                found.warnings.append(f"{kind}: {few(names)}: {advice}")
        return scan
    return None


def few(names: Sequence[str]) -> str:
    """The first three, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _pictures(
    found: _Findings, pipe: Any, backbone: Backbone, samples: Sequence[Sample], options: TrainOptions
) -> tuple[Picture, ...]:
    if not samples:
        return ()
    with found.kept():
        prepare.check_concept(tuple(sample.caption for sample in samples), options)
    with found.kept():
        prepare.check_masks(samples, options)
    with found.kept():
        if options.held_out:
            validation.check(len(samples), options.held_out)
    sizes: list[Size] = []
    with found.kept():
        sizes = prepare.fitted_sizes(pipe, samples, options)
    if not sizes:
        return ()
    lost = prepare.cut_off(lambda text: backbone.encode_prompts(pipe, [text]), samples)
    return tuple(_picture(s, size, lost.get(n, "")) for n, (s, size) in enumerate(zip(samples, sizes, strict=True)))


def _picture(sample: Sample, size: Size, lost: str) -> Picture:
    return Picture(
        name=sample.path.name,
        caption=sample.caption,
        caption_source=sample.caption_source,
        lost=lost,
        size=(sample.width, sample.height),
        seen=size,
        cut=1 - kept(sample.width, sample.height, size),
        enlarged=max(size[0] / sample.width, size[1] / sample.height),
        mask=sample.mask is not None,
        clear=sample.clear,
    )


def _write_sheet(path: Path, samples: Sequence[Sample], pictures: Sequence[Picture]) -> None:
    try:
        contact_sheet(samples, [picture.seen for picture in pictures]).save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"`sheet` must be a picture file that can be written, got {path}: {error}.") from error


def _adapt(
    found: _Findings,
    pipe: Any,
    backbone: Backbone,
    samples: Sequence[Sample],
    options: TrainOptions,
    steps: int | None,
) -> tuple[Adapted | None, Cost | None, Memory | None]:
    """What is known with a fresh adapter attached; afterwards the pipeline is the base again."""
    base = denoiser(pipe)
    adapted, cost, needed = None, None, None
    with found.kept():
        check_checkpointing(base, backbone, options)
    before = {p: p.requires_grad for p in base.parameters()}
    try:
        with found.kept():
            attach_atoms(pipe, backbone, options)
            adapted = _adapted(base)
        if adapted is not None:
            with found.kept():
                optimizers.make(options, [p for name, p in base.named_parameters() if "atom_" in name], (), 1.0)
        own: tuple[Sample, ...] = ()
        with found.kept():
            own = prepare.own_unrelated(options)
            kept_prompts, held = prepare.without_concept(pipe, options)
            if samples and adapted is not None and len(found.problems) == found.apart:
                cost, needed = _needs(pipe, backbone, samples, own, (kept_prompts, held), options, steps)
    finally:
        discard_adapters(base, NAME)
        for parameter, trained in before.items():
            parameter.requires_grad_(trained)
    return adapted, cost, needed


def _adapted(base: Any) -> Adapted:
    state = {name: value for name, value in base.state_dict().items() if "atom_" in name}
    layers = atom_layers(base, NAME)
    return Adapted(
        sites=kinds_of(layers),
        atoms=sum(layer.r[NAME] for layer in layers.values()),
        parameters=sum(p.numel() for name, p in base.named_parameters() if "atom_" in name),
        gate=prompt_gate(base, NAME) is not None,
        file_bytes=sum(map(memory.bytes_of, state.values())),
    )


def _needs(
    pipe: Any,
    backbone: Backbone,
    samples: Sequence[Sample],
    own: Sequence[Sample],
    prompts: tuple[tuple[str, ...], tuple[str, ...]],
    options: TrainOptions,
    steps: int | None,
) -> tuple[Cost, Memory | None]:
    o, (kept_prompts, held) = options, prompts
    captions = tuple(sample.caption for sample in samples)
    painted = prepare.pictured(captions, kept_prompts, o)
    opening, shutting = prepare.gate_prompts(captions, (*kept_prompts, *(s.caption for s in own)), o)
    gate = (opening, shutting, ("", *held)) if o.gated else ()
    side = prepare.side_of(pipe, o)
    sizes = memory.Sizes(
        side=side,
        pictures=len(samples),
        views=len(prepare.views_of(samples, o)),
        unrelated=len(own) + len(painted),
        painted=len(painted),
        buckets=len(set(prepare.fitted_sizes(pipe, samples, o))),
        prompts=_groups(captions, (*(s.caption for s in own), *painted), ("",)),
        gate_prompts=_groups(*gate),
    )
    longest = [max(texts, key=len) for texts in (captions, painted or ("",))]
    measured = None if steps is None else memory.measure(pipe, backbone, o, side, longest, steps)
    say("trying a few steps at small sizes, for the memory")
    needed = memory.estimate(pipe, backbone, o, sizes, longest, prepare.unit_of(pipe))
    shown = o.steps * o.batch_size * o.grad_accumulation
    in_epoch = sum(s.repeats for s in samples) * (len(samples) - o.held_out) / len(samples)
    unrelated = o.steps * o.unrelated_rows * o.grad_accumulation
    return Cost(o.steps, shown, shown / in_epoch, unrelated, len(painted), measured), needed


def _groups(*groups: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Of prompts that are held together, and are as long as the longest then: this one, and how many."""
    return tuple((max(texts, key=len), len(texts)) for texts in groups if texts)


def _warn(
    found: _Findings,
    pictures: Sequence[Picture],
    same: Sequence[Twins],
    options: TrainOptions,
    cost: Cost | None,
    needed: Memory | None,
) -> None:
    """What would not stop the run, and is worth a look."""
    tell = found.warnings.append
    if needed is not None and not needed.fits:
        assert needed.there is not None
        found.warnings.insert(
            0,
            f"memory: {gib(needed.peak)} needed, {needed.device} has {gib(needed.there)}. Lower --batch-size or "
            "--resolution, or give --gradient-checkpointing, --mixed-precision bf16 or --quantize.",
        )
    for pair in same:
        how = "the same file" if pair.distance is None else f"nearly the same ({pair.distance} of 64 bits differ)"
        tell(f"{pair.first} and {pair.second} are {how}")
    for picture in pictures:
        if picture.lost:
            tell(f"the caption of {picture.name} is longer than the base reads; lost: {short(picture.lost)}")
    captions = {picture.caption for picture in pictures}
    if len(pictures) > 1 and len(captions) == 1:
        tell(f"all {len(pictures)} captions are the same: {captions.pop()!r}")
    if options.concept and not options.gated:
        lacking = [p.name for p in pictures if not prepare.mentions(p.caption, options.concept)]
        if lacking:
            tell(f"captions without {options.concept!r}: {few(lacking)}")
    small = [f"{p.name} ({p.enlarged:.1f} times)" for p in pictures if p.enlarged > 1.001]
    if small:
        tell(f"smaller than what is trained on, and enlarged: {few(small)}. Lower --resolution, or leave them out.")
    cut = [f"{p.name} ({p.cut:.0%})" for p in pictures if p.cut > CUT]
    if cut:
        tell(f"cut off at the edges: {few(cut)}." + ("" if options.buckets else " --buckets keeps shapes."))
    clear = [p.name for p in pictures if p.clear]
    if clear:
        tell(f"partly transparent, white lies under it: {few(clear)}")
    if cost is not None and cost.epochs < 1:
        tell(f"{cost.steps} steps show only {cost.epochs:.0%} of the pictures. Raise --steps.")


# ------------------------------------------------------------------------------------------------------- as text


def short(words: str) -> str:
    """The beginning of a long text."""
    return words if len(words) <= 80 else f"{words[:77]}..."


def gib(size: float) -> str:
    """Bytes, for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds, for people."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def text(report: Report) -> str:
    """The report for a terminal, the most important first."""
    lines: list[str] = []
    if report.problems:
        lines += [f"{len(report.problems)} to mend, or the run stops:", *(f"  {p}" for p in report.problems), ""]
    else:
        lines += ["Nothing would stop the run.", ""]
    if report.warnings:
        lines += [f"{len(report.warnings)} worth a look:", *(f"  {w}" for w in report.warnings), ""]
    rows = list(_facts(report))
    width = max((len(name) for name, _ in rows), default=0)
    lines += [f"{name:<{width}}  {value}" for name, value in rows]
    if report.pictures:
        width = max(len(p.name) for p in report.pictures)
        lines.append("")
        for p in report.pictures:
            shape = f"{p.size[0]}x{p.size[1]}"
            extra, said = ", mask" if p.mask else "", short(p.caption)
            lines.append(
                f"{p.name:<{width}}  {shape:>9} -> {p.seen[0]}x{p.seen[1]}  {said} ({p.caption_source}{extra})"
            )
    return "\n".join(lines)


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    masks = sum(p.mask for p in report.pictures)
    if report.pictures:
        yield "pictures", f"{len(report.pictures)}" + (f", {masks} with a mask" if masks else "")
    for reason, names in report.skipped.items():
        if reason not in STRAY:  # which is a warning
            yield "passed over", f"{len(names)} x {reason}: {few(names)}"
    if a := report.adapted:
        kinds = ", ".join(f"{number} x {name}" for name, number in a.sites.items())
        yield "sites", f"{sum(a.sites.values())}: {kinds}"
        gate = "a prompt gate" if a.gate else "no prompt gate"
        yield "trained", f"{a.atoms} atoms, {gate}; {a.parameters:,} parameters, a file of {gib(a.file_bytes)}"
    if c := report.cost:
        yield "shown", f"{c.shown:,} pictures in {c.steps} steps, {c.epochs:.1f} epochs; {c.unrelated:,} unrelated ones"
        if c.painted:
            yield "painted", f"{c.painted} unrelated pictures before the first step, where they are not cached"
        if (m := c.measured) and c.seconds is not None:
            each = f"{duration(m.seconds_per_step)} a step, {duration(m.seconds_per_painting)} a painted picture"
            yield "time", f"about {duration(c.seconds)}: {each} (measured, {m.steps} steps)"
            yield "", f"a step holds {gib(m.step_bytes)} (measured)"
        else:
            yield "time", "not measured: atomtune doctor --measure 3"
    if n := report.memory:
        largest = max(n.phases, key=lambda phase: n.phases[phase])
        has = "" if n.there is None else f"; {n.device} has {gib(n.there)}"
        yield "memory", f"about {gib(n.peak)}, in {largest}{has}"
        yield "", ", ".join(f"{name} {gib(size)}" for name, size in sorted(n.phases.items(), key=lambda e: -e[1]))
        yield "", f"of it weights {gib(n.weights)}, trained {gib(n.trained)}, pictures and prompts {gib(n.material)}"
