"""The frozen base that a run trains on: in fewer bits, or ready to be shared among processes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from atomtune.backbones import denoiser, open_pipeline
from atomtune.errors import UserError
from atomtune.training.processes import own_device, wants_shards


def open_base(base: str, dtype: str, device: str | None, *, quantized: str | None = None, share: bool = False) -> Any:
    """The pipeline to train on, on this process's device.

    One that is to be quantized or shared is whole on the CPU only: its denoiser reaches the device in fewer bits, or
    piece by piece (`processes.shard`).
    """
    place = own_device(device)
    if quantized is None and not wants_shards(share):
        return open_pipeline(base, dtype, place)
    pipe = open_pipeline(base, dtype)
    if quantized is not None:
        quantize(denoiser(pipe), quantized)
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and place and not (wants_shards(share) and part is denoiser(pipe)):
            part.to(place)
    return pipe


def _in_blocks(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, layer) of every linear layer inside the model's blocks; the ends keep their precision."""
    for path, module in model.named_modules():
        for name, child in module.named_children():
            inside = any(part.isdigit() for part in f"{path}.{name}".split("."))
            if type(child) is nn.Linear and inside:
                yield module, name, child


def _torchao(kind: str) -> Callable[[nn.Module], None]:
    def apply(model: nn.Module) -> None:
        package = _extra("torchao.quantization")
        config = getattr(package, kind)()
        chosen = {id(layer) for _, _, layer in _in_blocks(model)}
        package.quantize_(model, config, filter_fn=lambda module, _: id(module) in chosen)

    return apply


def _nf4(model: nn.Module) -> None:
    bnb = _extra("bitsandbytes")
    for parent, name, layer in list(_in_blocks(model)):
        device, dtype = layer.weight.device, layer.weight.dtype
        with torch.device("meta"):
            quantized = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, quant_type="nf4"
            )
        quantized.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        quantized.bias = layer.bias
        setattr(parent, name, quantized.to(device))


KINDS: dict[str, Callable[[nn.Module], None]] = {
    "int8": _torchao("Int8WeightOnlyConfig"),
    "fp8": _torchao("Float8WeightOnlyConfig"),
    "nf4": _nf4,
}
"""What a base's weights can become: torchao's 8 bits, or bitsandbytes' 4."""


def quantize(model: nn.Module, kind: str) -> None:
    """Quantize the linear layers in a model's blocks, in place. Raises UserError on a kind that is unknown."""
    if kind not in KINDS:
        raise UserError(f"`quantize` must be one of {', '.join(KINDS)}, got {kind!r}.")
    model.requires_grad_(False)
    KINDS[kind](model)


def _extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"`quantize` needs the package {module.partition('.')[0]}. Install atomtune[quant].") from error
