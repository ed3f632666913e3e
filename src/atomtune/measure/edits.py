"""How far an edit is still the picture that it came from, and how far it is what was asked: by the base alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from atomtune.backbones import backbone_of, denoiser, select
from atomtune.errors import UserError
from atomtune.measure.reads import watch
from atomtune.tuner import base_only
from atomtune.tuner.model import site_name

LIKENESS = "mean over the source's subject tokens of the largest cosine to a token of the edit, in the base's features"
ALIGNMENT = "(error(source's words) - error(prompt)) / (their sum) of the base's prediction on the noised edit"
"""The formulas, as they are printed wherever their numbers are."""

EARLY = 0.2
"""Where pictures are noised to, to read features."""
TIMES = (0.5, 0.7, 0.9)
REPEATS = 2
"""Times, and noises at each, at which the base is asked which words fit better."""


@torch.no_grad()
def token_features(pipe: Any, latents: Tensor, *, batch_size: int = 8) -> Float[Tensor, "pictures tokens features"]:
    """What the base's middle attention layer reads of lightly noised pictures, without words.

    Features of a diffusion model match parts of pictures (DIFT, Tang et al. 2023, arXiv 2306.03881). Each picture gets
    the same noise, so that its features are its own.
    """
    backbone, model = backbone_of(pipe), denoiser(pipe)
    tokens = math.prod(backbone.grid(model, latents))
    words = backbone.encode_prompts(pipe, [""])
    site, module = _middle(pipe, tokens, words)
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(latents)
    found: list[Tensor] = []

    def note(_: str, x: Tensor, real: Tensor) -> None:
        image = backbone.layout(site, given, tokens).image
        found.append(x[image].view(len(x), tokens, -1).float())

    with base_only(model), watch(pipe, {site: module}, note):
        for some in latents.split(batch_size):
            given = select(words, torch.zeros(len(some), dtype=torch.long))
            s = torch.full((len(some),), EARLY, device=latents.device)
            backbone.predict(model, (1 - EARLY) * some + EARLY * noise, s, given)
    return torch.cat(found)


def _middle(pipe: Any, tokens: int, words: dict[str, Tensor]) -> tuple[str, Any]:
    """The middle one of the default sites that see pictures."""
    backbone = backbone_of(pipe)
    named = {site_name(path): module for path, module in denoiser(pipe).named_modules()}
    sites = [path for path in named if any(f".{path}".endswith(f".{end}") for end in backbone.sites[:1])]
    seeing = [path for path in sites if backbone.layout(path, words, tokens).image.any()]
    if not seeing:
        raise UserError("`pipe` must have attention layers that see the picture, found none.")
    path = seeing[len(seeing) // 2]
    return path, named[path]


def likeness(
    source: Float[Tensor, "tokens features"],
    weight: Float[Tensor, " tokens"],
    edits: Float[Tensor, "edits tokens features"],
) -> Float[Tensor, " edits"]:
    """`LIKENESS`: 1 for the same picture, lower the further away, wherever in the edit the subject lies.

    Cosines are of features less the source's mean; `weight` is the share of each token on the subject.
    """
    middle = source.mean(0)
    own, others = normalize(source - middle, dim=-1), normalize(edits - middle, dim=-1)
    best = (own @ others.transpose(1, 2)).amax(2)
    return (best * weight).sum(1) / weight.sum().clamp_min(1e-8)


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
            with base_only(model):
                v = backbone.predict(model, (1 - time) * clean + time * noise, s, words)
            errors[:, at] += (v - (noise - clean)).float().square().flatten(1).mean(1).view(2, -1)
    asked, told = errors
    return (told - asked) / (told + asked)
