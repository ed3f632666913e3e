"""Where atoms start: encoders that tell the concept's tokens from unrelated ones before the first step."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from atomtune.backbones import Backbone, placed
from atomtune.training.batch import draw
from atomtune.training.options import TrainOptions
from atomtune.training.prepare import Material
from atomtune.tuner import atom_layers, base_only, hooked

ROWS = 8
"""Noised pictures of each kind that the start is read from."""
POSITIONS = 1024
"""At most this many positions of each kind a site."""
RIDGE = 0.1
"""Share of the mean variance that is added to every direction's."""


@torch.no_grad()
def from_activations(base: Any, backbone: Backbone, material: Material, options: TrainOptions, adapter: str) -> None:
    """Each atom's encoder becomes a linear discriminant: one of the concept's own positions against unrelated ones.

    With m and S the mean and covariance of what a site reads on unrelated pictures, and x what it reads at a position
    of the concept (a token of its words, or of the subject in the picture), e = S^-1 (x - m) (Fisher 1936), scaled and
    shifted so that the pre-code is 1 at x and -1 at m. Positions are drawn as k-means++ draws its centres.
    """
    generator = torch.Generator().manual_seed(options.seed)
    given = dataclasses.replace(options, batch_size=ROWS, unrelated_batch=ROWS, caption_dropout=0.0)
    batch = draw(material, backbone, given, 0, generator)
    grid = backbone.grid(base, batch.x)
    layers = atom_layers(base, adapter)
    seen: dict[str, Tensor] = {}
    taps = (
        layer.register_forward_pre_hook(lambda _, x, site=site: seen.update({site: x[0].detach()}))
        for site, layer in layers.items()
    )
    with hooked(taps), base_only(base):
        backbone.predict(base, batch.x, batch.s, batch.conditioning)
    for site, layer in layers.items():
        x, layout = placed(backbone, site, _unit(seen[site]), batch.conditioning, grid)
        subject = layout.resample(batch.masks, grid) > 0.5
        mine = _concept(layout.real[batch.concept], layout.image[batch.concept], subject)
        own = _some(x[batch.concept][mine], generator)
        other = _some(x[batch.others][layout.real[batch.others]], generator)
        if not len(own) or not len(other):
            continue
        dictionary = layer.dictionary(adapter)
        if dictionary.bias is None or dictionary.method != "linear":
            continue
        encoder, bias = discriminants(own, other, dictionary.n_atoms, generator)
        dictionary.encoder.copy_(encoder)
        dictionary.bias.copy_(bias)


def _concept(
    real: Bool[Tensor, "rows length"], image: Bool[Tensor, "rows length"], subject: Bool[Tensor, "rows tokens"]
) -> Bool[Tensor, "rows length"]:
    """Positions of the concept: words, and picture tokens on the subject."""
    chosen = real & ~image
    if image.any():
        chosen[image] = subject.flatten().to(chosen.device)
    return chosen


def _unit(x: Tensor) -> Tensor:
    return x.float() * x.float().square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()


def _some(x: Tensor, generator: torch.Generator) -> Tensor:
    return x[torch.randperm(len(x), generator=generator)[:POSITIONS].to(x.device)]


def discriminants(
    own: Float[Tensor, "n d_in"], other: Float[Tensor, "m d_in"], atoms: int, generator: torch.Generator
) -> tuple[Float[Tensor, "atoms d_in"], Float[Tensor, " atoms"]]:
    """(E, b) of `from_activations`, by an eigendecomposition of the covariance."""
    mean = other.mean(0)
    centred = other - mean
    covariance = centred.T @ centred / max(1, len(other) - 1)
    ridge = RIDGE * covariance.diagonal().mean().clamp_min(1e-8)
    values, vectors = torch.linalg.eigh(covariance)
    root = (values.clamp_min(0) + ridge).rsqrt()
    white = ((own - mean) @ vectors) * root
    chosen = _centres(white, atoms, generator)
    e = (white[chosen] * root) @ vectors.T
    # e . (x - m) is the squared length of the whitened x: half of it is where the pre-code is zero.
    half = white[chosen].square().sum(1, keepdim=True).clamp_min(1e-6) / 2
    e = e / half
    return e, e @ mean + 1


def _centres(points: Float[Tensor, "n d"], number: int, generator: torch.Generator) -> Tensor:
    """Indices drawn as k-means++ does: far from those before, and from the origin; with replacement where needed."""
    distance = points.square().sum(1)
    chosen = []
    for _ in range(number):
        weights = distance.clamp_min(0) + 1e-9
        pick = int(torch.multinomial(weights.cpu(), 1, generator=generator))
        chosen.append(pick)
        distance = torch.minimum(distance, (points - points[pick]).square().sum(1))
    return torch.tensor(chosen, device=points.device)
