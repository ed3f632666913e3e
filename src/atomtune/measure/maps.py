"""Where, when and on which words atoms fire, and which are alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from atomtune.atoms import Atom
from atomtune.backbones import Backbone, Conditioning, placed, select
from atomtune.tuner import atom_layers, open_gate, record, unwrap

Codes = Float[np.ndarray, "times pictures _tokens"]
Tables = tuple[dict[str, Codes], dict[str, Codes]]
"""Codes at the picture's tokens, and at the prompt's, by the name of the atom."""

TIMES = (0.3, 0.5, 0.7)
"""Where pictures are noised to, 0 being clean, unless a caller says otherwise."""


@torch.no_grad()
def fired(
    model: Any,
    backbone: Backbone,
    latents: Tensor,
    conditioning: Conditioning,
    atoms: Sequence[Atom],
    *,
    times: Sequence[float] = TIMES,
    seed: int = 0,
    batch_size: int = 8,
    adapter: str = "default",
) -> Tables:
    """The codes of atoms on noised pictures, gate open; all get the same noise, so that each one's numbers are its own.

    An atom is missing where its site sees no such tokens. Picture tokens lie row by row; text is as
    `backbones.token_texts` names it, NaN beyond the end of a shorter prompt. The nanmean over axes 1 and 2 is the atom
    over time, the nanmax over 0 and 2 its peak in each picture.
    """
    base = unwrap(model)
    tables: Tables = ({}, {})
    grid = backbone.grid(base, latents)
    generator = torch.Generator().manual_seed(seed)
    for number, time in enumerate(times):
        noise = torch.randn(latents.shape[1:], generator=generator).to(latents)
        for at in torch.arange(len(latents)).split(batch_size):
            given, s = select(conditioning, at), torch.full((len(at),), time, device=latents.device)
            with record(base, adapter) as recording, open_gate(base, adapter):
                backbone.predict(base, backbone.noised(latents[at], time, noise.expand_as(latents[at]))[0], s, given)
            for atom in atoms:
                if recording.codes[atom.path][-1].ndim == 2:  # reads no tokens
                    continue
                seen, here = placed(backbone, atom.path, recording.codes[atom.path][-1], given, grid)
                codes, whole = seen[..., atom.row].float().cpu(), backbone.layout(atom.path, conditioning, grid)
                kinds = ((whole.image, here.image), (whole.real & ~whole.image, here.real & ~here.image))
                for table, (every, chosen) in zip(tables, kinds, strict=True):
                    if every.any():
                        shape = len(times), len(latents), int(every.sum(1).max())
                        into = table.setdefault(atom.name, np.full(shape, np.nan, np.float32))
                        for picture, own, mask in zip(at.tolist(), codes, chosen.cpu(), strict=True):
                            into[number, picture, : int(mask.sum())] = own[mask]
    return tables


def code_maps(
    model: Any, backbone: Backbone, latents: Tensor, conditioning: Conditioning, atoms: Sequence[Atom], **more: Any
) -> dict[str, Float[np.ndarray, "pictures rows columns"]]:
    """The mean code over several times at each picture token, by the name of the atom; gate open.

    An atom whose site sees no picture tokens has no map; one of a coarser site has a smaller one. Keywords: as `fired`.
    """
    grid = backbone.grid(unwrap(model), latents)
    image, _ = fired(model, backbone, latents, conditioning, atoms, **more)
    own = {atom.name: backbone.layout(atom.path, conditioning, grid).grid for atom in atoms if atom.name in image}
    return {name: codes.mean(0).reshape(-1, *own[name]) for name, codes in image.items()}


def examples(
    peaks: Float[np.ndarray, " pictures"], number: int = 8, quantiles: Sequence[float] = (0.9, 0.75, 0.5, 0.25)
) -> dict[str, list[int]]:
    """Numbers of pictures to show an atom by, from its peak in each: `most` active, at `quantiles`, `silent`.

    At most `number` that fire most, the first the strongest, and that are silent; quantiles are of those that fire.
    """
    order = np.argsort(-np.abs(peaks), kind="stable")
    firing = order[peaks[order] != 0]
    at = [round((1 - q) * (len(firing) - 1)) for q in quantiles if len(firing)]
    silent = np.flatnonzero(peaks == 0)
    return {"most": firing[:number].tolist(), "quantiles": firing[at].tolist(), "silent": silent[:number].tolist()}


def twins(
    model: Any,
    ranked: Sequence[Atom],
    atoms: Sequence[Atom],
    codes: Tables = ({}, {}),
    *,
    number: int = 5,
    adapter: str = "default",
) -> dict[str, list[tuple[str, float, float]]]:
    """(name, cosine, correlation) of the atoms that point most nearly the same way as each of `atoms`, by its name.

    Cosines are of all atoms at sites of the same output width, 0 for one that adds nothing. Correlations (Pearson) are
    of two atoms' codes at one site, over all that `fired` gave of both; NaN where it gave none, or one never changes.
    """
    layers = atom_layers(model, adapter)
    unit = {a.name: normalize(layers[a.path].dictionary(adapter).atoms[a.row].detach(), dim=0) for a in ranked}
    width = {a.name: len(unit[a.name]) for a in ranked}
    found = {}
    for atom in atoms:
        others = [a for a in ranked if width[a.name] == width[atom.name] and a.name != atom.name]
        cosines = torch.stack([unit[a.name] for a in [atom, *others]]) @ unit[atom.name]
        near = sorted(zip(cosines[1:].tolist(), others, strict=True), key=lambda pair: -pair[0])[:number]
        found[atom.name] = [(other.name, cosine, _correlation(atom, other, codes)) for cosine, other in near]
    return found


def _correlation(one: Atom, other: Atom, codes: Tables) -> float:
    both = [np.stack([table[one.name], table[other.name]]) for table in codes if {one.name, other.name} <= table.keys()]
    if one.path != other.path or not both:
        return math.nan
    seen = np.concatenate([kind.reshape(2, -1) for kind in both], 1)
    with np.errstate(invalid="ignore"):  # an atom that never changes
        return float(np.corrcoef(seen[:, ~np.isnan(seen[0])])[0, 1])
