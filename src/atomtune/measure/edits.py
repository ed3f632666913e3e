"""How far an edit still shows what it came from, and how far what was asked: by pixels, and by the base alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, unfold

from atomtune.backbones import backbone_of, denoiser
from atomtune.tuner import base_only

LIKENESS = "1 - rms difference of pixels, of the source's patches on the subject to the nearest patches of the edit"
ALIGNMENT = "(error(source's words) - error(prompt)) / (their sum) of the base's prediction on the noised edit"
"""The formulas, as they are printed wherever their numbers are."""

PATCHES, SIDE = 8, 128
"""Patches across a picture, and the side, in pixels, to which larger pictures are reduced first."""
TIMES, REPEATS = (0.5, 0.7, 0.9), 2
"""Times, and noises at each, at which the base is asked which words fit better."""


def likeness(
    source: Float[Tensor, "3 height width"],
    weight: Float[Tensor, "rows columns"],
    edits: Float[Tensor, "edits 3 height width"],
) -> Float[Tensor, " edits"]:
    """`LIKENESS`, in [0, 1]: 1 for the same picture, wherever in the edit the subject lies; pixels are in [-1, 1].

    `weight` is the share of each part of the source on the subject. Patches of an edit lie at every quarter of a patch
    (Simakov et al. 2008, "Summarizing visual data using bidirectional similarity", one direction of it). It does not
    know another size or style of the subject.
    """
    share = adaptive_avg_pool2d(weight[None].float(), (PATCHES, PATCHES)).flatten()
    # In double, since cdist takes the difference of squares.
    own = _patches(source[None], 1)[0].double()
    nearest = [torch.cdist(own, some.double()).amin(1).square() / own.shape[1] for some in _patches(edits, 4)]
    error = (torch.stack(nearest).float() * share).sum(1) / share.sum().clamp_min(1e-8)
    return 1 - error.sqrt() / 2


def _patches(pictures: Float[Tensor, "n 3 height width"], a_patch: int) -> Float[Tensor, "n patches values"]:
    """`PATCHES` across, `a_patch` times as many in each direction where they overlap."""
    side = min(SIDE, pictures.shape[-1] // PATCHES * PATCHES)
    size = side // PATCHES
    small = adaptive_avg_pool2d(pictures.float(), (side, side))
    return unfold(small, size, stride=max(1, size // a_patch)).transpose(1, 2)


@torch.no_grad()
def alignment(
    pipe: Any, latents: Tensor, prompts: Sequence[str], source: str, *, batch_size: int = 8
) -> Float[Tensor, " edits"]:
    """`ALIGNMENT`, in (-1, 1): above 0 where the base finds the prompt truer of the edit than the source's own words.

    Errors are mean squares over times and noises, the same for both (Li et al. 2023, arXiv 2303.16203, classify so).
    """
    backbone, model = backbone_of(pipe), denoiser(pipe)
    generator = torch.Generator().manual_seed(0)
    draws = [
        (t, torch.randn(latents.shape[1:], generator=generator).to(latents)) for t in TIMES for _ in range(REPEATS)
    ]
    errors = torch.zeros(2, len(latents), device=latents.device)
    for at in torch.arange(len(latents)).split(max(1, batch_size // 2)):
        words = backbone.encode_prompts(pipe, [*(prompts[i] for i in at), *[source] * len(at)])
        clean = latents[at].repeat(2, *[1] * (latents.ndim - 1))
        for time, noise in draws:
            s = torch.full((len(clean),), time, device=latents.device)
            noised, target = backbone.noised(clean, time, noise.expand_as(clean))
            with base_only(model):
                v = backbone.predict(model, noised, s, words)
            errors[:, at] += (v - target).float().square().flatten(1).mean(1).view(2, -1)
    asked, told = errors
    return (told - asked) / (told + asked)
