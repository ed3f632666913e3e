"""How latents are noised in training, and what a model should predict of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from atomtune.errors import UserError

Time = float | Float[Tensor, " batch"]
Noising = Callable[[Tensor, Time, Tensor], tuple[Tensor, Tensor]]
"""(latents, s, noise) -> latents at s, and the target; s is one number or one a picture."""

STEPS = 1000
"""Of a scheduler that counts them."""


def flow(latents: Tensor, s: Time, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(x_s, v): x_s = (1 - s) x0 + s noise, and the velocity v = noise - x0."""
    weight = s if isinstance(s, float) else s.view(-1, *[1] * (latents.ndim - 1))
    return ((1 - weight) * latents + weight * noise).to(latents.dtype), noise - latents


def shifted(pipe: Any) -> dict[str, Any]:
    """The shift of a scheduler that has a static one; one that depends on the picture's size is not for training."""
    config = pipe.scheduler.config
    shift = 1.0 if config.get("use_dynamic_shifting") else config.get("shift") or config.get("flow_shift") or 1.0
    return {"shift": float(shift)}


def step(s: Float[Tensor, " batch"]) -> Tensor:
    """The scheduler's step at s, 0 to 999."""
    return (s * STEPS).round().long().clamp(0, STEPS - 1)


def scheduled(pipe: Any) -> dict[str, Any]:
    """Noise as the pipeline's own scheduler adds it, and its prediction, at step 1000 s.

    The target is the noise (Ho et al. 2020, arXiv 2006.11239) or v = alpha noise - sigma x0 (Salimans & Ho 2022,
    arXiv 2202.00512). Raises UserError on a scheduler that predicts anything else, or adds noise by no betas (EDM).
    """
    from diffusers import DDPMScheduler

    kind = pipe.scheduler.config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(f"`base` must have a scheduler that predicts epsilon or v_prediction, got {kind!r}.")
    if pipe.scheduler.config.get("beta_start") is None and pipe.scheduler.config.get("trained_betas") is None:
        name = type(pipe.scheduler).__name__
        raise UserError(f"`base` must have a scheduler that adds noise by betas, as DDPM's does, got {name}.")
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)

    def noised(latents: Tensor, s: Time, noise: Tensor) -> tuple[Tensor, Tensor]:
        at = step(torch.as_tensor(s, device=latents.device)).expand(len(latents))
        target = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, at)
        return scheduler.add_noise(latents, noise, at), target

    return {"noised": noised}
