"""Several processes: one mean of gradients, and one base among them where it is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

from atomtune.tuner import atom_layers, prompt_gate


def mean_gradients(parameters: Iterable[nn.Parameter], processes: PartialState) -> None:
    """Every process gets the mean of all gradients, as DDP would give it."""
    if processes.num_processes > 1:
        for p in parameters:
            p.grad = reduce(torch.zeros_like(p) if p.grad is None else p.grad, "mean")


def mean_values(values: Iterable[Tensor], processes: PartialState) -> None:
    """Every process gets, in place, the mean of each value on all of them."""
    if processes.num_processes > 1:
        for value in values:
            value.copy_(reduce(value, "mean"))


def highest(values: Mapping[str, Tensor], processes: PartialState) -> None:
    """Every process gets, in place, the largest of each value on all of them."""
    if processes.num_processes > 1:
        for value in values.values():
            torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)


def own_device(device: str | None) -> str | None:
    """The device of this process: of several that are launched together, each has its own GPU."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device == "cuda" and rank is not None else device


def launched() -> int:
    """How many processes were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def wants_shards(asked: bool) -> bool:
    """Whether the base is to be shared: by --shard, or by `accelerate launch --use_fsdp`."""
    return asked or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def shard(base: nn.Module, device: torch.device, processes: PartialState, adapter: str) -> None:
    """Share a frozen base among the processes (FSDP2), block by block.

    What is trained stays whole on each of them, outside of FSDP: it is small, and so its optimizer, its checkpoints
    and its mean are those of one process.
    """
    if processes.num_processes == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.num_processes,))
    ours = {p for name, p in base.named_parameters() if "atom_" in name}
    blocks = [m for stack in base.modules() if isinstance(stack, nn.ModuleList) for m in stack]
    inner = {id(m) for block in blocks for m in block.modules() if m is not block}
    for block in blocks:
        if id(block) not in inner and any(p not in ours for p in block.parameters()):
            fully_shard(block, mesh=mesh, ignored_params=ours)
    fully_shard(base, mesh=mesh, ignored_params=ours)
    for layer in atom_layers(base, adapter).values():  # FSDP has taken the base to the device, and left these
        layer._move_adapter_to_device_of_base_layer(adapter, device)
    gate = prompt_gate(base, adapter)
    if gate is not None:
        gate.to(device)
