"""LoRA out and in: atoms as the nearest LoRA, and a LoRA as atoms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from atomtune.adapter import Adapter
from atomtune.atoms import measure, order_by_importance
from atomtune.backbones import Backbone, backbone_of, base_name, denoiser, denoiser_name
from atomtune.data.folder import scan
from atomtune.data.picture import to_tensor
from atomtune.data.prompts import split_held_out
from atomtune.errors import UserError
from atomtune.measure import pixel_drift
from atomtune.measure.reads import watch
from atomtune.mix import Mixture
from atomtune.sampling import generate
from atomtune.training.ends import NAME, attach_atoms
from atomtune.training.options import TrainOptions
from atomtune.training.prepare import mentions, replaced, triggered, unrelated_list
from atomtune.training.run_folder import OPTIONS, stored
from atomtune.tuner import adapter_config, atom_layers, base_only, unwrap
from atomtune.tuner.lora import Factors, added, codes_in_effect, error_of, lora_of, reduced_rank, rotated, save_lora

PICTURES = 12
"""Pictures of each kind that are painted, to see what sites read and to measure drift."""
ROWS = 256
"""Positions of each forward that an autoencoder is fitted to."""
WIDTH = 4
"""Latents of an autoencoder for each direction of the update."""
L1, FIT_STEPS = 0.02, 1000
SMALL = 1e-4
"""Share of an update's energy below which a direction of it is left out."""


# ---------------------------------------------------------------------------------------------------- export


@dataclass(frozen=True)
class Export:
    """What an export lost, and the drift that it added."""

    lost: dict[str, float]
    """Share of the energy of the atoms' contribution that the LoRA misses, by site."""
    lost_in_all: float
    drift_before: float
    """Mean absolute pixel difference to the base on unrelated prompts, pixels in [0, 1]; the adapter's."""
    drift_after: float


def export_lora(
    adapter: Adapter,
    folder: str | Path,
    prompts: Sequence[str],
    *,
    rank: int = 16,
    weight: float = 1.0,
    seed: int = 0,
    steps: int | None = None,
) -> Export:
    """Write the LoRA nearest to an adapter, as its dials stand, for diffusers and for PEFT. It has no prompt gate.

    `prompts` are the concept's. What sites read is recorded while the adapter paints them and, with `weight`, prompts
    that have nothing to do with it, in `steps` steps of the sampler. Atoms that are LoRA (`dense`, no bias, no
    normalization) are exported exactly where `rank` holds them. Raises UserError on a rank that no site can have, and
    where the adapter adds nothing to what is painted from the prompts.
    """
    if isinstance(adapter, Mixture):
        raise UserError("A mixture can't be exported as it is. Merge its parts: atomtune mix --one-file, `mix.merge`.")
    pipe, layers = adapter.pipe, atom_layers(adapter.pipe, adapter.name)
    most = min(min(layer.in_features, layer.out_features) for layer in layers.values())
    if not 1 <= rank <= most:
        raise UserError(f"`rank` must be between 1 and the size of the smallest site ({most}), got {rank}.")
    if not (math.isfinite(weight) and weight >= 0):
        raise UserError(f"`weight` must be a number of 0 or more, got {weight}.")
    call: dict[str, Any] = {"seed": seed, "steps": steps}
    shown, asked = map(_some, split_held_out(unrelated_list(pipe, TrainOptions())))
    # A few captions are painted several times, every time from another noise.
    wanted = (list(prompts) * PICTURES)[: max(PICTURES, len(prompts))]
    concept, unrelated = (grams(adapter, some, **call) for some in (wanted, shown))
    weight *= len(wanted) / len(shown)
    parts, errors, exact = {}, {}, {site: _exact(adapter, site, rank) for site in layers}
    for site, layer in layers.items():
        atoms = layer.dictionary(adapter.name).atoms.detach().double()
        parts[site] = exact[site] or reduced_rank(concept[site] + weight * unrelated[site], atoms, rank)
        errors[site] = error_of(*parts[site], concept[site], atoms)
    if not any(energy for _, energy in errors.values()):
        raise UserError(
            f"`prompt` must make atoms fire, got {prompts[0]!r} and the like. Name the concept, as captions did."
        )
    save_lora(parts, rank, Path(folder), base_name(pipe), denoiser_name(pipe))
    before = generate(pipe, asked, **call)
    with base_only(pipe):
        base = generate(pipe, asked, **call)
        with added(layers, parts):
            after = generate(pipe, asked, **call)
    shares = {site: error / max(energy, 1e-12) for site, (error, energy) in errors.items()}
    return Export(shares, _share(errors), _drift(base, before), _drift(base, after))


def captions(adapter: Adapter, run: Path) -> tuple[str, ...]:
    """Prompts of a run's concept: unrelated ones that say its class noun, with its name instead.

    The name alone does not do: adapters act on the words around it too. Raises UserError where nothing is found.
    """
    options = _options(run)
    name, noun = options.concept, options.class_noun
    if not (name and noun):
        raise UserError(f"`prompt` or `data` must be given, since {run} names no concept with a class noun.")
    near = [replaced(p, noun, name) for p in unrelated_list(adapter.pipe, options) if mentions(p, noun)]
    if not near:
        raise UserError(f"`prompt` or `data` must be given, since no unrelated prompt says the class noun {noun!r}.")
    return _some(near)


def learned(data: Path, run: Path) -> tuple[str, ...]:
    """The captions of a folder as training read them, with the run's options."""
    options = _options(run)
    return tuple(sample.caption for sample in triggered(scan(data, **options.scanning), options)[0].samples)


def _options(run: Path) -> TrainOptions:
    """What a run trained with; the defaults where the folder is no run's."""
    return stored(run, TrainOptions()) if (run / OPTIONS).is_file() else TrainOptions()


def _some(prompts: Sequence[str]) -> tuple[str, ...]:
    """From all over a list, which may be sorted."""
    return tuple(prompts[:: max(1, len(prompts) // PICTURES)][:PICTURES])


@torch.no_grad()
def grams(adapter: Adapter, prompts: Sequence[str], **call: Any) -> dict[str, Float[Tensor, "d d"]]:
    """By site Z^T Z in float64, summed over positions while the adapter paints.

    Z is what the site reads beside its codes as they take effect, d = d_in + n_atoms.
    """
    layers = atom_layers(adapter.pipe, adapter.name)
    sums: dict[str, Tensor] = {}

    def note(site: str, x: Tensor, real: Tensor) -> None:
        z = torch.cat([x, codes_in_effect(layers[site], x, adapter.name)], -1)[real].double()
        sums[site] = sums.get(site, 0) + z.T @ z

    with watch(adapter.pipe, layers, note):
        generate(adapter.pipe, prompts, **call)
    return sums


def _exact(adapter: Adapter, site: str, rank: int) -> tuple[Tensor, Tensor] | None:
    """The factors of atoms that are LoRA, where the rank holds them and no dial limits where or when they act."""
    config, layer = adapter_config(adapter.pipe, adapter.name), atom_layers(adapter.pipe, adapter.name)[site]
    if config.sparsifier != "dense" or config.normalize or config.encoder_bias or layer.r[adapter.name] > rank:
        return None
    if any(adapter.name in dials for dials in (layer.floors, layer.steering, layer.replaced)):
        return None
    dictionary = layer.dictionary(adapter.name)
    strength = layer.atom_strength[adapter.name] * layer.scaling[adapter.name]
    return dictionary.encoder.detach().double(), (dictionary.atoms.detach() * strength[:, None]).double()


def _share(errors: Mapping[str, tuple[float, float]]) -> float:
    return sum(error for error, _ in errors.values()) / max(sum(energy for _, energy in errors.values()), 1e-12)


def _drift(base: list[Image.Image], other: list[Image.Image]) -> float:
    return float(pixel_drift(*(np.stack([np.asarray(p) for p in pictures]) for pictures in (base, other))).mean())


# ---------------------------------------------------------------------------------------------------- import


def import_lora(
    pipe: Any,
    path: str | Path,
    prompts: Sequence[str],
    *,
    exact: bool = False,
    seed: int = 0,
    steps: int | None = None,
) -> tuple[Adapter, float]:
    """(a LoRA from a safetensors file as atoms, the share of its update's energy that they miss).

    The atoms are a sparse autoencoder of the update, fitted where the LoRA paints `prompts` and unrelated ones;
    `exact`: its singular components, signed and dense. They are measured on the pictures of `prompts`. Raises
    UserError on a file that is not safetensors or not for this model; the pipeline is then as it was.
    """
    if not prompts:
        raise UserError("`prompt` must be given, at least one that the LoRA was made for, with its own words in it.")
    backbone, options = backbone_of(pipe), TrainOptions(seed=seed)
    others = () if exact else _some(unrelated_list(pipe, options))
    with lora_of(pipe, Path(path)) as parts:
        pictures, seen = _reads(pipe, parts, (*prompts, *others), seed=seed, steps=steps)
    fits = {site: fit_autoencoder(*parts[site], z, seed) for site, z in seen.items() if not exact and z.any()}
    if exact:
        attach_factors(pipe, backbone, rotated(parts), options)
    else:
        attach_rows(pipe, backbone, {site: rows for site, (rows, _) in fits.items()}, options)
    pixels = torch.stack([to_tensor(picture) for picture in pictures[: len(prompts)]]).to(pipe.vae.device)
    latents, words = backbone.encode_pictures(pipe, pixels), backbone.encode_prompts(pipe, list(prompts))
    statistics = measure(denoiser(pipe), backbone, latents, words)
    return Adapter(pipe, order_by_importance(pipe, statistics)), _share({site: e for site, (_, e) in fits.items()})


@torch.no_grad()
def _reads(pipe: Any, parts: Factors, prompts: Sequence[str], **call: Any) -> tuple[list[Any], dict[str, Tensor]]:
    """(pictures, by site some of what the LoRA's first matrix gives) while the LoRA paints."""
    generator = torch.Generator().manual_seed(0)
    seen: dict[str, list[Tensor]] = {site: [] for site in parts}

    def note(site: str, x: Tensor, real: Tensor) -> None:
        some = torch.randperm(int(real.sum()), generator=generator)[:ROWS]
        seen[site].append(x[real][some.to(x.device)].float() @ parts[site][0].T)

    modules = dict(unwrap(pipe).named_modules())
    with watch(pipe, {site: modules[site] for site in parts}, note):
        pictures = generate(pipe, prompts, **call)
    return pictures, {site: torch.cat(kept) for site, kept in seen.items()}


@torch.no_grad()
def attach_rows(
    pipe: Any, backbone: Backbone, rows: Mapping[str, dict[str, Tensor]], options: TrainOptions, **fields: Any
) -> None:
    """Dictionaries by site, from their parameters; they read their input as it is. `fields` are of their config."""
    sizes = {site: len(named["atoms"]) for site, named in rows.items()}
    fields |= {"n_atoms": max(sizes.values()), "size_pattern": sizes, "target_modules": list(sizes)}
    attach_atoms(pipe, backbone, options, k=None, normalize=False, **fields)
    for site, layer in atom_layers(pipe).items():
        for name, value in rows[site].items():
            layer.dictionary(NAME).get_parameter(name).copy_(value)


def attach_factors(pipe: Any, backbone: Backbone, parts: Factors, options: TrainOptions) -> None:
    """Rank-one components as signed, dense atoms: the same outputs, with every dial that atoms have."""
    rows = {site: {"encoder": down, "atoms": up} for site, (down, up) in parts.items()}
    attach_rows(pipe, backbone, rows, options, sparsifier="dense", encoder_bias=False)


def fit_autoencoder(
    down: Float[Tensor, "rank d_in"], up: Float[Tensor, "rank d_out"], z: Float[Tensor, "positions rank"], seed: int
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """(a sparse autoencoder of the update z @ up, (its squared error, the update's energy)).

    It is fitted to the update's principal components, so that how LoRA's two matrices share their sizes is nothing.
    """
    right, inner = torch.linalg.qr(up.T)
    values, vectors = torch.linalg.eigh(inner @ (z.T @ z) @ inner.T)
    basis = vectors[:, values > SMALL * values.sum()]
    x = z @ inner.T @ basis
    rows, lost = autoencode(x.cpu(), torch.eye(x.shape[1]), seed, FIT_STEPS)
    encoder, bias, atoms = (rows[name].to(down) for name in ("encoder", "bias", "atoms"))
    energy, kept = values.sum().item(), x.square().sum().item()
    rows = {"encoder": encoder @ basis.T @ inner @ down, "bias": bias, "atoms": atoms @ basis.T @ right.T}
    return rows, (energy - kept * (1 - lost), energy)


def autoencode(
    z: Float[Tensor, "positions rank"], up: Float[Tensor, "rank d_out"], seed: int, steps: int = 400
) -> tuple[dict[str, Tensor], float]:
    """(E, b and D of codes = relu(E z - b), update = codes D; the share of the energy of z @ up that is lost).

    After `steps` of Adam on the squared error plus an L1 of codes times atom norms (Cunningham et al. 2023, arXiv
    2309.08600). E z is linear in a site's input, so that this is a site of ours, and has its dials.
    """
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
    for _ in range(steps):
        rows = torch.randint(len(z), (min(512, len(z)),), generator=generator)
        codes = torch.relu(z[rows] @ reader.T - bias)
        error = (codes @ atoms - update[rows]).square().sum(1).mean() / scale**2
        size = (codes * atoms.norm(dim=1)).sum(1).mean() / scale
        optimizer.zero_grad(set_to_none=True)
        (error + L1 * size).backward()
        optimizer.step()
    with torch.no_grad():
        missed = torch.relu(z @ reader.T - bias) @ atoms - update
        lost = (missed.square().sum() / update.square().sum().clamp_min(1e-12)).item()
    return {"encoder": reader.detach(), "bias": bias.detach(), "atoms": atoms.detach()}, lost
