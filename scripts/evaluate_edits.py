"""python scripts/evaluate_edits.py: `atomtune edit` on the benchmark's subjects, its sweep scored exactly.

Writes benchmarks/results/edits.json, a row for each subject, recipe and point, and the strips to --out. Beside the
exact scores of the comparison's editing task stand likeness and alignment as `edit` measures them without a judge,
whether the point is the one that it suggests, and how the two kinds of score agree over single edits (Spearman's rank
correlation).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import atomtune
from atomtune.compare import tasks
from atomtune.compare.cells import code_digest
from atomtune.compare.fit import CODE
from atomtune.compare.results import script_command, write_result
from atomtune.editing.options import TUNING, EditOptions
from atomtune.editing.sweep import Edits, best, table
from atomtune.explore.strips import save_edits
from atomtune.files import key, write_whole
from atomtune.scenes.render import render
from atomtune.training import run_folder

SWEEP = EditOptions(sampler=12)
LESS = dataclasses.replace(SWEEP, strength=(1.0,))
RECIPES = {
    "default": SWEEP,
    "blend": dataclasses.replace(LESS, purity=(0.0,), blend=0.7),
    "stopped": dataclasses.replace(LESS, looks=3),
    "variants": dataclasses.replace(LESS, variants=8),
    "quick": dataclasses.replace(LESS, purity=(0.0,), quick=True),
}
"""What is swept: all of it as `edit` does it; with other tunings, and the recipes of others, less."""
TUNED = ("variants", "looks", "quick")
"""Fields that tell one tuning from another."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", default=tasks.SUBJECTS)
    parser.add_argument("--words", choices=("full", "bare"), default="bare", help="what the caption says")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--steps", type=int, default=TUNING.steps)
    parser.add_argument("--noises", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/edits"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/edits.json"))
    given = parser.parse_args()
    begin = time.monotonic()
    rows = [row for subject in given.subjects for row in kept(subject, given)]
    write_result(given.results, script_command(), rows, time.monotonic() - begin)


def kept(subject: str, given: Any) -> list[dict[str, Any]]:
    """The rows of a subject; of an earlier run, where one of the same options and the same code has left them."""
    how = [str(RECIPES[recipe]) for recipe in given.recipes]
    asked = key(code_digest(CODE), str(TUNING), subject, given.words, *how, str(given.steps), str(given.noises))
    path = given.out / f"{asked[:20]}.json"
    if not path.is_file():
        write_whole(path, json.dumps(list(of_subject(subject, given))))
    return json.loads(path.read_text())


def of_subject(subject: str, given: Any) -> Iterator[dict[str, Any]]:
    pipe = atomtune.open_pipeline("embedded")
    ((shot, source),) = tasks.single_lesson(subject, given.words).shots
    asks = tasks.edit_asks(subject, given.noises)
    picture, words = Image.fromarray(render(shot)), [ask.words for ask in asks]
    training, tuned, steps, tuning = dataclasses.replace(TUNING, steps=given.steps), None, 0, None
    for recipe in given.recipes:
        options, out = RECIPES[recipe], given.out / subject / recipe
        before, tuning = tuning, [getattr(options, name) for name in TUNED]
        if tuned is not None and tuning != before:
            tuned.remove()
            tuned = None
        done = atomtune.edit(pipe, picture, source, words, out, options, training, adapter=tuned)
        if tuned is None:  # it stopped where its loss did
            steps = len((out / "run" / run_folder.LOG).read_text().splitlines())
        tuned = done.adapter
        save_edits(done, out)
        facts = {"subject": subject, "words": given.words, "recipe": recipe, "steps": steps}
        agreed = agreement(done, asks)
        for row in score(done, asks):
            print(json.dumps(facts | {k: round(v, 3) for k, v in row.items() if isinstance(v, float)}), flush=True)
            yield facts | row | agreed


def score(done: Edits, asks: list[tasks.Ask]) -> list[dict[str, float]]:
    """The rows of the sweep's table with the comparison's scores beside them."""
    rows, suggested = [], best(done.found)
    for row in table(done.found):
        own = [e for e in done.found if all(row[k] == v for k, v in vars(e.point).items())]
        exact = tasks.score([e.picture for e in own], asks)
        rows.append(row | {"suggested": own[0].point == suggested} | {f"exact_{k}": v for k, v in exact.items()})
    return rows


def agreement(done: Edits, asks: list[tasks.Ask]) -> dict[str, float]:
    """Spearman's rank correlation, over edits, of what the base measures with what is exact; within each prompt."""
    found = {}
    kinds = {"likeness": ("similarity", "object_accuracy"), "alignment": ("alignment", "true_distance")}
    for name, exacts in kinds.items():
        for exact in exacts:
            values = []
            for seed, ask in enumerate(asks):
                own = [e for e in done.found if e.seed == seed]
                true = [tasks.score([e.picture], [ask], None)[exact] for e in own]
                if len(set(true)) > 1:
                    values.append(_rank_correlation([getattr(e, name) for e in own], true))
            if values:
                found[f"{name}_with_{exact}"] = float(np.mean(values))
    return found


def _rank_correlation(a: list[float], b: list[float]) -> float:
    ranks = [np.array([sum(y < x for y in v) + (sum(y == x for y in v) - 1) / 2 for x in v]) for v in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


if __name__ == "__main__":
    main()
