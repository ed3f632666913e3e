"""python scripts/measure_many.py: concepts trained and requests served together, against one after the other.

Writes benchmarks/results/many.json: seconds of processor time of one thread on the embedded model, the median of
`--repeats`. What the base paints and what is encoded is in the cache before.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure_scale import processor_seconds

import atomtune
from atomtune.compare.results import script_command, write_result
from atomtune.compare.tasks import SUBJECTS, subject_lesson
from atomtune.serving import Server
from atomtune.training.many import Job, train_many
from atomtune.training.options import TrainOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/many.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = list(measured(Path(folder), given))
    write_result(given.out, script_command(), rows, time.monotonic() - begin)


def measured(folder: Path, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    subjects = SUBJECTS[: given.concepts]
    for subject in subjects:
        subject_lesson(subject).write(folder / subject)

    def jobs() -> list[Job]:
        turn = next(turns)
        options = [TrainOptions(concept=subject, steps=given.steps) for subject in subjects]
        return [Job(folder / s, folder / "runs" / str(turn) / s, o) for s, o in zip(subjects, options, strict=True)]

    turns, pipe = itertools.count(), atomtune.open_pipeline("embedded")
    first = jobs()
    train_many(pipe, first, progress=False)
    acts = {
        "alone": lambda: _one_by_one(pipe, jobs()),
        "together": lambda: train_many(pipe, jobs(), progress=False),
    }
    found = {how: processor_seconds(act, given.repeats, warm=False) for how, act in acts.items()}
    yield {"what": f"{len(subjects)} concepts trained, {given.steps} steps each"} | found
    names = [subjects[i % len(subjects)] for i in range(given.requests)]
    asked = [(name, f"a {name}") for name in names]
    found = {}
    for how, size in (("alone", 1), ("together", given.requests)):
        server = Server(pipe, {name: job.out for name, job in zip(subjects, first, strict=True)})
        call: dict[str, Any] = {"seeds": range(len(names)), "batch_size": size, "num_inference_steps": 8}
        found[how] = processor_seconds(partial(server.generate, asked, **call), given.repeats)
        server.close()
    yield {"what": f"{len(names)} requests served, for {len(subjects)} adapters"} | found


def _one_by_one(pipe: Any, jobs: list[Job]) -> None:
    for job in jobs:
        atomtune.train(pipe, job.data, job.out, job.options, progress=False).remove()


if __name__ == "__main__":
    main()
