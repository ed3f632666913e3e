"""python scripts/measure_dial.py NAME=ADAPTER ...: how likeness follows the density dial, for each adapter.

Writes benchmarks/results/dial.json: a row for each adapter and density with the closeness to the whole adapter's
picture (`measure.painting.density_curve`) over the prompts, in which {} is the NAME. For the mean curve it prints
its largest fall and its largest rise for a tenth of the atoms. `atomtune atoms ADAPTER --curve FILE.svg` draws one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import atomtune
from atomtune.adapter import base_of
from atomtune.compare.results import script_command, write_result
from atomtune.measure.painting import density_curve

DENSITIES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapters", nargs="+", metavar="NAME=ADAPTER")
    parser.add_argument("--prompts", nargs="+", default=["a big 3d {} on a blue background, on the right", "a {}"])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/dial.json"))
    given = parser.parse_args()
    begin = time.monotonic()
    rows: list[dict[str, Any]] = []
    for name, _, folder in (text.partition("=") for text in given.adapters):
        adapter = atomtune.load(atomtune.open_pipeline(base_of(folder) or "embedded"), folder)
        prompts = [prompt.format(name) for prompt in given.prompts]
        curve = density_curve(
            adapter.pipe,
            adapter.atoms.ranked,
            prompts,
            densities=DENSITIES,
            seeds=range(given.seeds),
            num_inference_steps=given.steps,
        )
        rows += [{"subject": name} | row for row in curve]
        print(name, json.dumps(smoothness(curve)), flush=True)
    write_result(given.out, script_command(), rows, time.monotonic() - begin)


def smoothness(curve: list[dict[str, float]]) -> dict[str, float]:
    """The largest fall of the mean curve, 0 where it never falls, and its largest rise for a tenth of the atoms."""
    steps = [(b["closeness"] - a["closeness"], b["density"] - a["density"]) for a, b in itertools.pairwise(curve)]
    return {
        "largest_fall": max(0.0, *(-rise for rise, _ in steps)),
        "largest_rise_a_tenth": max(rise * 0.1 / width for rise, width in steps),
    }


if __name__ == "__main__":
    main()
