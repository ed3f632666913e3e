"""Several adapters in one picture: side by side with weights, which of their atoms fight, and all as one adapter."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from atomtune import surgery, tuner
from atomtune.adapter import Adapter, OwnWords, Steering, concept_of, load
from atomtune.atoms import Atom, Statistics
from atomtune.backbones import backbone_of, denoiser, placed
from atomtune.data.picture import to_tensor
from atomtune.errors import UserError, did_you_mean
from atomtune.files import write_whole
from atomtune.own_words import UNTIL
from atomtune.sampling import generate
from atomtune.steering import is_named
from atomtune.tuner.mixture import MIXTURE, check_parts, merge_parts, off_on_error, same_base
from atomtune.tuner.notes import LONGEST
from atomtune.tuner.store import read

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""At which atoms are seen firing together."""


# -------------------------------------------------------------------------------------------- side by side


class Mixture(Adapter):
    """Adapters that take part together; a handle as any other, whose atoms are named `style/L17[137]`.

    Every part keeps its prompt gate, so that the picture is the base's, bit for bit, where none opens. The parts' own
    handles are in `parts`.
    """

    def __init__(self, pipe: Any, parts: dict[str, Adapter], weights: Mapping[str, float]) -> None:
        super().__init__(pipe, {}, " + ".join(parts))
        self.parts = parts
        self.weights = {name: float(weights.get(name, 1.0)) for name in parts}
        tuner.activate(pipe, *parts)
        for name in parts:
            for layer in tuner.atom_layers(pipe, name).values():
                layer.set_scale(name, self.weights[name])

    def __repr__(self) -> str:
        weights = ", ".join(f"{weight:g} x {self.parts[name]!r}" for name, weight in self.weights.items())
        return f"<mixture of {weights}>"

    def ranking(self, formula: str) -> list[Atom]:
        """Every atom of all parts, the most important first; importances are times the weight, shares are not."""
        found = []
        for name, part in self.parts.items():
            factor = 1.0 if formula in ("purity", "focus") else abs(self.weights[name])
            found += [replace(a, part=name, importance=a.importance * factor) for a in part.ranking(formula)]
        # Stable: each part keeps its order, also where its weight is 0.
        return sorted(found, key=lambda a: -a.importance)

    def written(self, name: str) -> dict[str, Float[Tensor, "atoms d_out"]]:
        """What a part's atoms write at each site, times its weight."""
        layers = tuner.atom_layers(self.pipe, name).items()
        return {path: layer.dictionary(name).atoms.double().cpu() * self.weights[name] for path, layer in layers}

    @contextmanager
    def steered(self, steer: Steering, ranked: Sequence[Atom]) -> Iterator[None]:
        """Inside, the steers hold for all parts, or each for its own part."""
        steers = steer if isinstance(steer, Mapping) else dict.fromkeys(self.parts, steer)
        for name in steers.keys() - self.parts.keys():
            raise UserError(f"`steer`: the parts are {', '.join(self.parts)}, got {name!r}.")
        own = {name: [replace(a, part="") for a in ranked if a.part == name] for name in self.parts}
        known = {} if isinstance(steer, Mapping) else own
        with ExitStack() as stack:
            for name, part in self.parts.items():
                given = steers.get(name, ())
                meant = [replace(s, atoms=s.names and self._of_part(s.names, name, known)) for s in given]
                stack.enter_context(part.steered([s for s in meant if s.atoms is None or s.atoms], own[name]))
            yield

    def _of_part(self, names: Sequence[str], part: str, own: Mapping[str, Sequence[Atom]]) -> list[str]:
        """Of names such as `style/L17` those of a part, and of names of no part those that are not others' alone."""
        mine = []
        for name in names:
            owner, within, rest = name.partition("/")
            if within and owner in self.parts:
                mine += [rest] if owner == part else []
            elif is_named(name, own.get(part, ())) or not any(is_named(name, atoms) for atoms in own.values()):
                mine.append(name)
        return mine

    @contextmanager
    def contained(self, contain: float = 0.0, beside: float = 0.0) -> Iterator[None]:
        """Inside, all parts are."""
        with ExitStack() as stack:
            for part in self.parts.values():
                stack.enter_context(part.contained(contain, beside))
            yield

    @contextmanager
    def worded(self, own_words: OwnWords, until: float = UNTIL) -> Iterator[None]:
        """Inside, each of these parts reads words of its own."""
        for name, own in own_words.items():
            if name not in self.parts or not isinstance(own, Mapping):
                parts = ", ".join(self.parts)
                raise UserError(f"`own_words` of a mixture must be tables by part ({parts}), got {name!r}: {own!r}.")
        with ExitStack() as stack:
            for name, own in own_words.items():
                stack.enter_context(self.parts[name].worded(cast("Mapping[str, str]", own), until))
            yield

    def shut(self, prompts: Sequence[str]) -> list[str]:
        """The prompts for which the gates of all parts are shut."""
        shut = [part.shut(prompts) for part in self.parts.values()]
        return [prompt for prompt in prompts if all(prompt in some for some in shut)]

    def keep(self, left: Sequence[Atom]) -> int:
        """Keep only these of its atoms, at least one of each part, for good; returns how many."""
        own = {name: [a for a in left if a.part == name] for name in self.parts}
        # An empty one first, which is refused before anything is lost.
        return sum(self.parts[name].keep(own[name]) for name in sorted(own, key=lambda name: len(own[name])))

    def save(self, folder: str | Path, card: dict[str, Any] | None = None) -> Path:
        """Write parts and weights to a folder that does not exist yet, whole or not at all; `load` reads it."""
        folder = Path(folder).resolve()
        fresh = folder.with_name(f".{folder.name}.saving")
        if folder.exists():
            raise UserError(f"`out` must not exist yet: {folder}. Choose another folder.")
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            for name, part in self.parts.items():
                part.save(fresh / name, card)
            write_whole(fresh / MIXTURE, json.dumps({"weights": self.weights}, indent=1) + "\n")
            os.rename(fresh, folder)
        except OSError as error:
            raise UserError(f"Could not write {folder}: {error}.") from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return folder

    def remove(self) -> None:
        """Take all parts off."""
        for name in self.parts:
            tuner.remove_adapter(self.pipe, name)


def mix(
    pipe: Any,
    folders: Mapping[str, str | Path],
    weights: Mapping[str, float] | None = None,
    *,
    allow_other_base: bool = False,
) -> Mixture:
    """Attach saved adapters, each under its name, and let exactly these take part, with weights of 1 if not given.

    Raises UserError, with the pipeline as it was, on names that can't be taken, one adapter under two names, other
    bases, and weights that are not finite or of no part.
    """
    check_parts(folders, weights or {})
    if not allow_other_base:
        same_base({name: read(folder)[0] for name, folder in folders.items()})
    layers = (m for m in tuner.unwrap(pipe).modules() if isinstance(m, tuner.AtomLinear))
    active = next((list(layer.active_adapters) for layer in layers), [])
    parts: dict[str, Adapter] = {}
    try:
        for name, folder in folders.items():
            parts[name] = load(pipe, folder, name=name, allow_other_base=allow_other_base)
    except BaseException:
        for name in parts:
            tuner.remove_adapter(pipe, name)
        tuner.activate(pipe, *active)
        raise
    return Mixture(pipe, parts, weights or {})


# ------------------------------------------------------------------------------------------------ conflicts


def concepts(folders: Mapping[str, str | Path]) -> list[str]:
    """What to paint where nobody says: each concept that these runs were taught, and all in one prompt."""
    found = [concept for folder in folders.values() if (concept := concept_of(folder))]
    if len(found) < len(folders):
        raise UserError(
            "`prompt` must be given where not every adapter is a run with a concept. Name all concepts in it."
        )
    return [*found, ", ".join(found)]


@dataclass(frozen=True)
class Conflict:
    """Two atoms of different parts that fire together at a site, and write along each other or against."""

    first: Atom
    second: Atom
    """The less important one."""
    together: float
    """Correlation of their codes over positions."""
    cosine: float
    """Of what they write, with the signs of the weights: above 0 they pile up, below 0 they cancel."""


@torch.no_grad()
def conflicts(
    mixture: Mixture, prompts: Sequence[str], *, together: float = 0.3, along: float = 0.3, seed: int = 0, **call: Any
) -> list[Conflict]:
    """Pairs whose codes correlate by `together` or more and whose |cosine| is `along` or more.

    Codes are read with all gates open, on what the mixture paints from the prompts (`call` goes to `generate`), noised
    to several times. Prompts that name all concepts say most. First those with the largest product of correlation,
    |cosine| and the lesser importance.
    """
    order, found = list(mixture.parts), []
    ordered = sorted(mixture.atoms, key=lambda a: (order.index(a.part), a.row))
    for path, moments in _moments(mixture, prompts, seed, call).items():
        mean, atoms = moments[0, 1:], [a for a in ordered if a.path == path]
        covariance = moments[1:, 1:] - mean[:, None] * mean
        deviation = covariance.diagonal().clamp_min(0).sqrt()
        # 0 for an atom that never fires.
        correlation = (covariance / (deviation[:, None] * deviation)).nan_to_num(0, 0, 0)
        unit = normalize(torch.cat([side[path] for side in map(mixture.written, order) if path in side]), dim=1)
        cosine = unit @ unit.T
        for i, j in ((correlation >= together) & (cosine.abs() >= along)).triu(1).nonzero().tolist():
            if atoms[i].part != atoms[j].part:
                pair = sorted((atoms[i], atoms[j]), key=lambda a: -a.importance)
                found.append(Conflict(pair[0], pair[1], correlation[i, j].item(), cosine[i, j].item()))
    return sorted(found, key=lambda c: -c.together * abs(c.cosine) * c.second.importance)


def _moments(
    mixture: Mixture, prompts: Sequence[str], seed: int, call: Mapping[str, Any]
) -> dict[str, Float[Tensor, "1+n 1+n"]]:
    """By site: mean over positions of c c', with c = (1, codes of the first part's atoms, of the second's, ...)."""
    pipe, base, backbone = mixture.pipe, denoiser(mixture.pipe), backbone_of(mixture.pipe)
    painted = torch.stack([to_tensor(picture) for picture in generate(pipe, prompts, seed=seed, **call)])
    latents = backbone.encode_pictures(pipe, painted.to(pipe.vae.device))
    grid, conditioning = backbone.grid(base, latents), backbone.encode_prompts(pipe, list(prompts))
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}
    for time in TIMES:
        x, _ = backbone.noised(latents, time, torch.randn(latents.shape, generator=generator).to(latents))
        with ExitStack() as stack:
            stack.enter_context(tuner.open_gate(base))
            seen = [stack.enter_context(tuner.record(base, name)).codes for name in mixture.parts]
            backbone.predict(base, x, torch.full((len(x),), time, device=x.device), conditioning)
        for path in dict.fromkeys(path for codes in seen for path in codes):
            parts = [placed(backbone, path, codes[path][-1], conditioning, grid) for codes in seen if path in codes]
            c = nn.functional.pad(torch.cat([codes[layout.real] for codes, layout in parts], 1), (1, 0), value=1)
            sums[path] = sums.get(path, 0) + c.double().T @ c.double()
    return {path: (total / total[0, 0]).cpu() for path, total in sums.items()}


def weaker(found: Sequence[Conflict]) -> list[str]:
    """Of each two atoms that conflict, the worst conflicts first, the less important one: what to drop."""
    gone: dict[str, None] = {}
    for conflict in found:
        if conflict.first.name not in gone:
            gone[conflict.second.name] = None
    return list(gone)


def orthogonality(mixture: Mixture, first: str, second: str) -> float:
    """1 where no atom of one part writes along one of the other, 0 where both write the same.

    1 - sum |A B'|^2 / sqrt(sum |A A'|^2 sum |B B'|^2) over sites, each atom as long as its mean importance: one less
    the RV coefficient (Robert & Escoufier 1976).
    """
    for name in (first, second):
        if name not in mixture.parts:
            hint = did_you_mean(name, mixture.parts)
            raise UserError(f"The parts are {', '.join(mixture.parts)}, got {name!r}.{hint}")
    a, b = (
        {path: x * mixture.parts[name].statistics[path]["mean"][:, None] for path, x in mixture.written(name).items()}
        for name in (first, second)
    )
    joint, *own = (
        sum((x[path] @ y[path].T).square().sum().item() for path in x.keys() & y.keys())
        for x, y in ((a, b), (a, a), (b, b))
    )
    return 1 - joint / math.sqrt(math.prod(own)) if all(own) else 1.0


# --------------------------------------------------------------------------------------------------- as one


def merge(mixture: Mixture, name: str = "merged") -> Adapter:
    """The same outputs, to rounding, as one adapter. Raises UserError where one can't hold them: `merge_parts`."""
    atoms = mixture.atoms
    tables: dict[str, list[dict[str, Tensor]]] = {}
    for part, one in mixture.parts.items():
        for site, table in one.statistics.items():
            sizes = table.keys() & {"norm", "effect", "effect_beside"}
            scaled = table | {k: table[k] * abs(mixture.weights[part]) for k in sizes}
            tables.setdefault(site, []).append(scaled)
    statistics: Statistics = {
        site: {k: torch.cat([t[k] for t in own]) for k in own[0] if all(k in t for t in own)}
        for site, own in tables.items()
    }
    offsets = merge_parts(mixture.pipe, mixture.weights, name)
    merged = Adapter(mixture.pipe, statistics, name)
    sites = tuner.adapter_config(mixture.pipe, name).sites or []
    old = {f"L{sites.index(a.path)}[{a.id + offsets[a.part]}]": a for a in atoms}
    labels = _labels(old)
    with off_on_error(mixture.pipe, name, mixture.parts):
        surgery.name(merged, labels, {new: a.note for new, a in old.items()})
    return merged


def _labels(old: Mapping[str, Atom]) -> dict[str, str]:
    """Part and label of each atom that has one, as a label: not too long, and none twice."""
    found: dict[str, str] = {}
    for new, atom in old.items():
        if atom.label:
            whole = f"{atom.part} {atom.label}".lstrip("_-")
            label, turn = whole[:LONGEST], 1
            while label in found.values():
                turn += 1
                label = f"{whole[: LONGEST - 4]} {turn}"
            found[new] = label
    return found
