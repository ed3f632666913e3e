"""A whole comparison: its cells, their rows, and what is written of them."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atomtune.backbones import EMBEDDED, denoiser, open_pipeline
from atomtune.compare import plots, tables
from atomtune.compare.cells import Cell
from atomtune.compare.fit import CODE, COMPONENTS
from atomtune.compare.methods import BASE, METHODS, REFERENCES, options_of, parse
from atomtune.compare.results import joined, others, restore, write_result
from atomtune.compare.results import rows as rows_of
from atomtune.compare.runner import run
from atomtune.compare.tasks import TASKS
from atomtune.errors import UserError, did_you_mean
from atomtune.files import exclusive, write_whole
from atomtune.tuner import fingerprint

TWO_AT_ONCE = ("mixing", "both")
"""Tasks in which two adapters act."""

COLUMNS = {
    "customization": ("similarity", "object_accuracy", "alignment", "drift", "bleed", "inner_leak", "silence"),
    "style": ("similarity", "object_accuracy", "alignment", "drift", "inner_leak", "silence"),
    "editing": ("similarity", "object_accuracy", "alignment", "true_distance"),
    "editing-bare": ("similarity", "object_accuracy", "alignment", "true_distance"),
    "mixing": ("true_distance", "similarity", "object_accuracy", "style", "both"),
    "both": ("true_distance", "similarity", "object_accuracy", "other"),
}
"""What the table of a task shows."""


@dataclass(frozen=True)
class Grid:
    """Which cells."""

    task: str
    methods: tuple[str, ...]
    subjects: tuple[str, ...] = ("benchmark",)
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: tuple[int, ...] = (16,)
    base: str = EMBEDDED
    sampler: int = 12
    dials: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of training for every method, unless it says otherwise."""

    def cells(self) -> list[Cell]:
        """Every cell, subject by subject. Raises UserError on a task, method, subject or option that is unknown."""
        if self.task not in TASKS:
            hint = did_you_mean(self.task, TASKS)
            raise UserError(f"`task` must be one of {', '.join(TASKS)}, got {self.task!r}.{hint}")
        for size in self.sizes:
            if size < 1:
                raise UserError(f"`sizes` must be ranks of at least 1, got {size}.")
        for method in self.methods if self.task in TWO_AT_ONCE else ():
            name, _ = parse(method)
            rival = None if name in REFERENCES else METHODS[name].rival
            if rival and rival not in COMPONENTS:
                raise UserError(f"`methods` of {self.task} must have parts that add up, got {name}: it has none.")
        for axis in ("methods", "subjects", "seeds", "sizes"):
            if not getattr(self, axis):
                raise UserError(f"`{axis}` must name at least one, got none.")
        subjects = subjects_of(self.task, self.subjects)
        shared = {"base": self.base, "sampler": self.sampler, "dials": self.dials}
        configs = [(method, config) for method in self.methods for config in self._configs(method)]
        shared["fingerprint"] = fingerprint(denoiser(open_pipeline(self.base)))
        return [
            Cell(self.task, method, subject, seed, shared | _seeded(config, seed))
            for subject in subjects
            for seed in self.seeds
            for method, config in configs
        ]

    def _configs(self, method: str) -> list[dict[str, Any]]:
        name, _ = parse(method)
        if name in REFERENCES:
            return [{}]
        return [
            {
                "options": options_of(method, size, **self.options).essence(),
                "size": size,
                "version": METHODS[name].version,
            }
            for size in self.sizes
        ]


def _seeded(config: dict[str, Any], seed: int) -> dict[str, Any]:
    return config | {"options": config["options"] | {"seed": seed}} if config else config


def subjects_of(task: str, names: Sequence[str]) -> tuple[str, ...]:
    """The subjects meant: `benchmark` and `tuning` stand for all of theirs."""
    known = TASKS[task]
    groups = {"benchmark": known.subjects, "tuning": known.tuning}
    every = (*known.subjects, *known.tuning)
    found: list[str] = []
    for name in names:
        if name not in groups and name not in every:
            listing = ", ".join((*groups, *every))
            raise UserError(f"`subjects` of {task} must be among {listing}, got {name!r}.{did_you_mean(name, every)}")
        found += groups.get(name, (name,))
    return tuple(dict.fromkeys(found))


def compare(
    grid: Grid,
    out: Path,
    name: str,
    *,
    processes: int | None = None,
    ray: str | None = None,
    again: bool = False,
    add: bool = False,
    results: Path | None = None,
    command: str = "",
) -> Path:
    """Measure what is missing, then write `name`.json, its tables and its figures in `results`; returns the table.

    Finished cells and trained methods are kept in `out`, which any number of runs may share; cells that the stored
    result of that name holds are not measured again either. With `add` its other cells stay in the result.
    """
    begin = time.monotonic()
    cells, folder = grid.cells(), results or out / "results"
    path = folder / f"{name}.json"
    settings = {"task": grid.task, **{name: cells[0].config[name] for name in ("fingerprint", "sampler")}}
    settings |= {"set": dict(grid.options)}
    beside = others(path, cells, settings) if add else None  # raises before anything is measured
    if beside and (changed := changed_since(beside.rows, grid)):
        raise UserError(
            f"`add` would keep rows of {', '.join(changed)} that were measured by an earlier version, or at other "
            "rates. Measure them with the rest, or name another result."
        )
    if not again and (restored := restore(path, cells, out)):
        print(f"{restored} cells are taken from {path}", file=sys.stderr)
    outcomes = run(
        cells,
        "atomtune.compare.measure:work",
        out,
        processes=(os.cpu_count() or 1) if processes is None else processes,
        ray=ray,
        again=again,
        modules=CODE,
    )
    failed = [o for o in outcomes if o.error is not None]
    for outcome in failed:
        print(f"failed: {outcome.cell.label}: {outcome.error}", file=sys.stderr)
    codes = {o.code for o in outcomes if o.error is None}
    if len(codes) > 1:
        print(
            f"warning: these cells were measured by {len(codes)} versions of the code; --again renews them",
            file=sys.stderr,
        )
    folder.mkdir(parents=True, exist_ok=True)
    spent = sum(o.seconds for o in outcomes) or time.monotonic() - begin
    with exclusive(folder):
        beside = others(path, cells, settings) if add else None
        rows = rows_of(outcomes)
        write_result(path, command, rows, spent, outcomes=outcomes, settings=settings, beside=beside)
    commands, every = joined(command, rows, beside)
    return write_report(every, grid.task, folder, name, commands)


def changed_since(rows: Sequence[Mapping[str, Any]], grid: Grid) -> list[str]:
    """Methods with rows that no cell of today's would give: of an earlier version, or at another learning rate."""
    measured = [row for row in rows if "error" not in row]
    columns = ("method", "subject", "seed")
    axes: dict[str, Any] = {f"{name}s": tuple(sorted({row[name] for row in measured})) for name in columns}
    axes["sizes"] = tuple(sorted({row["size"] for row in measured if row.get("size")})) or grid.sizes
    if not measured:
        return []
    cells = dataclasses.replace(grid, **axes).cells()
    known = {dataclasses.replace(c, config={**c.config, "dials": dials}).key for c in cells for dials in (True, False)}
    return sorted({row["method"] for row in measured if row["cell"] not in known})


def tune(grid: Grid, out: Path, name: str = "tuning", **given: Any) -> Path:
    """Every method at each of its learning rates, by the same search; the table's first row of a method is its best.

    The score is what one operating point dominates: similarity gained over the base x alignment x (1 - drift).
    """
    methods = [m for m in grid.methods if m not in REFERENCES]
    tried = [f"{m}{',' if ':' in m else ':'}lr={rate}" for m in methods for rate in METHODS[parse(m)[0]].rates]
    return compare(dataclasses.replace(grid, methods=(BASE, *tried), dials=False), out, name, **given)


def best_rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """From the rows of `tune`: the learning rates of the largest hypervolume at full strength, as in `METHODS`."""
    found: dict[str, tuple[float, float]] = {}
    full = [row for row in rows if row.get("knob") == "full"]
    for entry in tables.method_hypervolume(full, tables.base_reference(rows)):
        if entry["method"] not in REFERENCES:
            name, changed = parse(entry["method"])
            found[name] = max(found.get(name, (0.0, 0.0)), (entry["hypervolume"].mean, changed["lr"]))
    return {name: rate for name, (_, rate) in found.items()}


def write_report(rows: Sequence[Mapping[str, Any]], task: str, folder: Path, name: str, command: str) -> Path:
    """Tables in Markdown, and the figures beside them."""
    if task.startswith("editing"):
        rows = [row for row in rows if row.get("edit", "all") == "all"]
    summary = tables.summarise(rows)
    full = [e for e in summary if e["knob"] == "full" or (e["knob"] == "scale" and e["knob_value"] == 1.0)]
    columns = COLUMNS[task]
    keys = {"method": "method", "prior": "prior", "gate": "gate", "size": "rank"}
    parts = [f"# {name}", tables.markdown(full, columns, keys, command=command)]
    if any("drift" in row for row in rows) and any(tables.is_base(row) for row in rows):
        reference = tables.base_reference(rows)
        volumes = tables.method_hypervolume([row for row in rows if row.get("subject") in reference], reference)
        parts.append(tables.markdown(volumes, ("hypervolume",), keys, command=command))
    dialled = [e for e in summary if e not in full]
    shown = [c for c in columns if any(isinstance(e.get(c), tables.Interval) and e[c].cells for e in dialled)]
    if shown:
        knobs = keys | {"knob": "knob", "knob_value": "at", "formula": "formula"}
        parts.append(tables.markdown(dialled, shown, knobs, command=command))
    path = folder / f"{name}.md"
    write_whole(path, "\n\n".join(parts) + "\n")
    _figures(summary, columns, folder, name)
    return path


def _figures(summary: Sequence[Mapping[str, Any]], columns: Sequence[str], folder: Path, name: str) -> None:
    plots.trade_off(summary, "similarity", "alignment", folder / f"{name}-alignment.svg")
    if "drift" in columns:
        plots.trade_off(summary, "similarity", "drift", folder / f"{name}-drift.svg")
    if any(e["knob"] not in ("full", "scale") for e in summary):
        plots.sweep(summary, "knob_value", "similarity", folder / f"{name}-knobs.svg")
    if len({e.get("size") for e in summary}) > 2:  # the base, and more than one size
        plots.against_size(summary, "similarity", folder / f"{name}-size.svg")
