"""LoRA taken apart like atoms, so that every claim about atoms can be tried on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from atomtune.backbones import Backbone, denoiser
from atomtune.training import gating
from atomtune.training.batch import draw, generator_of
from atomtune.training.loop import NAME, attach_atoms
from atomtune.training.options import TrainOptions
from atomtune.training.prepare import Material
from atomtune.tuner import atom_layers, prompt_gate

Factors = dict[str, tuple[Float[Tensor, "rank d_in"], Float[Tensor, "rank d_out"]]]
"""By site: what reads the input and what is added; their product is the update."""


def factors(model: nn.Module, adapter: str = "rival") -> Factors:
    """The rank-one components of a PEFT LoRA, its scale put into what they add."""
    found: Factors = {}
    for path, module in model.named_modules():
        pairs: Any = getattr(module, "lora_A", None)
        if pairs is not None and adapter in pairs:
            layer: Any = module
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            found[path] = (down.detach().clone(), (up * layer.scaling[adapter]).T.detach().clone())
    return found


def rotated(parts: Factors) -> Factors:
    """The same updates as singular vectors, the largest first: component i of rank r is the i-th best."""
    turned: Factors = {}
    for site, (down, up) in parts.items():
        u, s, v = torch.linalg.svd(up.T @ down, full_matrices=False)
        rank = len(down)
        root = s[:rank].sqrt()
        turned[site] = (root[:, None] * v[:rank], root[:, None] * u[:, :rank].T)
    return turned


def attach_factors(pipe: Any, backbone: Backbone, parts: Factors, options: TrainOptions, adapter: str = NAME) -> None:
    """Rank-one components as signed, dense atoms: the same outputs, with every dial that atoms have."""
    rank = len(next(iter(parts.values()))[0])
    dense = {"n_atoms": rank, "k": None, "sparsifier": "dense", "normalize": False, "encoder_bias": False}
    attach_atoms(pipe, backbone, options, adapter, **dense)
    _fill(denoiser(pipe), parts, adapter)


@torch.no_grad()
def _fill(model: nn.Module, parts: Mapping[str, tuple[Tensor, Tensor]], adapter: str) -> None:
    for site, layer in atom_layers(model, adapter).items():
        dictionary = layer.dictionary(adapter)
        dictionary.encoder.copy_(parts[site][0])
        dictionary.atoms.copy_(parts[site][1])


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


# ------------------------------------------------------------------------------ a sparse autoencoder

WIDTH = 4
"""Latents of the autoencoder for each rank of the update."""
BATCHES, STEPS, L1 = 6, 400, 0.02


def attach_autoencoded(
    pipe: Any, backbone: Backbone, material: Material, parts: Factors, options: TrainOptions, adapter: str = NAME
) -> float:
    """A sparse autoencoder of LoRA's update at each site, in its place; returns the share of its energy that is lost.

    codes = relu(E z - b), update = codes D, with z what LoRA's first matrix reads (Cunningham et al. 2023,
    arXiv 2309.08600). E z is linear in the site's input, so that it is a site of ours, and has its dials.
    """
    seen = _inputs(pipe, backbone, material, parts, options)
    rank = len(next(iter(parts.values()))[0])
    given = {"n_atoms": WIDTH * rank, "k": None, "sparsifier": "relu", "normalize": False}
    attach_atoms(pipe, backbone, options, adapter, **given)
    lost = []
    for site, layer in atom_layers(denoiser(pipe), adapter).items():
        down, up = parts[site]
        reader, bias, atoms, error = _autoencode(seen[site] @ down.T, up, options.seed)
        dictionary = layer.dictionary(adapter)
        with torch.no_grad():
            dictionary.encoder.copy_(reader @ down)
            assert dictionary.bias is not None
            dictionary.bias.copy_(bias)
            dictionary.atoms.copy_(atoms)
        lost.append(error)
    return sum(lost) / len(lost)


@torch.no_grad()
def _inputs(
    pipe: Any, backbone: Backbone, material: Material, parts: Factors, options: TrainOptions
) -> dict[str, Float[Tensor, "positions d_in"]]:
    """What each site reads on some of training's own batches."""
    base = denoiser(pipe)
    seen: dict[str, list[Tensor]] = {site: [] for site in parts}
    modules = dict(base.named_modules())
    handles = [
        modules[site].register_forward_pre_hook(lambda _, x, kept=kept: kept.append(x[0].detach().flatten(0, -2)))
        for site, kept in seen.items()
    ]
    try:
        for number in range(BATCHES):
            batch = draw(material, backbone, options, number, generator_of(options, number))
            backbone.predict(base, batch.x, batch.s, batch.conditioning)
    finally:
        for handle in handles:
            handle.remove()
    return {site: torch.cat(kept) for site, kept in seen.items()}


def _autoencode(
    z: Float[Tensor, "positions rank"], up: Float[Tensor, "rank d_out"], seed: int
) -> tuple[Tensor, Tensor, Tensor, float]:
    """(E, b, D, share of energy lost) after Adam on the squared error plus an L1 of codes times atom norms."""
    generator = torch.Generator().manual_seed(seed)
    update = z @ up
    scale = update.square().sum(1).mean().sqrt().clamp_min(1e-8)
    rank, latents = z.shape[1], WIDTH * z.shape[1]
    spread = z.std(0).clamp_min(1e-8)
    reader = (torch.randn(latents, rank, generator=generator) / rank**0.5 / spread).requires_grad_(True)
    bias = torch.zeros(latents, requires_grad=True)
    atoms = (torch.randn(latents, up.shape[1], generator=generator) * scale / up.shape[1] ** 0.5).requires_grad_(True)
    sizes = (reader.detach().abs().mean(), 1.0, atoms.detach().abs().mean())
    groups = [{"params": [p], "lr": 0.02 * float(size)} for p, size in zip((reader, bias, atoms), sizes, strict=True)]
    optimizer = torch.optim.Adam(groups)
    for _ in range(STEPS):
        rows = torch.randint(len(z), (min(512, len(z)),), generator=generator)
        codes = torch.relu(z[rows] @ reader.T - bias)
        error = (codes @ atoms - update[rows]).square().sum(1).mean() / scale**2
        size = (codes * atoms.norm(dim=1)).sum(1).mean() / scale
        optimizer.zero_grad(set_to_none=True)
        (error + L1 * size).backward()
        optimizer.step()
    with torch.no_grad():
        codes = torch.relu(z @ reader.T - bias)
        lost = ((codes @ atoms - update).square().sum() / update.square().sum().clamp_min(1e-12)).item()
    return reader.detach(), bias.detach(), atoms.detach(), lost
