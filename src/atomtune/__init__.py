"""atomtune: fine-tune generative transformers as sparse combinations of dictionary atoms."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atomtune.adapter import Adapter, load, save
    from atomtune.backbones import open_pipeline
    from atomtune.editing.options import EditOptions
    from atomtune.editing.sweep import edit
    from atomtune.errors import UserError
    from atomtune.sampling import generate, prompt_gates
    from atomtune.steering import Steer
    from atomtune.training.loop import train
    from atomtune.training.options import TrainOptions
    from atomtune.training.refit import refit
    from atomtune.tuner import AtomConfig

_HOMES = {
    "Adapter": "adapter",
    "AtomConfig": "tuner",
    "EditOptions": "editing.options",
    "Steer": "steering",
    "TrainOptions": "training.options",
    "UserError": "errors",
    "edit": "editing.sweep",
    "generate": "sampling",
    "load": "adapter",
    "open_pipeline": "backbones",
    "prompt_gates": "sampling",
    "refit": "training.refit",
    "save": "adapter",
    "train": "training.loop",
}

__all__ = [
    "Adapter",
    "AtomConfig",
    "EditOptions",
    "Steer",
    "TrainOptions",
    "UserError",
    "edit",
    "generate",
    "load",
    "open_pipeline",
    "prompt_gates",
    "refit",
    "save",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `import atomtune` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'atomtune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"atomtune.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
