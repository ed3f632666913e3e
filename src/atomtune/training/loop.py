"""The whole of training: from a pipeline and a folder of pictures to an adapter in a run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import PartialState

from atomtune.adapter import Adapter, load
from atomtune.backbones import backbone_of, base_name, denoiser
from atomtune.training import checkpoints, hub, run_folder, validation
from atomtune.training.encode import weights_key
from atomtune.training.ends import (
    NAME,
    attach_atoms,
    check_checkpointing,
    conclude,
    kinds_of,
    learned_nothing,
    sites_of,
    training_mode,
)
from atomtune.training.options import TrainOptions
from atomtune.training.prepare import prepare
from atomtune.training.processes import shard, wants_shards
from atomtune.training.run import Run
from atomtune.training.run_folder import say
from atomtune.training.trackers import Trackers, chosen
from atomtune.tuner import adapter_config, atom_layers, base_only, discard_adapters, note_base


def train(
    pipe: Any,
    data: str | Path,
    out: str | Path,
    options: TrainOptions | None = None,
    *,
    resume: bool = False,
    allow_changed_data: bool = False,
    command: str = "",
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
    stop: Callable[[Run], bool] = lambda run: False,
) -> Adapter:
    """Train an adapter on a folder of pictures; returns it attached to the pipeline, saved in `out`.

    `out` receives config.toml (with `settings` beside the options), log.jsonl, status.json, checkpoints/, samples/ and
    the adapter's own files. With validation it is the best one, by `validation_score`, and `last/` holds the last.
    With `resume` the newest whole checkpoint goes on, and its losses are those of an uninterrupted run; a finished run
    is loaded as it is. `stop` is asked
    after each step whether that was the last. Raises UserError on bad data or options before anything is trained or
    written, and on a loss that is not finite. After an error the pipeline is the base again.
    """
    options = options or TrainOptions()
    run, base, backbone = Path(out), denoiser(pipe), backbone_of(pipe)
    processes = PartialState(cpu=pipe.vae.device.type == "cpu")
    if processes.is_main_process:
        run_folder.mend(run)
    processes.wait_for_everyone()
    options = run_folder.stored(run, options) if resume else run_folder.check_free(run, options)
    if resume and run_folder.is_finished(run):
        say(f"{run} is finished: nothing is left to train")
        return load(pipe, run)
    tracked = chosen(options.trackers) if processes.is_main_process else ()
    processes.wait_for_everyone()
    check_checkpointing(base, backbone, options)
    # First, because it names unknown sites and wrong sizes, and what follows may take minutes.
    attach_atoms(pipe, backbone, options)
    try:
        with ExitStack() as stack:
            if resume and processes.is_main_process:
                stack.enter_context(run_folder.held(run))
            for name in ("sample_every", "validate_every") if processes.is_main_process else ():
                if (every := getattr(options, name)) is not None and every > options.steps:
                    say(f"warning: `{name}` is {every}, and there are {options.steps} steps: nothing will come of it")
            if progress and processes.is_main_process:
                say(f"preparing pictures and prompts for {sites_of(kinds_of(atom_layers(base, NAME)))}")
            base_key = None
            if wants_shards(options.shard):
                # While it is whole: afterwards no process can tell.
                note_base(adapter_config(base, NAME), base)
                base_key = weights_key(base)
                shard(base, pipe.vae.device, processes, NAME)
            with base_only(base):
                material = prepare(pipe, backbone, Path(data), options, run, base_key)
            learned, held_out = validation.split(material, options.held_out, options.seed)
            settings = {"data": data, "base": base_name(pipe), **(settings or {})}
            if resume:
                run_folder.check_data(run, material.scan, material.beside, allow_changed_data)
            if processes.is_main_process:
                run_folder.tell(material.scan, material.said)
                if not resume:
                    stack.enter_context(run_folder.claimed(run, options, settings, material.scan, material.beside))
            processes.wait_for_everyone()
            stack.enter_context(training_mode(base, options))
            trackers = Trackers(tracked, run, settings | options.to_dict(), say)
            stack.callback(trackers.finish)
            state = Run(pipe, backbone, learned, options, run, processes, held_out, trackers)
            if resume:
                state.resume()
                processes.wait_for_everyone()  # the first writes to files that all of them read
            with state.told():
                state.steps(progress, stop)
                return _finish(state, command)
    except BaseException:
        discard_adapters(base, NAME)
        raise


def _finish(state: Run, command: str) -> Adapter:
    """Save what was trained: the best by validation, with the last beside it, or the last."""
    o, run, processes = state.options, state.run, state.processes
    meta: dict[str, Any] = {"command": command, "concept": o.concept, "steps": state.done, "seed": o.seed}
    state.end()
    adapter, gate_report = conclude(state.pipe, state.backbone, state.material, o)
    if state.best is not None:
        if processes.is_main_process:
            adapter.save(run / "last", meta | gate_report)
        adapter.remove()
        processes.wait_for_everyone()
        checkpoints.attach(checkpoints.best_of(run), state.base, NAME)
        adapter, gate_report = conclude(state.pipe, state.backbone, state.material, o)
        score, step = state.best
        meta |= {"best step": step, "validation_score": round(score, 6)}
    if processes.is_main_process:
        _tell_end(state)
        adapter.save(run, meta | gate_report)
        if o.hub is not None:
            try:
                say(f"sent to {hub.push(run, o.hub)}")
            except Exception as error:  # of the network's library, which changes
                say(f"warning: not sent to {o.hub}: {error}. The adapter is in {run}.")
    processes.wait_for_everyone()
    return adapter


def _tell_end(state: Run) -> None:
    if state.best is not None:
        score, step = state.best
        say(f"the best of {state.done} steps, by validation_score, is step {step} ({score:.4g}); last/ has the last")
    if learned_nothing(state.base):
        say("warning: no atom has learned anything: the adapter is the base. Raise --lr or --steps.")
