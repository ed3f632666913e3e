"""What layers read while a pipeline works."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from atomtune.backbones import backbone_of, denoiser
from atomtune.errors import UserError


@contextmanager
def watch(
    pipe: Any, modules: Mapping[str, nn.Module], note: Callable[[str, Tensor, Bool[Tensor, "batch positions"]], None]
) -> Iterator[None]:
    """Inside, `note(site, x, real)` gets what each module reads, and which of its positions are no padding."""
    backbone, base = backbone_of(pipe), denoiser(pipe)
    given: dict[str, Any] = {}

    @torch.compiler.disable  # what is noted is Python's
    def read(site: str, x: Tensor) -> None:
        real = backbone.layout(site, given, math.prod(backbone.grid(base, given["hidden_states"]))).real
        if x.shape[:-1] != real.shape:
            raise UserError(f"Atoms need sites that read tokens, and {site} does not. Leave it out of the LoRA.")
        note(site, x, real)

    handles = [base.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)]
    for site, module in modules.items():
        handles.append(module.register_forward_pre_hook(lambda _, x, site=site: read(site, x[0].detach())))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
