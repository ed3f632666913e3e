"""The training objective as plain functions over a backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from atomtune import sparse
from atomtune.backbones import Backbone, Conditioning
from atomtune.tuner import Recording

DENSITIES: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "logit_normal": lambda n, g: torch.sigmoid(torch.randn(n, generator=g)),
    "uniform": lambda n, g: torch.rand(n, generator=g),
}
"""How the time s in [0, 1] is drawn; logit-normal is SD3's (arXiv 2403.03206, eq. 19 with m=0, s=1)."""


def among(times: Sequence[float]) -> Callable[[int, torch.Generator], Tensor]:
    """Draws from a few times alone (FastEdit, arXiv 2408.03355)."""
    return lambda n, g: torch.tensor(times)[torch.randint(len(times), (n,), generator=g)]


def noised(latents: Tensor, s: Float[Tensor, " batch"], noise: Tensor) -> tuple[Tensor, Tensor]:
    """(x_s, v): the latents at time s, x_s = (1 - s) x0 + s noise, and the velocity v = noise - x0."""
    weight = s.view(-1, *[1] * (latents.ndim - 1))
    return (1 - weight) * latents + weight * noise, noise - latents


def flow_matching(predicted: Tensor, velocity: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error of the predicted velocity (rectified flow, arXiv 2209.03003, eq. 1).

    With a `weight`, which has one channel, the weighted mean; 0 where nothing weighs anything.
    """
    if weight is not None:
        weight = weight.float().expand_as(predicted)
        return ((predicted.float() - velocity.float()).square() * weight).sum() / weight.sum().clamp_min(1e-8)
    return nn.functional.mse_loss(predicted.float(), velocity.float())


def silence(
    recording: Recording,
    backbone: Backbone,
    conditioning: Conditioning,
    tokens: int,
    rows: slice,
    margin: float,
) -> Tensor:
    """Sum over sites of the mean of relu(pre + margin) on some rows' real positions."""
    terms = []
    for site, calls in recording.pre_codes.items():
        real = backbone.layout(site, conditioning, tokens).real[rows]
        terms.append(sparse.silence(calls[-1][rows][real], margin))
    return torch.stack(terms).sum()


def around(
    recording: Recording,
    backbone: Backbone,
    conditioning: Conditioning,
    weight: Float[Tensor, "concept tokens"],
    margin: float,
) -> Tensor:
    """Sum over sites of the weighted mean of relu(pre + margin) on picture tokens of the first rows.

    A site without picture tokens adds nothing.
    """
    terms = [weight.new_zeros(())]
    for site, calls in recording.pre_codes.items():
        image = backbone.layout(site, conditioning, weight.shape[1]).image[: len(weight)]
        if image.any():
            high = torch.relu(calls[-1][: len(weight)][image] + margin).float().mean(-1)
            terms.append((high * weight.flatten()).sum() / weight.sum().clamp_min(1))
    return torch.stack(terms).sum()


def sparsity(recording: Recording, atoms: Mapping[str, Tensor], rows: slice) -> Tensor:
    """Sum over sites of the L1 of codes times atom norms, on some rows."""
    return torch.stack([sparse.sparsity(calls[-1][rows], atoms[site]) for site, calls in recording.codes.items()]).sum()


def mean_l0(recording: Recording, rows: slice) -> float:
    """Mean over sites of the number of active atoms a position."""
    with torch.no_grad():
        return torch.stack([sparse.l0(calls[-1][rows]) for calls in recording.codes.values()]).mean().item()
