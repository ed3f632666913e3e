"""One site: a frozen linear layer plus, for each adapter, a dictionary of atoms."""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from atomtune.errors import UserError
from atomtune.sparse import Dictionary, stacked_codes

from .config import AtomConfig

if TYPE_CHECKING:
    from .gate import GateValues

CANNOT_MERGE = (
    "An atom adapter depends on its layer's input and can't be merged into the weights. "
    "Keep it attached, or export it to LoRA (lossy)."
)


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of anything that works as a linear layer, quantized ones too; None for the rest."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    for d_in, d_out in (("in_features", "out_features"), ("nx", "nf")):  # transformers' Conv1D has nx, nf
        if isinstance(getattr(base, d_in, None), int) and isinstance(getattr(base, d_out, None), int):
            return getattr(base, d_in), getattr(base, d_out)
    return None


class AtomLayer(BaseTunerLayer):
    """What sites and prompt gates share: PEFT and diffusers treat both as tuner layers."""

    # PEFT rebinds these on the instance; a list of our own keeps the classes apart.
    merged_adapters: list[str] = []  # noqa: RUF012

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        raise UserError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the strength of a whole adapter."""

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters."""

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strength of the active adapters; None puts it back to 1."""


class AtomLinear(nn.Module, AtomLayer):
    """W x + strength * codes(x) D, summed over the active adapters.

    Codes are first replaced by those of `replaced[adapter]`, where there is one: (where, codes), as its context says.
    Those at or below `floors[adapter]`, where there is one, (n_atoms,), are off; a context sets it. What is left is
    multiplied by four things: `scaling[adapter]` (PEFT's and diffusers' adapter weight),
    `atom_strength[adapter]` (one number an atom, ones at start, never saved), the adapter's prompt gate, and, where
    there is one, `steering[adapter]`, broadcastable to (rows, positions, n_atoms), which a steering sets each forward.
    Where all codes are zero the output is the base layer's, bit for bit (torch.equal).

    Under gradient checkpointing a gate is read again in backward: one forward for each backward.
    """

    adapter_layer_names = ("atom_dictionary",)
    other_param_names = ("r", "scaling", "atom_strength", "gates", "steering", "floors", "replaced")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        features = linear_features(base_layer)
        if features is None:
            raise UserError(f"A site must be a linear layer, got {type(base_layer).__name__}.")
        self.base_layer = base_layer
        self.in_features, self.out_features = features
        self.atom_dictionary = nn.ModuleDict()
        self.atom_strength = BufferDict(persistent=False)
        self.scaling: dict[str, float] = {}
        self.r: dict[str, int] = {}  # diffusers reads adapter names here
        self.gates: dict[str, GateValues] = {}
        self.steering: dict[str, Tensor] = {}
        self.floors: dict[str, Tensor] = {}
        self.replaced: dict[str, tuple[Tensor, Tensor]] = {}
        self.recorders: dict[str, list[tuple[list[Tensor], list[Tensor]]]] = {}
        self.assigned: Sequence[str] | None = None
        """The adapter of each row, for a while: `model.assigned` sets it."""

    def update_layer(self, adapter: str, config: AtomConfig, n_atoms: int) -> None:
        """Add an adapter, in float32 whatever the base's dtype, on the base layer's device."""
        dictionary = Dictionary(
            self.in_features,
            self.out_features,
            n_atoms,
            sparsifier=config.sparsifier,
            k=None if config.k is None else min(config.k, n_atoms),
            threshold=config.threshold,
            encoder=config.encoder,
            steps=config.steps,
            normalize=config.normalize,
            bias=config.encoder_bias,
            dtype=torch.float32,
        )
        self.set_dictionary(adapter, dictionary, torch.ones(n_atoms))
        self.scaling[adapter] = 1.0
        self._move_adapter_to_device_of_base_layer(adapter)

    def set_dictionary(self, adapter: str, dictionary: Dictionary, strength: Tensor) -> None:
        """Put a dictionary and the strengths of its atoms in place of the adapter's."""
        self.atom_dictionary[adapter] = dictionary.train(self.base_layer.training)
        self.atom_strength[adapter] = strength
        self.r[adapter] = dictionary.n_atoms

    def dictionary(self, adapter: str) -> Dictionary:
        """The adapter's dictionary, typed."""
        found = self.atom_dictionary[adapter]
        assert isinstance(found, Dictionary)
        return found

    def drop(self, adapter: str) -> None:
        """Forget an adapter here, leaving which adapters are active as it is."""
        for name in self.adapter_layer_names + self.other_param_names:
            if adapter in getattr(self, name):
                del getattr(self, name)[adapter]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move to the device only: PEFT would also cast to the base's dtype and lose the adapter's."""
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if device is None or adapter_name not in self.atom_dictionary:
            return
        dictionary = self.dictionary(adapter_name)
        if not any(p.is_meta for p in dictionary.parameters()):
            dictionary.to(device)
        self.atom_strength[adapter_name] = self.atom_strength[adapter_name].to(device)

    def set_scale(self, adapter: str, scale: float) -> None:
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] = 1.0 if scale is None else self.scaling[adapter] / scale

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """(*batch, d_in) -> (*batch, d_out). `adapter_names` names one adapter, or `__base__`, a sample."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        if adapter_names is not None:
            return self._mixed_batch(result, x, adapter_names)
        if self.assigned is not None:
            # Guidance may run its branches as one batch: all rows in order, once for each.
            return self._mixed_batch(result, x, [*self.assigned] * (len(x) // len(self.assigned)))
        for adapter in self.active_adapters:
            if adapter in self.atom_dictionary:
                result = self._add(result, self._codes(x, adapter), adapter)
        return result

    def _mixed_batch(self, result: Tensor, x: Tensor, names: Sequence[str]) -> Tensor:
        """Each row by its own adapter; rows whose adapter has no atoms here, such as `__base__`, stay as they are."""
        if len(names) != len(x):
            raise UserError(f"`adapter_names` must name one adapter a sample ({len(x)}), got {len(names)}.")
        chosen = [row for row, name in enumerate(names) if name in self.atom_dictionary]
        if not chosen:
            return result
        rows = torch.tensor(chosen, device=x.device)
        some = len(chosen) < len(x)
        own, added = [names[row] for row in chosen], (result[rows], x[rows]) if some else (result, x)
        blocks = self._in_blocks(*added, own, rows) if self._stacks(own) else self._one_by_one(*added, own, rows)
        return result.index_copy(0, rows, blocks) if some else blocks

    def _stacks(self, names: Sequence[str]) -> bool:
        distinct = list(dict.fromkeys(names))
        first = self.dictionary(distinct[0])
        steered = any(name in self.steering or name in self.replaced for name in distinct)
        return not steered and all(first.stacks_with(self.dictionary(name)) for name in distinct)

    def _one_by_one(self, result: Tensor, x: Tensor, names: Sequence[str], rows: Tensor) -> Tensor:
        for adapter in dict.fromkeys(names):
            mine = torch.tensor([at for at, name in enumerate(names) if name == adapter], device=x.device)
            codes = self._codes(x[mine], adapter, rows[mine])
            result = result.index_copy(0, mine, self._add(result[mine], codes, adapter))
        return result

    def _in_blocks(self, result: Tensor, x: Tensor, names: Sequence[str], rows: Tensor) -> Tensor:
        """All rows at once: as many blocks of neighbours as are of one adapter each, a batched product over them."""
        size = math.gcd(*(len(list(same)) for _, same in itertools.groupby(names)))
        heads = names[::size]
        dictionaries = [self.dictionary(name) for name in heads]
        pre, codes = stacked_codes(dictionaries, x.reshape(len(heads), -1, self.in_features))
        self._record_blocks(heads, size, (*x.shape[:-1], pre.shape[-1]), pre, codes)
        if any(name in self.floors for name in heads):
            never = pre.new_full(pre.shape[-1:], -math.inf, dtype=torch.float32)
            floors = torch.stack([self.floors.get(name, never).to(never.device) for name in heads])
            codes = codes.masked_fill(codes.abs() <= floors[:, None], 0)
        factors = [self._factor(name, rows[at * size :][:size]) for at, name in enumerate(heads)]
        shape = (len(heads), size, -1, pre.shape[-1])
        factor = torch.stack([f.expand(size, shape[-1]) for f in factors])[:, :, None].to(codes.dtype)
        dtype, codes = result.dtype, (codes.view(shape) * factor).flatten(1, 2)
        with torch.autocast(result.device.type, enabled=False):
            atoms = torch.stack([d.atoms for d in dictionaries]).to(dtype)
            added = torch.baddbmm(result.reshape(len(heads), -1, self.out_features), codes.to(dtype), atoms)
        return added.view(result.shape)

    def _factor(self, adapter: str, rows: Tensor) -> Tensor:
        """What multiplies the codes of some rows: (n_atoms,), or with a gate a row, (rows, n_atoms)."""
        factor = self.atom_strength[adapter] * self.scaling[adapter]
        if adapter not in self.gates:
            return factor
        gate = self.gates[adapter].of_atoms(adapter, self.dictionary(adapter).atom_ids)
        if gate.ndim and len(gate) > 1:
            gate = gate[rows]
        return factor * (gate[:, None] if gate.ndim == 1 else gate)

    def _record_blocks(self, heads: Sequence[str], size: int, shape: tuple[int, ...], *values: Tensor) -> None:
        if torch._C._current_graph_task_id() != -1:
            return
        for adapter in dict.fromkeys(name for name in heads if self.recorders.get(name)):
            at = [number for number, name in enumerate(heads) if name == adapter]
            # Neighbours, as a training batch has them, are a view.
            found = [
                v[at[0] : at[-1] + 1] if at[-1] - at[0] == len(at) - 1 else v[torch.tensor(at, device=v.device)]
                for v in values
            ]
            for pair in self.recorders[adapter]:
                for seen, value in zip(pair, found, strict=True):
                    seen.append(value.reshape(len(at) * size, *shape[1:]))

    def _codes(self, x: Tensor, adapter: str, rows: Tensor | None = None) -> Tensor:
        dictionary = self.dictionary(adapter)
        pre_codes = dictionary.pre_codes(x)
        codes = dictionary.sparsifier(pre_codes)
        # In backward, gradient checkpointing runs the same forward again: already recorded.
        if self.recorders.get(adapter) and torch._C._current_graph_task_id() == -1:
            for seen_pre_codes, seen_codes in self.recorders[adapter]:
                seen_pre_codes.append(pre_codes)
                seen_codes.append(codes)
        if adapter in self.replaced:
            where, others = (
                (t if rows is None else t[rows.to(t.device)]).to(codes.device) for t in self.replaced[adapter]
            )
            codes = torch.where(where, others.to(codes.dtype), codes)
        if adapter in self.floors:
            codes = codes.masked_fill(codes.abs() <= self.floors[adapter].to(codes.device), 0)
        factor = self.atom_strength[adapter] * self.scaling[adapter]
        if adapter in self.gates:
            gate = self.gates[adapter].of_atoms(adapter, dictionary.atom_ids)
            if rows is not None and gate.ndim and len(gate) > 1:
                gate = gate[rows]
            factor = factor * _per_sample(gate, codes)
        if adapter in self.steering:
            steering = self.steering[adapter].to(codes.device)
            if codes.ndim == 2:  # no tokens
                if steering.shape[1] > 1:
                    raise UserError("`where` and `words` need sites that read tokens. Name the atoms of those alone.")
                steering = steering[:, 0]
            factor = factor * (steering if rows is None or len(steering) == 1 else steering[rows])
        return codes * factor.to(codes.dtype)

    def _add(self, result: Tensor, codes: Tensor, adapter: str) -> Tensor:
        # One addmm into the base's output; without autocast, which could change the output's dtype.
        dtype, atoms = result.dtype, self.dictionary(adapter).atoms
        with torch.autocast(result.device.type, enabled=False):
            flat = torch.addmm(
                result.reshape(-1, self.out_features),
                codes.to(dtype).reshape(-1, codes.shape[-1]),
                atoms.to(dtype),
            )
        return flat.view(result.shape)


def _per_sample(gate: Tensor, codes: Tensor) -> Tensor:
    """Shape a gate (B,) or (B, n) for codes (B, ..., n); a sample folded into several rows must lie in a row (b f)."""
    if gate.ndim == 0 or len(gate) == 1:
        return gate
    batch, lead = len(gate), codes.shape[0]
    if batch != lead:
        # Without a token axis, samples of different lengths may have been packed: no way to tell.
        if codes.ndim < 3 or lead % batch:
            raise UserError(
                f"A prompt gate of {batch} samples can't be matched to a layer input of leading size {lead}. "
                "Exclude this layer with `exclude_modules`."
            )
        gate = gate.repeat_interleave(lead // batch, 0)
    return gate.view(len(gate), *[1] * (codes.ndim - gate.ndim), *gate.shape[1:])
