"""What is compared: a name for each way to train, with the learning rate that the search chose for it."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from atomtune.errors import UserError, did_you_mean
from atomtune.training.options import TrainOptions

BASE = "base"
"""The unadapted model, measured beside the methods."""

TRUTH = "truth"
"""What was asked for, through the base's autoencoder: what no method can better, measured beside them too."""

REFERENCES = (BASE, TRUTH)
"""Neither is trained."""


@dataclass(frozen=True)
class Method:
    """One way to train."""

    lr: float = 4e-3
    """Chosen on tuning subjects by `atomtune compare --tune`: benchmarks/results/tuning.json."""
    rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    """What that search tries."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the defaults of training."""
    rival: str | None = None
    """Name in `rivals.RIVALS`; None: ours, by the product's own training."""
    autoencoded: bool = False
    """Whether a sparse autoencoder is fitted to its update afterwards, and takes its place."""
    version: int = 4
    """Raised when its code starts to give other results, so that stored cells are measured again."""


def _rival(name: str, *rates: float, lr: float | None = None) -> Method:
    return Method(lr=lr or rates[1], rates=rates, rival=name)


def _ours(lr: float = 4e-3, **options: Any) -> Method:
    return Method(lr=lr, options=options)


METHODS: dict[str, Method] = {
    "atoms": _ours(),
    "atoms-soft": _ours(sparsifier="soft"),
    "atoms-topk": _ours(sparsifier="topk", k=4),
    "atoms-batchtopk": _ours(sparsifier="batch_topk", k=4),
    "atoms-jumprelu": _ours(sparsifier="jumprelu"),
    "atoms-whole": _ours(lr=2e-3, nested=False),
    "atoms-dense": _ours(sparsifier="dense", silence=0.0),
    "lora": _rival("lora", 1e-3, 2e-3, 4e-3),
    "lora_sae": Method(lr=2e-3, rival="lora", autoencoded=True),
    "rslora": _rival("rslora", 2.5e-4, 5e-4, 1e-3),
    "dora": _rival("dora", 1e-3, 2e-3, 4e-3),
    "oft": _rival("oft", 3e-4, 1e-3, 3e-3),
    "lokr": _rival("lokr", 5e-3, 1e-2, 2e-2, lr=2e-2),
    "vera": _rival("vera", 1e-2, 2e-2, 5e-2),
    "shira": _rival("shira", 3e-4, 1e-3, 2e-3),
    "fourierft": _rival("fourierft", 1e-3, 3e-3, 1e-2),
    "waveft": _rival("waveft", 3e-5, 1e-4, 3e-4),
    "vblora": _rival("vblora", 2e-3, 5e-3, 1e-2),
    "adapter": _rival("adapter", 1e-3, 2e-3, 4e-3),
    "ssf": _rival("ssf", 1e-2, 2e-2, 5e-2, lr=5e-2),
    "full": _rival("full", 2e-4, 5e-4, 1e-3, lr=1e-3),
    "topk_lora": _rival("topk_lora", 1e-3, 2e-3, 4e-3),
    "transcoder": _rival("transcoder", 1e-3, 2e-3, 4e-3),
}
"""Methods by name. A rival's rate is the middle one of those tried, where the search has chosen no other."""


OURS = {"silence": 0.0, "nested": False, "contain": False}
"""What a rival's training does not read, so that new defaults of ours leave its cells valid."""


UNREAD = ("optimizer", "grad_accumulation", "ema", "mixed_precision", "gradient_checkpointing")
"""Options of training that a rival's loop does not have."""


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """`atoms:silence=0.01,n_atoms=64` as a method's name and the options that it changes."""
    name, _, rest = text.partition(":")
    known = (*REFERENCES, *METHODS)
    if name not in known:
        raise UserError(f"`methods` must be among {', '.join(known)}, got {name!r}.{did_you_mean(name, known)}")
    return name, parse_options(rest.split(","))


def parse_options(parts: Iterable[str]) -> dict[str, Any]:
    """`option=value` and the like, options of training, as a table."""
    return dict(_pair(part) for part in parts if part)


def _pair(part: str) -> tuple[str, Any]:
    key, sign, value = part.partition("=")
    known = {f.name for f in dataclasses.fields(TrainOptions)}
    if not sign or key not in known:
        hint = did_you_mean(key, known)
        raise UserError(f"An option of training is written name=value, such as steps=200, got {part!r}.{hint}")
    if key == "sites":
        return key, tuple(value.split("+"))
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def options_of(text: str, size: int, **given: Any) -> TrainOptions:
    """The full options of a method written as `parse` reads it, at a size in ranks of LoRA.

    An atom has a bias beside what a rank of LoRA has: 0.3 % more parameters.
    """
    name, changed = parse(text)
    method = METHODS[name]
    off = OURS if method.rival else {}
    options = TrainOptions(**{"n_atoms": size, "lr": method.lr, **off, **given, **method.options, **changed})
    for other in UNREAD if method.rival else ():
        if getattr(options, other) != getattr(TrainOptions(), other):
            raise UserError(f"`set`: the loop of {name} knows no `{other}`, so that methods would differ in it.")
    return options
