"""Pictures from the same prompts and noises with dials turned: strips of one atom, and the density curve."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from atomtune.atoms import Atom, count, dialled, places
from atomtune.errors import UserError
from atomtune.sampling import batches
from atomtune.tuner import hooked

Pictures = Float[np.ndarray, "n h w 3"]
"""Pixels in [0, 1]."""

Dial = Mapping[str, Tensor]
"""Strengths of atoms by place (`atoms.dialled`)."""


ROUNDING = 1e-5
"""Mean difference of pixels, in [0, 1], below which two pictures are the same: rows of a batch differ in rounding."""


@contextmanager
def row_strengths(model: Any, dials: Sequence[Dial], adapter: str = "default") -> Iterator[None]:
    """Give each row of a batch strengths of its own for a while; gradients reach them.

    A forward of k times as many rows, such as guidance with both branches in one batch, has them k times in order.
    """

    def turn(layer: Any, args: tuple[Any, ...], place: str) -> None:
        x = args[0]
        rows = torch.stack([row[place] for row in dials]).to(x.device).repeat(len(x) // len(dials), 1)
        layer.atom_strength[held[place][1]] = rows.view(len(x), *(1,) * (x.ndim - 2), -1)

    held = places(model, dials[0], adapter)
    before = {place: layer.atom_strength[part] for place, (layer, part) in held.items()}
    try:
        with hooked(layer.register_forward_pre_hook(partial(turn, place=place)) for place, (layer, _) in held.items()):
            yield
    finally:
        for place, (layer, part) in held.items():
            # The model may have been moved meanwhile.
            layer.atom_strength[part] = before[place].to(layer.atom_strength[part].device)


def paint(
    pipe: Any, rows: Sequence[tuple[str, int, Dial]], *, batch_size: int = 16, adapter: str = "default", **call: Any
) -> Pictures:
    """One picture a row of (prompt, seed of its noise, dial), whatever its batch.

    Gates are held as `atomtune.prompt_gates` does. Other arguments go to the pipeline.
    """
    prompts, seeds, dials = zip(*rows, strict=True) if rows else ((), (), ())

    def turned(chosen: slice) -> AbstractContextManager[None]:
        return row_strengths(pipe, dials[chosen], adapter)

    return np.concatenate(list(batches(pipe, prompts, seeds, batch_size, turned, **{"output_type": "np"} | call)))


def strips(
    pipe: Any,
    ranked: Sequence[Atom],
    names: Sequence[str],
    prompt: str,
    *,
    strengths: Sequence[float] = (0.0, 1.0, 2.0, 4.0),
    seed: int = 0,
    **more: Any,
) -> dict[str, tuple[Pictures, Float[np.ndarray, " n"]]]:
    """By atom: the base's picture, then one at each strength of the atom, the others at 1, all from the same noise; and
    the mean absolute difference of their pixels to the one at strength 1, in [0, 1].

    Raises UserError on a name that is no atom's. Keywords: as `paint`.
    """
    dials = {("", 0.0): dialled(ranked, 0.0), ("", 1.0): dialled(ranked)}
    dials |= {(name, s): dialled(ranked, strength={name: s}) for name in names for s in strengths if s != 1}
    pictures = paint(pipe, [(prompt, seed, dial) for dial in dials.values()], **more)
    away, at = np.abs(pictures - pictures[1]).mean((1, 2, 3), np.float64), list(dials).index
    rows = {name: [0, *(at(("" if s == 1 else name, s)) for s in strengths)] for name in names}
    return {name: (pictures[own], away[own]) for name, own in rows.items()}


def density_curve(
    pipe: Any,
    ranked: Sequence[Atom],
    prompts: Sequence[str],
    *,
    densities: Sequence[float] = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0),
    seeds: Sequence[int] = (0, 1, 2, 3),
    **more: Any,
) -> list[dict[str, float]]:
    """How close the picture at each density comes to the whole adapter's: 1 there, 0 at the base's, below 0 beyond.

    closeness(d) = 1 - |p(d) - p(1)| / |p(0) - p(1)|, |.| the mean over pixels: its mean and standard deviation over
    the pictures, of all prompts and noises, that the adapter changes. Raises UserError where it changes none.
    """
    levels = sorted({0.0, 1.0, *densities})
    dials = [dialled(ranked, level) for level in levels]
    painted = paint(pipe, [(prompt, seed, dial) for prompt in prompts for seed in seeds for dial in dials], **more)
    same = painted.reshape(-1, len(levels), *painted.shape[1:])
    away = np.abs(same - same[:, -1:]).mean((2, 3, 4), np.float64)
    away = away[away[:, 0] > ROUNDING]
    if not len(away):
        raise UserError(f"`prompts` must name the concept: the adapter changes no picture of {list(prompts)}.")
    closeness = 1 - away / away[:, :1]
    kept, means = (count(level, len(ranked)) for level in levels), closeness.mean(0).tolist()
    columns = zip(levels, kept, means, closeness.std(0).tolist(), strict=True)
    return [dict(zip(("density", "atoms", "closeness", "deviation"), row, strict=True)) for row in columns]


def curve_svg(rows: Sequence[Mapping[str, float]]) -> str:
    """The rows of `density_curve` as an SVG file."""
    low = min(0.0, *(row["closeness"] for row in rows))

    def y(closeness: float) -> float:
        return round(324 - 292 * (closeness - low) / (1 - low), 1)

    line = " ".join(f"{56 + 484 * row['density']:.1f},{y(row['closeness'])}" for row in rows)
    look = 'viewBox="0 0 560 380" font-family="sans-serif" font-size="12" fill="#555555"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {look}><rect width="560" height="380" fill="white"/>']
    for t in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts += [f'<path d="M56 {y(t)}H540" stroke="#DDDDDD"/>']
        parts += [f'<text x="48" y="{y(t) + 4:.1f}" text-anchor="end">{t:.0%}</text>']
        parts += [f'<text x="{56 + 484 * t:.1f}" y="344" text-anchor="middle">{t:.0%}</text>']
    parts += ['<text x="56" y="20">closeness to the whole adapter&#39;s picture</text>']
    parts += ['<text x="298" y="366" text-anchor="middle">density: share of the atoms that take part</text>']
    parts += [f'<polyline points="{line}" fill="none" stroke="#D55E00" stroke-width="2"/>', "</svg>\n"]
    return "\n".join(parts)
