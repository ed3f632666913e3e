"""python scripts/train_judge.py --minutes 8: train the judge of the embedded world, and store its accuracy.

It learns from true scenes only, all names and all styles, moved, blurred and noised a little, so that it forgives
what an autoencoder does to a picture. Writes assets/judge.safetensors and benchmarks/results/judge.json.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from atomtune.scenes.judge import LOOKS, NAMES, SIDE, Judge
from atomtune.scenes.read import crops
from atomtune.scenes.render import centre, render
from atomtune.scenes.world import CLASS_OF, Scene, Thing, random_scene, with_style


def sample(rng: random.Random) -> tuple[np.ndarray, Thing]:
    """One window on a random scene, moved by up to three pixels."""
    scene = random_scene(rng, tuple(CLASS_OF), pairs=0.3)
    scene = with_style(scene, rng.choice(LOOKS))
    which = rng.randrange(len(scene.things))
    picture = np.roll(render(scene), (rng.randint(-3, 3), rng.randint(-3, 3)), (0, 1))
    picture = np.pad(picture, ((SIDE, SIDE), (SIDE, SIDE), (0, 0)), mode="edge")
    thing = scene.things[which]
    x, y = centre(thing)
    top, left = y + SIDE // 2, x + SIDE // 2
    return picture[top : top + SIDE, left : left + SIDE], thing


def batch(rng: random.Random, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    windows, things = zip(*(sample(rng) for _ in range(size)), strict=True)
    x = torch.from_numpy(np.stack(windows)).float()
    if rng.random() < 0.5:
        blurred = nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
        x = torch.lerp(x, blurred, rng.random())
    x = (x + torch.randn_like(x) * rng.random() * 12).clamp(0, 255).round().to(torch.uint8)
    names = torch.tensor([NAMES.index(t.name) for t in things])
    return x, names, torch.tensor([LOOKS.index(t.style) for t in things])


@torch.no_grad()
def accuracy(judge: Judge, scenes: int = 2000) -> dict[str, float]:
    """Accuracy on true scenes that training has not drawn, windows found by the reader as in use."""
    rng = random.Random(999)
    hits = []
    for _ in range(scenes):
        scene: Scene = random_scene(rng, tuple(CLASS_OF))
        _, names, styles = judge(torch.from_numpy(crops(render(scene), scene)))
        for i, thing in enumerate(scene.things):
            hits.append((NAMES[names[i].argmax()] == thing.name, LOOKS[styles[i].argmax()] == thing.style))
    named, styled = np.mean(hits, axis=0)
    return {"things": len(hits), "object_accuracy": float(named), "style_accuracy": float(styled)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8)
    options = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(0)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    begin, step = time.monotonic(), 0
    while (share := (time.monotonic() - begin) / (60 * options.minutes)) < 1:
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * max(0.01, 1 - share)
        x, name, style = batch(rng, 64)
        _, names, styles = judge(x)
        smooth = {"label_smoothing": 0.05}
        loss = nn.functional.cross_entropy(names, name, **smooth) + 0.5 * nn.functional.cross_entropy(
            styles, style, **smooth
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(step, round(loss.item(), 3), flush=True)
    judge.eval()
    seconds = time.monotonic() - begin
    state = {k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}
    save_file(state, "src/atomtune/scenes/assets/judge.safetensors")
    judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    row = accuracy(judge)
    command = "python " + " ".join(sys.argv)
    result = {"command": command, "seconds": round(seconds, 1), "steps": step, "rows": [row]}
    Path("benchmarks/results/judge.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
