"""Where the subject is in a picture, without asking anybody: where the base is surprised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from atomtune.atoms import CHUNK, per_token
from atomtune.backbones import Backbone, Conditioning, select


@torch.no_grad()
def surprise(
    base: nn.Module,
    backbone: Backbone,
    latents: Tensor,
    conditioning: Conditioning,
    *,
    times: Sequence[float] = (0.5, 0.7, 0.9),
    repeats: int = 2,
    share: float = 0.25,
    seed: int = 0,
) -> Float[Tensor, "batch tokens"]:
    """1 at the picture tokens that the base predicts badly, else 0.

    Badly: its squared error, over some times and noises, lies above `share` of the way from the picture's best
    predicted tokens (tenth percentile) to its worst (98th). A base knows backgrounds; it does not know the subject.
    """
    rows, columns = backbone.grid(base, latents)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(latents), rows * columns, device=latents.device)
    for time in (t for t in times for _ in range(repeats)):
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        s = torch.full((len(latents),), time, device=latents.device)
        x, target = backbone.noised(latents, s, noise)
        for at in torch.arange(len(latents)).split(CHUNK):
            predicted = backbone.predict(base, x[at], s[at], select(conditioning, at))
            total[at] += per_token((predicted - target[at]).float().square(), rows, columns)
    low, high = (total.quantile(q, dim=1, keepdim=True) for q in (0.1, 0.98))
    return (total > low + share * (high - low)).float()
