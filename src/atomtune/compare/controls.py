"""LoRA taken apart like atoms, so that every claim about atoms can be tried on it."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from atomtune.backbones import Backbone, denoiser
from atomtune.lora import attach_factors, attach_rows, fit_autoencoder
from atomtune.measure.reads import watch
from atomtune.training import gating
from atomtune.training.batch import draw, generator_of
from atomtune.training.ends import NAME
from atomtune.training.options import TrainOptions
from atomtune.training.prepare import Material
from atomtune.tuner import prompt_gate
from atomtune.tuner.lora import Factors, factors, rotated

__all__ = ["attach_autoencoded", "attach_factors", "factors", "rotated", "train_gate"]

BATCHES = 6
"""Of training's own batches, those that an autoencoder is fitted to."""


def train_gate(pipe: Any, backbone: Backbone, material: Material, options: TrainOptions, adapter: str = NAME) -> None:
    """The prompt gate alone, as many steps as the atoms' own: it learns from words, whatever it switches."""
    base = denoiser(pipe)
    gate = prompt_gate(base, adapter)
    assert gate is not None
    gate.requires_grad_(True)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=gating.LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(options.steps):
        gating.loss(base, backbone, material, generator_of(options, step), adapter).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def attach_autoencoded(
    pipe: Any, backbone: Backbone, material: Material, parts: Factors, options: TrainOptions
) -> float:
    """A sparse autoencoder of LoRA's update in its place; returns the share of its energy that is lost."""
    seen = _inputs(pipe, backbone, material, parts, options)
    fits = {site: fit_autoencoder(down, up, seen[site] @ down.T, options.seed) for site, (down, up) in parts.items()}
    attach_rows(pipe, backbone, {site: rows for site, (rows, _) in fits.items()}, options, sparsifier="relu")
    errors, energies = zip(*(both for _, both in fits.values()), strict=True)
    return sum(errors) / max(sum(energies), 1e-12)


@torch.no_grad()
def _inputs(
    pipe: Any, backbone: Backbone, material: Material, parts: Factors, options: TrainOptions
) -> dict[str, Float[Tensor, "positions d_in"]]:
    """What each site reads on some of training's own batches."""
    base = denoiser(pipe)
    seen: dict[str, list[Tensor]] = {site: [] for site in parts}
    modules = dict(base.named_modules())
    with watch(pipe, {site: modules[site] for site in parts}, lambda site, x, _: seen[site].append(x.flatten(0, -2))):
        for number in range(BATCHES):
            batch = draw(material, backbone, options, number, generator_of(options, number))
            backbone.predict(base, batch.x, batch.s, batch.conditioning)
    return {site: torch.cat(kept) for site, kept in seen.items()}
