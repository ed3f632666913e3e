"""An adapter attached to a pipeline: its atoms to see, its dials to turn, its file to save."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atomtune import atoms as _atoms
from atomtune import tuner
from atomtune.atoms import Atom, Statistics
from atomtune.errors import UserError


class Atoms:
    """The atoms of an adapter, ranked by an importance formula."""

    def __init__(self, adapter: Adapter, formula: str = "mean") -> None:
        self.adapter, self.formula = adapter, formula
        self.ranked = _atoms.ranking(adapter.pipe, adapter.statistics, formula, adapter.name)

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

    @property
    def atoms(self) -> Atoms:
        """The atoms, by mean importance."""
        return Atoms(self)

    @contextmanager
    def using(
        self,
        density: float = 1.0,
        strength: float | dict[str, float] = 1.0,
        formula: str = "mean",
        atoms: dict[str, float] | None = None,
    ) -> Iterator[Adapter]:
        """Turn the dials for a while.

        `density`: share of all atoms that take part, the most important first by `formula`; 0 gives the base's
        pictures, bit for bit. `strength`: a multiplier on the whole adapter, or a table of single atoms by name,
        which `atoms` is too.
        """
        whole, single = (1.0, strength) if isinstance(strength, dict) else (strength, {})
        if not math.isfinite(whole):
            raise UserError(f"`strength` must be a finite number, got {whole}.")
        ranked = self.atoms.by(formula).ranked
        values = _atoms.dialled(ranked, density, single | (atoms or {}))
        scaled = {site: value * whole for site, value in values.items()}
        with _atoms.strengths(self.pipe, scaled, self.name):
            yield self

    def prune(self, keep: float | int, formula: str = "mean") -> int:
        """Keep a share (a float in (0, 1]) or a number (an int) of the atoms for good; returns how many."""
        ranked = self.atoms.by(formula).ranked
        share = keep if isinstance(keep, float) and 0 < keep <= 1 else 0.0
        number = keep if isinstance(keep, int) else _atoms.count(share, len(ranked))
        if not 1 <= number <= len(ranked):
            raise UserError(f"`keep` must leave between 1 and {len(ranked)} atoms, got {keep}.")
        rows = _atoms.kept(ranked, number)
        tuner.prune(self.pipe, rows, self.name)
        self.statistics = {
            site: {name: tensor[rows[site]] for name, tensor in s.items()}
            for site, s in self.statistics.items()
            if len(rows[site])
        }
        return number

    def save(self, folder: str | Path, card: dict[str, Any] | None = None) -> Path:
        """Write the adapter, its statistics and a model card to a folder, whole or not at all."""
        return tuner.save(self.pipe, folder, self.name, card=card, statistics=self.statistics)

    def remove(self) -> None:
        """Take the adapter off; the pipeline is the base again."""
        tuner.remove_adapter(self.pipe, self.name)


def load(pipe: Any, folder: str | Path, *, name: str = "default", allow_other_base: bool = False) -> Adapter:
    """Attach the adapter saved in a folder (a run's folder too) to a pipeline."""
    tuner.load(pipe, folder, name, allow_other_base=allow_other_base)
    return Adapter(pipe, tuner.load_statistics(folder), name)


def save(adapter: Adapter, folder: str | Path, **card: Any) -> Path:
    """Write an adapter to a folder; keyword arguments go on its model card."""
    return adapter.save(folder, card)


def base_of(folder: str | Path) -> str | None:
    """The base that a saved adapter names, if it names one."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no adapter: adapter_config.json is missing.")
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except ValueError as error:
        raise UserError(f"{path} can't be read: {error}.") from error
    return found or None
