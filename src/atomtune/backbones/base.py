"""What the rest of atomtune asks of a model family, and nothing more."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from atomtune.backbones.noising import Noising, flow
from atomtune.backbones.reading import Reading
from atomtune.errors import UserError

Embeds = Tensor | list[Tensor]
Conditioning = dict[str, Any]
"""What the model is told beside the latents, by the argument of its forward: tensors with the batch first, or lists of
one tensor a sample."""

Grid = tuple[int, int]
"""Rows and columns of picture tokens."""


@dataclass(frozen=True)
class Layout:
    """Which positions of a site's input are real (not padding), and which lie on the picture, row by row."""

    real: Bool[Tensor, "batch positions"]
    image: Bool[Tensor, "batch positions"]
    grid: Grid = (0, 0)
    """Of the site's own picture tokens, which may be coarser than the latents'."""

    def resample(self, values: Float[Tensor, "batch tokens"], grid: Grid) -> Float[Tensor, "batch own"]:
        """Values of the picture tokens of a grid, at this site's own."""
        if grid == self.grid:
            return values
        return nn.functional.adaptive_avg_pool2d(values.view(-1, 1, *grid), self.grid).flatten(1)


@dataclass(frozen=True)
class Heard:
    """What a forward of the model was told, read back from its arguments."""

    s: Float[Tensor, " batch"]
    grid: Grid
    conditioning: Conditioning
    slack: float = 1e-4
    """How far s may be off: less than any step of a sampler, more than the rounding of a clock."""


@dataclass(frozen=True)
class Backbone:
    """A model family, as plain functions.

    Time `s` runs from 0 (clean) to 1 (noise). What a model is given at s and should predict there is for `noised` to
    say: x_s = (1 - s) x0 + s noise and v = noise - x0 (rectified flow, arXiv 2209.03003), or what its scheduler adds
    and predicts. Latents are `(batch, channels, height, width)` everywhere; `predict` packs them.
    """

    family: str
    sites: tuple[str, ...]
    """Ends of the names of the linear layers that are adapted by default."""
    gate_input: str
    """Argument of the model's forward with the prompt embeddings `(batch, tokens, width)`, or a list of them."""
    gate_mask: str | None
    """Argument with their mask, if the family has one."""
    encode_prompts: Callable[[Any, list[str]], Conditioning]
    """(pipe, prompts) -> conditioning."""
    encode_pictures: Callable[[Any, Float[Tensor, "batch 3 height width"]], Tensor]
    """(pipe, pixels in [-1, 1]) -> latents."""
    predict: Callable[[nn.Module, Tensor, Float[Tensor, " batch"], Conditioning], Tensor]
    """(model, latents at s, s, conditioning) -> its prediction, of the latents' shape."""
    grid: Callable[[nn.Module, Tensor], Grid]
    """(model, latents) -> rows and columns of picture tokens."""
    layout: Callable[[str, Conditioning, Grid], Layout]
    """(site, conditioning, grid) -> where the site's positions lie."""
    heard: Callable[[nn.Module, dict[str, Any]], Heard]
    """(model, arguments of its forward by name) -> what they say."""
    readings: Callable[[Any, str], list[Reading]]
    """(pipe, prompt) -> how its tokenizers read it, in the order of the text tokens that a site sees."""
    density: str = "uniform"
    """How training draws `s`: a key of `training.objective.DENSITIES`."""
    shift: float = 1.0
    """Where that is moved to: s becomes shift s / (1 + (shift - 1) s)."""
    noised: Noising = flow
    """(latents, s, noise) -> latents at s, and what the model should predict of them."""
    settings: Callable[[Any], dict[str, Any]] = lambda pipe: {}
    """(pipe) -> fields of this that the pipeline's own parts decide."""
    call: Callable[[Any, list[str]], dict[str, Any]] = lambda pipe, prompts: {}
    """(pipe, prompts, negative ones too) -> further arguments of the pipeline's call."""


def denoiser_name(pipe: Any) -> str:
    """`transformer` or `unet`: the part of a pipeline that is adapted."""
    return "unet" if getattr(pipe, "transformer", None) is None else "transformer"


def denoiser(pipe: Any) -> nn.Module:
    """The network of a pipeline that is adapted."""
    model = getattr(pipe, denoiser_name(pipe))
    assert isinstance(model, nn.Module)
    return model


# --------------------------------------------------------------------------------------------- conditioning


def select(conditioning: Conditioning, rows: Tensor) -> Conditioning:
    """The conditioning of some rows of a batch."""
    return {
        name: [value[row] for row in rows.tolist()] if isinstance(value, list) else value[rows]
        for name, value in conditioning.items()
    }


def join(first: Conditioning, second: Conditioning) -> Conditioning:
    """Two batches of conditioning as one.

    Prompts of different lengths are filled up with zeros: only a family that masks its padding has them.
    """
    return {
        name: value + second[name] if isinstance(value, list) else torch.cat(_same_length(value, second[name]))
        for name, value in first.items()
    }


def _same_length(*tensors: Tensor) -> list[Tensor]:
    """Tensors `(batch, length, ...)`, all as long as the longest."""
    if len({t.shape[1:] for t in tensors}) == 1:
        return list(tensors)
    longest = max(t.shape[1] for t in tensors)
    return [nn.functional.pad(t, (0, 0) * (t.ndim - 2) + (0, longest - t.shape[1])) for t in tensors]


def named(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name."""
    return dict(zip(list(inspect.signature(type(model).forward).parameters)[1:], args, strict=False)) | dict(kwargs)


# -------------------------------------------------------------------------------------------------- layouts

TEXT_STREAM = (".add_q_proj", ".add_k_proj", ".add_v_proj", ".to_add_out", ".ff_context", ".txt_mlp")
CROSS = (".attn2.to_k", ".attn2.to_v")


def attended(embeds: Float[Tensor, "batch tokens width"]) -> Bool[Tensor, "batch tokens"]:
    """The mask of a family that attends to its padding."""
    return torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)


def words(mask: Bool[Tensor, "batch tokens"]) -> Layout:
    """Text tokens alone."""
    return Layout(real=mask, image=torch.zeros_like(mask))


def picture(like: Bool[Tensor, "batch tokens"], grid: Grid) -> Layout:
    """Picture tokens alone, for as many rows."""
    image = like.new_ones(len(like), grid[0] * grid[1])
    return Layout(real=image, image=image, grid=grid)


def two_streams(site: str, mask: Bool[Tensor, "batch tokens"], grid: Grid) -> Layout:
    """Text and picture in sites of their own; in a single stream text comes first."""
    if site.startswith("single_"):
        text, image = words(mask), picture(mask, grid)
        return Layout(torch.cat([text.real, image.real], 1), torch.cat([text.image, image.image], 1), grid)
    return words(mask) if any(part in site for part in TEXT_STREAM) else picture(mask, grid)


def cross_attention(site: str, mask: Bool[Tensor, "batch tokens"], grid: Grid) -> Layout:
    """Text is seen where the picture attends to it, and nowhere else."""
    return words(mask) if site.endswith(CROSS) else picture(mask, grid)


def placed(
    backbone: Backbone, site: str, values: Float[Tensor, "batch ..."], conditioning: Conditioning, grid: Grid
) -> tuple[Float[Tensor, "batch positions width"], Layout]:
    """What a site read or coded, by position, and where its positions lie.

    A site that reads no tokens has one position, of neither kind. Raises UserError on a site that reads what is
    neither the picture's tokens nor the prompt's.
    """
    rows = len(conditioning[backbone.gate_input])
    if values.ndim == 2 and len(values) == rows:
        real = torch.ones(rows, 1, dtype=torch.bool, device=values.device)
        return values[:, None], Layout(real=real, image=torch.zeros_like(real))
    layout = backbone.layout(site, conditioning, grid)
    if layout.real.shape != values.shape[:-1]:
        raise UserError(f"`sites`: {site} reads neither tokens of the picture nor of the prompt. Leave it out.")
    return values, layout


# ----------------------------------------------------------------------------------- what most families share


def patches(model: nn.Module, latents: Tensor) -> Grid:
    """A token for each patch of latents."""
    patch: int = model.config.patch_size  # type: ignore[union-attr, assignment]
    return latents.shape[-2] // patch, latents.shape[-1] // patch


@torch.no_grad()
def autoencoded(pipe: Any, pixels: Tensor) -> Tensor:
    """The autoencoder's latents, moved and scaled as its config says; the mode where it gives a distribution."""
    out = pipe.vae.encode(pixels.to(pipe.vae.dtype))
    latents, config = out.latent if hasattr(out, "latent") else out.latent_dist.mode(), pipe.vae.config
    mean, deviation = (getattr(config, f"latents_{name}", None) for name in ("mean", "std"))
    if mean is not None and deviation is not None:  # some of SDXL's kin
        mean, deviation = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, deviation))
        return (latents - mean) * config.scaling_factor / deviation
    return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor


def default_of(pipe: Any, argument: str) -> Any:
    """What an argument of the pipeline's call is when nobody says it."""
    return inspect.signature(type(pipe).__call__).parameters[argument].default


def bare(prompts: Sequence[str], found: Sequence[Tensor | None]) -> Conditioning:
    """Of (embeddings, mask, those of no words, their mask), as pipelines with Gemma give them; empty prompts bare."""
    embeds, mask, plain, plain_mask = found
    assert embeds is not None
    assert mask is not None
    empty = torch.tensor([not prompt for prompt in prompts], device=mask.device)
    if plain is not None and plain_mask is not None:
        embeds = torch.where(empty[:, None, None], plain, embeds)
        mask = torch.where(empty[:, None], plain_mask, mask)
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def pack(latents: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens four_channels"]:
    """2 x 2 latents in a token, row by row (Flux, Qwen-Image)."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(packed: Tensor, like: Float[Tensor, "batch channels height width"]) -> Tensor:
    """The inverse of `pack`, in the shape of some latents."""
    b, c, h, w = like.shape
    return packed.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def heard(thousandths: bool = True) -> Callable[[nn.Module, dict[str, Any]], Heard]:
    """For a forward with `hidden_states` that are latents, and a `timestep` of 0 to 1000 (or, if not, to 1)."""

    def read(model: nn.Module, given: dict[str, Any]) -> Heard:
        latents, timestep = given["hidden_states"], given["timestep"].float()
        s = timestep / 1000 if thousandths else timestep
        return Heard(s.expand(len(latents)), patches(model, latents), given, slack(given["timestep"]))

    return read


def slack(told: Tensor) -> float:
    """Of a time that was told in this dtype: pipelines round it as one of 1000 and again as one of 1."""
    return 1e-4 + (torch.finfo(told.dtype).eps / 2 if told.dtype.is_floating_point else 0)
