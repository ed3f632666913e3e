"""The training objective as plain functions over a backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from atomtune import sparse
from atomtune.backbones import Backbone, Conditioning, Grid, placed
from atomtune.tuner import Recording

DENSITIES: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "logit_normal": lambda n, g: torch.sigmoid(torch.randn(n, generator=g)),
    "uniform": lambda n, g: torch.rand(n, generator=g),
}
"""How the time s in [0, 1] is drawn; logit-normal is SD3's (arXiv 2403.03206, eq. 19 with m=0, s=1)."""


def among(times: Sequence[float]) -> Callable[[int, torch.Generator], Tensor]:
    """Draws from a few times alone (FastEdit, arXiv 2408.03355)."""
    return lambda n, g: torch.tensor(times)[torch.randint(len(times), (n,), generator=g)]


def times(backbone: Backbone, number: int, generator: torch.Generator) -> Float[Tensor, " number"]:
    """Times as the family's density and shift draw them (the shift is arXiv 2403.03206, eq. 23)."""
    s = DENSITIES[backbone.density](number, generator)
    return backbone.shift * s / (1 + (backbone.shift - 1) * s)


def error(predicted: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error of a prediction; of the velocity it is rectified flow's loss (arXiv 2209.03003, eq. 1).

    With a `weight`, which has one channel, the weighted mean; 0 where nothing weighs anything.
    """
    if weight is not None:
        weight = weight.float().expand_as(predicted)
        return ((predicted.float() - target.float()).square() * weight).sum() / weight.sum().clamp_min(1e-8)
    return nn.functional.mse_loss(predicted.float(), target.float())


def silence(
    recording: Recording,
    backbone: Backbone,
    conditioning: Conditioning,
    grid: Grid,
    rows: slice,
    margin: float,
) -> Tensor:
    """Sum over sites of the mean of relu(pre + margin) on some rows' real positions."""
    terms = []
    for site, calls in recording.pre_codes.items():
        pre_codes, layout = placed(backbone, site, calls[-1], conditioning, grid)
        terms.append(sparse.silence(pre_codes[rows][layout.real[rows]], margin))
    return torch.stack(terms).sum()


def around(
    recording: Recording,
    backbone: Backbone,
    conditioning: Conditioning,
    weight: Float[Tensor, "concept tokens"],
    grid: Grid,
    margin: float,
) -> Tensor:
    """Sum over sites of the weighted mean of relu(pre + margin) on picture tokens of the first rows.

    A site without picture tokens adds nothing.
    """
    terms = [weight.new_zeros(())]
    for site, calls in recording.pre_codes.items():
        pre_codes, layout = placed(backbone, site, calls[-1], conditioning, grid)
        image = layout.image[: len(weight)]
        if image.any():
            high = torch.relu(pre_codes[: len(weight)][image] + margin).float().mean(-1)
            own = layout.resample(weight, grid)
            terms.append((high * own.flatten()).sum() / own.sum().clamp_min(1))
    return torch.stack(terms).sum()


def sparsity(recording: Recording, atoms: Mapping[str, Tensor], rows: slice) -> Tensor:
    """Sum over sites of the L1 of codes times atom norms, on some rows."""
    return torch.stack([sparse.sparsity(calls[-1][rows], atoms[site]) for site, calls in recording.codes.items()]).sum()


def mean_l0(recording: Recording, rows: slice) -> float:
    """Mean over sites of the number of active atoms a position."""
    with torch.no_grad():
        return torch.stack([sparse.l0(calls[-1][rows]) for calls in recording.codes.values()]).mean().item()
