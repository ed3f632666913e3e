"""Training and calibrating the prompt gate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from atomtune.backbones import Backbone, Conditioning, select
from atomtune.training.prepare import Material
from atomtune.tuner import PromptGate, prompt_gate

LEARNING_RATE = 0.02
BATCH = 64


def loss(base: Any, backbone: Backbone, material: Material, generator: torch.Generator, adapter: str) -> Tensor:
    """Hinge loss: pre-code beyond +1 on the concept's prompts, beyond -1 on the others, weighed equally."""
    gate = _gate(base, adapter)
    opening = _draw(material.gate_concept, generator)
    shutting = _draw(material.gate_unrelated, generator)
    z, other = (_pre_code(gate, backbone, c) for c in (opening, shutting))
    return (1 - z).clamp_min(0).mean() + (1 + other).clamp_min(0).mean()


@torch.no_grad()
def calibrate(base: Any, backbone: Backbone, material: Material, adapter: str) -> dict[str, float]:
    """Set the gate's cut on held-out prompts; returns the shares that were measured there."""
    gate = _gate(base, adapter)
    shut = torch.cat([_pre_code(gate, backbone, c) for c in (material.gate_held_out, material.gate_unrelated)])
    shares = gate.calibrate(shut, _pre_code(gate, backbone, material.gate_concept))
    return {"gate_silent_share": shares.silent_share, "gate_open_share": shares.open_share}


@contextmanager
def calibrated(base: Any, backbone: Backbone, material: Material, adapter: str) -> Iterator[None]:
    """Inside, the gate is calibrated, as it is when an adapter is saved; afterwards it trains on as it was."""
    gate = _gate(base, adapter)
    before = {name: value.clone() for name, value in gate.state_dict().items()}
    calibrate(base, backbone, material, adapter)
    try:
        yield
    finally:
        gate.load_state_dict(before)


def _gate(base: Any, adapter: str) -> PromptGate:
    gate = prompt_gate(base, adapter)
    assert gate is not None
    return gate


def _pre_code(gate: PromptGate, backbone: Backbone, conditioning: Conditioning) -> Tensor:
    mask = conditioning[backbone.gate_mask] if backbone.gate_mask else None
    return gate.pre_code(conditioning[backbone.gate_input], mask)


def _draw(conditioning: Conditioning, generator: torch.Generator) -> Conditioning:
    size = len(next(iter(conditioning.values())))
    rows = torch.randint(size, (min(BATCH, size),), generator=generator)
    return select(conditioning, rows)
