"""Lumina2, and the embedded model: one stream of text and picture tokens, one text encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from atomtune.backbones.base import Backbone, Conditioning, Layout, spelling


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str]) -> Conditioning:
    embeds, mask, _, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, **call(pipe, prompts))
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


@torch.no_grad()
def encode_pictures(pipe: Any, pixels: Tensor) -> Tensor:
    out = pipe.vae.encode(pixels.to(pipe.vae.dtype))
    latents = out.latent if hasattr(out, "latent") else out.latent_dist.mode()
    return (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


def predict(model: nn.Module, latents: Tensor, s: Tensor, conditioning: Conditioning) -> Tensor:
    """The model's clock runs from noise (0) to picture (1), and so does its velocity."""
    return -model(hidden_states=latents, timestep=1 - s, return_dict=False, **conditioning)[0]


def grid(model: nn.Module, latents: Tensor) -> tuple[int, int]:
    patch: int = model.config.patch_size  # type: ignore[union-attr, assignment]
    return latents.shape[-2] // patch, latents.shape[-1] // patch


def layout(site: str, conditioning: Conditioning, tokens: int) -> Layout:
    """Joint layers see the real text tokens, then the picture's, then padding; refiners see one kind."""
    mask = conditioning["encoder_attention_mask"].bool()
    lengths = mask.sum(1, keepdim=True)
    if site.startswith("context_refiner"):
        return Layout(real=mask, image=torch.zeros_like(mask))
    if site.startswith("noise_refiner"):
        image = mask.new_ones(len(mask), tokens)
        return Layout(real=image, image=image)
    at = torch.arange(int(lengths.max()) + tokens, device=mask.device)
    real = at < lengths + tokens
    return Layout(real=real, image=real & (at >= lengths))


def clock(timestep: Tensor) -> Tensor:
    return 1 - timestep


def word_tokens(pipe: Any, prompt: str, words: str) -> list[int]:
    text = f"{pipe.system_prompt} <Prompt Start> {prompt}"
    return spelling(pipe.tokenizer, text, words, start=len(text) - len(prompt))


def call(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    """A text length just long enough, in steps of 32: padding is masked, but it is computed."""
    texts = [f"{pipe.system_prompt} <Prompt Start> {prompt}" for prompt in prompts]
    longest = max(len(ids) for ids in pipe.tokenizer(texts).input_ids)
    return {"max_sequence_length": min(256, -(-longest // 32) * 32)}


BACKBONE = Backbone(
    family="Lumina2",
    sites=("to_q", "to_k", "to_v", "to_out.0"),
    gate_input="encoder_hidden_states",
    gate_mask="encoder_attention_mask",
    encode_prompts=encode_prompts,
    encode_pictures=encode_pictures,
    predict=predict,
    grid=grid,
    layout=layout,
    clock=clock,
    word_tokens=word_tokens,
    call=call,
)
