"""An adapter attached to a pipeline: its atoms to see, its dials to turn, its file to save."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor

from atomtune import atoms as _atoms
from atomtune import tuner
from atomtune.atoms import Atom, Density, Statistics
from atomtune.backbones import backbone_of, denoiser
from atomtune.errors import UserError
from atomtune.own_words import UNTIL
from atomtune.own_words import own_words as reading_own_words
from atomtune.steering import Steer, steered, unheard
from atomtune.tuner.mixture import is_mixture, saved_parts

Steering = Sequence[Steer] | Mapping[str, Sequence[Steer]]
"""Steers for all, or by part of a mixture."""

OwnWords = Mapping[str, str] | Mapping[str, Mapping[str, str]]
"""Words of a prompt and what is read instead, or by part of a mixture."""

REACH = {"contain": ("reach", "on unrelated pictures"), "beside": ("reach_beside", "beside the subject")}
"""Dials that keep codes off up to a share of what they reached, the statistic that tells it, and where that was."""


class Atoms:
    """The atoms of an adapter, ranked by an importance formula."""

    def __init__(self, adapter: Adapter, formula: str = "effect") -> None:
        self.adapter, self.formula = adapter, formula
        self.ranked = adapter.ranking(formula)

    def __len__(self) -> int:
        return len(self.ranked)

    def __iter__(self) -> Iterator[Atom]:
        return iter(self.ranked)

    def __getitem__(self, name: str) -> Atom:
        return _atoms.find(self.ranked, name)

    def top(self, n: int) -> list[Atom]:
        """The `n` most important atoms."""
        return self.ranked[:n]

    def by(self, formula: str) -> Atoms:
        """The same atoms under another formula, a key of `atomtune.atoms.FORMULAS`."""
        return Atoms(self.adapter, formula)


class Adapter:
    """A handle on an attached adapter; the pipeline stays a plain diffusers pipeline."""

    def __init__(self, pipe: Any, statistics: Statistics, name: str = "default") -> None:
        self.pipe, self.statistics, self.name = pipe, statistics, name

    def __repr__(self) -> str:
        try:
            sites, config = tuner.atom_layers(self.pipe, self.name), tuner.adapter_config(self.pipe, self.name)
        except UserError:
            return f"<adapter {self.name!r}: not attached>"
        atoms, gate = sum(layer.r[self.name] for layer in sites.values()), "a" if config.gate_input else "no"
        return f"<adapter {self.name!r}: {atoms} atoms at {len(sites)} sites, {gate} prompt gate>"

    @property
    def atoms(self) -> Atoms:
        """The atoms, by their effect on the subject."""
        return Atoms(self)

    def ranking(self, formula: str) -> list[Atom]:
        """Every atom, the most important first."""
        return _atoms.ranking(self.pipe, self.statistics, formula, self.name)

    @contextmanager
    def using(
        self,
        density: Density = 1.0,
        strength: float | dict[str, float] = 1.0,
        formula: str = "effect",
        atoms: dict[str, float] | None = None,
        steer: Steering = (),
        *,
        purity: float = 0.0,
        contain: float = 0.0,
        beside: float = 0.0,
        own_words: OwnWords | None = None,
        own_until: float = UNTIL,
    ) -> Iterator[Self]:
        """Turn the dials for a while.

        `density`: share of all atoms that take part, the most important first by `formula`; 0 gives the base's
        pictures, bit for bit. A table such as `{"L3": 0.2, "to_v": 0.5}` speaks of the atoms of single sites. `purity`:
        the share of an atom's energy on the subject from which it takes part. `strength`: a multiplier on the whole
        adapter, or a table of single atoms by name, which `atoms` is too. `steer`: strengths that hold at some times,
        places or words (of a mixture also by part); all of them multiply. `contain`: an atom fires only where its code
        is above this share of the most that it reached on unrelated pictures; at 1 it is silent on all of those.
        `beside`: likewise, of the most that it reached beside the subject in its own pictures.
        `own_words`: codes on the picture are read as if the prompt said these words instead, down to the time
        `own_until` (1 is noise, 0 the picture); of a mixture, by part.
        """
        whole, single = (1.0, strength) if isinstance(strength, dict) else (strength, {})
        if not math.isfinite(whole):
            raise UserError(f"`strength` must be a finite number, got {whole}.")
        ranked = self.atoms.by(formula).ranked
        values = _atoms.dialled(ranked, density, single | (atoms or {}), purity)
        scaled = {place: value * whole for place, value in values.items()}
        with ExitStack() as stack:
            stack.enter_context(_atoms.strengths(self.pipe, scaled, self.name))
            stack.enter_context(self.steered(steer, ranked))
            stack.enter_context(self.contained(contain, beside))
            stack.enter_context(self.worded(own_words or {}, own_until))
            yield self

    def worded(self, own_words: OwnWords, until: float = UNTIL) -> AbstractContextManager[None]:
        """Inside, its codes on the picture are read with these words of its own in the prompt's place."""
        if any(isinstance(own, Mapping) for own in own_words.values()):
            raise UserError(f"`own_words` by part is for mixtures, and {self.name} is none. Give one table of words.")
        return reading_own_words(self.pipe, cast("Mapping[str, str]", own_words), self.name, until)

    def steered(self, steer: Steering, ranked: Sequence[Atom]) -> AbstractContextManager[None]:
        """Inside, the steers hold for its atoms, `ranked`."""
        if isinstance(steer, Mapping):
            raise UserError(f"`steer` by part is for mixtures, and {self.name} is none. Give a list.")
        return steered(self.pipe, steer, ranked, self.name)

    def contained(self, contain: float = 0.0, beside: float = 0.0) -> AbstractContextManager[None]:
        """Inside, its atoms fire only above shares of what they reached: on unrelated pictures, beside the subject."""
        floors: dict[str, Tensor] = {}
        for name, share in {"contain": contain, "beside": beside}.items():
            if not (math.isfinite(share) and share >= 0):
                raise UserError(f"`{name}` must be 0 or more, got {share}.")
            statistic, where = REACH[name]
            for site, found in self.statistics.items() if share else ():
                if statistic not in found:
                    raise UserError(
                        f"`{name}` needs what atoms reach {where}, which {self.name} was saved without (at {site}). "
                        "Train it again."
                    )
                floor = share * found[statistic]
                floors[site] = torch.maximum(floors[site], floor) if site in floors else floor
        return _atoms.contained(self.pipe, floors, self.name)

    def shut(self, prompts: Sequence[str]) -> list[str]:
        """The prompts for which its gate is shut: their pictures are the base's, bit for bit."""
        with unheard(self.pipe):
            given = backbone_of(self.pipe).encode_prompts(self.pipe, list(prompts))
        gate = tuner.read_gates(denoiser(self.pipe), given).get(self.name, torch.ones(()))
        rows = gate.expand(len(prompts), *gate.shape[1:])
        return [prompt for prompt, row in zip(prompts, rows, strict=True) if not row.any()]

    def prune(self, keep: float | int, formula: str = "effect") -> int:
        """Keep a share (a float in (0, 1]) or a number (an int) of the atoms for good; returns how many."""
        ranked = self.atoms.by(formula).ranked
        share = keep if isinstance(keep, float) and 0 < keep <= 1 else 0.0
        number = keep if isinstance(keep, int) else _atoms.count(share, len(ranked))
        if not 1 <= number <= len(ranked):
            raise UserError(f"`keep` must leave between 1 and {len(ranked)} atoms, got {keep}.")
        return self.keep(ranked[:number])

    def keep(self, left: Sequence[Atom]) -> int:
        """Keep only these of its atoms, at least one, for good; returns how many."""
        if not left:
            raise UserError(f"At least one atom of {self.name} must be left, got none. Keep more.")
        rows = _atoms.kept([*left, *self.atoms], len(left))
        self.statistics = _atoms.restrict(self.pipe, self.statistics, rows, self.name)
        return len(left)

    def save(self, folder: str | Path, card: dict[str, Any] | None = None) -> Path:
        """Write the adapter, its statistics and a model card to a folder, whole or not at all."""
        return tuner.save(self.pipe, folder, self.name, card=card, statistics=self.statistics)

    def remove(self) -> None:
        """Take the adapter off; the pipeline is the base again."""
        tuner.remove_adapter(self.pipe, self.name)


def load(pipe: Any, folder: str | Path, *, name: str = "default", allow_other_base: bool = False) -> Adapter:
    """Attach the adapter saved in a folder (a run's folder too) to a pipeline; a mixture's parts keep their names."""
    if is_mixture(folder):
        from atomtune.mix import mix  # which builds on this module

        return mix(pipe, *saved_parts(folder), allow_other_base=allow_other_base)
    tuner.load(pipe, folder, name, allow_other_base=allow_other_base)
    return Adapter(pipe, tuner.load_statistics(folder), name)


def save(adapter: Adapter, folder: str | Path, **card: Any) -> Path:
    """Write an adapter to a folder; keyword arguments go on its model card."""
    return adapter.save(folder, card)


def concept_of(folder: str | Path) -> str | None:
    """The words for what a run was taught, if the folder is a run's that was told any."""
    path = Path(folder) / "options.json"
    return _entry(path, "concept") if path.is_file() else None


def base_of(folder: str | Path) -> str | None:
    """The base that a saved adapter names, if it names one."""
    first = next(iter(saved_parts(folder)[0].values())) if is_mixture(folder) else folder
    tuner.check_there(Path(first))
    return _entry(Path(first) / "adapter_config.json", "base_model_name_or_path")


def _entry(path: Path, name: str) -> str | None:
    """A text in a JSON file; None where it has none."""
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8"))).get(name)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} can't be read: {error}.") from error
    if not isinstance(found, str | None):
        raise UserError(f"{path}: `{name}` must be text, got {found!r}.")
    return found or None
