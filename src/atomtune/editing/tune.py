"""Tuning on one picture: its variants, and when to stop."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from atomtune.adapter import Adapter
from atomtune.backbones import select
from atomtune.editing.options import TUNING, EditOptions
from atomtune.training import objective
from atomtune.training.loop import train
from atomtune.training.options import TrainOptions
from atomtune.training.run import Run
from atomtune.tuner import open_gate

QUICK: dict[str, Any] = {"steps": 50, "times": (0.5, 0.7, 0.8, 0.9, 1.0)}
"""Options of a quick tuning; where things are is decided at these times (FastEdit, arXiv 2408.03355, chooses some)."""


def tune(
    pipe: Any,
    picture: Image.Image,
    source: str,
    mask: Image.Image | None,
    out: Path,
    options: EditOptions,
    training: TrainOptions,
    **more: Any,
) -> Adapter:
    """An adapter trained on one picture and its variants: `out` receives data/ and run/. Keywords: as `train`."""
    write_data(out / "data", picture, source, mask, options)
    if options.quick:
        unsaid = {name: value for name, value in QUICK.items() if getattr(training, name) == getattr(TUNING, name)}
        training = dataclasses.replace(training, **unsaid)
    stop = plateau(options.looks) if options.looks else lambda run: False
    return train(pipe, out / "data", out / "run", training, stop=stop, **more)


def write_data(folder: Path, picture: Image.Image, source: str, mask: Image.Image | None, options: EditOptions) -> None:
    """The picture and its variants, each with the source's words and, where there is one, its mask."""
    folder.mkdir(parents=True)
    for i, cut in enumerate(variants(picture.size, options)):
        cut(picture).save(folder / f"{i:02d}.png")
        if mask is not None:
            cut(mask).save(folder / f"{i:02d}.mask.png")
        (folder / f"{i:02d}.txt").write_text(source + "\n", encoding="utf-8")


def variants(size: tuple[int, int], options: EditOptions) -> Iterator[Callable[[Image.Image], Image.Image]]:
    """How each variant is cut: the first not at all, others by up to 6 % of shift and 10 % of scale; edges repeat."""
    width, height = size
    pad, rng = max(size) // 4, random.Random(options.noise)

    def cut(picture: Image.Image, box: tuple[float, float, float, float], mirror: bool) -> Image.Image:
        pixels = np.asarray(picture)
        wide = Image.fromarray(np.pad(pixels, ((pad, pad),) * 2 + ((0, 0),) * (pixels.ndim - 2), mode="edge"))
        moved = wide.resize(size, Image.Resampling.BICUBIC, box=box)
        return ImageOps.mirror(moved) if mirror else moved

    yield lambda picture: picture
    for i in range(1, options.variants):
        scale, across, down = rng.uniform(0.9, 1.1), rng.uniform(-0.06, 0.06), rng.uniform(-0.06, 0.06)
        left = pad + width * (0.5 - scale / 2 + across)
        top = pad + height * (0.5 - scale / 2 + down)
        box = (left, top, left + width * scale, top + height * scale)
        yield partial(cut, box=box, mirror=options.mirror and i % 2 == 1)


def plateau(looks: int, every: int = 20, least: float = 0.05) -> Callable[[Run], bool]:
    """Whether the loss on the picture itself, at fixed times and noises, has stopped falling.

    Asked after each step, it looks every `every`: the last `looks` must have added at least the share `least`
    of what the loss had fallen since the first one.
    """
    losses: list[float] = []

    def stop(run: Run) -> bool:
        if run.done % every:
            return False
        losses.append(fixed_loss(run))
        if len(losses) <= looks + 1:
            return False
        before = min(losses[:-looks])
        return before - min(losses[-looks:]) <= least * (losses[0] - before)

    return stop


@torch.no_grad()
def fixed_loss(run: Run) -> float:
    """The task's loss on the picture itself, at ten times and noises that are always the same."""
    latents, generator = run.material.latents[:1], torch.Generator().manual_seed(0)
    s = torch.tensor((0.1, 0.3, 0.5, 0.7, 0.9)).repeat(2).to(latents)
    same = torch.zeros(len(s), dtype=torch.long)
    noise = torch.randn(len(s), *latents.shape[1:], generator=generator).to(latents)
    x, target = run.backbone.noised(latents[same], s, noise)
    with open_gate(run.base):
        predicted = run.backbone.predict(run.base, x, s, select(run.material.conditioning, same))
    return objective.error(predicted, target).item()
