"""The tuner: finds the sites of a base model, wraps them, and lets others reach them by name."""

import copy
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from atomtune.errors import UserError, did_you_mean

from . import gate
from .config import AtomConfig
from .layer import CANNOT_MERGE, AtomLayer, AtomLinear, linear_features
from .register import PREFIX

# What PEFT, torch.compile, DDP and FSDP put into the names of modules.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:base_layer|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OWNED = ("atom_dictionary", "gates")
BASE = "__base__"
"""Of a row without an adapter, in a mixed batch; PEFT's word."""


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Inside, these hooks hold, also in a model that was compiled: it runs as it was written.

    A graph that was compiled before a module in it got a hook goes on without the hook.
    """
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the import takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def site_name(path: str) -> str:
    """A module path as the unadapted base model has it."""
    return _WRAPPERS.sub("", path + ".")[:-1].removeprefix("base_model.model.")


class AtomModel(BaseTuner):
    """PEFT's tuner for atoms. Merging raises UserError; nothing of the model changes then."""

    prefix = PREFIX
    tuner_layer_cls = AtomLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        _check_name(model, adapter_name)
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach the adapter: every door of PEFT, diffusers and transformers passes here.

        The configuration is copied, so one can serve several models. What can be wrong is checked before
        the model is touched.
        """
        _check_name(model, adapter_name)
        try:
            config = copy.deepcopy(self.peft_config[adapter_name])
            _name_sites(config)  # type: ignore[arg-type]
            config = self._prepare_adapter_config(config, self.get_model_config(model))
            config.sites = _checked_sites(model, config, self._check_target_module_exists)
            gate.check_inputs(model, config)
            self.peft_config[adapter_name] = config
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            self.peft_config.pop(adapter_name, None)
            # diffusers sets this flag before it injects, and stumbles over it the next time.
            if getattr(model, "_hf_peft_config_loaded", False) and not getattr(model, "peft_config", None):
                model._hf_peft_config_loaded = False
            raise
        if config.gate_input is not None:
            layers = [m for m in model.modules() if isinstance(m, AtomLinear) and adapter_name in m.r]
            trained = adapter_name in self.active_adapters and not config.inference_mode
            gate.install(model, adapter_name, config, layers).requires_grad_(trained)
            self._gates_follow()

    def _gates_follow(self) -> None:
        gates = gate.installed(self.model)
        if gates is not None:
            gates._active_adapter = list(self.active_adapters)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None and model_config.get("model_type") not in self.target_module_mapping:
            raise UserError("`target_modules` must name the layers to adapt in this model, got None.")
        return super()._prepare_adapter_config(peft_config, model_config)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        site = site_name(current_key)
        n_atoms = peft_config.atoms_at(site)
        if n_atoms == 0 or site not in peft_config.sites:  # its name may end like a site's
            return
        layer: Any = target
        while not isinstance(layer, AtomLinear) and hasattr(layer, "base_layer"):
            layer = layer.base_layer
        if not isinstance(layer, AtomLinear):
            layer = AtomLinear(target)
            self._replace_module(parent, target_name, layer, target)
        layer.update_layer(adapter_name, peft_config, n_atoms)
        if adapter_name not in self.active_adapters:
            layer.atom_dictionary[adapter_name].requires_grad_(False)

    def _check_merge_allowed(self) -> None:
        raise UserError(CANNOT_MERGE)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        super()._unload_and_optionally_merge(merge, *args, **kwargs)
        gate.uninstall(self.model)
        return self.model

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; its gate and, with the last gate, the hook go with it."""
        super().delete_adapter(adapter_name)
        # PEFT skips every module with `atom_` in its path: the gates, and some of a chemist's base model.
        for module in self.model.modules():
            if isinstance(module, AtomLayer):
                module.delete_adapter(adapter_name)
        gates = gate.installed(self.model)
        if gates is not None and not gates.gates:
            gate.uninstall(self.model)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` of a forward (a mixed batch) on to the sites."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise UserError("`adapter_names` works for inference only. Call `model.eval()` first.")
        unknown = set(names) - set(self.peft_config) - {BASE}
        if unknown:
            raise UserError(f"`adapter_names` must name attached adapters, got {', '.join(sorted(unknown))}.")
        # Beam search repeats each sample.
        names = [name for name in names for _ in range(kwargs.get("num_beams") or 1)]
        handles = [
            module.register_forward_pre_hook(partial(_add_names, adapter_names=names), with_kwargs=True)
            for module in self.modules()
            if isinstance(module, AtomLinear)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """PEFT's rule misses `sparsifier.threshold` and the like, and keys under a stacked LoRA."""
        for owner in _OWNED:
            key = re.sub(rf"\b{owner}\.{re.escape(adapter_name)}(?=\.)", owner, key)
        return key.replace(".base_layer.", ".")


def _add_names(
    module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _check_name(model: nn.Module, adapter: str) -> None:
    if "." in adapter or not adapter:
        raise UserError(f"An adapter's name must be without '.' and not empty, got {adapter!r}.")
    if any(adapter in m.r for m in model.modules() if isinstance(m, (AtomLinear, gate.PromptGates))):
        raise UserError(f"An adapter named {adapter!r} is already attached. Choose another name or delete it.")


def _name_sites(config: AtomConfig) -> None:
    """Patterns of a saved adapter, as the sites that they found: a stranger's regular expression may never end."""
    patterns = isinstance(config.target_modules, str) or isinstance(config.exclude_modules, str)
    if config.sites is not None and (patterns or config.layers_pattern):
        config.target_modules = [site for site in config.sites if config.atoms_at(site)] or config.sites
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def _checked_sites(model: nn.Module, config: AtomConfig, matches: Any) -> list[str]:
    """The names of all sites, in the model's order. Raises UserError on names and layers that can't work."""
    _maybe_include_all_linear_layers(config, model)
    named = [(key, module) for key, module in model.named_modules() if key]
    inner = tuple(
        f"{key}.{child}."
        for key, module in named
        if isinstance(module, BaseTunerLayer) and isinstance(module, nn.Module)
        for child, _ in module.named_children()
        if child != "base_layer"
    )
    modules = {
        site_name(key): module
        for key, module in named
        if not isinstance(module, gate.PromptGates) and not f"{key}.".startswith(inner)
    }
    linear = {name for name, module in modules.items() if linear_features(module) is not None}
    suffixes = linear | {name.rpartition(".")[2] for name in linear}
    if isinstance(config.target_modules, (list, set, tuple)):
        for name in config.target_modules:
            if not any(key == name or key.endswith(f".{name}") for key in modules):
                raise UserError(
                    f"`target_modules` (--sites): no module is named {name!r}.{did_you_mean(name, suffixes)}"
                )
    found = [name for name in modules if matches(config, name)]
    if not found:
        raise UserError(
            f"`target_modules` must match at least one module, got {config.target_modules!r} "
            f"(with `exclude_modules` {config.exclude_modules!r})."
        )
    for name in found:
        if name not in linear:
            raise UserError(
                f"`target_modules`: {name!r} is a {type(modules[name]).__name__}, and sites must be linear "
                "layers. Name its linear layers, or leave it out with `exclude_modules`."
            )
        parent = modules.get(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            raise UserError(
                f"`target_modules`: {name!r} is inside a torch MultiheadAttention, which never calls it. "
                "Leave it out with `exclude_modules`."
            )
    if config.sites is None:
        for name in config.size_pattern or {}:
            if name not in found:
                raise UserError(f"`size_pattern`: no site is named {name!r}.{did_you_mean(name, found)}")
        return found
    for name in config.sites:
        if config.atoms_at(name) and name not in found:
            raise UserError(f"This base model has no site {name!r}.{did_you_mean(name, found)}")
    return config.sites


def unwrap(model: Any) -> nn.Module:
    """The base model (with its adapters) inside a diffusers pipeline, a PeftModel, DDP or torch.compile."""
    if not isinstance(model, nn.Module):
        for part in ("transformer", "unet"):
            if isinstance(getattr(model, part, None), nn.Module):
                return unwrap(getattr(model, part))
        raise UserError(f"Expected a model, or a pipeline with a transformer, got {type(model).__name__}.")
    if isinstance(model, PeftModel):
        return unwrap(model.base_model)
    if isinstance(model, BaseTuner):
        return unwrap(model.model)
    for inner in ("_orig_mod", "module"):
        wrapped = getattr(model, inner, None)
        if isinstance(wrapped, nn.Module) and type(model).__module__.startswith("torch."):
            return unwrap(wrapped)
    return model


def adapter_config(model: Any, adapter: str = "default") -> AtomConfig:
    """The configuration of an attached adapter. Raises UserError where there is none of that name."""
    configs = getattr(unwrap(model), "peft_config", None) or {}
    ours = {name: config for name, config in configs.items() if isinstance(config, AtomConfig)}
    if adapter not in ours:
        raise UserError(f"No atom adapter {adapter!r} is attached; attached: {', '.join(ours) or 'none'}.")
    return ours[adapter]


def atom_layers(model: Any, adapter: str = "default") -> dict[str, AtomLinear]:
    """The sites that hold atoms of the adapter, by the base model's module path, in the order of `sites`."""
    config = adapter_config(model, adapter)
    by_name = {
        site_name(path): module
        for path, module in unwrap(model).named_modules()
        if isinstance(module, AtomLinear) and adapter in module.atom_dictionary
    }
    return {site: by_name[site] for site in config.sites or [] if site in by_name}


@dataclass
class Recording:
    """What each site's dictionary saw: by site, one tensor (*batch, n_atoms) for each call of the layer."""

    pre_codes: dict[str, list[Tensor]] = field(default_factory=dict)
    codes: dict[str, list[Tensor]] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget the forwards so far."""
        for lists in (self.pre_codes, self.codes):
            for tensors in lists.values():
                tensors.clear()


@contextmanager
def record(model: Any, adapter: str | None = None) -> Iterator[Recording]:
    """Record an adapter's pre-codes and codes, before strength and gate, with their graph.

    `adapter` None: the only attached one. The recompute of non-reentrant gradient checkpointing adds nothing.
    """
    if adapter is None:
        configs = getattr(unwrap(model), "peft_config", None) or {}
        names = [name for name, config in configs.items() if isinstance(config, AtomConfig)]
        if len(names) != 1:
            raise UserError(f"`adapter` must be given where not exactly one is attached, here {names}.")
        adapter = names[0]
    recording = Recording()
    layers = atom_layers(model, adapter)
    for site, layer in layers.items():
        recording.pre_codes[site], recording.codes[site] = [], []
        pair = (recording.pre_codes[site], recording.codes[site])
        layer.recorders.setdefault(adapter, []).append(pair)
    try:
        yield recording
    finally:
        for site, layer in layers.items():
            pairs = layer.recorders[adapter]
            layer.recorders[adapter] = [pair for pair in pairs if pair[0] is not recording.pre_codes[site]]


def attach(model: Any, config: AtomConfig, adapter: str = "default") -> None:
    """Attach a fresh adapter, whatever the model is; it becomes the active atom adapter."""
    if isinstance(model, PeftModel):
        model.add_adapter(adapter, config)
        model.set_adapter(adapter, inference_mode=config.inference_mode)
        return
    base: Any = unwrap(model)
    with warnings.catch_warnings():
        # A second adapter is no reason for concern.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(config, base, adapter)
    if hasattr(base, "_hf_peft_config_loaded"):
        base._hf_peft_config_loaded = True


def activate(model: Any, *adapters: str) -> None:
    """Let exactly these atom adapters take part; their deltas add up."""
    base = unwrap(model)
    for adapter in adapters:
        adapter_config(base, adapter)
    for layer in base.modules():
        if isinstance(layer, AtomLayer):
            layer._active_adapter = list(adapters)


@contextmanager
def assigned(model: Any, names: Sequence[str]) -> Iterator[None]:
    """Inside, each row of a forward has its own adapter, or `__base__`, whichever are active; in training too.

    The rows are those of `names` in order; with guidance in one batch, once for each branch. It is PEFT's
    `adapter_names`, without a PeftModel. Raises UserError on a name that is not attached.
    """
    base = unwrap(model)
    for name in dict.fromkeys(names):
        if name != BASE:
            adapter_config(base, name)
    layers = [module for module in base.modules() if isinstance(module, AtomLinear)]
    before = [layer.assigned for layer in layers]
    for layer in layers:
        layer.assigned = tuple(names)
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.assigned = old


@contextmanager
def base_only(model: Any) -> Iterator[None]:
    """Run the base model, every atom adapter off, without touching which adapters are active or trained."""
    layers = [m for m in unwrap(model).modules() if isinstance(m, AtomLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer._disable_adapters = flag


def discard_adapters(model: Any, *adapters: str) -> None:
    """`remove_adapter` of those among these that are attached."""
    base = unwrap(model)
    for adapter in adapters:
        if adapter in (getattr(base, "peft_config", None) or {}):
            remove_adapter(base, adapter)


def remove_adapter(model: Any, adapter: str = "default") -> None:
    """Take an adapter off, however it was attached, and unwrap the sites that no adapter uses any more."""
    base: Any = unwrap(model)
    adapter_config(base, adapter)
    for path, layer in list(base.named_modules()):
        if isinstance(layer, AtomLinear):
            layer.drop(adapter)
            left = [name for name in layer.active_adapters if name != adapter]
            layer._active_adapter = left
            if not layer.atom_dictionary:
                parent, _, name = path.rpartition(".")
                setattr(base.get_submodule(parent), name, layer.base_layer)
    gates = gate.installed(base)
    if gates is not None:
        if adapter in gates.gates:
            del gates.gates[adapter], gates.inputs[adapter], gates.r[adapter]
        gates._active_adapter = [name for name in gates.active_adapters if name != adapter]
        if not gates.gates:
            gate.uninstall(base)
    del base.peft_config[adapter]
    if not base.peft_config and not isinstance(model, PeftModel):
        del base.peft_config
        if getattr(base, "_hf_peft_config_loaded", False):
            base._hf_peft_config_loaded = False
