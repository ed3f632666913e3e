"""What a run will need of memory: the run's own parts, tried at small sizes and carried on to the size that it has.

Nothing is written, and nothing is learned that stays. What is counted is what torch allocates; Python, its libraries
and what a driver keeps for itself come on top.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from atomtune.atoms import CHUNK, noised_pass
from atomtune.backbones import Backbone, Conditioning, denoiser
from atomtune.data.folder import Scan
from atomtune.errors import UserError
from atomtune.sampling import generate
from atomtune.training import gating
from atomtune.training.encode import PAINTED_AT_ONCE, PIXELS_AT_ONCE, Bucket
from atomtune.training.ends import NAME, training_mode
from atomtune.training.options import TrainOptions
from atomtune.training.prepare import SAMPLES, Item, Material
from atomtune.training.run import Run
from atomtune.tuner import base_only

SHARES = (1 / 4, 1 / 3, 1 / 2, 3 / 4)
"""Of a picture's side: the first three that differ are tried."""
STEPS = 3
"""Steps that are tried at each size: later ones have the optimizer's state, and every second fires above a floor."""
PASSES = 10
"""Forwards whose codes are held together when atoms are measured, after the last step."""
PROMPTS = 32
"""Prompts of the gate that are encoded together."""


@dataclass(frozen=True)
class Sizes:
    """How much there is of what is learned from."""

    side: int
    """Of a picture, in pixels."""
    pictures: int
    views: int
    unrelated: int
    """Unrelated pictures, the user's own and painted ones."""
    painted: int
    buckets: int
    prompts: tuple[tuple[str, int], ...]
    """Groups of prompts that are held, without those of the gate: of each the longest, and how many it has."""
    gate_prompts: tuple[tuple[str, int], ...]
    """Those of the gate."""


@dataclass(frozen=True)
class Memory:
    """Bytes that torch will hold."""

    device: str
    weights: int
    """All of the pipeline's parts, without the adapter."""
    trained: int
    """Parameters, the optimizer's state and the running mean."""
    material: int
    """Pictures and prompts as the model takes them."""
    phases: dict[str, int]
    """The peak of each phase, with all that it holds."""
    there: int | None
    """What the device has for all of it. None: unknown."""

    @property
    def peak(self) -> int:
        """The largest of the phases."""
        return max(self.phases.values())

    @property
    def fits(self) -> bool:
        """Whether the device has as much."""
        return self.there is None or self.peak <= self.there


@dataclass(frozen=True)
class Measured:
    """What some steps of full size took."""

    steps: int
    seconds_per_step: float
    """The median."""
    seconds_per_painting: float
    """Of one unrelated picture."""
    step_bytes: int
    """The peak of a step, with all that it holds but the material."""


# ------------------------------------------------------------------------------------------------------ counting


def countable(device: torch.device) -> bool:
    """Whether what torch allocates there can be counted."""
    return device.type in ("cpu", "cuda")


def peak_of(act: Callable[[], object], device: torch.device) -> int:
    """The most bytes that torch holds at once while `act` runs, beyond those that it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        act()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler says on stderr that it starts
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        act()
    events: Any = profile.profiler.kineto_results.events()
    held = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def bytes_of(tensor: Tensor) -> int:
    """What a tensor takes, quantized ones too."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(bytes_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def held_by(value: Any) -> int:
    """Bytes of all tensors in tables and lists."""
    if isinstance(value, Tensor):
        return bytes_of(value)
    if isinstance(value, Mapping):
        value = value.values()
    return sum(map(held_by, value)) if isinstance(value, Iterable) and not isinstance(value, str) else 0


def weights_of(pipe: Any) -> int:
    """Bytes of the parameters and buffers of all of a pipeline's parts, each once."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    tensors = {id(t): t for part in parts for kind in (part.parameters(), part.buffers()) for t in kind}
    return sum(map(bytes_of, tensors.values()))


def there(device: torch.device) -> int | None:
    """Bytes that are free on a device, for whoever comes first."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch holds and has free is free
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu":
        import psutil

        return int(psutil.virtual_memory().available)
    return None


# ----------------------------------------------------------------------------------------------------- estimating


def estimate(
    pipe: Any,
    backbone: Backbone,
    options: TrainOptions,
    sizes: Sizes,
    prompts: Sequence[str],
    unit: int,
) -> Memory | None:
    """What the run will hold; None on a device where nothing can be counted. A fresh adapter is attached.

    `prompts` are the longest of the captions and of the unrelated ones; `unit` divides the side of every picture.
    """
    device = pipe.vae.device
    if not countable(device):
        return None
    adapter = sum(bytes_of(p) for name, p in denoiser(pipe).named_parameters() if "atom_" in name)
    weights = weights_of(pipe) - adapter
    trial = Trial(pipe, backbone, options, prompts)
    sides = tried(sizes.side, unit)

    def at_full(count: Callable[[int], int], bends: bool = False) -> int:
        return carried([(side * side, count(side)) for side in sides], sizes.side**2, bends)

    with trial.prepared():
        # Attention that is not fused bends; an autoencoder only has other ways of convolution for other sizes.
        step = at_full(trial.step, bends=True)
        state = trial.state
        picture = at_full(lambda side: held_by(trial.latents(1, side)))
        words, gate = ([trial.row(t) * n for t, n in groups] for groups in (sizes.prompts, sizes.gate_prompts))
        shown = sizes.pictures * sizes.views + sizes.buckets * sizes.unrelated
        material = sum(words) + sum(gate) + picture * shown
        start = weights + adapter
        phases = {"a step": start + material + step}
        rows = min(CHUNK, sizes.pictures)
        codes = (PASSES - 1) * rows * at_full(trial.codes)
        look = at_full(lambda side: trial.look(rows, side), bends=True)
        phases["measuring atoms"] = start + material + state - adapter + codes + look
        many = max(1, min(sizes.unrelated, PIXELS_AT_ONCE // sizes.side**2))
        phases["encoding pictures"] = start + many * at_full(trial.encode)
        if options.gated:
            one, two = (trial.read(number) for number in (1, 2))
            together = min(PROMPTS, max(number for _, number in sizes.gate_prompts))
            # Joined, they are there twice for a moment.
            phases["encoding prompts"] = start + material + max(one + (together - 1) * max(0, two - one), *gate)
        if sizes.painted:
            number = min(PAINTED_AT_ONCE, sizes.painted)
            phases["painting"] = start + at_full(lambda side: trial.paint(number, side, 2))
        if options.sample_every:
            number = min(PAINTED_AT_ONCE, len(options.sample_prompts) or min(SAMPLES, sizes.pictures))
            painting = at_full(lambda side: trial.paint(number, side, 2))
            phases["validation pictures"] = start + material + state - adapter + painting
    free = there(device)
    return Memory(str(device), weights, state, material, phases, None if free is None else free + start)


def measure(
    pipe: Any, backbone: Backbone, options: TrainOptions, side: int, prompts: Sequence[str], steps: int
) -> Measured:
    """Time some steps of full size, on pictures of noise, and the painting of one picture."""
    if steps < 1:
        raise UserError(f"`measure` must be at least 1 step, got {steps}.")
    trial = Trial(pipe, backbone, options, prompts)
    with trial.prepared():
        begin = time.monotonic()
        trial.paint_now(1, side, None)
        painting = time.monotonic() - begin
        state, took = trial.run(side), []
        for number in range(steps):
            begin = time.monotonic()
            state.step(number)
            took.append(time.monotonic() - begin)
        device = pipe.vae.device
        extra = peak_of(lambda: state.step(options.steps - 1), device) if countable(device) else 0
        held = weights_of(pipe) + held_by(state.optimizer.state_dict()["state"])
        held += held_by(state.ema.mean) if state.ema else 0
    return Measured(steps, statistics.median(took), painting, held + extra)


def tried(side: int, unit: int) -> list[int]:
    """Sides at which a run is tried, the smallest first."""
    found = dict.fromkeys(max(unit, round(side * share / unit) * unit) for share in SHARES)
    smaller = [s for s in found if s < side][:3]
    return smaller or [side]


def carried(points: Sequence[tuple[int, int]], area: int, bends: bool = False) -> int:
    """What grows with the area, at another area: along a line or, where it may and does bend upwards, a parabola."""
    (x2, y2) = points[-1]
    if len(points) == 1:
        return y2 if x2 == area else round(y2 * area / x2)
    (x1, y1) = points[-2]
    slope = (y2 - y1) / (x2 - x1)
    line = y2 + slope * (area - x2)
    if len(points) == 2 or not bends:
        return round(max(y2, line))
    (x0, y0) = points[-3]
    bend = (slope - (y1 - y0) / (x1 - x0)) / (x2 - x0)
    return round(max(y2, line + max(0.0, bend) * (area - x2) * (area - x1)))


class Trial:
    """Parts of a run, on pictures of noise and its own longest prompts."""

    def __init__(self, pipe: Any, backbone: Backbone, options: TrainOptions, prompts: Sequence[str]) -> None:
        self.pipe, self.backbone, self.prompts = pipe, backbone, list(prompts)
        self.base, self.device = denoiser(pipe), pipe.vae.device
        self.options = dataclasses.replace(options, data_start=False)
        self.words = self._longest()
        self.state = 0
        """Bytes of what is trained, the optimizer's state and the running mean; once a step was tried."""

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Inside, the model is as it is in training."""
        with training_mode(self.base, self.options):
            yield

    def _longest(self) -> Conditioning:
        """One row: of the prompts, the one that gives most to hold."""
        found = [self.backbone.encode_prompts(self.pipe, [prompt]) for prompt in self.prompts]
        return max(found, key=held_by)

    def row(self, prompt: str) -> int:
        """Bytes of one prompt's conditioning."""
        return held_by(self.backbone.encode_prompts(self.pipe, [prompt]))

    def rows(self, number: int) -> Conditioning:
        """The same words for so many rows, which take no room."""
        return {
            name: value * number if isinstance(value, list) else value.expand(number, *value.shape[1:])
            for name, value in self.words.items()
        }

    def latents(self, number: int, side: int) -> Tensor:
        """Noise of the shape of so many pictures' latents."""
        pixels = torch.zeros(1, 3, side, side, device=self.device)
        with torch.no_grad():
            one = self.backbone.encode_pictures(self.pipe, pixels)
        return torch.randn(number, *one.shape[1:], device=one.device, dtype=one.dtype)

    def material(self, side: int) -> Material:
        """As much as one batch reads."""
        o = self.options
        own, others = o.batch_size, max(1, o.unrelated_rows)
        latents, unrelated = self.latents(own, side), self.latents(others, side)
        rows, columns = self.backbone.grid(self.base, latents)
        masks = torch.ones(own, rows * columns, device=self.device)
        weights = torch.ones(1, own, 1, *latents.shape[2:], device=self.device) if o.mask_loss else None
        bucket = Bucket((side, side), tuple(range(own)), latents[None], masks[None], weights, unrelated)
        prompts = self.rows(gating.BATCH)
        return Material(
            captions=("",) * own,
            latents=latents,
            conditioning=self.rows(own),
            masks=masks,
            weights=None if weights is None else weights[0],
            buckets=(bucket,),
            items=tuple(Item(0, place, 0) for place in range(own)),
            wordless=self.rows(1),
            unrelated_captions=("",) * others,
            unrelated_latents=unrelated,
            unrelated_conditioning=self.rows(others),
            of_class=torch.zeros(others, dtype=torch.bool),
            gate_concept=prompts,
            gate_unrelated=prompts,
            gate_held_out=prompts,
            scan=Scan((), ()),
            beside="",
            said=(),
        )

    def run(self, side: int) -> Run:
        """A run that has not begun, with a folder that it never writes to."""
        processes = PartialState(cpu=self.device.type == "cpu")
        return Run(self.pipe, self.backbone, self.material(side), self.options, Path("nowhere"), processes)

    def step(self, side: int) -> int:
        """The peak of steps, from the first, beside the adapter itself."""
        state, last = self.run(side), self.options.steps - 1
        found = peak_of(lambda: [state.step(max(0, last - back)) for back in range(STEPS)], self.device)
        self.state = held_by(state.parameters()) + held_by(state.optimizer.state_dict()["state"])
        self.state += held_by(state.ema.mean) if state.ema else 0
        return found

    def look(self, rows: int, side: int) -> int:
        """The peak of one forward of so many pictures without gradients, as it is made where atoms are measured."""
        return peak_of(lambda: self._look(rows, side), self.device)

    @torch.no_grad()
    def _look(self, rows: int, side: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        latents = self.latents(rows, side)
        return noised_pass(self.base, self.backbone, latents, self.rows(rows), 0.5, generator, NAME)[3]

    def codes(self, side: int) -> int:
        """All codes of one picture at one time."""
        return held_by(self._look(1, side))

    def encode(self, side: int) -> int:
        """The peak of encoding one picture, and its pixels."""
        return peak_of(lambda: self.latents(1, side), self.device)

    def read(self, number: int) -> int:
        """The peak of encoding so many prompts together."""
        longest = max(self.prompts, key=len)
        return peak_of(lambda: self.backbone.encode_prompts(self.pipe, [longest] * number), self.device)

    def paint(self, number: int, side: int, steps: int | None) -> int:
        """The peak of painting pictures together."""
        return peak_of(lambda: self.paint_now(number, side, steps), self.device)

    def paint_now(self, number: int, side: int, steps: int | None) -> None:
        """Paint pictures as they are painted before training, perhaps in fewer steps of the sampler."""
        prompts = [max(self.prompts, key=len)] * number
        call = self.backbone.call(self.pipe, prompts)
        with base_only(self.base):
            generate(self.pipe, prompts, steps=steps, width=side, height=side, **call)
