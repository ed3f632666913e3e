"""The prompt gate: one sparse code of the prompt that turns a whole adapter on or off, per sample."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from atomtune.errors import UserError, did_you_mean

from .config import AtomConfig
from .layer import AtomLayer, AtomLinear

ATTRIBUTE = "atom_gate"
Embeds = Tensor | list[Tensor] | tuple[Tensor, ...]


class GateShares(NamedTuple):
    """What a calibration measured: exactly silent unrelated prompts, fully open concept prompts."""

    silent_share: float
    open_share: float


class PromptGate(nn.Module):
    """clamp((1 + z) / 2, 0, 1) with z = max over tokens of w . norm(e_t) - b, norm being RMS over features.

    Exactly 0 for z <= -1, exactly 1 for z >= 1. Starts fully open (w = 0, b = -1). Always in float32: a
    cast of the whole model moves it to another device but leaves its dtype, and so its calibration, alone.
    With a `number` it is as many gates, of parts that were merged; what it gives then has them as last axis.
    """

    def __init__(self, gate_dim: int, number: int | None = None) -> None:
        super().__init__()
        gates = () if number is None else (number,)
        self.weight = nn.Parameter(torch.zeros(*gates, gate_dim, dtype=torch.float32))
        self.bias = nn.Parameter(torch.full(gates, -1.0, dtype=torch.float32))

    def _apply(self, fn: Any, recurse: bool = True) -> "PromptGate":
        return super()._apply(lambda t: fn(t) if t.is_meta else t.to(fn(t).device), recurse)

    def pre_code(self, embeds: Embeds, mask: Tensor | None = None) -> Float[Tensor, "batch *gates"]:
        """z of each prompt.

        `embeds`: (B, T, gate_dim), or a list of B tensors (T_i, gate_dim) with real tokens only; a mask
        (B, T), true at real tokens. A prompt without a real token gives -inf.
        """
        if isinstance(embeds, (list, tuple)):
            return torch.cat([self.pre_code(one.unsqueeze(0)) for one in embeds])
        if embeds.ndim != 3 or embeds.shape[-1] != self.weight.shape[-1]:
            raise UserError(
                f"Prompt embeddings must be (batch, tokens, {self.weight.shape[-1]}), got {tuple(embeds.shape)}. "
                "Check `gate_input` and `gate_dim`."
            )
        # Offloading moves the model after this has been asked for.
        weights, bias = self.weight.to(embeds.device), self.bias.to(embeds.device)
        if weights.ndim == 1:
            return self._largest(embeds, mask, weights) - bias
        return torch.stack([self._largest(embeds, mask, weight) for weight in weights], 1) - bias

    @staticmethod
    def _largest(embeds: Tensor, mask: Tensor | None, weight: Tensor) -> Float[Tensor, " batch"]:
        wide = embeds.float()
        # Products and sums, not a matmul: autocast would run that in half precision.
        z = (wide * weight).sum(-1) * wide.square().mean(-1).clamp_min(1e-12).rsqrt()
        if mask is not None:
            if mask.shape != z.shape:
                raise UserError(
                    f"The prompt mask must be (batch, tokens) = {tuple(z.shape)}, got {tuple(mask.shape)}. "
                    "Check `gate_mask`."
                )
            z = z.masked_fill(~mask.bool(), -math.inf)
        return z.amax(-1)

    def forward(self, embeds: Embeds, mask: Tensor | None = None) -> Float[Tensor, "batch *gates"]:
        return (0.5 + 0.5 * self.pre_code(embeds, mask)).clamp(0, 1)

    @torch.no_grad()
    def calibrate(
        self,
        unrelated: Float[Tensor, " m"],
        concept: Float[Tensor, " n"],
        silent_share: float = 0.995,
    ) -> GateShares:
        """Move bias and scale: at least `silent_share` of held-out unrelated prompts become exactly silent.

        Both arguments are `pre_code`s of this gate. The gap between the highest silenced unrelated prompt
        (all of them, if the two kinds separate) and the lowest concept prompt above it is cut in the middle:
        silent up to a quarter of it, fully open from three quarters. Concept prompts below stay shut.
        """
        if not 0 < silent_share <= 1:
            raise UserError(f"`silent_share` must be above 0 and at most 1, got {silent_share}.")
        if not len(unrelated) or not len(concept):
            raise UserError("Calibration needs at least one unrelated and one concept prompt.")
        low, high = unrelated.double().sort().values, concept.double().sort().values
        tolerance = 1e-3 * (1 + high[-1].abs().item())
        top = low[math.ceil(silent_share * len(low)) - 1].item()
        if high[0].item() > low[-1].item() + tolerance:
            top = low[-1].item()
        above = high[high > top + tolerance]
        gap = above[0].item() - top if len(above) else 4.0  # nothing to open: keep the slope
        slope = 4 / gap  # z runs from -1 to 1 over half the gap
        shift = -1 - slope * (top + gap / 4)
        self.weight.mul_(slope)
        self.bias.copy_(slope * self.bias.double() - shift)
        return GateShares(
            silent_share=(slope * low + shift <= -1).double().mean().item(),
            open_share=(slope * high + shift >= 1).double().mean().item(),
        )


class GateValues:
    """The gates of the last forward; a plain object, so that every layer of a model can hold it.

    Forced ones are a number, or one a picture: a forward with a multiple of as many rows, such as guidance with
    both branches in one batch, has all pictures in order once for each branch.
    """

    def __init__(self) -> None:
        self.computed: dict[str, Tensor] = {}
        self.forced: dict[str, Tensor] = {}
        self.starts: dict[str, Tensor] = {}
        """Of parts merged into one: ids from which the second and further gates are an atom's."""

    def of_atoms(self, adapter: str, atom_ids: Tensor) -> Tensor:
        """What `read` gives; where parts have gates of their own, each atom's, (B, atoms)."""
        gate = self.read(adapter).to(atom_ids.device)
        if gate.ndim < 2:
            return gate
        return gate[:, torch.bucketize(atom_ids, self.starts[adapter].to(atom_ids.device), right=True)]

    def read(self, adapter: str) -> Tensor:
        """(B,) or () for the adapter; (B, gates) of one that was merged from several."""
        for values in (self.computed, self.forced):
            if adapter in values:
                return values[adapter]
        raise UserError(
            f"Adapter {adapter!r} has a prompt gate, but no prompt embeddings reached the base model's "
            "forward. Pass them, or use `override_gate`."
        )


class _Argument(NamedTuple):
    """Where an argument of a forward is found."""

    name: str
    position: int | None

    def find(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.name in kwargs:
            return kwargs[self.name]
        if self.position is not None and self.position < len(args):
            return args[self.position]
        return None


class PromptGates(nn.Module, AtomLayer):
    """The gates of a model by adapter, as its submodule `atom_gate`; one hook on the model reads the prompts.

    A tuner layer in PEFT's eyes: saved, trained, switched and deleted with the adapter by all its doors.
    """

    adapter_layer_names = ("gates",)
    other_param_names = ("r", "inputs")
    # BaseTunerLayer's properties look for a wrapped layer, and there is none.
    weight = None  # type: ignore[assignment]
    bias = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleDict()
        self.values = GateValues()
        self.inputs: dict[str, tuple[_Argument, _Argument | None]] = {}
        self.r: dict[str, int] = {}
        self.handle: Any = None

    def gate(self, adapter: str) -> PromptGate:
        """The adapter's gate, typed."""
        found = self.gates[adapter]
        assert isinstance(found, PromptGate)
        return found

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook: compute every adapter's gate from the arguments of the forward."""
        if not hasattr(model, "peft_config"):  # diffusers' unload_lora knows nothing of gates
            uninstall(model)
            return
        self.compute(args, kwargs)

    def compute(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Set every adapter's gate as a forward with these arguments has it."""
        self.values.computed.clear()
        if self.disable_adapters:
            return
        for adapter, gate in self.gates.items():
            embeds, mask = self.inputs[adapter]
            found = embeds.find(args, kwargs)
            if found is None:
                continue
            if adapter in self.values.forced:
                self.values.computed[adapter] = _each_branch(self.values.forced[adapter], found)
            else:
                found_mask = None if mask is None else mask.find(args, kwargs)
                self.values.computed[adapter] = gate(found, found_mask)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.values.computed.pop(adapter_name, None)
        if not self.gates and self.handle is not None:
            # The empty module stays until `uninstall`: callers may be walking over the modules.
            self.handle.remove()
            self.handle = None

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Gates are made on the model's device."""


def install(model: nn.Module, adapter: str, config: AtomConfig, layers: list[AtomLinear]) -> PromptGate:
    """Attach a gate for the adapter to the base model and let its layers read it."""
    assert config.gate_input is not None
    assert config.gate_dim is not None
    inputs = (
        _argument(model, config.gate_input, "gate_input"),
        None if config.gate_mask is None else _argument(model, config.gate_mask, "gate_mask"),
    )
    gates = installed(model)
    if gates is None:
        gates = PromptGates()
        setattr(model, ATTRIBUTE, gates)
    if gates.handle is None:
        gates.handle = model.register_forward_pre_hook(_hook, with_kwargs=True)
    gate = PromptGate(config.gate_dim, None if config.gate_starts is None else len(config.gate_starts))
    if config.gate_starts is not None:
        gates.values.starts[adapter] = torch.tensor(config.gate_starts[1:], dtype=torch.long)
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    gates.gates[adapter] = gate.to(device)
    gates.inputs[adapter] = inputs
    gates.r[adapter] = 1
    for layer in layers:
        layer.gates[adapter] = gates.values
    return gate


def _hook(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    gates = installed(model)
    if gates is not None:
        gates.before_forward(model, args, kwargs)


def check_inputs(model: nn.Module, config: AtomConfig) -> None:
    """Raise UserError where the base model's forward lacks the arguments the gate reads."""
    for field in ("gate_input", "gate_mask"):
        if getattr(config, field) is not None:
            _argument(model, getattr(config, field), field)


def installed(model: nn.Module) -> PromptGates | None:
    """The model's gates, if it has any."""
    found = getattr(model, ATTRIBUTE, None)
    return found if isinstance(found, PromptGates) else None


def uninstall(model: nn.Module) -> None:
    """Take the gates and their hook off a model that no gated adapter uses."""
    gates = installed(model)
    if gates is not None:
        if gates.handle is not None:
            gates.handle.remove()
        delattr(model, ATTRIBUTE)


def prompt_gate(model: nn.Module, adapter: str = "default") -> PromptGate | None:
    """The adapter's gate, or None. `model` is the base model or anything around it."""
    gates = _find(model)
    return gates.gate(adapter) if gates is not None and adapter in gates.gates else None


@contextmanager
def override_gate(
    model: nn.Module, values: float | Float[Tensor, " batch"] | None, adapter: str | None = None
) -> Iterator[None]:
    """Force the gate of an adapter (None: of all) to a number, or one a picture; no values: force nothing."""
    gates = _find(model)
    names = [] if gates is None else [name for name in gates.gates if adapter in (None, name)]
    if values is None:
        yield
        return
    if gates is None or not names:
        raise UserError("`override_gate` needs an adapter with a prompt gate. Set `gate_input` in its config.")
    with _forced(gates, dict.fromkeys(names, torch.as_tensor(values).to(gates.gate(names[0]).weight))):
        yield


@contextmanager
def open_gate(model: nn.Module, adapter: str | None = None) -> Iterator[None]:
    """Hold the gate of an adapter (None: of all) open, where it has one: what codes do by themselves."""
    gates = _find(model)
    gated = gates is not None and any(adapter in (None, name) for name in gates.gates)
    with override_gate(model, 1.0 if gated else None, adapter):
        yield


@contextmanager
def hold_gate(model: nn.Module, arguments: Callable[[], Mapping[str, Any]]) -> Iterator[Callable[[int], None]]:
    """Keep the gates as a forward with these arguments has them, whatever the prompts of the forwards inside.

    `arguments` is called only where an active adapter has a gate that is not overridden. Gives a function that is told
    how many pictures in a row have the gate of each row, where it is not one.
    """
    gates = _find(model)
    if gates is None or gates.disable_adapters or set(gates.gates) <= set(gates.values.forced):
        yield lambda pictures: None
        return
    read = read_gates(model, arguments())

    def spread(pictures: int) -> None:
        each = {name: gate.repeat_interleave(pictures, 0) if gate.ndim else gate for name, gate in read.items()}
        gates.values.forced.update(each)

    with _forced(gates, read):
        yield spread


@torch.no_grad()
def read_gates(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Float[Tensor, "..."]]:
    """By adapter, its gate in a forward with these arguments: (batch,), or () where a number is forced."""
    gates = _find(model)
    if gates is None:
        return {}
    gates.compute((), arguments)
    return dict(gates.values.computed)


@contextmanager
def _forced(gates: PromptGates, values: Mapping[str, Tensor]) -> Iterator[None]:
    before = dict(gates.values.forced)
    gates.values.forced.update(values)
    gates.values.computed.clear()
    try:
        yield
    finally:
        gates.values.computed.clear()
        gates.values.forced.clear()
        gates.values.forced.update(before)


def _find(model: nn.Module) -> PromptGates | None:
    return next((module for module in model.modules() if isinstance(module, PromptGates)), None)


def _each_branch(values: Tensor, found: Any) -> Tensor:
    """One value a picture (B,), for a forward of k B rows: (k B,).

    Where prompts are a list (Z-Image), those of several pictures of one prompt are one and the same tensor.
    """
    rows = len(found)
    if values.ndim == 0 or len(values) == 1 or rows % len(values):
        return values
    alike = next((n for n, one in enumerate(found) if one is not found[0]), 1) if isinstance(found, list) else 1
    values = values.repeat_interleave(max(1, alike), 0)
    return values.repeat(max(1, rows // len(values)), *[1] * (values.ndim - 1))


def _argument(model: nn.Module, name: str, field: str) -> _Argument:
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    names = [parameter.name for parameter in parameters]
    if name in names:
        at = names.index(name)
        positional = parameters[at].kind is not inspect.Parameter.KEYWORD_ONLY
        return _Argument(name, at if positional else None)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return _Argument(name, None)
    raise UserError(
        f"`{field}` must be an argument of {type(model).__name__}.forward, got {name!r}.{did_you_mean(name, names)}"
    )
