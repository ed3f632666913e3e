"""Atoms as things: what each one does, how they rank, which take part, and what became of them in another adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from atomtune.backbones import Backbone, Conditioning, placed, select
from atomtune.effect import effects
from atomtune.errors import UserError, did_you_mean
from atomtune.sparse import CodeStatistics
from atomtune.tuner import (
    AtomConfig,
    adapter_config,
    atom_layers,
    base_only,
    load_statistics,
    open_gate,
    prune,
    record,
    unwrap,
)
from atomtune.tuner.mixture import same_base
from atomtune.tuner.notes import Notes, notes
from atomtune.tuner.store import read

T = TypeVar("T")

Statistics = dict[str, dict[str, Tensor]]
"""By site and name, one number an atom (`by_time`: one an atom and time bucket)."""

FORMULAS = {
    "effect": "change of the prediction on the subject if the atom were out, to first order",
    "focus": "share of its effect that falls on the subject, were that as large as what is around it",
    "mean": "mean over positions of code x ||D||",
    "mean_when_active": "mean over the positions where it fires of code x ||D||",
    "maximum": "largest code x ||D||",
    "purity": "share of its energy that falls on the subject, were that as large as what is around it",
}
"""Importance formulas, as they are printed wherever their numbers are."""
READS = {"effect": ("effect",), "focus": ("effect", "effect_beside"), "purity": ("purity",)}
"""What they read of an atom's statistics; those not named here, their own and its norm."""

CHUNK = 4
"""Pictures that are measured at once."""

_NAME = re.compile(r"(?:[\w-]+/)?L\d+\[\d+\]")


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
    label: str = ""
    """What someone called it: it is found by that too."""
    note: str = ""
    """What someone wrote of it."""
    part: str = ""
    """The part of a mixture that it belongs to; its name then begins with it, as in `style/L17[137]`."""

    @property
    def name(self) -> str:
        return self._within(f"L{self.site}[{self.id}]")

    @property
    def called(self) -> str:
        """Its label, or its name where it has none."""
        return self._within(self.label) if self.label else self.name

    @property
    def title(self) -> str:
        """Label and name, for people: `ears (L17[137])`."""
        return f"{self.called} ({self.name})" if self.label else self.name

    @property
    def place(self) -> str:
        """Its site in a table of strengths, as in `style/layers.0.attn.to_q`."""
        return self._within(self.path)

    def _within(self, word: str) -> str:
        return f"{self.part}/{word}" if self.part else word

    def is_at(self, site: str) -> bool:
        """Whether that is its site, by number (`L17`) or the end of its path."""
        return site == f"L{self.site}" or f".{self.path}".endswith(f".{site}")

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
    collected = {site: _unseen(layer.r[adapter]) for site, layer in layers.items()}
    generator = torch.Generator().manual_seed(seed)
    moments = [t for t in times for _ in range(repeats)]
    subject = []
    # A few pictures at a time: the codes of all their passes are held until the subject is known.
    for chosen in torch.arange(len(latents)).split(CHUNK):
        part = None if masks is None else masks[chosen]
        given = select(conditioning, chosen)
        subject.append(_collect(collected, base, backbone, latents[chosen], given, adapter, part, moments, generator))
    change = effects(base, backbone, latents, conditioning, torch.cat(subject), adapter=adapter, times=times, seed=seed)
    return {site: _tensors(s, layers[site], adapter) | change[site] for site, s in collected.items()}


@torch.no_grad()
def reaches(
    model: nn.Module,
    backbone: Backbone,
    latents: Tensor,
    conditioning: Conditioning,
    *,
    adapter: str = "default",
    times: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    repeats: int = 2,
    seed: int = 0,
) -> dict[str, dict[str, Float[Tensor, " atoms"]]]:
    """By site, each atom's `reach`: its largest code on noised pictures that have nothing to do with the concept."""
    base = unwrap(model)
    found = {site: torch.zeros(layer.r[adapter]) for site, layer in atom_layers(base, adapter).items()}
    generator = torch.Generator().manual_seed(seed)
    grid = backbone.grid(base, latents)
    for rows in torch.arange(len(latents)).split(CHUNK):
        given = select(conditioning, rows)
        for time in (t for t in times for _ in range(repeats)):
            codes = noised_pass(base, backbone, latents[rows], given, time, generator, adapter)[-1]
            for site, values in codes.items():
                codes_at, layout = placed(backbone, site, values, given, grid)
                highest = codes_at[layout.real].abs().amax(0)
                found[site] = torch.maximum(found[site], highest.float().cpu())
    return {site: {"reach": values} for site, values in found.items()}


class Seen(NamedTuple):
    """What a site's atoms did at all real positions, and at those of the picture, where the subject is known."""

    everywhere: CodeStatistics
    picture: CodeStatistics


def _unseen(atoms: int) -> Seen:
    return Seen(CodeStatistics(atoms), CodeStatistics(atoms))


def _collect(
    collected: dict[str, Seen],
    base: nn.Module,
    backbone: Backbone,
    latents: Tensor,
    conditioning: Conditioning,
    adapter: str,
    masks: Tensor | None,
    times: Sequence[float],
    generator: torch.Generator,
) -> Float[Tensor, "batch tokens"]:
    """Add what the atoms do on some pictures, noised once for each of `times`; returns where the subject is."""
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
    for site, seen in collected.items():
        for _, codes, _ in passes:
            codes[site], layout = placed(backbone, site, codes[site], conditioning, (rows, columns))
        subject = layout.resample(masks, (rows, columns)).to(layout.image.device) if layout.image.any() else masks
        for i in range(len(latents)):
            real, image = layout.real[i], layout.image[i]
            for s, codes, _ in passes:
                seen.everywhere.update(codes[site][i : i + 1, real], time=s[i : i + 1])
                if image.any():
                    seen.picture.update(codes[site][i : i + 1, image], mask=subject[i : i + 1])
    return masks


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
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    s = torch.full((len(latents),), time, device=latents.device)
    x, _ = backbone.noised(latents, time, noise)
    with record(base, adapter) as recording, open_gate(base, adapter):
        predicted = backbone.predict(base, x, s, conditioning)
    return x, s, predicted, {site: calls[-1] for site, calls in recording.codes.items()}


def _tensors(seen: Seen, layer: Any, adapter: str) -> dict[str, Tensor]:
    found = {name: getattr(seen.everywhere, name) for name in ("density", "mean", "mean_when_active", "maximum")}
    found |= {"purity": seen.picture.purity, "reach_beside": seen.picture.maximum_beside}
    found["by_time"] = seen.everywhere.by_time.T.contiguous()
    found["norm"] = layer.dictionary(adapter).atoms.detach().norm(dim=1).double().cpu()
    return {name: values.float() for name, values in found.items()}


def per_token(values: Tensor, rows: int, columns: int) -> Float[Tensor, "batch tokens"]:
    """Mean over channels and over the pixels of each token; latents are `(b, c, h, w)`."""
    return nn.functional.adaptive_avg_pool2d(values.mean(1, keepdim=True), (rows, columns)).flatten(1)


# --------------------------------------------------------------------------------------------------- rank


def ranking(model: Any, statistics: Statistics, formula: str = "effect", adapter: str = "default") -> list[Atom]:
    """Every atom of the adapter, the most important first. Raises UserError on an unknown formula."""
    if formula not in FORMULAS:
        hint = did_you_mean(formula, FORMULAS)
        raise UserError(f"`formula` must be one of {', '.join(FORMULAS)}, got {formula!r}.{hint}")
    sites, noted = adapter_config(model, adapter).sites or [], notes(model, adapter)
    found = []
    for path, layer in atom_layers(model, adapter).items():
        if path not in statistics:
            raise UserError(f"The adapter has no statistics at {path}: it was saved without them. Train again.")
        s = statistics[path]
        for name in ("density", "purity", *READS.get(formula, (formula, "norm"))):
            if name not in s or s[name].shape != (layer.r[adapter],):
                raise UserError(f"The adapter's statistics at {path} lack the {name} of some atoms. Train again.")
        values = _importance(s, formula)
        site = sites.index(path)
        for row, number in enumerate(layer.dictionary(adapter).atom_ids.tolist()):
            found.append(
                Atom(
                    site=site,
                    id=number,
                    path=path,
                    row=row,
                    importance=values[row].item(),
                    density=s["density"][row].item(),
                    purity=s["purity"][row].item(),
                    **noted.get(f"L{site}[{number}]", {}),
                )
            )
    return sorted(found, key=lambda a: (-a.importance, a.site, a.id))


def _importance(s: dict[str, Tensor], formula: str) -> Tensor:
    if formula == "focus":
        on, beside = s["effect"].square(), s["effect_beside"].square()
        return (on / (on + beside)).nan_to_num(0)
    values = s[formula].nan_to_num(0)
    return values if formula in READS else values * s["norm"]


def order_by_importance(model: Any, statistics: Statistics, adapter: str = "default") -> Statistics:
    """Put each dictionary's most important atoms first; returns the statistics in the new order."""
    order = {site: _importance(s, "effect").argsort(descending=True, stable=True) for site, s in statistics.items()}
    return restrict(model, statistics, order, adapter)


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


def restrict(model: Any, statistics: Statistics, rows: Mapping[str, Tensor], adapter: str = "default") -> Statistics:
    """Keep only these rows at each site, in that order, for good; returns the statistics of what is left."""
    prune(model, dict(rows), adapter)
    return {site: {name: t[rows[site]] for name, t in s.items()} for site, s in statistics.items() if len(rows[site])}


def find(ranked: Sequence[Atom], name: str) -> Atom:
    """The atom of that name (`L17[137]`) or label. Raises UserError, with close names, where there is none."""
    wanted = name.strip()
    known = {a.called: a for a in ranked} | {a.name: a for a in ranked}
    if wanted in known:
        return known[wanted]
    hint = did_you_mean(wanted, known)
    if _NAME.fullmatch(wanted) is None:
        raise UserError(f"An atom is named like L17[137], or as it was labelled, got {name!r}.{hint}")
    raise UserError(f"The adapter has no atom {name}.{hint}")


def find_each(ranked: Sequence[Atom], values: Mapping[str, T]) -> dict[Atom, T]:
    """Values by atom. Raises UserError on unknown names, and where two of them are one atom's."""
    found: dict[Atom, T] = {}
    for name, value in values.items():
        atom = find(ranked, name)
        if atom in found:
            raise UserError(f"{atom.title} is given twice, by its label and its name. Give it once.")
        found[atom] = value
    return found


def at_site(ranked: Sequence[Atom], name: str) -> list[Atom]:
    """All atoms of a site, by its number (`L17`) or the end of its path. Raises UserError where there is none."""
    found = [a for a in ranked if a.is_at(name) or (a.part and a.is_at(name.removeprefix(f"{a.part}/")))]
    if not found:
        ends = {a.path.split(".", n)[-1] for a in ranked for n in range(a.path.count(".") + 1)}
        known = ends | {a._within(end) for a in ranked for end in (f"L{a.site}", a.path.rpartition(".")[2])}
        raise UserError(f"The adapter has no site {name!r}.{did_you_mean(name, known)}")
    return found


# --------------------------------------------------------------------------------------------------- dial

Density = float | Mapping[str, float]
"""A share of all atoms, or of those of some sites by name; atoms of other sites all take part."""


@contextmanager
def strengths(model: Any, values: Mapping[str, float | Tensor], adapter: str = "default") -> Iterator[None]:
    """Set the strength of atoms for a while: by site (`Atom.place`), one number or one an atom."""
    held = places(model, values, adapter)
    before = {place: layer.atom_strength[part].clone() for place, (layer, part) in held.items()}
    try:
        for place, value in values.items():
            layer, part = held[place]
            layer.atom_strength[part].copy_(torch.as_tensor(value))
        yield
    finally:
        for place, value in before.items():
            layer, part = held[place]
            # Looked up again: a model that is moved or cast has other buffers, one that is pruned shorter ones or none.
            if part in layer.atom_strength and layer.atom_strength[part].shape == value.shape:
                layer.atom_strength[part].copy_(value)


def places(model: Any, wanted: Iterable[str], adapter: str = "default") -> dict[str, tuple[Any, str]]:
    """The layer and the adapter's name at each of these places; one without a part is the adapter's own."""
    parts = {place: place.rpartition("/")[0] or adapter for place in wanted}
    layers = {part: atom_layers(model, part) for part in set(parts.values())}
    return {place: (layers[part][place.rpartition("/")[2]], part) for place, part in parts.items()}


@contextmanager
def contained(model: Any, floors: Mapping[str, Float[Tensor, " atoms"]], adapter: str = "default") -> Iterator[None]:
    """Keep codes off, for a while, that are not above their atom's floor: by site."""
    layers = atom_layers(model, adapter)
    before = {site: layers[site].floors.get(adapter) for site in floors}
    try:
        for site, floor in floors.items():
            layers[site].floors[adapter] = floor.to(layers[site].atom_strength[adapter].device)
        yield
    finally:
        for site, old in before.items():
            if old is None:
                layers[site].floors.pop(adapter, None)
            else:
                layers[site].floors[adapter] = old


def dialled(
    ranked: Sequence[Atom],
    density: Density = 1.0,
    strength: Mapping[str, float] | None = None,
    purity: float = 0.0,
) -> dict[str, Tensor]:
    """Strengths by place for the first `density` of a ranking, of those the pure ones; then single atoms by name.

    Atoms of unknown purity, such as those that see words only, count as pure.
    """
    if not 0 <= purity <= 1:
        raise UserError(f"`purity` must be between 0 and 1, got {purity}.")
    sizes: dict[str, int] = {}
    for atom in ranked:
        sizes[atom.place] = max(sizes.get(atom.place, 0), atom.row + 1)
    values = {place: torch.zeros(size) for place, size in sizes.items()}
    for atom in _dense(ranked, density):
        if not atom.purity < purity:
            values[atom.place][atom.row] = 1.0
    for atom, value in find_each(ranked, strength or {}).items():
        if not math.isfinite(value):
            raise UserError(f"The strength of {atom.called} must be a finite number, got {value}.")
        values[atom.place][atom.row] = value
    return values


def _dense(ranked: Sequence[Atom], density: Density) -> Sequence[Atom]:
    """The atoms that a density leaves."""
    if not isinstance(density, Mapping):
        return ranked[: count(density, len(ranked))]
    gone: set[str] = set()
    for site, share in density.items():
        own = at_site(ranked, site)
        gone |= {a.name for a in own[count(share, len(own)) :]}
    return [a for a in ranked if a.name not in gone]


# ----------------------------------------------------------------------------------------------------- diff

SETTINGS = ("sparsifier", "k", "threshold", "encoder", "steps", "normalize", "encoder_bias")
"""Entries of the config that change what the same tensors compute."""

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Match:
    """An atom of A, and the atom of B that it is now or that is likest to it."""

    kind: str
    """shared (equal bit for bit), changed, only A or only B."""
    path: str
    a: str | None
    b: str | None
    likeness: float | None
    """Cosine of the rank-one maps encoder x atom, which is the product of both cosines; to the likest one there is,
    where there is none that it is."""
    importance: float | None = None
    """Effect of A's atom, or of B's where only B has it; None where nothing was measured."""


@dataclass(frozen=True)
class Difference:
    """What two adapters of one base differ in."""

    by: str
    """How atoms were matched: by `id`, or by `likeness` where they were trained apart and ids mean nothing."""
    settings: dict[str, tuple[Any, Any]]
    """Entries of the config that are not the same."""
    gate: str
    """none, shared, changed, only A or only B."""
    matches: list[Match]


def diff(a: str | Path, b: str | Path, alike: float = 0.5) -> Difference:
    """What became of each atom of a saved adapter in another; needs no base. Raises UserError on different bases.

    Matched by id where most atoms are likest to the one of their id; else those that are each other's likest, down to
    a likeness of `alike`.
    """
    (first, left, noted), (second, right, other_noted) = read(a), read(b)
    same_base({str(a): first, str(b): second})
    gate = _kind(left.pop("atom_gate", {}), right.pop("atom_gate", {}))
    tables = {path: _likeness(left[path], right[path], first.sparsifier == "dense") for path in left if path in right}
    ids = {path: _same_ids(left[path], right[path]) for path in tables}
    hits = [bool(tables[path][i].argmax() == j) for path, pairs in ids.items() for i, j in pairs]
    by_id = sum(hits) * 2 > len(hits)
    pairs = ids if by_id else {path: _likest(table, alike) for path, table in tables.items()}
    measured = [load_statistics(folder) for folder in (a, b)]

    def effect(side: int, path: str, row: int) -> float | None:
        values = measured[side].get(path, {}).get("effect")
        return None if values is None or row >= len(values) else values[row].item()

    matches = []
    for path in dict.fromkeys([*(first.sites or []), *(second.sites or [])]):
        mine, theirs = _names(first, path, left, noted), _names(second, path, right, other_noted)
        for i, j in pairs.get(path, []):
            kind = _kind(_row(left[path], i), _row(right[path], j))
            likeness = tables[path][i, j].item()
            matches.append(Match(kind, path, mine.pop(i), theirs.pop(j), likeness, effect(0, path, i)))
        best = [tables[path].amax(dim).tolist() for dim in (1, 0)] if path in tables else None
        for i, name in mine.items():
            matches.append(Match("only A", path, name, None, best[0][i] if best else None, effect(0, path, i)))
        for j, name in theirs.items():
            matches.append(Match("only B", path, None, name, best[1][j] if best else None, effect(1, path, j)))
    settings = {name: (getattr(first, name), getattr(second, name)) for name in SETTINGS}
    settings = {name: pair for name, pair in settings.items() if pair[0] != pair[1]}
    return Difference("id" if by_id else "likeness", settings, gate, matches)


def _likeness(a: Tensors, b: Tensors, signed: bool) -> Float[Tensor, "a b"]:
    """<e d', f g'> / (|e d'| |f g'|) = cos(e, f) cos(d, g); but an encoder turned round reads something else."""
    read_by, written = (
        normalize(a[name].double(), dim=1) @ normalize(b[name].double(), dim=1).T for name in ("encoder", "atoms")
    )
    return (read_by if signed else read_by.clamp_min(0)) * written


def _same_ids(a: Tensors, b: Tensors) -> list[tuple[int, int]]:
    at = {number: j for j, number in enumerate(b["atom_ids"].tolist())}
    return [(i, at[number]) for i, number in enumerate(a["atom_ids"].tolist()) if number in at]


def _likest(likeness: Float[Tensor, "a b"], alike: float) -> list[tuple[int, int]]:
    """Pairs of which each is the other's likest."""
    to, back = likeness.argmax(1).tolist(), likeness.argmax(0).tolist()
    return [(i, j) for i, j in enumerate(to) if back[j] == i and likeness[i, j] >= alike]


def _names(config: AtomConfig, path: str, tensors: dict[str, Tensors], noted: Notes) -> dict[int, str]:
    """Labels or names of a site's atoms, by row."""
    ids = tensors[path]["atom_ids"].tolist() if path in tensors else []
    names = [f"L{(config.sites or []).index(path)}[{number}]" for number in ids]
    return {row: noted.get(name, {}).get("label", name) for row, name in enumerate(names)}


def _row(tensors: Tensors, row: int) -> Tensors:
    """All that an atom is; what its whole site shares is no part of it."""
    return {name: t[row] for name, t in tensors.items() if t.ndim and name != "atom_ids"}


def _kind(a: Tensors, b: Tensors) -> str:
    if not a or not b:
        return "only A" if a else "only B" if b else "none"
    return "shared" if a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) else "changed"
