"""Which atoms made a part of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from atomtune.atoms import Atom, dialled, per_token
from atomtune.backbones import backbone_of, denoiser, select
from atomtune.data.picture import mask_shares, to_tensor
from atomtune.errors import UserError
from atomtune.measure.maps import TIMES
from atomtune.measure.painting import Dial, row_strengths
from atomtune.tuner import open_gate


def region(mask: Image.Image, size: tuple[int, int], grid: tuple[int, int]) -> Float[Tensor, " tokens"]:
    """The share of each picture token that a gray mask, white inside, covers; `size` is the picture's, in pixels."""
    pixels = mask_shares(mask)
    if mask.size != size:
        raise UserError(f"`mask` must have the picture's size {size}, got {mask.size}. Resize it.")
    if not pixels.any():
        raise UserError("`mask` must be white somewhere, got an empty region. Paint it white (255) inside.")
    return torch.nn.functional.adaptive_avg_pool2d(pixels[None], grid).flatten()


def attribution(
    pipe: Any,
    ranked: Sequence[Atom],
    picture: Image.Image,
    prompt: str,
    mask: Image.Image,
    *,
    top: int = 16,
    times: Sequence[float] = TIMES,
    seed: int = 0,
    batch_size: int = 8,
    adapter: str = "default",
) -> list[dict[str, Any]]:
    """What each atom contributes to what the adapter changes in a region of a picture: a row an atom.

    The picture is noised to several times; v(g) is the prediction at atom strengths g, gate open, and D = v(1) - v(0)
    the adapter's change. <a, b> sums over the region's tokens, each by its share of the mask, over channels and times.
    S(g) = <v(g) - v(0), D> / <D, D> is the share of the change that is there: S(0) = 0, S(1) = 1.

    `exact`: S(1) - S(1 without the atom), by a forward without it. `additive`: dS/dg of the atom at 1, gradient x code
    summed over positions, of all atoms by one backward (attribution patching, Nanda 2023). `error`: additive - exact.
    `inside`, `outside`: (<d, d> / <D, D>)^1/2 of d = v(1) - v(1 without the atom), in the region and beside it.
    The `top` atoms of the largest additive share are tried, the largest exact share comes first; shares need not sum to
    1. Raises UserError on a mask of another size or mode, an empty one, or one where the adapter changes nothing.
    """
    backbone, model = backbone_of(pipe), denoiser(pipe)
    clean = backbone.encode_pictures(pipe, to_tensor(picture)[None].to(pipe.vae.device))
    grid = backbone.grid(model, clean)
    weight = region(mask, picture.size, grid).to(clean.device)
    conditioning = backbone.encode_prompts(pipe, [prompt])
    noise = torch.randn(len(times), *clean.shape[1:], generator=torch.Generator().manual_seed(seed)).to(clean)
    s, parts = torch.tensor(times, device=clean.device), {a.part or adapter for a in ranked}
    noised, _ = backbone.noised(clean.expand_as(noise), s, noise)

    def predict(dials: Sequence[Dial]) -> Float[Tensor, "times rows ..."]:
        at = torch.arange(len(s)).repeat_interleave(len(dials))
        with ExitStack() as stack:
            stack.enter_context(row_strengths(model, [*dials] * len(s), adapter))
            for part in parts:
                stack.enter_context(open_gate(model, part))
            v = backbone.predict(model, noised[at], s[at], select(conditioning, torch.zeros_like(at)))
        return v.float().unflatten(0, (len(s), len(dials)))

    def product(a: Tensor, b: Tensor, weight: Tensor = weight) -> Float[Tensor, " rows"]:
        return (per_token((a * b).flatten(0, 1), *grid) * weight).sum(1).view(len(s), -1).sum(0)

    ones = {site: strength.requires_grad_() for site, strength in dialled(ranked).items()}
    full, base = predict([ones, dialled(ranked, 0.0)]).split(1, dim=1)
    change = (full - base).detach()
    whole = product(change, change)
    # Rows of a batch differ in rounding.
    if (whole <= 1e-10 * product(base.detach(), base.detach())).all():
        raise UserError("`mask` must lie where the adapter changes the picture, got a region that is the base's.")
    (product(full, change) / whole).sum().backward(inputs=list(ones.values()))
    slope = {a.name: 0.0 if (g := ones[a.place].grad) is None else g[a.row].item() for a in ranked}
    tried = sorted(ranked, key=lambda a: -abs(slope[a.name]))[:top]
    rows, size = [], max(1, batch_size // len(s))
    for chosen in (tried[start : start + size] for start in range(0, len(tried), size)):
        with torch.no_grad():
            lost = full.detach() - predict([dialled(ranked, strength={a.name: 0.0}) for a in chosen])
        exact = product(lost, change) / whole
        sizes = [(product(lost, lost, part) / whole).sqrt() for part in (weight, 1 - weight)]
        for atom, *values in zip(chosen, *(v.tolist() for v in (exact, *sizes)), strict=True):
            row = dict(zip(("exact", "inside", "outside"), values, strict=True))
            guess = slope[atom.name]
            rows.append({"atom": atom.name, **row, "additive": guess, "error": guess - row["exact"]})
    return sorted(rows, key=lambda row: -abs(row["exact"]))
