"""python scripts/evaluate_scenes.py: score the embedded model on 200 held-out combinations.

Writes benchmarks/results/scenes.json, and a grid of the first pictures to --grid. Plain pipeline defaults.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from PIL import Image

import atomtune
from atomtune.scenes.score import arrays, mean, score
from atomtune.scenes.world import caption, held_out, random_scene


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="embedded")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--grid", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scenes.json"))
    options = parser.parse_args()
    rng = random.Random(12345)
    scenes = []
    while len(scenes) < options.prompts:
        scene = random_scene(rng)
        if held_out(scene):
            scenes.append(scene)
    pipe = atomtune.open_pipeline(options.base)
    started, begin = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    pictures = atomtune.generate(pipe, [caption(s) for s in scenes], batch_size=25, steps=options.steps)
    scores = mean(score(pictures, scenes))
    judge = json.loads(Path("benchmarks/results/judge.json").read_text(encoding="utf-8"))["rows"][0]
    row = {
        "prompts": len(scenes),
        "background": scores["background"],
        "position": scores["position"],
        "size": scores["size"],
        "object_accuracy": scores["named"],
        "style_accuracy": scores["styled"],
        "similarity": scores["similarity"],
        "judge_accuracy_on_true_scenes": judge["object_accuracy"],
    }
    result = {
        "command": "python " + " ".join(sys.argv),
        "atomtune": "0.1.0",
        "machine": f"{platform.machine()}, {platform.system()}",
        "started": started,
        "seconds": round(time.monotonic() - begin, 1),
        "rows": [row],
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(row, indent=1))
    if options.grid:
        stack = arrays(pictures[:48])
        rows = [np.concatenate(list(stack[i : i + 12]), 1) for i in range(0, len(stack), 12)]
        picture = Image.fromarray(np.concatenate(rows))
        picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(options.grid)
        for scene in scenes[:48]:
            print(caption(scene))


if __name__ == "__main__":
    main()
