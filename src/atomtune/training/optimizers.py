"""Optimizers by name, and what the learning rate does over the steps."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from atomtune.errors import UserError
from atomtune.training.options import TrainOptions

Groups = list[dict[str, Any]]


def _adamw(groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)


def _adamw8bit(groups: Groups) -> Any:
    return _extra("bitsandbytes", "quant").optim.AdamW8bit(groups, betas=(0.9, 0.99), weight_decay=0.0)


def _muon(groups: Groups) -> torch.optim.Optimizer:
    # Its steps then have the size of AdamW's, so that a learning rate means the same.
    return torch.optim.Muon(groups, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


def _packaged(name: str) -> Callable[[Groups], Any]:
    return lambda groups: _extra("pytorch_optimizer", "optimizers").load_optimizer(name)(groups, weight_decay=0.0)


MAKERS: dict[str, Callable[[Groups], Any]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "muon": _muon,
    **{name: _packaged(name) for name in ("adopt", "came", "lion", "prodigy")},
}


def make(options: TrainOptions, atoms: Sequence[nn.Parameter], gate: Sequence[nn.Parameter], gate_lr: float) -> Any:
    """The optimizer of a run; each of its groups has its full learning rate at `rate`.

    Encoders and atoms go to the one of the options, and what is no matrix to AdamW where that is Muon. The prompt
    gate, a logistic regression with a rate of its own, always goes to AdamW.
    """
    chosen = [p for p in atoms if p.ndim == 2] if options.optimizer == "muon" else list(atoms)
    kept = {id(p) for p in chosen}
    own = [{"params": chosen, "lr": options.lr}]
    rest = [
        {"params": params, "lr": lr}
        for params, lr in (([p for p in atoms if id(p) not in kept], options.lr), (list(gate), gate_lr))
        if params
    ]
    if options.optimizer == "adamw":
        optimizer: Any = _adamw(own + rest)
    else:
        parts = [MAKERS[options.optimizer](own)]
        optimizer = Together([*parts, _adamw(rest)]) if rest else parts[0]
    for group in optimizer.param_groups:
        group["rate"] = group["lr"]
    return optimizer


class Together:
    """Several optimizers as one; its state is numbered through."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)

    @property
    def param_groups(self) -> Groups:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        state: dict[int, Any] = {}
        groups: Groups = []
        for part, start in zip(self.parts, self._starts(), strict=True):
            plain = part.state_dict()
            state |= {start + index: entries for index, entries in plain["state"].items()}
            groups += [group | {"params": [start + i for i in group["params"]]} for group in plain["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, plain: dict[str, Any]) -> None:
        groups = list(plain["param_groups"])
        for part, start in zip(self.parts, self._starts(), strict=True):
            number = len(part.param_groups)
            mine, groups = groups[:number], groups[number:]
            mine = [group | {"params": [i - start for i in group["params"]]} for group in mine]
            inside = range(start, start + sum(len(group["params"]) for group in mine))
            state = {i - start: entries for i, entries in plain["state"].items() if i in inside}
            part.load_state_dict({"state": state, "param_groups": mine})

    def _starts(self) -> list[int]:
        sizes = [sum(len(group["params"]) for group in part.param_groups) for part in self.parts]
        return [sum(sizes[:i]) for i in range(len(sizes))]


def _extra(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"`optimizer` needs the package {module}. Install atomtune[{extra}].") from error


def schedule(step: int, steps: int, kind: str = "cosine", warmup: float = 0.05, floor: float = 0.1) -> float:
    """Factor on the learning rate: linear up over the first share of the steps, then down towards `floor`; or 1."""
    warm = max(1, int(steps * warmup))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return 1 - (1 - floor) * done
    return (1 + floor) / 2 + (1 - floor) / 2 * math.cos(math.pi * done)
