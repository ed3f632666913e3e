"""The PEFT method: importing this package registers it, so that PEFT's own loaders know the files."""

from atomtune.errors import OPTIONAL, hushed

with hushed(*OPTIONAL):  # the first import of PEFT
    from .config import FORMAT_VERSION, AtomConfig
    from .gate import GateShares, PromptGate, hold_gate, open_gate, override_gate, prompt_gate, read_gates
    from .layer import AtomLinear
    from .model import (
        BASE,
        AtomModel,
        Recording,
        activate,
        adapter_config,
        assigned,
        atom_layers,
        attach,
        base_only,
        discard_adapters,
        hooked,
        record,
        remove_adapter,
        unwrap,
    )
    from .register import register
    from .store import check_there, fingerprint, load, load_statistics, note_base, previous_of, prune, recover, save

register(AtomConfig, AtomModel)

__all__ = [
    "BASE",
    "FORMAT_VERSION",
    "AtomConfig",
    "AtomLinear",
    "AtomModel",
    "GateShares",
    "PromptGate",
    "Recording",
    "activate",
    "adapter_config",
    "assigned",
    "atom_layers",
    "attach",
    "base_only",
    "check_there",
    "discard_adapters",
    "fingerprint",
    "hold_gate",
    "hooked",
    "load",
    "load_statistics",
    "note_base",
    "open_gate",
    "override_gate",
    "previous_of",
    "prompt_gate",
    "prune",
    "read_gates",
    "record",
    "recover",
    "remove_adapter",
    "save",
    "unwrap",
]
