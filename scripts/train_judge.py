"""python scripts/train_judge.py --minutes 8: train the judge of the embedded world, and store its accuracy.

It learns from true scenes only, all names and all styles, moved, blurred and noised a little. Half of them have been
through the embedded autoencoder, so that it forgives what that does to a picture: a model that paints as well as it can
must be judged to paint rightly. Writes assets/judge.safetensors and benchmarks/results/judge.json.
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
from diffusers import AutoencoderDC
from safetensors.torch import save_file
from torch import nn

from atomtune.scenes.judge import LOOKS, NAMES, SIDE, Judge
from atomtune.scenes.model import folder
from atomtune.scenes.read import crops
from atomtune.scenes.render import centre, render
from atomtune.scenes.world import CLASS_OF, Scene, Thing, random_scene, with_style

Pool = list[tuple[Scene, np.ndarray]]


def drawn(rng: random.Random) -> Scene:
    return with_style(random_scene(rng, tuple(CLASS_OF), pairs=0.3), rng.choice(LOOKS))


@torch.no_grad()
def decoded(vae: AutoencoderDC, scenes: list[Scene]) -> Pool:
    """The scenes as the autoencoder gives them back."""
    pool: Pool = []
    for i in range(0, len(scenes), 64):
        part = scenes[i : i + 64]
        x = torch.from_numpy(np.stack([render(s) for s in part])).permute(0, 3, 1, 2).float() / 127.5 - 1
        y = vae.decode(vae.encode(x).latent).sample.clamp(-1, 1).permute(0, 2, 3, 1)
        pool += list(zip(part, ((y + 1) * 127.5).round().byte().numpy(), strict=True))
    return pool


def sample(rng: random.Random, pool: Pool) -> tuple[np.ndarray, Thing]:
    """One window on a random scene, true or decoded, moved by up to three pixels."""
    scene, picture = rng.choice(pool) if rng.random() < 0.5 else (None, None)
    if scene is None:
        scene = drawn(rng)
        picture = render(scene)
    which = rng.randrange(len(scene.things))
    picture = np.roll(picture, (rng.randint(-3, 3), rng.randint(-3, 3)), (0, 1))
    picture = np.pad(picture, ((SIDE, SIDE), (SIDE, SIDE), (0, 0)), mode="edge")
    thing = scene.things[which]
    x, y = centre(thing)
    top, left = y + SIDE // 2, x + SIDE // 2
    return picture[top : top + SIDE, left : left + SIDE], thing


def batch(rng: random.Random, size: int, pool: Pool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    windows, things = zip(*(sample(rng, pool) for _ in range(size)), strict=True)
    x = torch.from_numpy(np.stack(windows)).float()
    if rng.random() < 0.5:
        blurred = nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
        x = torch.lerp(x, blurred, rng.random())
    x = (x + torch.randn_like(x) * rng.random() * 12).clamp(0, 255).round().to(torch.uint8)
    names = torch.tensor([NAMES.index(t.name) for t in things])
    return x, names, torch.tensor([LOOKS.index(t.style) for t in things])


@torch.no_grad()
def accuracy(judge: Judge, pictures: Pool) -> dict[str, float]:
    """Accuracy on scenes that training has not drawn, windows found by the reader as in use."""
    hits = []
    for scene, picture in pictures:
        _, names, styles = judge(torch.from_numpy(crops(picture, scene)))
        for i, thing in enumerate(scene.things):
            hits.append((NAMES[names[i].argmax()] == thing.name, LOOKS[styles[i].argmax()] == thing.style))
    named, styled = np.mean(hits, axis=0)
    return {"things": len(hits), "object_accuracy": float(named), "style_accuracy": float(styled)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--decoded", type=int, default=8000, help="scenes that go through the autoencoder")
    options = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(0)
    vae = AutoencoderDC.from_pretrained(folder() / "vae", torch_dtype=torch.float32).eval()
    pool = decoded(vae, [drawn(rng) for _ in range(options.decoded)])
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    begin, step = time.monotonic(), 0
    while (share := (time.monotonic() - begin) / (60 * options.minutes)) < 1:
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * max(0.01, 1 - share)
        x, name, style = batch(rng, 64, pool)
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
    fresh = random.Random(999)
    scenes = [random_scene(fresh, tuple(CLASS_OF)) for _ in range(2000)]
    again = {f"{name}_decoded": value for name, value in accuracy(judge, decoded(vae, scenes)).items()}
    row = accuracy(judge, [(s, render(s)) for s in scenes]) | again
    command = "python " + " ".join(sys.argv)
    result = {"command": command, "seconds": round(seconds, 1), "steps": step, "rows": [row]}
    Path("benchmarks/results/judge.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
