"""Atoms as things: what each one does, how they rank, and which take part."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from atomtune.backbones import Backbone, Conditioning, select
from atomtune.errors import UserError
from atomtune.sparse import CodeStatistics
from atomtune.tuner import adapter_config, atom_layers, base_only, override_gate, prune, record, unwrap

Statistics = dict[str, dict[str, Tensor]]
"""By site and name, one number an atom (`by_time`: one an atom and time bucket)."""

FORMULAS = {
    "mean": "mean over positions of code x ||D||",
    "mean_when_active": "mean over the positions where it fires of code x ||D||",
    "maximum": "largest code x ||D||",
    "purity": "share of its energy that falls on the subject, were that as large as what is around it",
}
"""Importance formulas, as they are printed wherever their numbers are."""

CHUNK = 4
"""Pictures that are measured at once."""

_NAME = re.compile(r"L(\d+)\[(\d+)\]")


@dataclass(frozen=True)
class Atom:
    """One atom of an adapter, with what was measured of it."""

    site: int
    """Number of its site: entry of the config's `sites`."""
    id: int
    """Its number at that site; pruning and reordering keep it."""
    path: str
    """Module path of the site."""
    row: int
    """Where it lies now in the site's dictionary."""
    importance: float
    density: float
    """Share of positions where it fires."""
    purity: float
    """Share of its energy on the subject; NaN where unknown."""

    @property
    def name(self) -> str:
        return f"L{self.site}[{self.id}]"

    @property
    def dead(self) -> bool:
        """Whether it never fired on what was measured."""
        return self.density == 0


# ------------------------------------------------------------------------------------------------ measure


@torch.no_grad()
def measure(
    model: nn.Module,
    backbone: Backbone,
    latents: Tensor,
    conditioning: Conditioning,
    *,
    adapter: str = "default",
    masks: Float[Tensor, "batch tokens"] | None = None,
    times: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    repeats: int = 2,
    seed: int = 0,
) -> Statistics:
    """What every atom does on noised pictures at several times, its gate open; signed codes count by their size.

    `masks` give the share of each picture token that lies on the subject, in [0, 1]. Without them the subject
    is where the adapted and the base's prediction differ by more than half of the most they differ.
    """
    base = unwrap(model)
    layers = atom_layers(base, adapter)
    collected = {site: CodeStatistics(layer.r[adapter]) for site, layer in layers.items()}
    generator = torch.Generator().manual_seed(seed)
    moments = [t for t in times for _ in range(repeats)]
    # A few pictures at a time: the codes of all their passes are held until the subject is known.
    for chosen in torch.arange(len(latents)).split(CHUNK):
        part = None if masks is None else masks[chosen]
        given = select(conditioning, chosen)
        _collect(collected, base, backbone, latents[chosen], given, adapter, part, moments, generator)
    return {site: _tensors(s, layers[site], adapter) for site, s in collected.items()}


def _collect(
    collected: dict[str, CodeStatistics],
    base: nn.Module,
    backbone: Backbone,
    latents: Tensor,
    conditioning: Conditioning,
    adapter: str,
    masks: Tensor | None,
    times: Sequence[float],
    generator: torch.Generator,
) -> None:
    """Add what the atoms do on some pictures, noised once for each of `times`."""
    rows, columns = backbone.grid(base, latents)
    passes = []
    for time in times:
        x, s, adapted, codes = noised_pass(base, backbone, latents, conditioning, time, generator, adapter)
        with base_only(base):
            plain = backbone.predict(base, x, s, conditioning)
        difference = per_token((adapted - plain).float().square(), rows, columns)
        passes.append((s, codes, difference))
    if masks is None:
        total = torch.stack([difference for _, _, difference in passes]).mean(0)
        masks = (total > 0.5 * total.quantile(0.98, dim=1, keepdim=True)).float()
    for site, statistics in collected.items():
        layout = backbone.layout(site, conditioning, rows * columns)
        for i in range(len(latents)):
            image = layout.image[i]
            at = image if image.any() else layout.real[i]
            share = masks[i : i + 1].to(image.device) if image.any() else None
            for s, codes, _ in passes:
                statistics.update(codes[site][i : i + 1, at], time=s[i : i + 1], mask=share)


def noised_pass(
    base: nn.Module,
    backbone: Backbone,
    latents: Tensor,
    conditioning: Conditioning,
    time: float,
    generator: torch.Generator,
    adapter: str,
) -> tuple[Tensor, Float[Tensor, " batch"], Tensor, dict[str, Tensor]]:
    """(x_s, s, prediction, codes by site) of pictures noised to one time in [0, 1], the adapter's gate open."""
    gated = adapter_config(base, adapter).gate_input is not None
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    s = torch.full((len(latents),), time, device=latents.device)
    x = (1 - time) * latents + time * noise
    with record(base, adapter) as recording, override_gate(base, 1.0 if gated else None, adapter):
        predicted = backbone.predict(base, x, s, conditioning)
    return x, s, predicted, {site: calls[-1] for site, calls in recording.codes.items()}


def _tensors(statistics: CodeStatistics, layer: Any, adapter: str) -> dict[str, Tensor]:
    norms = layer.dictionary(adapter).atoms.detach().norm(dim=1).double().cpu()
    found = {
        name: getattr(statistics, name).float() for name in ("density", "mean", "mean_when_active", "maximum", "purity")
    }
    return found | {"by_time": statistics.by_time.float().T.contiguous(), "norm": norms.float()}


def per_token(values: Tensor, rows: int, columns: int) -> Float[Tensor, "batch tokens"]:
    """Mean over channels and over the pixels of each token; latents are `(b, c, h, w)` or `(b, tokens, c)`."""
    if values.ndim == 4:
        return nn.functional.adaptive_avg_pool2d(values.mean(1, keepdim=True), (rows, columns)).flatten(1)
    return values.mean(-1)


# --------------------------------------------------------------------------------------------------- rank


def ranking(model: Any, statistics: Statistics, formula: str = "mean", adapter: str = "default") -> list[Atom]:
    """Every atom of the adapter, the most important first. Raises UserError on an unknown formula."""
    if formula not in FORMULAS:
        raise UserError(f"`formula` must be one of {', '.join(FORMULAS)}, got {formula!r}.")
    sites = adapter_config(model, adapter).sites or []
    found = []
    for path, layer in atom_layers(model, adapter).items():
        if path not in statistics:
            raise UserError(f"The adapter has no statistics at {path}: it was saved without them. Train again.")
        s = statistics[path]
        values = _importance(s, formula)
        for row, number in enumerate(layer.dictionary(adapter).atom_ids.tolist()):
            found.append(
                Atom(
                    site=sites.index(path),
                    id=number,
                    path=path,
                    row=row,
                    importance=values[row].item(),
                    density=s["density"][row].item(),
                    purity=s["purity"][row].item(),
                )
            )
    return sorted(found, key=lambda a: (-a.importance, a.site, a.id))


def _importance(s: dict[str, Tensor], formula: str) -> Tensor:
    values = s[formula].nan_to_num(0)
    return values if formula == "purity" else values * s["norm"]


def order_by_importance(model: Any, statistics: Statistics, adapter: str = "default") -> Statistics:
    """Put each dictionary's most important atoms first; returns the statistics in the new order."""
    order = {site: _importance(s, "mean").argsort(descending=True, stable=True) for site, s in statistics.items()}
    prune(model, order, adapter)
    return {site: {name: t[order[site]] for name, t in s.items()} for site, s in statistics.items()}


def count(density: float, total: int) -> int:
    """How many of `total` atoms a density keeps. Raises UserError outside [0, 1]."""
    if not (math.isfinite(density) and 0 <= density <= 1):
        raise UserError(f"`density` must be between 0 and 1, got {density}.")
    return math.ceil(density * total - 1e-9)


def kept(ranked: Sequence[Atom], number: int) -> dict[str, Tensor]:
    """Rows to keep at each site for the first `number` atoms of a ranking."""
    rows: dict[str, list[int]] = {atom.path: [] for atom in ranked}
    for atom in ranked[:number]:
        rows[atom.path].append(atom.row)
    return {path: torch.tensor(sorted(chosen), dtype=torch.long) for path, chosen in rows.items()}


def find(ranked: Sequence[Atom], name: str) -> Atom:
    """The atom of that name (`L17[137]`). Raises UserError, with close names, where there is none."""
    match = _NAME.fullmatch(name.strip())
    if match is None:
        raise UserError(f"An atom is named like L17[137], got {name!r}.")
    for atom in ranked:
        if (atom.site, atom.id) == (int(match[1]), int(match[2])):
            return atom
    close = difflib.get_close_matches(name, [a.name for a in ranked], n=3)
    hint = f" Close: {', '.join(close)}." if close else ""
    raise UserError(f"The adapter has no atom {name}.{hint}")


# --------------------------------------------------------------------------------------------------- dial


@contextmanager
def strengths(model: Any, values: Mapping[str, float | Tensor], adapter: str = "default") -> Iterator[None]:
    """Set the strength of atoms for a while: by site, one number or one an atom."""
    layers = atom_layers(model, adapter)
    before = {site: layers[site].atom_strength[adapter].clone() for site in values}
    try:
        for site, value in values.items():
            buffer = layers[site].atom_strength[adapter]
            buffer.copy_(torch.as_tensor(value, dtype=buffer.dtype, device=buffer.device).expand_as(buffer))
        yield
    finally:
        for site, value in before.items():
            layers[site].atom_strength[adapter].copy_(value)


def dialled(
    ranked: Sequence[Atom], density: float = 1.0, strength: dict[str, float] | None = None
) -> dict[str, Tensor]:
    """Strengths by site for the first `density` of a ranking, single atoms then set by name."""
    number = count(density, len(ranked))
    sizes: dict[str, int] = {}
    for atom in ranked:
        sizes[atom.path] = max(sizes.get(atom.path, 0), atom.row + 1)
    values = {path: torch.zeros(size) for path, size in sizes.items()}
    for atom in ranked[:number]:
        values[atom.path][atom.row] = 1.0
    for name, value in (strength or {}).items():
        if not math.isfinite(value):
            raise UserError(f"The strength of {name} must be a finite number, got {value}.")
        atom = find(ranked, name)
        values[atom.path][atom.row] = value
    return values
