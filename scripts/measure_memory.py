"""python scripts/measure_memory.py: what `atomtune doctor` says a run will hold, beside what the whole run held.

Writes benchmarks/results/doctor.json: a row for each setting with the estimated peak, the counted one (all that torch
allocates, from the first prompt that is encoded to the saved adapter, with the base's weights) and the error. Each is
counted in a process of its own, on pictures of the embedded world; every cache is fresh.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from atomtune.compare.results import script_command, write_result
from atomtune.compare.tasks import subject_lesson
from atomtune.training.options import TrainOptions

SUBJECT = "cow"
PLAIN: dict[str, Any] = {"concept": SUBJECT, "class_noun": "animal face", "steps": 6, "unrelated_pictures": 16}
SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "8 rows": {"batch_size": 8},
    "64 atoms": {"n_atoms": 64},
    "checkpointed gradients": {"gradient_checkpointing": True},
    "a running mean": {"ema": 0.9},
    "attention and feed-forward": {"sites": ("to_q", "to_k", "to_v", "to_out.0", "linear_1", "linear_2", "linear_3")},
    "no gate, no silence": {"gate": False, "silence": 0.0, "contain": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--base", default="embedded")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/doctor.json"))
    given = parser.parse_args()
    begin, rows = time.monotonic(), []
    for name in given.settings:
        with tempfile.TemporaryDirectory() as folder:
            subject_lesson(SUBJECT).write(Path(folder, "data"))
            found = {kind: _child(kind, name, folder, given.base) for kind in ("estimate", "count")}
        estimated, counted = found["estimate"]["peak"], found["count"]["peak"]
        row = {"setting": name, "estimated": estimated, "counted": counted, "error": estimated / counted - 1}
        rows.append(row | {"phase": found["estimate"]["phase"]})
        print(f"{name}: estimated {estimated / 2**20:.1f} MiB, counted {counted / 2**20:.1f} MiB", flush=True)
    write_result(given.out, script_command(), rows, time.monotonic() - begin)


def _child(kind: str, name: str, folder: str, base: str) -> dict[str, Any]:
    code = f"import measure_memory; measure_memory.{kind}({name!r}, {folder!r}, {base!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def estimate(name: str, folder: str, base: str) -> None:
    """Print what the doctor says."""
    import atomtune
    from atomtune.training.doctor import examine

    memory = examine(lambda: atomtune.open_pipeline(base), Path(folder, "data"), _options(name)).memory
    assert memory is not None
    print(json.dumps({"peak": memory.peak, "phase": max(memory.phases, key=lambda phase: memory.phases[phase])}))


def count(name: str, folder: str, base: str) -> None:
    """Print what torch held while the run was trained."""
    import atomtune
    from atomtune.training.memory import peak_of, weights_of

    pipe = atomtune.open_pipeline(base)
    weights = weights_of(pipe)

    def run() -> None:
        atomtune.train(pipe, Path(folder, "data"), Path(folder, "run"), _options(name), progress=False)

    print(json.dumps({"peak": weights + peak_of(run, pipe.vae.device)}))


def _options(name: str) -> TrainOptions:
    return TrainOptions(**PLAIN | SETTINGS[name])


if __name__ == "__main__":
    main()
