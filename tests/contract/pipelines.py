"""The table that the contract of a backbone runs over: each family, and a tiny random pipeline of its real class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import tiny_cross as cross
import tiny_streams as streams
import torch
from tiny_parts import CAPTIONS, randomize
from tiny_streams import lumina2
from torch import nn

from atomtune.backbones import denoiser
from atomtune.tuner import AtomConfig, atom_layers, attach, remove_adapter

__all__ = ["CAPTIONS", "FAMILIES", "Family", "Made", "lumina2", "random_atoms", "randomize"]

SIZE = {"height": 64, "width": 64}
NO_BINNING = {"use_resolution_binning": False}
AS_WRITTEN = NO_BINNING | {"clean_caption": False}
NEGATIVE = {"negative_prompt": ["", ""]}


@dataclass(frozen=True)
class Family:
    """One row: a family, how a tiny pipeline of it is made, and what a test of all families must know of it."""

    name: str
    build: Callable[[], Any]
    sites: tuple[str, ...]
    """Ends of the names of some sites, one of each kind, for short runs."""
    first: tuple[str, ...] = ("transformer_blocks.0.",)
    """Begins of the names of sites where text and picture have not met, unless by `to_add_out`."""
    plain: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    """Arguments of a call without guidance."""
    guided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 3.0})
    """Arguments of a call with it, or none where the family has none; for two prompts."""
    call: dict[str, Any] = field(default_factory=dict)
    """Arguments of the pipeline's call that atomtune gives by itself."""
    readers: tuple[str, ...] = ("text_encoder",)
    """The text encoders, in the order of the backbone's readings."""
    mute: tuple[str, ...] = ()
    """Ends of the names of sites that never get a gradient."""


class Made(dict[str, Any]):
    """A table whose entries are made when they are first asked for."""

    def __init__(self, make: Callable[[str], Any]) -> None:
        self.make = make

    def __missing__(self, name: str) -> Any:
        self[name] = self.make(name)
        return self[name]


@contextmanager
def random_atoms(pipe: Any, **config: Any) -> Iterator[None]:
    """Atoms of any size at its sites while it lasts; the last of each site never fires."""
    torch.manual_seed(3)
    attach(denoiser(pipe), AtomConfig(**config))
    for layer in atom_layers(pipe).values():
        nn.init.normal_(layer.dictionary("default").atoms, std=0.3)
        layer.dictionary("default").bias.data[-1] = 1e6
    yield
    remove_adapter(pipe)


TRUE_GUIDANCE = {"true_cfg_scale": 3.0, **NEGATIVE}
TWO = ("text_encoder", "text_encoder_2")
JOINT = ("attn.to_q", "attn.add_k_proj", "attn.to_add_out")
CROSS = ("attn1.to_q", "attn2.to_k", "attn2.to_out.0")
BLOCKS = ("transformer_blocks.0.", "single_transformer_blocks.0.")

FAMILIES = (
    Family(
        "sd3",
        streams.sd3,
        (*JOINT, "attn2.to_v"),
        readers=("text_encoder", "text_encoder_3"),
        mute=("1.attn.add_q_proj",),
    ),
    Family("lumina2", streams.lumina2, ("to_q", "to_out.0"), ("layers.0.",)),
    Family("flux", streams.flux, JOINT, BLOCKS, plain={}, guided=TRUE_GUIDANCE, readers=("text_encoder_2",)),
    Family("flux2", streams.flux2, ("to_q", "to_qkv_mlp_proj"), BLOCKS, plain={}, guided={}),
    Family("klein", streams.klein, ("to_q", "to_qkv_mlp_proj"), BLOCKS),
    Family("qwen_image", streams.qwen_image, ("to_q", "to_out.0"), plain={}, guided=TRUE_GUIDANCE),
    Family("z_image", streams.z_image, ("to_q", "to_out.0"), ("layers.0.",), plain={"guidance_scale": 0.0}),
    Family("aura_flow", streams.aura_flow, JOINT, ("joint_transformer_blocks.0.", BLOCKS[1])),
    Family("pixart_sigma", cross.pixart_sigma, CROSS, call=AS_WRITTEN),
    Family("pixart_alpha", cross.pixart_alpha, CROSS, call=AS_WRITTEN),
    Family("sana", cross.sana, ("attn1.to_q", "attn2.to_k"), call=NO_BINNING),
    Family("hunyuan_dit", cross.hunyuan_dit, CROSS, ("blocks.0.",), call=NO_BINNING, readers=TWO),
    Family("sdxl", cross.sdxl, CROSS, ("down_blocks.0.",)),
    Family("sd15", cross.sd15, CROSS, ("down_blocks.0.",)),
)
