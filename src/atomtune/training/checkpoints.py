"""Checkpoints: complete or absent, without pickle, found again by step."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
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
LOOP = "loop.safetensors"


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return run / "checkpoints" / f"step-{step:06d}"


def save(
    run: Path,
    step: int,
    model: Any,
    optimizer: torch.optim.Optimizer,
    adapter: str,
    keep: int,
    loop: dict[str, Tensor],
) -> Path:
    """Write a checkpoint after `step` steps, whole or not at all, and drop all but the newest `keep`.

    `loop` is what else the next step depends on.
    """
    folder = folder_of(run, step)
    fresh = folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        save_adapter(model, fresh / "adapter", adapter)
        safetensors.torch.save_file(_flat(optimizer), fresh / OPTIMIZER)
        safetensors.torch.save_file(loop, fresh / LOOP)
        digests = {p.relative_to(fresh).as_posix(): _digest(p) for p in sorted(fresh.rglob("*")) if p.is_file()}
        (fresh / STATE).write_text(json.dumps({"step": step, "sha256": digests}, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(fresh, folder)
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        shutil.rmtree(fresh, ignore_errors=True)
        raise UserError(f"Could not write {folder}: {error}. Earlier checkpoints are untouched.") from error
    for old in sorted((run / "checkpoints").glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def newest(run: Path) -> tuple[int, Path] | None:
    """The newest checkpoint whose files are whole; broken ones are passed over."""
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        try:
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            if all(_digest(folder / name) == digest for name, digest in state["sha256"].items()):
                return int(state["step"]), folder
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def restore(
    folder: Path, model: Any, optimizer_of: Callable[[], torch.optim.Optimizer], adapter: str
) -> tuple[torch.optim.Optimizer, dict[str, Tensor]]:
    """Put a checkpoint's adapter in place of the model's; returns its optimizer, and `loop` as it was saved.

    `optimizer_of()` makes the optimizer once the adapter is attached.
    """
    remove_adapter(model, adapter)
    load_adapter(model, folder / "adapter", adapter, trainable=True)
    optimizer = optimizer_of()
    _unflatten(optimizer, safetensors.torch.load_file(folder / OPTIMIZER))
    return optimizer, safetensors.torch.load_file(folder / LOOP)


def _flat(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value.detach().cpu().contiguous()
        for index, entries in state.items()
        for name, value in entries.items()
        if isinstance(value, Tensor)
    }


def _unflatten(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
