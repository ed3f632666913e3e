"""What layers read while a pipeline works."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jaxtyping import Bool
from torch import Tensor, nn

from atomtune.backbones import Heard, backbone_of, denoiser, named, placed
from atomtune.tuner import hooked


@contextmanager
def watch(
    pipe: Any, modules: Mapping[str, nn.Module], note: Callable[[str, Tensor, Bool[Tensor, "batch positions"]], None]
) -> Iterator[None]:
    """Inside, `note(site, x, real)` gets what each module reads, and which of its positions are no padding."""
    backbone, base = backbone_of(pipe), denoiser(pipe)
    heard: Heard

    def listen(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal heard
        heard = backbone.heard(base, named(base, args, kwargs))

    def read(site: str, x: Tensor) -> None:
        x, layout = placed(backbone, site, x, heard.conditioning, heard.grid)
        note(site, x, layout.real)

    handles = [base.register_forward_pre_hook(listen, with_kwargs=True)]
    for site, module in modules.items():
        handles.append(module.register_forward_pre_hook(lambda _, x, site=site: read(site, x[0].detach())))
    with hooked(handles):
        yield
