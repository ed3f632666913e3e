"""The methods that atoms are compared with, each attached to a frozen model by one door.

PEFT's methods are PEFT's own code, with no option but those in `PEFT`; the rest is in `plain_rivals`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lokr.layer import factorization
from peft.tuners.shira import layer as shira_layer
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from torch import Tensor, nn

from atomtune.compare.plain_rivals import MARK, PLAIN, Rival, Target, checked_strength, release, target
from atomtune.errors import UserError, did_you_mean

__all__ = ["RIVALS", "Rival", "attach_rival"]

ADAPTER = "rival"
"""The adapter's name in PEFT."""


@dataclass(frozen=True)
class PeftMethod:
    """A method of PEFT, and how it is sized."""

    config: Callable[..., Any]
    options: Callable[[Target], dict[str, Any]]
    """What is handed to `config` beside the sites."""
    scaling: str | None = None
    """Attribute of its layers with a factor for each adapter that its delta is linear in."""
    drawn: bool = False
    """Has frozen parts that the seed gives."""


# ----------------------------------------------------------------------------------------------------- sizes


def _dora(at: Target) -> dict[str, Any]:
    """A magnitude for each output feature comes on top of LoRA's."""
    sums, outs = sum(map(sum, at.shapes)), sum(d_out for _, d_out in at.shapes)
    rank = max(1, math.floor((at.budget - outs) / sums + 0.5))
    return {"r": rank, "lora_alpha": rank, "use_dora": True}


def _oft(at: Target) -> dict[str, Any]:
    """b(b - 1) / 2 parameters a block of b; b must divide every d_in, or PEFT would change it layer by layer."""
    ins = [d_in for d_in, _ in at.shapes]
    blocks = [b for b in _divisors(math.gcd(*ins)) if b > 1]
    if not blocks:
        raise UserError("`sites` must have input widths with a common divisor for oft, and these have none.")
    return {"oft_block_size": min(blocks, key=lambda b: abs(sum(ins) * (b - 1) / 2 - at.budget))}


def _lokr(at: Target) -> dict[str, Any]:
    """w1 (x) w2, with w2 of low rank where that is smaller; the left factor of PEFT's default is far too small."""
    shapes = Counter(at.shapes)

    def size(factor: int, rank: int) -> int:
        return sum(n * _lokr_size(*shape, factor, rank) for shape, n in shapes.items())

    largest = max(map(max, at.shapes))
    options = ((factor, rank) for factor in range(2, 17) for rank in range(1, largest // (2 * factor) + 2))
    factor, rank = min(options, key=lambda option: abs(size(*option) - at.budget))
    return {"r": rank, "alpha": rank, "decompose_factor": factor}


def _lokr_size(d_in: int, d_out: int, factor: int, rank: int) -> int:
    (m, n), (out_m, out_n) = factorization(d_in, factor), factorization(d_out, factor)
    return out_m * m + (out_n * n if rank >= max(out_n, n) / 2 else rank * (out_n + n))


def _shira(at: Target) -> dict[str, Any]:
    """rank * (d_in + d_out) entries of each weight."""
    most = min(d_in * d_out // (d_in + d_out) for d_in, d_out in at.shapes)
    if at.rank > most:
        raise UserError(f"`rank` must be at most {most} for shira on these sites, got {at.rank}. Lower the rank.")
    return {"r": at.rank, "random_seed": at.seed}


def _frequencies(at: Target) -> dict[str, Any]:
    """As many coefficients at each site as LoRA has parameters there, and never more than the weight.

    The patterns are plain paths: FourierFT takes an expression only after a dot, and else looks the path up.
    """
    counts = {
        path: min(at.rank * (d_in + d_out), d_in * d_out)
        for path, (d_in, d_out) in zip(at.layers, at.shapes, strict=True)
    }
    [(usual, _)] = Counter(counts.values()).most_common(1)
    pattern = {path: count for path, count in counts.items() if count != usual}
    return {"n_frequency": usual, "n_frequency_pattern": pattern, "random_loc_seed": at.seed, "init_weights": True}


def _vblora(at: Target) -> dict[str, Any]:
    """One bank of vectors for all sites, of a quarter of the width; all logits are trained. Rank and k are PEFT's.

    With PEFT's bound of 0.02 the start is not the base (0.25 % off); on a toy target, 60 steps went as fast with 1e-3.
    """
    common = math.gcd(*(d for shape in at.shapes for d in shape))
    length = max(d for d in _divisors(common) if d <= max(1, min(256, common // 4)))
    rank, topk = 4, 2
    logits = rank * sum(map(sum, at.shapes)) // length
    vectors = max(topk, round(at.budget / (logits + length)))
    return {
        "r": rank,
        "topk": topk,
        "vector_length": length,
        "num_vectors": vectors,
        "init_vector_bank_bound": 1e-3,
    }


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


PEFT: dict[str, PeftMethod] = {
    # arXiv 2106.09685
    "lora": PeftMethod(peft.LoraConfig, lambda at: {"r": at.rank, "lora_alpha": at.rank}, "scaling"),
    # arXiv 2312.03732: scaled by alpha / sqrt(rank), so by sqrt(rank) here
    "rslora": PeftMethod(
        peft.LoraConfig, lambda at: {"r": at.rank, "lora_alpha": at.rank, "use_rslora": True}, "scaling"
    ),
    # arXiv 2402.09353
    "dora": PeftMethod(peft.LoraConfig, _dora),
    # arXiv 2306.07280
    "oft": PeftMethod(peft.OFTConfig, _oft),
    # arXiv 2309.14859
    "lokr": PeftMethod(peft.LoKrConfig, _lokr, "scaling"),
    # arXiv 2310.11454
    "vera": PeftMethod(peft.VeraConfig, lambda at: {"r": 256, "projection_prng_key": at.seed}, drawn=True),
    # arXiv 2406.13175
    "shira": PeftMethod(peft.ShiraConfig, _shira, "scaling", drawn=True),
    # arXiv 2405.03003
    "fourierft": PeftMethod(
        peft.FourierFTConfig, lambda at: _frequencies(at) | {"scaling": 150.0}, "fourierft_scaling", drawn=True
    ),
    # arXiv 2505.12532
    "waveft": PeftMethod(
        peft.WaveFTConfig, lambda at: _frequencies(at) | {"scaling": 25.0}, "waveft_scaling", drawn=True
    ),
    # arXiv 2405.15179
    "vblora": PeftMethod(peft.VBLoRAConfig, _vblora),
}
"""PEFT's, by name."""


# ------------------------------------------------------------------------------------------------------ attach


class PeftRival(Rival):
    """A method of PEFT: its tuner layers stand in the places of the sites."""

    def __init__(self, name: str, method: PeftMethod, at: Target) -> None:
        options = method.options(at)
        config = method.config(target_modules=list(at.suffixes), **options)
        checks = torch.sparse.check_sparse_tensor_invariants
        if not checks.is_enabled():
            # Off is torch's default, but it warns at SHiRA's sparse deltas unless it is told so.
            checks.disable()
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
        if tuner.uses_shared_state:
            # inject_adapter_in_model is this call and a refusal of such tuners.
            tuner(at.model, config, adapter_name=ADAPTER)
        else:
            peft.inject_adapter_in_model(config, at.model, ADAPTER)
        # get_peft_model does this, injection does not: on a half base the adapter would be trained in half precision.
        cast_adapter_dtype(at.model, ADAPTER)
        super().__init__(name, at, options, drawn=method.drawn)
        self._scaling = method.scaling
        self._layers: list[Any] = [layer for layer in at.model.modules() if isinstance(layer, BaseTunerLayer)]
        for layer in self._layers:
            layer.train(layer.base_layer.training)

    @contextmanager
    def off(self) -> Iterator[None]:
        before = [layer._disable_adapters for layer in self._layers]
        for layer in self._layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, flag in zip(self._layers, before, strict=True):
                layer._disable_adapters = flag

    @contextmanager
    def scaled(self, strength: float) -> Iterator[None]:
        checked_strength(strength)
        with ExitStack() as stack:
            for layer in self._layers:
                if self._scaling is not None:
                    factors: dict[str, float] = getattr(layer, self._scaling)
                    stack.callback(factors.__setitem__, ADAPTER, factors[ADAPTER])
                    factors[ADAPTER] *= strength
                elif strength != 1:
                    hook = partial(_scale, strength)
                    stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def _detach(self) -> None:
        _unwrap(self._at.model)
        self._layers = []


def _scale(strength: float, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], adapted: Tensor) -> Tensor:
    """base + strength * (adapted - base), for methods whose output is not linear in any factor."""
    base: Tensor = layer.base_layer(*args, **kwargs)
    return base + strength * (adapted - base)


def _unwrap(model: nn.Module) -> None:
    """Put the base layers back where PEFT's layers are, half an injection's too."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    # SHiRA warns once a layer, and the cache that it does this with would hold every layer for good.
    shira_layer._warn_once_about_module_hooks.cache_clear()


_MAKE: dict[str, Callable[[Target], Rival]] = {
    **{name: partial(PeftRival, name, method) for name, method in PEFT.items()},
    **PLAIN,
}


def _attach(name: str, model: nn.Module, sites: Sequence[str], rank: int, seed: int) -> Rival:
    at = target(model, sites, rank, seed)
    model.requires_grad_(False)
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            rival = _MAKE[name](at)
    except BaseException:
        _unwrap(model)
        release(at)
        raise
    setattr(model, MARK, name)
    return rival


RIVALS: dict[str, Callable[[nn.Module, Sequence[str], int, int], Rival]] = {
    name: partial(_attach, name) for name in _MAKE
}
"""(model, sites, rank, seed) -> rival, by the method's name."""


def attach_rival(name: str, model: nn.Module, sites: Sequence[str], rank: int, seed: int) -> Rival:
    """Freeze the model and attach a fresh method, of about as many parameters as a LoRA of that rank.

    `sites` are ends of names of linear layers. The output is the base's until something is trained, and the
    caller's random numbers are as if nothing had happened. Raises UserError on what can't work.
    """
    if name not in RIVALS:
        raise UserError(f"`name` must be one of {', '.join(RIVALS)}, got {name!r}.{did_you_mean(name, RIVALS)}")
    return RIVALS[name](model, sites, rank, seed)
