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
    at = real_positions(recording.pre_codes, backbone, conditioning, grid, rows)
    return torch.stack([sparse.silence(pre_codes, margin) for pre_codes in at.values()]).sum()


def real_positions(
    codes: Mapping[str, Sequence[Tensor]], backbone: Backbone, conditioning: Conditioning, grid: Grid, rows: slice
) -> dict[str, Float[Tensor, "positions atoms"]]:
    """What was last recorded at each site, codes or pre-codes, of some rows, without padding."""
    found = {}
    for site, calls in codes.items():
        values, layout = placed(backbone, site, calls[-1], conditioning, grid)
        found[site] = values[rows][layout.real[rows]]
    return found


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


def sparsity(
    codes: Mapping[str, Float[Tensor, "positions atoms"]], atoms: Mapping[str, Float[Tensor, "atoms d_out"]]
) -> Tensor:
    """Sum over sites of the L1 of codes times atom norms."""
    return torch.stack([sparse.sparsity(codes[site], atoms[site]) for site in codes]).sum()


@torch.no_grad()
def mean_l0(codes: Mapping[str, Float[Tensor, "positions atoms"]]) -> float:
    """Mean over sites of the number of active atoms a position."""
    return torch.stack([sparse.l0(found) for found in codes.values()]).mean().item()
