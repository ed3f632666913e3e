"""A run between its first step and its last: one step at a time, checkpoints, validation, pictures."""

from __future__ import annotations

import dataclasses
import io
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from tqdm import tqdm

from atomtune.atoms import contained, strengths
from atomtune.backbones import Backbone, Conditioning, Grid, denoiser, placed
from atomtune.errors import UserError
from atomtune.files import write_whole
from atomtune.sampling import generate
from atomtune.sparse import anneal_k, dead_atoms
from atomtune.training import checkpoints, gating, objective, optimizers, run_folder, validation
from atomtune.training.batch import Batch, draw, generator_of, lots_of
from atomtune.training.ema import Ema
from atomtune.training.ends import NAME
from atomtune.training.options import TrainOptions
from atomtune.training.pace import Pace
from atomtune.training.prepare import SAMPLES, Material, side_of
from atomtune.training.processes import highest, launched, mean_gradients, mean_values, wants_shards
from atomtune.training.run_folder import say
from atomtune.training.start import from_activations
from atomtune.training.trackers import Trackers
from atomtune.tuner import Recording, atom_layers, base_only, open_gate, prompt_gate, record, save

ANNEAL = 0.4
"""Share of the steps over which k falls from all atoms to `k`."""
DEAD_AFTER = 50
"""Micro-batches without firing after which the dead-atom term pulls an atom up."""
CONTAIN_FROM = 0.2
"""Share of the steps before `contain` begins: by then codes tell the concept from the rest."""
FORGET = 0.99
"""What is left, a micro-batch later, of what an atom reached on unrelated pictures."""


ECHO = 2.0
"""Seconds in which a second Ctrl-C is the first one, told again."""


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C was pressed: the step ends first, so that its checkpoint is whole. A second one stops
    at once; of several processes each gets the first one twice, from the terminal and from its launcher.
    """
    since: float | None = None
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: False
        return

    def note(number: int, frame: Any) -> None:
        nonlocal since
        if since is None:
            since = time.monotonic()
            say("stopping after this step; Ctrl-C again stops at once")
        elif launched() == 1 or time.monotonic() - since >= ECHO:
            signal.signal(signal.SIGINT, before)
            before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: since is not None
    finally:
        signal.signal(signal.SIGINT, before)


class Run:
    """The state of a run between steps. Every random draw is a function of the seed and the step."""

    def __init__(
        self,
        pipe: Any,
        backbone: Backbone,
        material: Material,
        options: TrainOptions,
        run: Path,
        processes: PartialState,
        held_out: Material | None = None,
        trackers: Trackers | None = None,
        name: str = NAME,
    ) -> None:
        self.name = name
        self.pipe, self.backbone, self.material, self.options = pipe, backbone, material, options
        self.run, self.processes, self.trackers = run, processes, trackers
        self.held_out = held_out or material
        self.base = denoiser(pipe)
        self.device = material.latents.device
        # float16 alone needs it: small gradients would vanish.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.mixed_precision == "fp16")
        if options.data_start:
            from_activations(self.base, backbone, material, options, self.name)
        self.optimizer = self._optimizer()
        self.ema = Ema(self.parameters(), options.ema) if options.ema else None
        self.teacher: Callable[[Batch], Tensor] | None = None
        """What the model should predict of a batch; None: what its pictures say."""
        self.done = 0
        self.told_to_stop = False
        self.best: tuple[float, int] | None = None
        """The lowest validation score so far, and its step."""
        self.silent_for: dict[str, Tensor] = {}
        self.reach: dict[str, Tensor] = {}
        self.pace = Pace(say, self.device)

    def _optimizer(self) -> Any:
        layers = atom_layers(self.base, self.name)
        dictionaries = [p for layer in layers.values() for p in layer.dictionary(self.name).parameters()]
        gate = prompt_gate(self.base, self.name)
        return optimizers.make(
            self.options, dictionaries, list(gate.parameters()) if gate else [], gating.LEARNING_RATE
        )

    def resume(self) -> None:
        found = checkpoints.newest(self.run, say)
        if found is not None:
            self.done, folder = found
            self.optimizer, loop = checkpoints.restore(folder, self.base, self._optimizer, self.name)
            if self.ema:
                self.ema = Ema(self.parameters(), self.options.ema)
            self._set_state(loop)
            before = checkpoints.schedule_of(folder)
            if before not in (None, self._schedule()):
                say(f"warning: the learning rate followed {before} until step {self.done}, and now {self._schedule()}")
        run_folder.cut_log(self.log, self.done)

    def _schedule(self) -> dict[str, Any]:
        return {name: getattr(self.options, name) for name in ("schedule", "steps", "lr", "warmup", "floor")}

    def steps(self, progress: bool, stop: Callable[[Run], bool]) -> None:
        o, main = self.options, self.processes.is_main_process
        bar = tqdm(
            total=o.steps,
            initial=self.done,
            disable=not (progress and main),
            unit="step",
            dynamic_ncols=True,
        )
        with bar, interruptible() as asked_to_stop, run_folder.log_of(self.log) as log:
            while not self.over():
                begin = time.monotonic()
                terms = self.step(self.done)
                self.done += 1
                seconds = time.monotonic() - begin
                self.pace.took(self.done, seconds)
                if self._due(o.validate_every):
                    terms |= self.validate()
                speed = self.speed(seconds)
                run_folder.note(log, self.line(terms | speed))
                if self.trackers:
                    self.trackers.log(terms | speed | {"lr": self.optimizer.param_groups[0]["lr"]}, self.done)
                bar.update()
                bar.set_postfix({k: f"{v:.4g}" for k, v in terms.items()})
                self.told_to_stop = stop(self)
                stopping = self._anywhere(asked_to_stop())
                if self._due(o.checkpoint_every) or self.over() or stopping:
                    self.checkpoint()
                if stopping:
                    say(f"stopped after step {self.done}; go on with: atomtune train --resume --out {self.run}")
                    raise KeyboardInterrupt
                if self._due(o.sample_every):
                    self.sample()

    def _anywhere(self, here: bool) -> bool:
        """Whether it is so on any process: all of them go on, or none, since each waits for the others."""
        if self.processes.num_processes == 1:  # a tensor would have to be waited for
            return here
        flag = torch.tensor(float(here), device=self.device)
        mean_values([flag], self.processes)
        return bool(flag)

    @property
    def log(self) -> Path:
        """Each process logs its own share of the data; the first one's is the run's log."""
        rank = self.processes.process_index
        return self.run / (f"log-{rank}.jsonl" if rank else run_folder.LOG)

    def speed(self, seconds: float) -> dict[str, float]:
        """What log.jsonl says of the time that a step took."""
        o = self.options
        return {"pictures_per_second": round(o.batch_size * o.grad_accumulation / seconds, 2)}

    def line(self, terms: dict[str, float]) -> dict[str, float]:
        """What log.jsonl says of a step."""
        return {"step": self.done, **{k: round(v, 6) for k, v in terms.items()}}

    def _due(self, every: int | None) -> bool:
        return every is not None and self.done % every == 0

    def over(self) -> bool:
        """Whether the last step is done: all of them, or enough validations without a better one."""
        o = self.options
        if self.done >= o.steps or self.told_to_stop:
            return True
        if o.patience is None or o.validate_every is None or self.best is None:
            return False
        return self.done // o.validate_every - self.best[1] // o.validate_every >= o.patience

    @contextmanager
    def told(self) -> Iterator[None]:
        """Inside, status.json says where the run stands; after it, how it ended."""
        state = "failed"
        self._set_status("training")
        try:
            yield
            state = "finished"
        except KeyboardInterrupt:
            state = "stopped"
            raise
        finally:
            self._set_status(state, **self.pace.facts())

    def _set_status(self, state: str, **facts: Any) -> None:
        if self.processes.is_main_process:
            run_folder.set_status(self.run, state, self.done, self.options.steps, **facts)

    def checkpoint(self) -> None:
        """Write the state after the last step, once for all processes."""
        if not self.processes.is_main_process:
            return
        keep = self.options.keep_checkpoints
        state = (self._state(), self._schedule())
        checkpoints.save(self.run, self.done, self.base, self.optimizer, self.name, keep, *state)
        self._set_status("training")

    def _state(self) -> dict[str, Tensor]:
        """What the next step depends on beside the adapter and its optimizer."""
        state = {f"silent_for.{site}": steps for site, steps in self.silent_for.items()}
        state |= {f"reach.{site}": codes for site, codes in self.reach.items()}
        state |= {f"scaler.{name}": torch.tensor(value) for name, value in self.scaler.state_dict().items()}
        if self.ema:
            state |= {f"ema.{name}": value for name, value in self.ema.state().items()}
        if self.best:
            state["best."] = torch.tensor(self.best, dtype=torch.float64)
        return state | {"processes.": torch.tensor(self.processes.num_processes)}

    def _set_state(self, state: dict[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            kind, _, name = key.partition(".")
            parts.setdefault(kind, {})[name] = value
        self.silent_for = {site: value.to(self.device) for site, value in parts.get("silent_for", {}).items()}
        self.reach = {site: value.to(self.device) for site, value in parts.get("reach", {}).items()}
        if "scaler" in parts:
            self.scaler.load_state_dict({name: value.item() for name, value in parts["scaler"].items()})
        if self.ema:
            self.ema.load(parts["ema"])
        if "best" in parts:
            score, step = parts["best"][""].tolist()
            self.best = score, int(step)
        number = self.processes.num_processes
        if (before := int(parts.get("processes", {}).get("", number))) != number:
            say(f"warning: the run was trained by {before} processes, and now by {number}: batches are other ones")

    @contextmanager
    def as_saved(self) -> Iterator[None]:
        """Inside, the adapter is what would be saved now, but for its gate: the mean of `ema`, and `k` as it ends."""
        self._set_k(self.options.steps)
        with self.ema.in_place() if self.ema else nullcontext():
            yield

    def end(self) -> None:
        """The adapter becomes what is saved, for good."""
        self._set_k(self.options.steps)
        if self.ema:
            self.ema.apply()

    def validate(self) -> dict[str, float]:
        """The numbers of `validation.validate`, the same on every process; the best adapter so far is kept."""
        with self.as_saved():
            with open_gate(self.base, self.name), self.autocast():
                found = validation.validate(self.base, self.backbone, self.held_out, self.options.seed)
            if self.processes.num_processes > 1:
                values = reduce(torch.tensor(list(found.values()), device=self.device), "mean").tolist()
                found = dict(zip(found, values, strict=True))
            score = found["validation_score"]
            if math.isfinite(score) and (self.best is None or score < self.best[0]):
                self.best = score, self.done
                if self.processes.is_main_process:
                    save(self.base, checkpoints.best_of(self.run), self.name)
        return found

    def autocast(self) -> torch.autocast:
        """The precision of forwards."""
        dtype = torch.float16 if self.options.mixed_precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.options.mixed_precision != "no")

    def sample(self) -> None:
        """Validation pictures, and the adapter that painted them; a failure is told and does not end the run."""
        main = self.processes.is_main_process
        if not main and not wants_shards(self.options.shard):
            return
        prompts = list(self.options.sample_prompts) or list(dict.fromkeys(self.material.captions))[:SAMPLES]
        side = side_of(self.pipe, self.options)
        folder = self.run / "samples"
        try:
            with torch.no_grad(), self.as_saved(), self._calibrated():
                if main:
                    save(self.base, folder / "adapter", self.name)
                pictures = generate(self.pipe, prompts, seed=self.options.seed, width=side, height=side)
            for i, picture in enumerate(pictures if main else ()):
                held = io.BytesIO()
                picture.save(held, "PNG")
                write_whole(folder / f"step-{self.done:06d}-{i}.png", held.getvalue())
        except Exception as error:  # whatever a pipeline raises, the run is worth more than its pictures
            say(f"warning: validation pictures at step {self.done} failed: {type(error).__name__}: {error}")

    def _calibrated(self) -> AbstractContextManager[None]:
        if not self.options.gated:
            return nullcontext()
        return gating.calibrated(self.base, self.backbone, self.material, self.name)

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step; returns every term of the loss under its own name."""
        self.begin(step)
        terms = self.backward(step)
        return self.update(step, terms)

    def begin(self, step: int) -> None:
        """Learning rate and `k` of a step."""
        o = self.options
        factor = optimizers.schedule(step, o.steps, o.schedule, o.warmup, o.floor)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        self._set_k(step)

    def update(self, step: int, terms: dict[str, float]) -> dict[str, float]:
        """The optimizer's part of a step, once there are gradients; returns the terms and their sum."""
        self._update(step)
        return {"loss": sum(v for k, v in terms.items() if k != "l0"), **terms}

    def backward(self, step: int) -> dict[str, float]:
        """Gradients of a step, the mean over its micro-batches and over the processes."""
        o = self.options
        terms: dict[str, float] = {}
        with self.taking_part(step):
            for part in range(o.grad_accumulation):
                self.total(step, self._losses(self.micro(step, part)), terms).backward()
        mean_gradients(self.parameters(), self.processes)
        return terms

    def total(self, step: int, losses: dict[str, Tensor], terms: dict[str, float]) -> Tensor:
        """What a micro-batch adds to the loss of a step, to be differentiated; its terms are added to `terms`."""
        l0, share = losses.pop("l0"), 1 / self.options.grad_accumulation
        total = torch.stack(list(losses.values())).sum()
        if not math.isfinite(total.item()):
            raise UserError(self._not_finite(step, losses))
        for name, value in {**losses, "l0": l0}.items():
            terms[name] = terms.get(name, 0.0) + value.item() * share
        return self.scaler.scale(total * share)

    @contextmanager
    def taking_part(self, step: int) -> Iterator[None]:
        """Inside, forwards and backwards are those of a step.

        The gate learns from labels; here it stands open, so that atoms learn to be silent themselves. In backward too:
        gradient checkpointing runs the forward again.
        """
        sparsifiers = [layer.dictionary(self.name).sparsifier for layer in atom_layers(self.base, self.name).values()]
        with open_gate(self.base, self.name), self._taking_part(step):
            # Those that choose among a whole batch do so in training alone.
            for sparsifier in sparsifiers:
                sparsifier.train()
            try:
                yield
                mean_values((b for s in sparsifiers for b in s.buffers() if b.is_floating_point()), self.processes)
            finally:
                for sparsifier in sparsifiers:
                    sparsifier.eval()

    def _taking_part(self, step: int) -> ExitStack:
        """Which atoms take part in a step, and from which code on, as lots drawn anew each step say.

        With `nested`, only the first atoms of each site; with `contain`, in half of the steps, only codes above a
        share of what the atom reached on unrelated pictures.
        """
        generator, stack = lots_of(self.options, step), ExitStack()
        share, lot = (torch.rand((), generator=generator).item() for _ in range(2))
        if self.options.nested:
            values = {}
            for site, layer in atom_layers(self.base, self.name).items():
                strength = torch.zeros(layer.r[self.name])
                strength[: math.ceil(share * len(strength))] = 1
                values[site] = strength
            stack.enter_context(strengths(self.base, values, self.name))
        if self.options.contain and step > CONTAIN_FROM * self.options.steps and lot > 0.5:
            floors = {site: (2 * lot - 1) * reach for site, reach in self.reach.items()}
            stack.enter_context(contained(self.base, floors, self.name))
        return stack

    @torch.no_grad()
    def _follow(self, codes: dict[str, list[Tensor]], batch: Batch, grid: Grid, backbone: Backbone) -> None:
        """What atoms reach on unrelated pictures, those of the class left out: they may well be like the concept."""
        far = torch.arange(len(batch.x)) >= len(batch.rows)
        far[batch.others] = torch.isin(batch.picks, self.material.far)
        for site, calls in codes.items():
            found, layout = placed(backbone, site, calls[-1], batch.conditioning, grid)
            real = layout.real & far.to(self.device)[:, None]
            sizes = torch.where(real[..., None], found.abs().float(), 0).flatten(0, -2).amax(0)
            self.reach[site] = torch.maximum(FORGET * self.reach.get(site, torch.zeros_like(sizes)), sizes)
        highest(self.reach, self.processes)

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer trains."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def micro(self, step: int, part: int) -> int:
        """Number of a micro-batch: no two processes see the same one."""
        n = self.processes.num_processes
        return (step * self.options.grad_accumulation + part) * n + self.processes.process_index

    def _update(self, step: int) -> None:
        """One step of the optimizer; in fp16 a gradient that overflows is left out and the scale halved."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters(), self.options.max_grad_norm)
        if not torch.isfinite(norm) and not (self.scaler.is_enabled() and self.scaler.get_scale() > 1):
            raise UserError(self._not_finite(step, {"gradient": norm}))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update()

    def _set_k(self, step: int) -> None:
        if self.options.k is None:
            return
        for layer in atom_layers(self.base, self.name).values():
            dictionary = layer.dictionary(self.name)
            share = min(1.0, step / max(1, ANNEAL * self.options.steps))
            dictionary.sparsifier.k = anneal_k(share, dictionary.n_atoms, min(self.options.k, dictionary.n_atoms))

    def _losses(self, micro: int) -> dict[str, Tensor]:
        """The weighted terms of the loss on micro-batch number `micro`, and l0."""
        o, m, backbone = self.options, self.material, self.backbone
        generator = generator_of(o, micro)
        batch = draw(m, backbone, o, micro, generator)
        if self.teacher is not None:
            batch = dataclasses.replace(batch, target=self.teacher(batch))
        with self.autocast(), record(self.base, self.name) as recording:
            predicted = backbone.predict(self.base, batch.x, batch.s, batch.conditioning)
        plain = None
        if self.needs_base:
            with self.autocast():
                others = batch.others
                plain = self._base_prediction(batch.x[others], batch.s[others], batch.conditioning_of(others))
        return self.losses(batch, backbone, generator, recording, predicted, plain)

    @property
    def needs_base(self) -> bool:
        """Whether a step needs the base's own prediction of unrelated rows."""
        return bool(self.options.unrelated_rows and self.options.distill)

    def losses(
        self,
        batch: Batch,
        backbone: Backbone,
        generator: torch.Generator,
        recording: Recording,
        predicted: Tensor,
        plain: Tensor | None,
    ) -> dict[str, Tensor]:
        """The weighted terms, and l0, of a batch that was drawn from `generator`.

        `recording` and `predicted` are of its rows; `plain` is the base's prediction of the unrelated ones.
        """
        o, m = self.options, self.material
        concept, others = batch.concept, batch.others
        grid = backbone.grid(self.base, batch.x)
        real = partial(objective.real_positions, backbone=backbone, conditioning=batch.conditioning, grid=grid)
        codes = real(recording.codes, rows=concept)
        losses = {"task": objective.error(predicted[concept], batch.target[concept], batch.weight)}
        if o.unrelated_rows and o.silence:
            quiet = objective.silence(recording, backbone, batch.conditioning, grid, others, o.margin)
            losses["silence"] = o.silence * quiet
        if o.unrelated_rows and o.contain:
            self._follow(recording.codes, batch, grid, backbone)
        if o.inner:
            around = objective.around(recording, backbone, batch.conditioning, 1 - batch.masks, grid, o.margin)
            losses["inner"] = o.inner * around
        if o.unrelated_rows and o.prior:
            losses["prior"] = o.prior * objective.error(predicted[others], batch.target[others])
        if plain is not None:
            losses["distill"] = o.distill * objective.error(predicted[others], plain)
        if o.sparsity:
            layers = atom_layers(self.base, self.name)
            atoms = {site: layer.dictionary(self.name).atoms for site, layer in layers.items()}
            losses["sparsity"] = o.sparsity * objective.sparsity(codes, atoms)
        if o.dead:
            losses["dead"] = o.dead * self._wake(real(recording.pre_codes, rows=slice(None)))
        if o.gated:
            losses["gate"] = gating.loss(self.base, backbone, m, generator, self.name)
        return losses | {"l0": torch.tensor(objective.mean_l0(codes))}

    @torch.no_grad()
    def _base_prediction(self, x: Tensor, s: Tensor, conditioning: Conditioning) -> Tensor:
        with base_only(self.base):
            return self.backbone.predict(self.base, x, s, conditioning)

    def _wake(self, pre_codes: dict[str, Tensor]) -> Tensor:
        """The dead-atom term: atoms silent for `DEAD_AFTER` micro-batches are pulled up."""
        terms = []
        for site, found in pre_codes.items():
            fired = (found > 0).any(0).float()
            highest({site: fired}, self.processes)
            quiet = self.silent_for.get(site, torch.zeros_like(fired, dtype=torch.long))
            self.silent_for[site] = torch.where(fired > 0, 0, quiet + 1)
            terms.append(dead_atoms(found, self.silent_for[site] > DEAD_AFTER))
        return torch.stack(terms).sum()

    def _not_finite(self, step: int, losses: dict[str, Tensor]) -> str:
        bad = [name for name, value in losses.items() if not torch.isfinite(value)]
        found = checkpoints.newest(self.run)
        good = f"The last good checkpoint is {found[1]}." if found else "There is no checkpoint yet."
        return f"Training stopped at step {step + 1}: `{', '.join(bad)}` is not finite. {good} Lower --lr."
