"""The training loop: from a pipeline and a folder of pictures to an adapter in a run folder."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from tqdm import tqdm

from atomtune.adapter import Adapter
from atomtune.atoms import measure, order_by_importance, strengths
from atomtune.backbones import Backbone, Conditioning, backbone_of, base_name, denoiser
from atomtune.data.folder import Scan
from atomtune.errors import UserError
from atomtune.sampling import generate
from atomtune.sparse import anneal_k, dead_atoms
from atomtune.training import checkpoints, gating, objective
from atomtune.training.batch import draw, generator_of
from atomtune.training.options import TrainOptions
from atomtune.training.prepare import Material, prepare
from atomtune.training.start import from_activations
from atomtune.tuner import (
    AtomConfig,
    atom_layers,
    attach,
    base_only,
    open_gate,
    prompt_gate,
    record,
    remove_adapter,
)

NAME = "default"
ANNEAL = 0.4
"""Share of the steps over which k falls from all atoms to `k`."""
DEAD_AFTER = 50
"""Micro-batches without firing after which the dead-atom term pulls an atom up."""


def train(
    pipe: Any,
    data: str | Path,
    out: str | Path,
    options: TrainOptions | None = None,
    *,
    resume: bool = False,
    command: str = "",
    progress: bool = True,
) -> Adapter:
    """Train an adapter on a folder of pictures; returns it attached to the pipeline, saved in `out`.

    `out` receives options.json, log.jsonl, checkpoints/, samples/ and the adapter's own files. With `resume`
    the newest whole checkpoint goes on, and its losses are those of an uninterrupted run. Raises UserError on
    bad data or options before anything is trained or written, and on a loss that is not finite. After an error
    the pipeline is the base again.
    """
    options = options or TrainOptions()
    run = Path(out)
    backbone = backbone_of(pipe)
    processes = PartialState(cpu=pipe.vae.device.type == "cpu")
    options = _stored(run, options) if resume else _checked(run, options)
    processes.wait_for_everyone()
    base = denoiser(pipe)
    if options.gradient_checkpointing and not getattr(base, "_supports_gradient_checkpointing", True):
        raise UserError(f"`gradient_checkpointing` must be off for {backbone.family}, which has none.")
    # First, because it names unknown sites and wrong sizes, and what follows may take minutes.
    attach_atoms(pipe, backbone, options)
    try:
        with base_only(base):
            material = prepare(pipe, backbone, Path(data), options, run)
        if processes.is_main_process:
            _tell(material.scan)
            if not resume:
                _claim(run, options)
        processes.wait_for_everyone()
        with training_mode(base, options):
            state = Run(pipe, backbone, material, options, run, processes)
            if resume:
                state.resume()
            state.steps(progress)
            adapter, gate_report = conclude(pipe, backbone, material, options)
        meta = {"concept": options.concept, "steps": options.steps, "seed": options.seed, **gate_report}
        if processes.is_main_process:
            adapter.save(run, {"command": command, **meta})
        processes.wait_for_everyone()
    except BaseException:
        if NAME in (getattr(base, "peft_config", None) or {}):
            remove_adapter(base, NAME)
        raise
    return adapter


def _stored(run: Path, given: TrainOptions) -> TrainOptions:
    """The options that a run began with: a resumed run keeps them, and says so where others were given."""
    path = run / "options.json"
    if not path.is_file():
        raise UserError(f"`out` must be the folder of a run to resume, but {run} has no options.json.")
    stored = TrainOptions.from_json(path.read_text(encoding="utf-8"))
    for field in dataclasses.fields(TrainOptions):
        old, new = getattr(stored, field.name), getattr(given, field.name)
        if new not in (old, field.default):
            _say(f"warning: a resumed run keeps its options: `{field.name}` stays {old}, not {new}")
    return stored


def _checked(run: Path, options: TrainOptions) -> TrainOptions:
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UserError(f"`out` exists and is not empty: {run}. Choose another folder, or go on with --resume.")
    return options


def _claim(run: Path, options: TrainOptions) -> None:
    """Make the run folder ours, once nothing is known to be wrong: a second try finds it free."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / "options.json").write_text(options.to_json(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"`out` can't be written: {error}.") from error


def _tell(found: Scan) -> None:
    """What lies in the data folder and is not learned from, and why: nothing is passed over in silence."""
    reasons: dict[str, list[str]] = {}
    for skipped in found.skipped:
        kind = skipped.reason.partition(":")[0]
        if kind != "caption":
            reasons.setdefault(kind, []).append(skipped.path.name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        _say(f"passed over, {reason}: {', '.join(names[:3])}{more}")


def _say(text: str) -> None:
    """A message on stderr, above the progress bar; stdout is for data."""
    tqdm.write(text, file=sys.stderr)


def attach_atoms(pipe: Any, backbone: Backbone, options: TrainOptions, adapter: str = NAME, **instead: Any) -> None:
    """A fresh adapter, as the options want it; `instead` are fields of its config that differ."""
    embeds = backbone.encode_prompts(pipe, [""])[backbone.gate_input]
    fields: dict[str, Any] = {
        "n_atoms": options.n_atoms,
        "sparsifier": options.sparsifier,
        "k": options.k,
        "threshold": options.threshold,
        "target_modules": list(options.sites or backbone.sites),
        "gate_input": backbone.gate_input if options.gated else None,
        "gate_mask": backbone.gate_mask if options.gated else None,
        "gate_dim": embeds[0].shape[-1] if options.gated else None,
        "base_model_name_or_path": base_name(pipe),
    }
    torch.manual_seed(options.seed)
    attach(denoiser(pipe), AtomConfig(**fields | instead), adapter)


def conclude(
    pipe: Any, backbone: Backbone, material: Material, options: TrainOptions
) -> tuple[Adapter, dict[str, float]]:
    """After the last step: calibrate the gate, measure the atoms, put them in order; returns what the gate does."""
    base = denoiser(pipe)
    gate_report = gating.calibrate(base, backbone, material, NAME) if options.gated else {}
    statistics = measure(base, backbone, material.latents, material.conditioning, masks=material.masks)
    return Adapter(pipe, order_by_importance(base, statistics)), gate_report


@contextmanager
def training_mode(base: Any, options: TrainOptions) -> Iterator[None]:
    """Freeze the base; gradient checkpointing where asked. The model stays in eval mode: no dropout."""
    for name, parameter in base.named_parameters():
        parameter.requires_grad_("atom_" in name)
    if options.gradient_checkpointing:
        base.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if options.gradient_checkpointing:
            base.disable_gradient_checkpointing()


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C was pressed: the step ends first, so that its checkpoint is whole. A second one stops
    at once.
    """
    asked = False
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: False
        return

    def note(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)
        _say("stopping after this step; Ctrl-C again stops at once")

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
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
    ) -> None:
        self.pipe, self.backbone, self.material, self.options = pipe, backbone, material, options
        self.run, self.processes = run, processes
        self.base = denoiser(pipe)
        self.device = material.latents.device
        # float16 alone needs it: small gradients would vanish.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.mixed_precision == "fp16")
        if options.data_start:
            from_activations(self.base, backbone, material, options, NAME)
        self.optimizer = self._optimizer()
        self.done = 0
        self.silent_for: dict[str, Tensor] = {}

    def _optimizer(self) -> torch.optim.Optimizer:
        layers = atom_layers(self.base, NAME)
        dictionaries = [p for layer in layers.values() for p in layer.dictionary(NAME).parameters()]
        groups = [{"params": dictionaries, "lr": self.options.lr}]
        gate = prompt_gate(self.base, NAME)
        if gate is not None:
            groups.append({"params": list(gate.parameters()), "lr": gating.LEARNING_RATE})
        for group in groups:
            group["rate"] = group["lr"]
        return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)

    def resume(self) -> None:
        found = checkpoints.newest(self.run)
        if found is not None:
            self.done, folder = found
            self.optimizer, loop = checkpoints.restore(folder, self.base, self._optimizer, NAME)
            self._set_state(loop)
        _cut_log(self.run / "log.jsonl", self.done)

    def steps(self, progress: bool) -> None:
        bar = tqdm(
            total=self.options.steps,
            initial=self.done,
            disable=not (progress and self.processes.is_main_process),
            unit="step",
            dynamic_ncols=True,
        )
        # Each process logs its own share of the data; the first one's is the run's log.
        name = f"log-{self.processes.process_index}.jsonl".replace("-0", "")
        with bar, _interruptible() as asked_to_stop, (self.run / name).open("a", encoding="utf-8") as log:
            while self.done < self.options.steps:
                begin = time.monotonic()
                terms = self.step(self.done)
                self.done += 1
                rate = self.options.batch_size * self.options.grad_accumulation / (time.monotonic() - begin)
                line = {"step": self.done, **{k: round(v, 6) for k, v in terms.items()}}
                print(json.dumps(line | {"pictures_per_second": round(rate, 2)}), file=log, flush=True)
                bar.update()
                bar.set_postfix({k: f"{v:.4g}" for k, v in terms.items()} | {"pic/s": f"{rate:.1f}"})
                due = self.done % self.options.checkpoint_every == 0 or self.done == self.options.steps
                if due or asked_to_stop():
                    self.checkpoint()
                if asked_to_stop():
                    _say(f"stopped after step {self.done}; go on with --resume --out {self.run}")
                    raise KeyboardInterrupt
                every = self.options.sample_every if self.processes.is_main_process else None
                if every and self.done % every == 0:
                    self.sample()

    def checkpoint(self) -> None:
        """Write the state after the last step, once for all processes."""
        if not self.processes.is_main_process:
            return
        keep = self.options.keep_checkpoints
        checkpoints.save(self.run, self.done, self.base, self.optimizer, NAME, keep, self._state())

    def _state(self) -> dict[str, Tensor]:
        """What the next step depends on beside the adapter and its optimizer."""
        silent = {f"silent_for.{site}": steps for site, steps in self.silent_for.items()}
        scaler = {f"scaler.{name}": torch.tensor(value) for name, value in self.scaler.state_dict().items()}
        return silent | scaler

    def _set_state(self, state: dict[str, Tensor]) -> None:
        scaler = {}
        for key, value in state.items():
            kind, _, name = key.partition(".")
            if kind == "scaler":
                scaler[name] = value.item()
            else:
                self.silent_for[name] = value.to(self.device)
        if scaler:
            self.scaler.load_state_dict(scaler)

    def _autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.options.mixed_precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.options.mixed_precision != "no")

    def sample(self) -> None:
        """Validation pictures; a failure is told and does not end the run."""
        prompts = list(self.options.sample_prompts or dict.fromkeys(self.material.captions))[:4]
        try:
            folder = self.run / "samples"
            folder.mkdir(exist_ok=True)
            # The gate is not calibrated yet: these prompts are the concept's, so it stands open.
            with torch.no_grad(), open_gate(self.base, NAME):
                pictures = generate(self.pipe, prompts, seed=self.options.seed)
            for i, picture in enumerate(pictures):
                picture.save(folder / f"step-{self.done:06d}-{i}.png")
        except Exception as error:  # whatever a pipeline raises, the run is worth more than its pictures
            _say(f"warning: validation pictures at step {self.done} failed: {type(error).__name__}: {error}")

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step; returns every term of the loss under its own name."""
        factor = schedule(step, self.options.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        self._set_k(step)
        terms = self.backward(step)
        self._update(step)
        return {"loss": sum(v for k, v in terms.items() if k != "l0"), **terms}

    def backward(self, step: int) -> dict[str, float]:
        """Gradients of a step, the mean over its micro-batches and over the processes."""
        o = self.options
        terms: dict[str, float] = {}
        # The gate learns from labels; here it stands open, so that atoms learn to be silent themselves. In
        # backward too: gradient checkpointing runs the forward again.
        with open_gate(self.base, NAME), self._prefix(step):
            for part in range(o.grad_accumulation):
                losses = self._losses(self._micro(step, part))
                l0 = losses.pop("l0")
                total = torch.stack(list(losses.values())).sum()
                if not math.isfinite(total.item()):
                    raise UserError(self._not_finite(step, losses))
                self.scaler.scale(total / o.grad_accumulation).backward()
                for name, value in {**losses, "l0": l0}.items():
                    terms[name] = terms.get(name, 0.0) + value.item() / o.grad_accumulation
        if self.processes.num_processes > 1:
            for p in self.parameters():
                p.grad = reduce(torch.zeros_like(p) if p.grad is None else p.grad, "mean")
        return terms

    def _prefix(self, step: int) -> AbstractContextManager[None]:
        """With `nested`, only the first atoms of each site take part; how many is drawn anew each step."""
        if not self.options.nested:
            return nullcontext()
        share = torch.rand((), generator=generator_of(self.options, step)).item()
        values = {}
        for site, layer in atom_layers(self.base, NAME).items():
            strength = torch.zeros(layer.r[NAME])
            strength[: math.ceil(share * len(strength))] = 1
            values[site] = strength
        return strengths(self.base, values, NAME)

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer trains."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _micro(self, step: int, part: int) -> int:
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

    def _set_k(self, step: int) -> None:
        if self.options.k is None:
            return
        for layer in atom_layers(self.base, NAME).values():
            dictionary = layer.dictionary(NAME)
            share = min(1.0, step / max(1, ANNEAL * self.options.steps))
            dictionary.sparsifier.k = anneal_k(share, dictionary.n_atoms, min(self.options.k, dictionary.n_atoms))

    def _losses(self, micro: int) -> dict[str, Tensor]:
        """The weighted terms of the loss on micro-batch number `micro`, and l0."""
        o, m, backbone = self.options, self.material, self.backbone
        generator = generator_of(o, micro)
        batch = draw(m, backbone, o, micro, generator)
        concept, others = batch.concept, batch.others
        grid = backbone.grid(self.base, batch.x)
        with self._autocast(), record(self.base, NAME) as recording:
            predicted = backbone.predict(self.base, batch.x, batch.s, batch.conditioning)
        losses = {"task": objective.error(predicted[concept], batch.target[concept])}
        if o.unrelated_rows and o.silence:
            quiet = objective.silence(recording, backbone, batch.conditioning, grid, others, o.margin)
            losses["silence"] = o.silence * quiet
        if o.inner:
            beside = 1 - m.masks[batch.rows]
            around = objective.around(recording, backbone, batch.conditioning, beside, grid, o.margin)
            losses["inner"] = o.inner * around
        if o.unrelated_rows and o.prior:
            losses["prior"] = o.prior * objective.error(predicted[others], batch.target[others])
        if o.unrelated_rows and o.distill:
            with self._autocast():
                plain = self._base_prediction(batch.x[others], batch.s[others], batch.conditioning_of(others))
            losses["distill"] = o.distill * objective.error(predicted[others], plain)
        if o.sparsity:
            layers = atom_layers(self.base, NAME)
            atoms = {site: layer.dictionary(NAME).atoms for site, layer in layers.items()}
            losses["sparsity"] = o.sparsity * objective.sparsity(recording, atoms, concept)
        if o.dead:
            losses["dead"] = o.dead * self._wake(recording.pre_codes)
        if o.gated:
            losses["gate"] = gating.loss(self.base, backbone, m, generator, NAME)
        return losses | {"l0": torch.tensor(objective.mean_l0(recording, concept))}

    @torch.no_grad()
    def _base_prediction(self, x: Tensor, s: Tensor, conditioning: Conditioning) -> Tensor:
        with base_only(self.base):
            return self.backbone.predict(self.base, x, s, conditioning)

    def _wake(self, pre_codes: dict[str, list[Tensor]]) -> Tensor:
        """The dead-atom term: atoms silent for `DEAD_AFTER` micro-batches are pulled up."""
        terms = []
        for site, calls in pre_codes.items():
            fired = (calls[-1] > 0).flatten(0, -2).any(0)
            quiet = self.silent_for.get(site, torch.zeros_like(fired, dtype=torch.long))
            self.silent_for[site] = torch.where(fired, 0, quiet + 1)
            terms.append(dead_atoms(calls[-1], self.silent_for[site] > DEAD_AFTER))
        return torch.stack(terms).sum()

    def _not_finite(self, step: int, losses: dict[str, Tensor]) -> str:
        bad = [name for name, value in losses.items() if not torch.isfinite(value)]
        found = checkpoints.newest(self.run)
        good = f"The last good checkpoint is {found[1]}." if found else "There is no checkpoint yet."
        return f"Training stopped at step {step + 1}: `{', '.join(bad)}` is not finite. {good} Lower --lr."


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: linear over the first 5 % of the steps, then cosine to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm))


def _cut_log(path: Path, done: int) -> None:
    """Forget logged steps after the checkpoint that a resumed run starts from."""
    if path.exists():
        lines = [ln for ln in path.read_text(encoding="utf-8").splitlines() if ln.startswith("{")]
        whole = [ln for ln in lines if ln.endswith("}") and json.loads(ln)["step"] <= done]
        path.write_text("".join(f"{ln}\n" for ln in whole), encoding="utf-8")
