"""Model families: which backbone serves a pipeline, and how a pipeline is opened."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atomtune.backbones import (
    aura_flow,
    flux,
    flux2,
    hunyuan_dit,
    lumina2,
    pixart,
    qwen_image,
    sana,
    sd3,
    unet,
    z_image,
)
from atomtune.backbones.base import (
    Backbone,
    Conditioning,
    Embeds,
    Grid,
    Heard,
    Layout,
    denoiser,
    denoiser_name,
    join,
    named,
    placed,
    select,
)
from atomtune.backbones.reading import encoding, spelling, token_texts, word_tokens
from atomtune.errors import UserError, did_you_mean

EMBEDDED = "embedded"
"""The base that ships with atomtune."""

DTYPES = ("float32", "bfloat16", "float16")
"""Precisions that a base is opened in."""

BACKBONES: dict[str, Backbone] = {
    "AuraFlowPipeline": aura_flow.BACKBONE,
    "Flux2KleinPipeline": flux2.KLEIN,
    "Flux2Pipeline": flux2.BACKBONE,
    "FluxPipeline": flux.BACKBONE,
    "HunyuanDiTPipeline": hunyuan_dit.BACKBONE,
    "Lumina2Pipeline": lumina2.BACKBONE,
    "PixArtAlphaPipeline": pixart.ALPHA,
    "PixArtSigmaPipeline": pixart.BACKBONE,
    "QwenImagePipeline": qwen_image.BACKBONE,
    "SanaPipeline": sana.BACKBONE,
    "StableDiffusion3Pipeline": sd3.BACKBONE,
    "StableDiffusionPipeline": unet.SD15,
    "StableDiffusionXLPipeline": unet.SDXL,
    "ZImagePipeline": z_image.BACKBONE,
}
"""Backbones by the class name of the diffusers pipeline."""

__all__ = [
    "BACKBONES",
    "EMBEDDED",
    "Backbone",
    "Conditioning",
    "Embeds",
    "Grid",
    "Heard",
    "Layout",
    "backbone_of",
    "base_name",
    "call_arguments",
    "denoiser",
    "denoiser_name",
    "encoding",
    "join",
    "named",
    "open_pipeline",
    "placed",
    "select",
    "spelling",
    "token_texts",
    "word_tokens",
]


def _check_family(folder: Path) -> None:
    """Raises UserError on a folder whose pipeline no file here serves, before any of its weights are read."""
    index = folder / "model_index.json"
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"`base`: {index} must name its pipeline's class: {type(error).__name__} {error}.") from error
    _served(name)


def _served(name: Any) -> Backbone:
    if not isinstance(name, str) or name not in BACKBONES:
        known = ", ".join(BACKBONES)
        raise UserError(f"`base` must be a pipeline of a known family ({known}), got {name}.")
    return BACKBONES[name]


def backbone_of(pipe: Any) -> Backbone:
    """The backbone that serves this pipeline. Raises UserError for a family without a file here."""
    found = _served(type(pipe).__name__)

    def encode_pictures(pipe: Any, pixels: Any) -> Any:
        model: Any = denoiser(pipe)
        with _in_float32(pipe.vae):
            return found.encode_pictures(pipe, pixels).to(model.dtype)

    return dataclasses.replace(found, **found.settings(pipe), encode_pictures=encode_pictures)


@contextmanager
def _in_float32(vae: Any) -> Iterator[None]:
    """Inside, an autoencoder has full precision: half of it costs detail, and some give NaN in float16."""
    kind, full = vae.dtype, vae.dtype.itemsize >= 4
    if not full:
        vae.float()
    try:
        yield
    finally:
        if not full:
            vae.to(kind)


def call_arguments(pipe: Any, prompts: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a call of the pipeline with these prompts and arguments gets beside the prompts."""
    negative = given.get("negative_prompt") or []
    texts = [*prompts, *([negative] if isinstance(negative, str) else negative)]
    return backbone_of(pipe).call(pipe, texts) | dict(given)


def base_name(pipe: Any) -> str | None:
    """What `open_pipeline` opens this pipeline with: `embedded`, a folder or a hub id."""
    from atomtune.scenes.model import folder

    path = str(getattr(pipe, "name_or_path", "") or "")
    return EMBEDDED if path == str(folder()) else path or None


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading without progress bars and without lines that tell a user nothing; errors are errors still."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    logs = (diffusers_log, transformers_log)
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
            log.enable_progress_bar()


def open_pipeline(base: str, dtype: str = "float32", device: str | None = None) -> Any:
    """The pipeline at a folder or hub id; `embedded` is the model that ships with atomtune.

    `dtype` is float32, bfloat16 or float16. Raises UserError on a base that is not there or of no known family.
    """
    if dtype not in DTYPES:
        raise UserError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if base == EMBEDDED:
        from atomtune.scenes.model import pipeline

        with _quiet():
            pipe: Any = pipeline(dtype)
    else:
        import torch
        from diffusers import DiffusionPipeline

        looks_local = base.startswith((".", "/", "~")) or Path(base).expanduser().exists()
        path = Path(base).expanduser()
        if looks_local and not (path / "model_index.json").is_file():
            raise UserError(f"`base` must be a diffusers pipeline folder (with model_index.json), got {base}.")
        if not looks_local and base.count("/") != 1:
            hint = did_you_mean(base, [EMBEDDED])
            raise UserError(f"`base` must be {EMBEDDED!r}, a folder or a hub id owner/name, got {base!r}.{hint}")
        if looks_local:
            _check_family(path)
        try:
            with _quiet():
                # Pickle runs code when it is read.
                pipe = DiffusionPipeline.from_pretrained(
                    path if looks_local else base, dtype=getattr(torch, dtype), use_safetensors=True
                )
        except Exception as error:  # a pipeline's parts raise anything where a file, a class or a package is not there
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            if "stacktrace" in reason:  # diffusers tells of the hub's own error above its own
                why = type(error.__cause__).__name__
                reason = f"it is not in the hub's cache here, and the hub gives {why}. Check the id and the network."
            raise UserError(f"`base` can't be loaded from {base}: {reason}") from error
        pipe.set_progress_bar_config(disable=True)
    backbone_of(pipe)
    return pipe.to(device) if device else pipe
