"""Model families: which backbone serves a pipeline, and how a pipeline is opened."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from atomtune.backbones import lumina2, sd3
from atomtune.backbones.base import Backbone, Conditioning, Layout, denoiser, join, select
from atomtune.errors import UserError

EMBEDDED = "embedded"
"""The base that ships with atomtune."""

BACKBONES: dict[str, Backbone] = {
    "Lumina2Pipeline": lumina2.BACKBONE,
    "StableDiffusion3Pipeline": sd3.BACKBONE,
}
"""Backbones by the class name of the diffusers pipeline."""

__all__ = [
    "BACKBONES",
    "EMBEDDED",
    "Backbone",
    "Conditioning",
    "Layout",
    "backbone_of",
    "base_name",
    "denoiser",
    "join",
    "open_pipeline",
    "select",
]


def backbone_of(pipe: Any) -> Backbone:
    """The backbone that serves this pipeline. Raises UserError for a family without a file here."""
    name = type(pipe).__name__
    if name not in BACKBONES:
        known = ", ".join(BACKBONES)
        raise UserError(f"`base` must be a pipeline of a known family ({known}), got {name}.")
    return BACKBONES[name]


def base_name(pipe: Any) -> str | None:
    """What `open_pipeline` opens this pipeline with: `embedded`, a folder or a hub id."""
    from atomtune.scenes.model import folder

    path = str(getattr(pipe, "name_or_path", "") or "")
    return EMBEDDED if path == str(folder()) else path or None


def open_pipeline(base: str, dtype: str = "float32", device: str | None = None) -> Any:
    """The pipeline at a folder or hub id; `embedded` is the model that ships with atomtune."""
    import torch
    from diffusers import DiffusionPipeline

    if base == EMBEDDED:
        from atomtune.scenes.model import pipeline

        pipe: Any = pipeline()
    else:
        looks_local = base.startswith((".", "/", "~")) or Path(base).expanduser().exists()
        path = Path(base).expanduser()
        if looks_local and not (path / "model_index.json").is_file():
            raise UserError(f"`base` must be a diffusers pipeline folder (with model_index.json), got {base}.")
        if not looks_local and base.count("/") != 1:
            close = difflib.get_close_matches(base, [EMBEDDED], cutoff=0.4)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UserError(f"`base` must be {EMBEDDED!r}, a folder or a hub id owner/name, got {base!r}.{hint}")
        pipe = DiffusionPipeline.from_pretrained(path if looks_local else base, torch_dtype=getattr(torch, dtype))
        pipe.set_progress_bar_config(disable=True)
    backbone_of(pipe)
    return pipe.to(device) if device else pipe
