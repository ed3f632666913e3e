"""python scripts/evaluate_edits.py: sweep edits of one picture on subjects for tuning, and score them exactly.

Writes benchmarks/results/edits.json, a row for each subject and point, and the strips to --out. Beside the exact scores
of the comparison's editing task stand likeness and alignment as they are measured without a judge, and how the two
kinds agree over single edits (Spearman's rank correlation).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import atomtune
from atomtune.compare import tasks
from atomtune.compare.results import script_command, write_result
from atomtune.editing.options import SWEPT, TUNING, EditOptions
from atomtune.editing.sweep import Edits, best, table
from atomtune.explore.strips import save_edits
from atomtune.scenes.render import render


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", default=["cow", "truck"])
    parser.add_argument("--words", choices=("full", "bare"), default="full")
    parser.add_argument("--silence", action="store_true", help="train on unrelated pictures too, as `atomtune train`")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--purity", nargs="+", type=float, default=[0.0, 0.4])
    parser.add_argument("--beside", nargs="+", type=float, default=[0.0, 0.5])
    parser.add_argument("--keep", nargs="+", type=float, default=[1.0])
    parser.add_argument("--strength", nargs="+", type=float, default=[1.0, 0.8])
    parser.add_argument("--noises", type=int, default=1)
    parser.add_argument("--tuned", type=Path, help="folder of earlier runs, by subject; nothing is trained then")
    parser.add_argument("--out", type=Path, default=Path("runs/edits"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/edits.json"))
    given = parser.parse_args()
    options = EditOptions(**{name: tuple(getattr(given, name)) for name in SWEPT}, sampler=12)
    training = dataclasses.replace(TUNING, steps=given.steps)
    if given.silence:
        training = dataclasses.replace(training, unrelated_batch=None, unrelated_pictures=32)
    begin = time.monotonic()
    rows: list[dict[str, Any]] = []
    for subject in given.subjects:
        rows += of_subject(subject, given, options, training)
    write_result(given.results, script_command(), rows, time.monotonic() - begin)


def of_subject(subject: str, given: Any, options: EditOptions, training: Any) -> list[dict[str, Any]]:
    pipe = atomtune.open_pipeline("embedded")
    ((shot, source),) = tasks.single_lesson(subject, given.words).shots
    asks = tasks.edit_asks(subject, given.noises)
    picture, out = Image.fromarray(render(shot)), given.out / subject
    adapter = None if given.tuned is None else atomtune.load(pipe, given.tuned / subject)
    words = [ask.words for ask in asks]
    done = atomtune.edit(pipe, picture, source, words, out, options, training, adapter=adapter)
    save_edits(done, out)
    scored = score(done, asks)
    for row in scored:
        print(json.dumps({"subject": subject} | {k: round(v, 3) for k, v in row.items() if isinstance(v, float)}))
    print("best", best(done.found), "agreement", agreement(done, asks), flush=True)
    return [{"subject": subject, "words": given.words} | row | agreement(done, asks) for row in scored]


def score(done: Edits, asks: list[tasks.Ask]) -> list[dict[str, float]]:
    """The rows of the sweep's table with the comparison's scores beside them."""
    rows = []
    for row in table(done.found):
        own = [e for e in done.found if all(row[k] == v for k, v in vars(e.point).items())]
        exact = tasks.score([e.picture for e in own], asks)
        rows.append(row | {f"exact_{name}": value for name, value in exact.items()})
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
