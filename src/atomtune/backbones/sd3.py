"""Stable Diffusion 3 and 3.5: two streams, three text encoders, padding attended."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from atomtune.backbones.base import Backbone, Conditioning, Layout, spelling

TEXT_SITES = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out", "ff_context")


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str]) -> Conditioning:
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, prompts, prompts, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


@torch.no_grad()
def encode_pictures(pipe: Any, pixels: Tensor) -> Tensor:
    latents = pipe.vae.encode(pixels.to(pipe.vae.dtype)).latent_dist.mode()
    return (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


def predict(model: nn.Module, latents: Tensor, s: Tensor, conditioning: Conditioning) -> Tensor:
    return model(hidden_states=latents, timestep=s * 1000, return_dict=False, **conditioning)[0]


def grid(model: nn.Module, latents: Tensor) -> tuple[int, int]:
    patch: int = model.config.patch_size  # type: ignore[union-attr, assignment]
    return latents.shape[-2] // patch, latents.shape[-1] // patch


def layout(site: str, conditioning: Conditioning, tokens: int) -> Layout:
    """Each site sees one stream, and all of its positions are real: padding is attended."""
    embeds = conditioning["encoder_hidden_states"]
    text = any(part in site for part in TEXT_SITES)
    length = embeds.shape[1] if text else tokens
    real = torch.ones(len(embeds), length, dtype=torch.bool, device=embeds.device)
    return Layout(real=real, image=torch.zeros_like(real) if text else real)


def clock(timestep: Tensor) -> Tensor:
    return timestep / 1000


def word_tokens(pipe: Any, prompt: str, words: str) -> list[int]:
    """CLIP's tokens, cut at its length, then T5's."""
    length = pipe.tokenizer_max_length
    clip = [at for at in spelling(pipe.tokenizer, prompt, words) if at < length - 1]
    return clip + [length + at for at in spelling(pipe.tokenizer_3, prompt, words)]


BACKBONE = Backbone(
    family="SD3",
    sites=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    gate_input="encoder_hidden_states",
    gate_mask=None,
    encode_prompts=encode_prompts,
    encode_pictures=encode_pictures,
    predict=predict,
    grid=grid,
    layout=layout,
    clock=clock,
    word_tokens=word_tokens,
)
