"""Edits of one picture at every point of a sweep, each with its likeness and alignment."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from atomtune.adapter import Adapter
from atomtune.backbones import backbone_of, denoiser
from atomtune.data.picture import fit, on_matte, open_picture, to_tensor
from atomtune.editing.options import SWEPT, TUNING, EditOptions, Point
from atomtune.editing.tune import tune
from atomtune.errors import UserError
from atomtune.measure.edits import alignment, likeness
from atomtune.measure.regions import region
from atomtune.sampling import generate
from atomtune.steering import Steer
from atomtune.training.masks import surprise
from atomtune.training.options import TrainOptions
from atomtune.training.prepare import default_side
from atomtune.tuner import base_only

T = TypeVar("T")


@dataclass(frozen=True)
class Edit:
    """One edit, and how it measures (`measure.edits`)."""

    point: Point
    prompt: str
    seed: int
    """Of its noise."""
    picture: Image.Image
    likeness: float
    alignment: float


@dataclass(frozen=True)
class Edits:
    """A sweep: every prompt at every point."""

    adapter: Adapter
    """Attached, its dials as they were."""
    source: Image.Image
    """As the model saw it."""
    found: list[Edit]


def edit(
    pipe: Any,
    picture: Image.Image | str | Path,
    source: str,
    prompts: Sequence[str],
    out: str | Path,
    options: EditOptions | None = None,
    training: TrainOptions = TUNING,
    *,
    mask: Image.Image | None = None,
    adapter: Adapter | None = None,
    **more: Any,
) -> Edits:
    """Tune on one picture and paint its edits at every point of a sweep.

    `source` says what the picture shows, `prompts` what the edits shall show. `mask` is a gray picture of the
    picture's size, white on the subject; without it the subject is where the base is surprised. `out`, which must not
    exist yet, receives data/ (what was trained on) and run/ (the adapter); an `adapter` that was tuned on the picture
    is taken as it is. Keywords: as `train`. Raises UserError on bad words, masks and options before any training.
    """
    options, folder = options or EditOptions(), Path(out)
    steers(options)
    if not prompts or not all(words.strip() for words in (source, *prompts)):
        raise UserError("`source` must say what the picture shows, and `prompt` what the edits shall show.")
    opened = picture if isinstance(picture, Image.Image) else open_picture(picture)
    if mask is not None:
        region(mask, opened.size, (1, 1))
    if folder.exists():
        raise UserError(f"`out` must not exist yet: {folder}. Choose another folder.")
    side = training.resolution or default_side(pipe)
    square, covered = fit(on_matte(opened), (side, side)), mask and fit(mask.convert("L"), (side, side))
    if covered is not None and not any(covered.getextrema()):
        raise UserError("`mask` must be white somewhere in the picture's middle square, which alone is edited.")
    if adapter is None:
        try:
            adapter = tune(pipe, square, source, covered, folder, options, training, **more)
        except UserError:
            if not (folder / "run/checkpoints").is_dir():  # nothing there but the variants
                shutil.rmtree(folder, ignore_errors=True)
            raise
    return Edits(adapter, square, edits(adapter, square, source, prompts, options, mask=covered))


def sweep(
    points: Iterable[T], turned: Callable[[T], AbstractContextManager[Any]], paint: Callable[[], Any]
) -> Iterator:
    """(point, what is painted with the dials turned to it), one after the other."""
    for point in points:
        with turned(point):
            painted = paint()
        yield point, painted


def edits(
    adapter: Adapter,
    picture: Image.Image,
    source: str,
    prompts: Sequence[str],
    options: EditOptions,
    *,
    mask: Image.Image | None = None,
) -> list[Edit]:
    """The prompts painted at every point, each prompt always from the same noise, and measured."""
    pipe, found = adapter.pipe, []
    steer = steers(options)
    call: dict[str, Any] = {"seed": options.noise, "steps": options.sampler, "guidance": options.guidance}
    call |= {"width": picture.width, "height": picture.height}
    before = to_tensor(picture)
    weight = subject(pipe, picture, source, mask).cpu()

    def turned(point: Point) -> AbstractContextManager[Any]:
        return adapter.using(steer=steer, **point.dials)

    def paint() -> list[Image.Image]:
        with blended(pipe, options.blend):
            return generate(pipe, prompts, **call)

    for point, pictures in sweep(options.points(), turned, paint):
        like = likeness(before, weight, torch.stack([to_tensor(one) for one in pictures])).tolist()
        right = alignment(pipe, _latents(pipe, pictures), prompts, source).tolist()
        seeds = range(options.noise, options.noise + len(prompts))
        found += [Edit(point, *row) for row in zip(prompts, seeds, pictures, like, right, strict=True)]
    return found


def steers(options: EditOptions) -> list[Steer]:
    """What limits the adapter to some times. Raises UserError on times that can't be."""
    return [] if options.time is None else [Steer(time=options.time)]


def subject(pipe: Any, picture: Image.Image, source: str, mask: Image.Image | None) -> Float[Tensor, "rows columns"]:
    """The share of each token on the subject: by the mask, or where the base is surprised."""
    backbone, model, latents = backbone_of(pipe), denoiser(pipe), _latents(pipe, [picture])
    grid = backbone.grid(model, latents)
    if mask is not None:
        return region(mask, mask.size, grid).view(grid)
    with base_only(model):
        return surprise(model, backbone, latents, backbone.encode_prompts(pipe, [source]))[0].view(grid)


def _latents(pipe: Any, pictures: Sequence[Image.Image]) -> Tensor:
    pixels = torch.stack([to_tensor(picture) for picture in pictures]).to(pipe.vae.device)
    return backbone_of(pipe).encode_pictures(pipe, pixels)


def blended(pipe: Any, share: float) -> AbstractContextManager[None]:
    """Inside, the model predicts share x its own + (1 - share) x the base's prediction.

    As SINE blends a tuned model with its base (Zhang et al. 2022, arXiv 2212.04489), but both are told the same words.
    """
    return nullcontext() if share == 1 else _blended(denoiser(pipe), share)


@contextmanager
def _blended(model: nn.Module, share: float) -> Iterator[None]:
    inside = False

    def mean(own: Any, base: Any) -> Any:
        if isinstance(own, list):  # Z-Image gives one a picture
            return [mean(*pair) for pair in zip(own, base, strict=True)]
        return share * own + (1 - share) * base

    def blend(_: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        nonlocal inside
        if inside:
            return None
        inside = True
        try:
            with base_only(model):
                plain = model(*args, **kwargs)
        finally:
            inside = False
        return (mean(out[0], plain[0]), *out[1:])

    handle = model.register_forward_hook(blend, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def table(found: Sequence[Edit]) -> list[dict[str, float]]:
    """A row a point: its dials, the means over the prompts, and `score`.

    The score is the sum of likeness and alignment, each from 0 at the sweep's least to 1 at its most.
    """
    rows = []
    for point in dict.fromkeys(e.point for e in found):
        own = [e for e in found if e.point == point]
        means = {name: float(np.mean([getattr(e, name) for e in own])) for name in ("likeness", "alignment")}
        rows.append(dataclasses.asdict(point) | means)
    for name in ("likeness", "alignment"):
        low, high = (end(row[name] for row in rows) for end in (min, max))
        for row in rows:
            row["score"] = row.get("score", 0.0) + ((row[name] - low) / (high - low) if high > low else 0.0)
    return rows


def best(found: Sequence[Edit]) -> Point:
    """The point of the largest score."""
    row = max(table(found), key=lambda row: row["score"])
    return Point(*(row[name] for name in SWEPT))
