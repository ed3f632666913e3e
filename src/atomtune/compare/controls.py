"""LoRA taken apart like atoms, so that every claim about atoms can be tried on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from atomtune.backbones import Backbone, base_name, denoiser
from atomtune.training import gating
from atomtune.training.batch import generator_of
from atomtune.training.loop import NAME
from atomtune.training.options import TrainOptions
from atomtune.training.prepare import Material
from atomtune.tuner import AtomConfig, atom_layers, attach, prompt_gate

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
    embeds = backbone.encode_prompts(pipe, [""])[backbone.gate_input]
    rank = len(next(iter(parts.values()))[0])
    config = AtomConfig(
        n_atoms=rank,
        sparsifier="dense",
        normalize=False,
        encoder_bias=False,
        target_modules=list(options.sites or backbone.sites),
        gate_input=backbone.gate_input if options.gated else None,
        gate_mask=backbone.gate_mask if options.gated else None,
        gate_dim=embeds.shape[-1] if options.gated else None,
        base_model_name_or_path=base_name(pipe),
    )
    attach(denoiser(pipe), config, adapter)
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
