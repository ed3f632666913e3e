"""The two ends of a run: a fresh adapter on a frozen base, and a trained one calibrated, measured and in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from atomtune.adapter import Adapter
from atomtune.atoms import measure, order_by_importance, reaches
from atomtune.backbones import Backbone, base_name, denoiser, select
from atomtune.errors import UserError
from atomtune.training import gating
from atomtune.training.options import TrainOptions
from atomtune.training.prepare import Material
from atomtune.tuner import AtomConfig, atom_layers, attach

NAME = "default"


def check_checkpointing(base: Any, backbone: Backbone, options: TrainOptions) -> None:
    """Raises UserError where gradient checkpointing is asked of a model that has none."""
    if options.gradient_checkpointing and not getattr(base, "_supports_gradient_checkpointing", True):
        raise UserError(f"`gradient_checkpointing` must be off for {backbone.family}, which has none.")


def kinds_of(sites: Iterable[str]) -> dict[str, int]:
    """How many sites there are of each kind, by the end of their names."""
    return dict(Counter(next(part for part in reversed(site.split(".")) if not part.isdigit()) for site in sites))


def sites_of(kinds: Mapping[str, int]) -> str:
    """Those kinds in words: `16 sites: 8 x to_q, 8 x to_v`."""
    return f"{sum(kinds.values())} sites: {', '.join(f'{number} x {kind}' for kind, number in kinds.items())}"


def attach_atoms(pipe: Any, backbone: Backbone, options: TrainOptions, adapter: str = NAME, **instead: Any) -> None:
    """A fresh adapter, as the options want it; `instead` are fields of its config that differ."""
    embeds = backbone.encode_prompts(pipe, [""])[backbone.gate_input]
    fields: dict[str, Any] = {
        "n_atoms": options.n_atoms,
        "sparsifier": options.sparsifier,
        "k": options.k,
        "threshold": options.threshold,
        "target_modules": list(options.sites or backbone.sites),
        "gate_input": backbone.gate_input if options.gated else None,
        "gate_mask": backbone.gate_mask if options.gated else None,
        "gate_dim": embeds[0].shape[-1] if options.gated else None,
        "base_model_name_or_path": base_name(pipe),
    }
    torch.manual_seed(options.seed)
    attach(denoiser(pipe), AtomConfig(**fields | instead), adapter)


def conclude(
    pipe: Any, backbone: Backbone, material: Material, options: TrainOptions, name: str = NAME
) -> tuple[Adapter, dict[str, float]]:
    """After the last step: calibrate the gate, measure the atoms, put them in order; returns what the gate does."""
    gate_report = gating.calibrate(denoiser(pipe), backbone, material, name) if options.gated else {}
    return described(pipe, backbone, material, name), gate_report


def described(pipe: Any, backbone: Backbone, material: Material, name: str = NAME) -> Adapter:
    """The adapter as it is attached, its atoms measured and in order."""
    base = denoiser(pipe)
    statistics = measure(base, backbone, material.latents, material.conditioning, adapter=name, masks=material.masks)
    far = material.far
    others = select(material.unrelated_conditioning, far)
    reach = reaches(base, backbone, material.unrelated_latents[far], others, adapter=name)
    statistics = {site: found | reach[site] for site, found in statistics.items()}
    return Adapter(pipe, order_by_importance(base, statistics, name), name)


@contextmanager
def training_mode(base: Any, options: TrainOptions) -> Iterator[None]:
    """Freeze the base; gradient checkpointing where asked. The model stays in eval mode: no dropout."""
    for name, parameter in base.named_parameters():
        parameter.requires_grad_("atom_" in name)
    if options.gradient_checkpointing:
        base.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if options.gradient_checkpointing:
            base.disable_gradient_checkpointing()


def learned_nothing(base: Any, name: str = NAME) -> bool:
    """Whether every atom is zero, so that the adapter is the base."""
    return not any(layer.dictionary(name).atoms.any() for layer in atom_layers(base, name).values())
