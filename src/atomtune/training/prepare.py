"""What a run needs before its first step: pictures as latents, prompts as conditioning, unrelated pictures."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atomtune.backbones import Backbone, Conditioning, denoiser, join
from atomtune.data.cache import Cache, key
from atomtune.data.folder import Sample, Scan, scan
from atomtune.data.picture import fit, open_mask, open_picture, to_tensor
from atomtune.data.prompts import split_held_out, unrelated_prompts
from atomtune.errors import UserError
from atomtune.sampling import generate
from atomtune.training.masks import surprise
from atomtune.training.options import TrainOptions
from atomtune.tuner import fingerprint

SIDE = 1024
"""Of a pipeline that does not say what it paints by default, such as Z-Image's."""


@dataclass(frozen=True)
class Material:
    """Everything a step reads, on the model's device."""

    captions: tuple[str, ...]
    latents: Tensor
    conditioning: Conditioning
    masks: Tensor
    """Share of each picture token on the subject: from the user's masks, or where the base is surprised."""
    unrelated_latents: Tensor
    unrelated_conditioning: Conditioning
    gate_concept: Conditioning
    """Prompts that must open the gate."""
    gate_unrelated: Conditioning
    """Prompts that must shut it, for training."""
    gate_held_out: Conditioning
    """The same, kept for calibration."""
    scan: Scan


def prepare(pipe: Any, backbone: Backbone, data: Path, options: TrainOptions, run: Path) -> Material:
    """Scan the data and encode it; what is slow is cached beside the run, by content."""
    found = scan(data, caption=options.caption)
    captions = tuple(sample.caption for sample in found.samples)
    _check_concept(captions, options)
    side = _side(pipe, options)
    cache = Cache(run.parent / ".cache")
    print_key = fingerprint(denoiser(pipe)), _weights_key(pipe)
    prompts = unrelated_list(pipe, options)
    kept, held_out = split_held_out(prompts)
    kept = tuple(p for p in kept if not _mentions(p, options.concept))
    held_out = tuple(p for p in held_out if not _mentions(p, options.concept))
    if not kept or not held_out:
        raise UserError("`unrelated` must hold prompts without the concept; all of them name it.")
    device = pipe.vae.device
    painted = pictured(captions, kept, options)

    def paint() -> dict[str, Tensor]:
        pictures = generate(pipe, painted, seed=options.seed + 1_000_000, height=side, width=side)
        pixels = torch.stack([to_tensor(p) for p in pictures]).to(device)
        return {"latents": backbone.encode_pictures(pipe, pixels).contiguous()}

    unrelated = cache.get(key(*print_key, str(side), str(options.seed), *painted), paint)["latents"].to(device)
    latents = torch.cat([_latents(pipe, backbone, s, side, cache, print_key) for s in found.samples]).to(device)
    opening, shutting = gate_prompts(captions, kept, options)

    def encode(texts: tuple[str, ...]) -> Conditioning:
        return reduce(join, (backbone.encode_prompts(pipe, list(texts[i : i + 32])) for i in range(0, len(texts), 32)))

    conditioning = encode(captions)

    def guess() -> dict[str, Tensor]:
        return {"masks": surprise(denoiser(pipe), backbone, latents, conditioning)}

    guess_key = key(*print_key, str(side), "surprise", *(s.digest for s in found.samples), *captions)
    masks = _masks(found.samples, backbone, pipe, latents, side)
    if masks is None:
        masks = cache.get(guess_key, guess)["masks"].to(device)

    return Material(
        captions=captions,
        latents=latents,
        conditioning=conditioning,
        masks=masks,
        unrelated_latents=unrelated,
        unrelated_conditioning=encode(spoken(painted)),
        gate_concept=encode(opening) if options.gated else {},
        gate_unrelated=encode(shutting) if options.gated else {},
        gate_held_out=encode(("", *held_out)) if options.gated else {},
        scan=found,
    )


def _side(pipe: Any, options: TrainOptions) -> int:
    side = default_side(pipe) if options.resolution is None else options.resolution
    unit = 2 * int(pipe.vae_scale_factor)
    if side % unit:
        raise UserError(f"`resolution` must be a multiple of {unit} pixels for this base, got {side}.")
    return side


def default_side(pipe: Any) -> int:
    """The side, in pixels, that the pipeline paints when it is not told one."""
    config: Any = denoiser(pipe).config
    size = getattr(pipe, "default_sample_size", None) or getattr(config, "sample_size", None)
    return int(size * pipe.vae_scale_factor) if size else SIDE


def unrelated_list(pipe: Any, options: TrainOptions) -> tuple[str, ...]:
    """Unrelated prompts: the user's file, or the base folder's unrelated.txt, or the shipped list."""
    path = options.unrelated
    if path is None:
        beside = Path(str(getattr(pipe, "name_or_path", "") or "")) / "unrelated.txt"
        if not beside.is_file():
            return unrelated_prompts()
        path = beside
    try:
        lines = tuple(ln.strip() for ln in path.read_text(encoding="utf-8").splitlines() if ln.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`unrelated` can't be read: {error}.") from error
    if len(lines) < 5:
        raise UserError(f"`unrelated` must hold at least 5 prompts, one a line; {path} has {len(lines)}.")
    return lines


def pictured(captions: tuple[str, ...], unrelated: tuple[str, ...], options: TrainOptions) -> tuple[str, ...]:
    """The prompts of the base's own pictures: a quarter say the class noun where captions say the concept's name."""
    name, noun = options.concept, options.class_noun
    number = options.unrelated_pictures
    near = [_replace(c, name, noun) for c in captions if _mentions(c, name)] if name and noun else []
    # With few captions each is painted several times, every time from another noise.
    near = (near * number)[: number // 4]
    return (*near, *unrelated)[:number]


def spoken(painted: tuple[str, ...]) -> tuple[str, ...]:
    """What stands beside the base's pictures: their prompts, and for the last eighth, at least one, no words.

    Guidance leans on what the model paints without words.
    """
    mute = -(-len(painted) // 8) if len(painted) > 1 else 0
    return painted[: len(painted) - mute] + ("",) * mute


def gate_prompts(
    captions: tuple[str, ...], unrelated: tuple[str, ...], options: TrainOptions
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Prompts that must open the gate, and prompts that must shut it.

    Opening: the captions, and the concept's name alone and beside other words. Shutting: unrelated prompts,
    no words at all, and the captions with the name taken out or replaced by the class noun.
    """
    name, noun = options.concept or "", options.class_noun
    beside = tuple(f"{p}, {name}" for p in unrelated[::4]) + tuple(f"{name}, {p}" for p in unrelated[1::4])
    opening = (*dict.fromkeys(captions), name, f"a {name}", f"a picture of {name}", *beside)
    without = tuple(" ".join(_replace(c, name, "").split()) for c in captions)
    instead = tuple(_replace(c, name, noun) for c in captions) + (noun, f"a {noun}") if noun else ()
    shutting = ("", *without, *instead, *unrelated)
    return opening, tuple(dict.fromkeys(shutting))


def _replace(text: str, name: str, by: str) -> str:
    at = text.lower().find(name.lower())
    return text if at < 0 else text[:at] + by + text[at + len(name) :]


def _mentions(text: str, name: str | None) -> bool:
    return name is not None and name.lower() in text.lower()


def _check_concept(captions: tuple[str, ...], options: TrainOptions) -> None:
    if not options.gated:
        return
    missing = [c for c in captions if not _mentions(c, options.concept)]
    if missing:
        raise UserError(
            f"`concept` must stand in every caption, but {len(missing)} of {len(captions)} lack "
            f"{options.concept!r}, such as {missing[0]!r}. Mend the captions, or train with --no-gate."
        )


def _latents(pipe: Any, backbone: Backbone, sample: Sample, side: int, cache: Cache, base: tuple[str, str]) -> Tensor:
    def make() -> dict[str, Tensor]:
        pixels = to_tensor(fit(open_picture(sample.path), (side, side)))[None].to(pipe.vae.device)
        latents = backbone.encode_pictures(pipe, pixels)
        if not latents.isfinite().all():
            raise UserError(f"{sample.path} gives latents that are not finite in {latents.dtype}. Use fp32.")
        return {"latents": latents.contiguous()}

    return cache.get(key(*base, sample.digest, str(side)), make)["latents"]


def _masks(samples: tuple[Sample, ...], backbone: Backbone, pipe: Any, latents: Tensor, side: int) -> Tensor | None:
    paths = [sample.mask for sample in samples if sample.mask is not None]
    if len(paths) < len(samples):
        return None
    pixels = torch.stack([to_tensor(fit(open_mask(path).convert("RGB"), (side, side)))[0] for path in paths])
    grid = backbone.grid(denoiser(pipe), latents)
    shares = torch.nn.functional.adaptive_avg_pool2d((pixels[:, None] + 1) / 2, grid)
    return shares.flatten(1).clamp(0, 1).to(latents.device)


def _weights_key(pipe: Any) -> str:
    """A hash over samples of the autoencoder's weights and its config."""
    digest = hashlib.sha256(str(dict(pipe.vae.config)).encode())
    for name, parameter in sorted(pipe.vae.named_parameters()):
        digest.update(name.encode() + parameter.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()
