"""Short runs on a tiny pipeline, what they leave behind, and ways to disturb them."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from atomtune.training.options import TrainOptions
from atomtune.training.run import Run

OPTIONS = TrainOptions(
    concept="kite",
    class_noun="toy",
    steps=6,
    batch_size=2,
    n_atoms=4,
    lr=0.02,
    sites=("layers.0.attn.to_q", "layers.1.attn.to_out.0"),
    unrelated_pictures=2,
    checkpoint_every=2,
    keep_checkpoints=5,
)


def log(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "pictures_per_second"} for line in lines]


def tensors(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def at_step(monkeypatch: pytest.MonkeyPatch, steps: set[int], act: Callable[[], None]) -> None:
    """Do something in the middle of the steps of these numbers (from 1), before their backward pass."""
    real = Run._losses

    def losses(self: Run, micro: int) -> dict[str, Tensor]:
        found = real(self, micro)
        if self.done + 1 in steps:
            act()
        return found

    monkeypatch.setattr(Run, "_losses", losses)


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def pull_the_plug() -> None:
    raise KeyboardInterrupt
