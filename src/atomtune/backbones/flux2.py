"""FLUX.2 and klein: two streams, then one; normalized patches; a language model, padding attended."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from atomtune.backbones import base
from atomtune.backbones.base import Backbone, Conditioning, Grid, Layout
from atomtune.backbones.flux import heard
from atomtune.backbones.noising import shifted
from atomtune.backbones.reading import Reading, around

GUIDANCE = 4.0
"""Of a model that is told it: what its pipeline paints with."""
LENGTH = 512


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str]) -> Conditioning:
    embeds, _ = pipe.encode_prompt(prompts, max_sequence_length=LENGTH)
    return {"encoder_hidden_states": embeds}


@torch.no_grad()
def encode_pictures(pipe: Any, pixels: Tensor) -> Tensor:
    latents = pipe.vae.encode(pixels.to(pipe.vae.dtype)).latent_dist.mode()
    b, c, h, w = latents.shape
    latents = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)
    mean, variance = (t.view(1, -1, 1, 1).to(latents) for t in (pipe.vae.bn.running_mean, pipe.vae.bn.running_var))
    return (latents - mean) / torch.sqrt(variance + pipe.vae.config.batch_norm_eps)


def predict(model: nn.Module, latents: Tensor, s: Tensor, conditioning: Conditioning) -> Tensor:
    (rows, columns), length = latents.shape[-2:], conditioning["encoder_hidden_states"].shape[1]
    packed = model(
        hidden_states=latents.flatten(2).transpose(1, 2),
        timestep=s,
        # Left out, a model that wants it is silently wrong.
        guidance=torch.full_like(s, GUIDANCE) if model.config.guidance_embeds else None,  # type: ignore[union-attr]
        txt_ids=_ids(latents, 1, 1, length),
        img_ids=_ids(latents, rows, columns, 1),
        return_dict=False,
        **conditioning,
    )[0]
    return packed.transpose(1, 2).view(latents.shape)


def _ids(like: Tensor, rows: int, columns: int, length: int) -> Tensor:
    """Coordinates (time, row, column, place in the text) of each token: (batch, tokens, 4)."""
    at = torch.cartesian_prod(*(torch.arange(n, device=like.device) for n in (1, rows, columns, length)))
    return at.expand(len(like), -1, -1)


def layout(site: str, conditioning: Conditioning, grid: Grid) -> Layout:
    return base.two_streams(site, base.attended(conditioning["encoder_hidden_states"]), grid)


def readings(pipe: Any, prompt: str) -> list[Reading]:
    """The tokenizer's slot may hold a processor of text and pictures."""

    def render(text: str) -> str:
        said = [("system", pipe.system_message), ("user", text)]
        messages = [{"role": role, "content": [{"type": "text", "text": content}]} for role, content in said]
        return pipe.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)

    tokenizer = getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)
    before, after = around(render)
    return [Reading(tokenizer, prompt, LENGTH, padded=True, before=before, after=after, special=False)]


def klein_readings(pipe: Any, prompt: str) -> list[Reading]:
    def render(text: str) -> str:
        messages = [{"role": "user", "content": text}]
        return pipe.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

    before, after = around(render)
    return [Reading(pipe.tokenizer, prompt, LENGTH, padded=True, before=before, after=after)]


def settings(pipe: Any) -> dict[str, Any]:
    """In the single stream the way out has the name of a container in the double one: its sites are named in full."""
    blocks = pipe.transformer.config.num_single_layers
    outs = (f"single_transformer_blocks.{number}.attn.to_out" for number in range(blocks))
    return shifted(pipe) | {"sites": (*BACKBONE.sites, *outs)}


BACKBONE = Backbone(
    family="FLUX.2",
    sites=("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj"),
    gate_input="encoder_hidden_states",
    gate_mask=None,
    encode_prompts=encode_prompts,
    encode_pictures=encode_pictures,
    predict=predict,
    grid=base.patches,
    layout=layout,
    heard=heard,
    readings=readings,
    settings=settings,
)
KLEIN = replace(BACKBONE, family="FLUX.2 klein", readings=klein_readings)
