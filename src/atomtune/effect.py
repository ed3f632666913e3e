"""What the prediction would lose with an atom, to first order: its effect on the subject, and beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from atomtune.backbones import Backbone, Conditioning, select
from atomtune.tuner import atom_layers, open_gate, unwrap

PASSES = 40
"""Forwards, each of one noised picture, with two backwards."""


def effects(
    model: nn.Module,
    backbone: Backbone,
    latents: Tensor,
    conditioning: Conditioning,
    masks: Float[Tensor, "batch tokens"],
    *,
    adapter: str = "default",
    times: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    seed: int = 0,
) -> dict[str, dict[str, Float[Tensor, " atoms"]]]:
    """By site, `effect` and `effect_beside`: the root mean square change of the prediction if an atom were out.

    Per value of the prediction, on the subject (where `masks`, in [0, 1], say) and beside it; the gate open. With J
    the derivative of the prediction by the atom's strength, the mean of (r . J)^2 over random r of unit variance is
    |J|^2 (Hutchinson 1990), and J = D dp/dD, since the strength multiplies the atom D. It is the Gauss-Newton
    diagonal of the distance to the whole adapter's prediction; Molchanov et al. 2017, arXiv 1611.06440, prune so.
    """
    base = unwrap(model)
    layers = atom_layers(base, adapter)
    atoms = {site: layer.dictionary(adapter).atoms for site, layer in layers.items()}
    grid = backbone.grid(base, latents)
    generator = torch.Generator().manual_seed(seed)
    squares = {name: {site: torch.zeros(len(d)) for site, d in atoms.items()} for name in ("effect", "effect_beside")}
    areas = dict.fromkeys(squares, 0.0)
    with torch.enable_grad(), _trainable(atoms), open_gate(base, adapter):
        for row, time in _passes(len(latents), times):
            clean, s = latents[row : row + 1], latents.new_full((1,), time, dtype=torch.float32)
            noise = torch.randn(clean.shape, generator=generator).to(clean)
            given = select(conditioning, torch.tensor([row]))
            predicted = backbone.predict(base, backbone.noised(clean, time, noise)[0], s, given).float()
            on = spread(masks[row : row + 1].to(predicted), predicted, grid)
            for name, region in (("effect", on), ("effect_beside", 1 - on)):
                probe = torch.randn(predicted.shape, generator=generator).to(predicted) * region.sqrt()
                last = name == "effect_beside"
                slopes = torch.autograd.grad(
                    (predicted * probe).sum(), list(atoms.values()), retain_graph=not last, allow_unused=True
                )
                for (site, d), slope in zip(atoms.items(), slopes, strict=True):
                    if slope is not None:  # of a site whose output the model throws away
                        squares[name][site] += (slope * d.detach()).sum(1).float().cpu().square()
                areas[name] += float(region.expand_as(predicted).sum())
    return {site: {name: (squares[name][site] / max(areas[name], 1.0)).sqrt() for name in squares} for site in atoms}


def _passes(pictures: int, times: Sequence[float]) -> Iterator[tuple[int, float]]:
    """Pictures and times in turn; of many pictures, some that lie evenly."""
    rounds = -(-PASSES // len(times))
    for turn in range(rounds):
        for time in times:
            yield (turn * pictures // rounds if pictures > rounds else turn % pictures), time


@contextmanager
def _trainable(atoms: dict[str, Any]) -> Iterator[None]:
    before = {site: parameter.requires_grad for site, parameter in atoms.items()}
    for parameter in atoms.values():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for site, parameter in atoms.items():
            parameter.requires_grad_(before[site])


def spread(masks: Float[Tensor, "batch tokens"], values: Tensor, grid: tuple[int, int]) -> Tensor:
    """A mask of picture tokens for latents `(b, c, h, w)`, with one channel."""
    return nn.functional.interpolate(masks.view(-1, 1, *grid), size=values.shape[-2:])
