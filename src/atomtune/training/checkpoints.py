"""Checkpoints: complete or absent, without pickle, found again by step."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from atomtune.errors import UserError
from atomtune.tuner import load as load_adapter
from atomtune.tuner import remove_adapter
from atomtune.tuner import save as save_adapter

STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
OPTIMIZER_PLAIN = "optimizer.json"
LOOP = "loop.safetensors"
_NEEDED = {OPTIMIZER, OPTIMIZER_PLAIN, LOOP, "adapter/adapter_model.safetensors", "adapter/adapter_config.json"}


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return run / "checkpoints" / f"step-{step:06d}"


def best_of(run: Path) -> Path:
    """Where the adapter lies that validation likes best."""
    return run / "checkpoints" / "best"


def save(
    run: Path,
    step: int,
    model: Any,
    optimizer: Any,
    adapter: str,
    keep: int,
    loop: dict[str, Tensor],
    schedule: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint after `step` steps, whole or not at all, and drop all but the newest `keep`.

    `loop` is what else the next step depends on; `schedule`, what the learning rate follows.
    """
    folder = folder_of(run, step)
    fresh = folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        save_adapter(model, fresh / "adapter", adapter)
        tensors: dict[str, Tensor] = {}
        plain = _pack(optimizer.state_dict(), "", tensors)
        (fresh / OPTIMIZER_PLAIN).write_text(json.dumps(plain), encoding="utf-8")
        for name, saved in ((OPTIMIZER, tensors), (LOOP, loop)):
            safetensors.torch.save_file(saved, fresh / name)
            shutil.copymode(fresh / OPTIMIZER_PLAIN, fresh / name)  # safetensors' files are for their owner only
        digests = {p.relative_to(fresh).as_posix(): _digest(p) for p in sorted(fresh.rglob("*")) if p.is_file()}
        state = {"step": step, "schedule": schedule, "sha256": digests}
        (fresh / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(fresh, folder)
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        raise UserError(f"Could not write {folder}: {error}. Earlier checkpoints are untouched.") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    # Those of later steps are damaged: a run goes on from the newest whole one.
    every = _in_order(run)
    at = every.index(folder)
    for old in (*every[: max(0, at + 1 - keep)], *every[at + 1 :]):
        shutil.rmtree(old, ignore_errors=True)
    return folder


def newest(run: Path, tell: Callable[[str], None] = lambda text: None) -> tuple[int, Path] | None:
    """The newest checkpoint whose files are whole; broken ones are passed over, and told."""
    for folder in reversed(_in_order(run)):
        if (step := _whole(folder)) is not None:
            return step, folder
        tell(f"warning: the checkpoint {folder} is damaged and passed over")
    return None


def _in_order(run: Path) -> list[Path]:
    """Folders of checkpoints, the oldest first: of more than six digits too."""
    return sorted((run / "checkpoints").glob("step-*"), key=lambda folder: (len(folder.name), folder.name))


def _whole(folder: Path) -> int | None:
    """The step of a checkpoint whose files are all there and as they were written; None for another."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        step, digests = int(state["step"]), dict(state["sha256"])
        if folder_of(folder.parents[1], step) != folder or not digests.keys() >= _NEEDED:
            return None
        return step if all(_digest(folder / name) == digest for name, digest in digests.items()) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def schedule_of(folder: Path) -> dict[str, Any] | None:
    """What the learning rate followed when the checkpoint was written."""
    found: dict[str, Any] | None = json.loads((folder / STATE).read_text(encoding="utf-8")).get("schedule")
    return found


def restore(folder: Path, model: Any, optimizer_of: Callable[[], Any], adapter: str) -> tuple[Any, dict[str, Tensor]]:
    """Put a checkpoint's adapter in place of the model's; returns its optimizer, and `loop` as it was saved.

    `optimizer_of()` makes the optimizer once the adapter is attached.
    """
    remove_adapter(model, adapter)
    attach(folder / "adapter", model, adapter)
    optimizer = optimizer_of()
    plain = json.loads((folder / OPTIMIZER_PLAIN).read_text(encoding="utf-8"))
    load_optimizer(optimizer, plain, safetensors.torch.load_file(folder / OPTIMIZER))
    return optimizer, safetensors.torch.load_file(folder / LOOP)


def load_optimizer(optimizer: Any, packed: Any, tensors: dict[str, Tensor]) -> None:
    """Put a packed state into an optimizer; what can't be packed, such as a function, stays its own."""
    plain = _unpack(packed, tensors)
    fresh = optimizer.state_dict()["param_groups"]
    groups = [new | old for new, old in zip(fresh, plain["param_groups"], strict=True)]
    optimizer.load_state_dict({"state": plain["state"], "param_groups": groups})


def attach(folder: Path, model: Any, adapter: str) -> None:
    """Attach an adapter that this run has saved, to be trained."""
    with warnings.catch_warnings():
        # A base that is shared or quantized has no fingerprint to compare; it is this run's own.
        warnings.filterwarnings("ignore", message="The base model is quantized or offloaded")
        load_adapter(model, folder, adapter, trainable=True)


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A state as JSON has it, its tensors taken out; what is neither is left out."""
    if isinstance(value, Tensor):
        # Copies, since a file holds no two names for one memory, and some optimizers share a table.
        tensors[path] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": path}
    if isinstance(value, dict):
        pairs = [[key, _pack(inner, f"{path}/{key}", tensors)] for key, inner in value.items() if _fits(inner)]
        return {"dict": pairs}
    if isinstance(value, list | tuple):
        return [_pack(inner, f"{path}/{i}", tensors) for i, inner in enumerate(value)]
    return value


def _fits(value: Any) -> bool:
    return value is None or isinstance(value, Tensor | dict | list | tuple | bool | int | float | str)


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(inner, tensors) for inner in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    return {key: _unpack(inner, tensors) for key, inner in value["dict"]}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
