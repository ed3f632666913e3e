"""Several adapters: which may stand together, where their parts lie on disk, and all of them as one."""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atomtune.errors import UserError, did_you_mean

from .config import AtomConfig
from .gate import PromptGate, prompt_gate
from .model import activate, adapter_config, atom_layers, attach, remove_adapter, unwrap
from .store import MIXTURE, PARTIAL, prints_of

MERGEABLE = ("relu", "soft", "jumprelu", "dense")
"""Sparsifiers that look at each atom alone: with the others, atoms of one dictionary compete."""


def is_mixture(folder: str | Path) -> bool:
    """Whether a mixture was saved there: `mixture.json` with the weights of its parts, each a folder of its name."""
    return (Path(folder) / MIXTURE).is_file()


def saved_parts(folder: str | Path) -> tuple[dict[str, Path], dict[str, float]]:
    """Folders and weights of a saved mixture's parts. Raises UserError on a file that is no mixture's."""
    path = Path(folder) / MIXTURE
    try:
        weights = dict(json.loads(path.read_text(encoding="utf-8"))["weights"])
        folders = {name: Path(folder) / name for name in weights}
        check_parts(folders, weights)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} can't be read: {error}") from error
    return folders, weights


def check_parts(folders: Mapping[str, str | Path], weights: Mapping[str, float]) -> None:
    """Raise UserError on names and weights that parts of a mixture can't have, and on one folder given twice."""
    if len(folders) < 2:
        raise UserError(f"A mixture must have at least two parts, got {len(folders)}. Name another, as style=FOLDER.")
    places: dict[Path, str] = {}
    for name, folder in folders.items():
        # Parts are folders and entries of torch's modules, where `update` is a method.
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,20}", name) or hasattr(nn.ModuleDict(), name):
            raise UserError(
                f"A part's name must be 1 to 20 letters, digits, - or _, and no word of torch's, got {name!r}."
            )
        if (place := Path(folder).resolve()) in places:
            raise UserError(f"{folder} is given twice, as {places[place]} and {name}. Give it once, with a weight.")
        places[place] = name
    for name, weight in weights.items():
        if name not in folders:
            raise UserError(f"`weight`: the parts are {', '.join(folders)}, got {name!r}.{did_you_mean(name, folders)}")
        try:
            finite = math.isfinite(float(weight))
        except (TypeError, ValueError):
            finite = False
        if not finite:
            raise UserError(f"`weight` of {name} must be a finite number, got {weight!r}.")


@torch.no_grad()
def merge_parts(model: Any, weights: Mapping[str, float], adapter: str = "merged") -> dict[str, int]:
    """Attach one adapter with the outputs, to rounding, of several attached ones; it becomes the active one.

    Dictionaries lie side by side, weights are put into the atoms; each atom keeps the gate of its part. Returns what
    was added to the ids of each. Raises UserError where one adapter can't hold them: competing atoms, other settings.
    """
    configs = {part: adapter_config(model, part) for part in weights}
    config = _mergeable(configs)
    layers = {part: atom_layers(model, part) for part in weights}
    ids = {part: [d.dictionary(part).atom_ids for d in found.values()] for part, found in layers.items()}
    steps = itertools.accumulate((int(torch.cat(ids[part]).max()) + 1 for part in weights), initial=0)
    offsets = dict(zip(weights, steps, strict=False))
    sites = list(dict.fromkeys(site for c in configs.values() for site in c.sites or []))
    sizes = {site: sum(found[site].r[part] for part, found in layers.items() if site in found) for site in sites}
    config.n_atoms, config.size_pattern, config.sites = max(sizes.values()), sizes, sites
    config.target_modules = [site for site in sites if sizes[site]]
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    gates = _gates(model, configs, offsets, config)
    active = next(layer.active_adapters for found in layers.values() for layer in found.values())
    attach(model, config, adapter)
    with off_on_error(model, adapter, active):
        if (merged := prompt_gate(unwrap(model), adapter)) is not None:
            merged.weight.copy_(torch.stack([weight for weight, _ in gates]))
            merged.bias.copy_(torch.stack([bias for _, bias in gates]))
        for site, layer in atom_layers(model, adapter).items():
            states = []
            for part in (part for part in weights if site in layers[part]):
                state = dict(layers[part][site].dictionary(part).state_dict())
                state |= {"atoms": state["atoms"] * weights[part], "atom_ids": state["atom_ids"] + offsets[part]}
                states.append(state)
            layer.dictionary(adapter).load_state_dict({key: torch.cat([s[key] for s in states]) for key in states[0]})
    return offsets


@contextmanager
def off_on_error(model: Any, adapter: str, active: Iterable[str]) -> Iterator[None]:
    """Inside, an error takes the adapter off, and those that were active take part again."""
    try:
        yield
    except BaseException:
        remove_adapter(model, adapter)
        activate(model, *active)
        raise


def _gates(
    model: Any, configs: Mapping[str, AtomConfig], offsets: Mapping[str, int], config: AtomConfig
) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of each part's gate, always open where it has none; tells the merged config of them."""
    gated = next((c for c in configs.values() if c.gate_input), None)
    if gated is None:
        return []
    config.gate_input, config.gate_mask, config.gate_dim = gated.gate_input, gated.gate_mask, gated.gate_dim
    found: list[tuple[Tensor, Tensor]] = []
    device = next(g.bias.device for part in configs if (g := prompt_gate(unwrap(model), part)) is not None)
    starts: list[int] = []
    for part, own in configs.items():
        gate = prompt_gate(unwrap(model), part) or PromptGate(gated.gate_dim or 1).to(device)
        found += zip(gate.weight.reshape(-1, gate.weight.shape[-1]), gate.bias.reshape(-1), strict=True)
        starts += [offsets[part] + start for start in own.gate_starts or [0]]
    config.gate_starts = starts
    return found


def _mergeable(configs: Mapping[str, AtomConfig]) -> AtomConfig:
    """A copy of the first config, if the others agree with it."""
    first, *others = configs.values()
    gated = [config for config in configs.values() if config.gate_input]
    reasons = {
        f"their `{field}` differs": any(getattr(first, field) != getattr(other, field) for other in others)
        for field in ("sparsifier", "encoder", "normalize", "encoder_bias", "threshold")
    } | {
        "their prompt gates read other things": len({(c.gate_input, c.gate_mask, c.gate_dim) for c in gated}) > 1,
        f"atoms of {first.sparsifier} compete": first.sparsifier not in MERGEABLE or first.encoder == "ista",
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"{', '.join(configs)} can't become one adapter: {reason}. Save them as parts.")
    return dataclasses.replace(first)


def same_base(configs: Mapping[str, AtomConfig]) -> None:
    """Raise UserError where adapters, by what they are called, are known to be of different bases."""
    known = [(name, c) for name, c in configs.items() if not (c.base_fingerprint or PARTIAL).startswith(PARTIAL)]
    for name, config in known[1:]:
        if not prints_of(config) & prints_of(known[0][1]):
            bases = [c.base_model_name_or_path or "a base without a name" for c in (known[0][1], config)]
            raise UserError(
                f"Adapters must be of one base: {known[0][0]} is of {bases[0]}, {name} of another ({bases[1]})."
            )
