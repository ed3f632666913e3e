"""What every rival can do, and the rivals that we wrote ourselves, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from atomtune.errors import UserError, did_you_mean
from atomtune.sparse import Dictionary, sparsity

MARK = "_atomtune_rival"
"""Attribute of a model that carries a rival: its name."""
PIECE = "rival"
"""Name under which a rival's modules hang in the model."""


@dataclass(frozen=True)
class Target:
    """Where a rival is attached, and how large it may be."""

    model: nn.Module
    suffixes: tuple[str, ...]
    layers: dict[str, nn.Linear]
    """The sites by module path, in the model's order."""
    rank: int
    seed: int
    flags: tuple[tuple[nn.Parameter, bool], ...]
    """What required a gradient before."""

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(d_in, d_out) of each site."""
        return [(layer.in_features, layer.out_features) for layer in self.layers.values()]

    @property
    def budget(self) -> int:
        """Trained parameters of a LoRA of that rank on the sites."""
        return self.rank * sum(d_in + d_out for d_in, d_out in self.shapes)


def target(model: nn.Module, sites: Sequence[str], rank: int, seed: int) -> Target:
    """The sites found in the model. Raises UserError on what can't work, before the model is touched."""
    carried = getattr(model, MARK, None) or ", ".join(getattr(model, "peft_config", None) or {})
    if carried:
        raise UserError(f"`model` must carry no adapter, got one with {carried!r}. Remove that first.")
    if rank < 1:
        raise UserError(f"`rank` must be at least 1, got {rank}.")
    if isinstance(sites, str) or not sites:
        raise UserError(f"`sites` must be a list of ends of names of linear layers, got {sites!r}.")
    modules = {name: module for name, module in model.named_modules() if name}
    layers: dict[str, nn.Linear] = {}
    for name, module in modules.items():
        if any(_ends(name, site) for site in sites):
            if not isinstance(module, nn.Linear):
                raise UserError(f"`sites` must name linear layers, got {name!r}, a {type(module).__name__}.")
            layers[name] = module
    for site in sites:
        if not any(_ends(name, site) for name in layers):
            known = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear)}
            raise UserError(f"`sites`: no linear layer is named {site!r}.{did_you_mean(site, known)}")
    flags = tuple((p, p.requires_grad) for p in model.parameters())
    return Target(model, tuple(sites), layers, rank, seed, flags)


def _ends(name: str, site: str) -> bool:
    return name == site or name.endswith(f".{site}")


class Rival:
    """A method attached to a frozen model. Made by `attach_rival` only.

    What it trains is what requires a gradient in the model once it is attached; `options` is what was chosen,
    and `drawn` says that `seed` gave it frozen parts, which its state then names by that seed.
    """

    name: str
    config: dict[str, Any]

    def __init__(self, name: str, at: Target, options: Mapping[str, Any], *, drawn: bool = False) -> None:
        self.name = name
        self._at, self._attached = at, True
        self._named = {key: p for key, p in at.model.named_parameters() if p.requires_grad}
        self._drawn = {"seed": torch.tensor(at.seed)} if drawn else {}
        trained = sum(p.numel() for p in self._named.values())
        self.config = {
            "sites": list(at.suffixes),
            "rank": at.rank,
            "seed": at.seed,
            "budget": at.budget,
            "trained": trained,
            "sized": "equal" if abs(trained - at.budget) <= 0.1 * at.budget else "natural",
            **options,
        }

    def parameters(self) -> list[nn.Parameter]:
        """What is trained; everything else of the model is frozen."""
        return list(self._named.values())

    def penalty(self) -> Tensor | None:
        """A further term of the loss, of the last forward with the rival on; None where the method has none."""
        return None

    def state(self) -> dict[str, Tensor]:
        """All that must be saved to have it again on the same base, copied."""
        return {key: p.detach().clone() for key, p in self._named.items()} | self._drawn

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state of a rival that was attached with the same arguments. Raises UserError otherwise."""
        wanted = self._named | self._drawn
        advice = "Attach it with the arguments that the state was saved with."
        for kind, keys in (("lack", wanted.keys() - state), ("also hold", state.keys() - wanted.keys())):
            if keys:
                raise UserError(
                    f"`state` must hold the tensors of this {self.name}, and they {kind} {min(keys)!r}. {advice}"
                )
        for key, value in wanted.items():
            if state[key].shape != value.shape:
                got, must = tuple(state[key].shape), tuple(value.shape)
                raise UserError(f"`state`: {key!r} must be of shape {must}, got {got}. {advice}")
        if self._drawn and int(state["seed"]) != int(self._drawn["seed"]):
            raise UserError(f"`seed` must be {int(state['seed'])}, the state's, got {self.config['seed']}. {advice}")
        for key, parameter in self._named.items():
            parameter.copy_(state[key])

    def off(self) -> AbstractContextManager[None]:
        """Inside, the model is the base, bit for bit."""
        raise NotImplementedError  # each kind has its own

    def scaled(self, strength: float) -> AbstractContextManager[None]:
        """Inside, the change of each layer's output, or of its weight, is multiplied by `strength`."""
        raise NotImplementedError  # each kind has its own

    def remove(self) -> None:
        """Make the model the base again, bit for bit; what was trained stays with the rival."""
        if self._attached:
            self._attached = False
            self._detach()
            release(self._at)

    def _detach(self) -> None:
        raise NotImplementedError  # each kind has its own


def release(at: Target) -> None:
    """Give the model's own parameters their flags back, and take the mark off."""
    for parameter, flag in at.flags:
        parameter.requires_grad_(flag)
    if hasattr(at.model, MARK):
        delattr(at.model, MARK)


def checked_strength(strength: float) -> float:
    """The number itself. Raises UserError where it is not finite."""
    if not math.isfinite(strength):
        raise UserError(f"`strength` must be a finite number, got {strength}.")
    return strength


# ------------------------------------------------------------------------------- rivals that hang on a layer


class Piece(nn.Module):
    """What is hung on a layer: from the layer's input x and output y, the adapted output."""

    def forward(
        self, x: Float[Tensor, "*batch d_in"], y: Float[Tensor, "*batch d_out"]
    ) -> Float[Tensor, "*batch d_out"]:
        raise NotImplementedError  # each kind has its own


class Bottleneck(Piece):
    """y + up(gelu(down(y))), `up` zero at the start: the sequential adapter of arXiv 1902.00751 (fig. 2) and
    arXiv 2110.04366 (table 1), here after each site."""

    def __init__(self, d_out: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(d_out, width)
        self.up = nn.Linear(width, d_out)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(
        self, x: Float[Tensor, "*batch d_in"], y: Float[Tensor, "*batch d_out"]
    ) -> Float[Tensor, "*batch d_out"]:
        return y + self.up(F.gelu(self.down(y.to(self.down.weight.dtype)))).to(y.dtype)


class ScaleShift(Piece):
    """gamma * y + beta, gamma one and beta zero at the start (SSF, arXiv 2210.08823)."""

    def __init__(self, d_out: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(d_out))
        self.beta = nn.Parameter(torch.zeros(d_out))

    def forward(
        self, x: Float[Tensor, "*batch d_in"], y: Float[Tensor, "*batch d_out"]
    ) -> Float[Tensor, "*batch d_out"]:
        return (self.gamma * y + self.beta).to(y.dtype)


class TopKLora(Piece):
    """y + B topk(A x): of the rank-space activations, signed, the k largest by magnitude stay at each token.

    LoRA (arXiv 2106.09685) with the k-sparse activation of arXiv 2406.04093, and nothing else.
    """

    def __init__(self, d_in: int, d_out: int, rank: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.A = nn.Parameter(torch.empty(rank, d_in))
        self.B = nn.Parameter(torch.zeros(d_out, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def codes(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch rank"]:
        """topk(A x)."""
        dense = F.linear(x.to(self.A.dtype), self.A)
        kept = dense.detach().abs().topk(self.k, dim=-1, sorted=False).indices
        dropped = torch.ones_like(dense, dtype=torch.bool).scatter(-1, kept, False)
        return dense.masked_fill(dropped, 0)

    def forward(
        self, x: Float[Tensor, "*batch d_in"], y: Float[Tensor, "*batch d_out"]
    ) -> Float[Tensor, "*batch d_out"]:
        return y + F.linear(self.codes(x), self.B).to(y.dtype)


class Transcoder(Piece):
    """y + D relu(E x - b), D zero at the start: a transcoder (arXiv 2406.11944) beside the block it hangs on."""

    def __init__(self, d_in: int, d_out: int, width: int) -> None:
        super().__init__()
        self.dictionary = Dictionary(d_in, d_out, width, threshold=0.0, normalize=False)
        self.last: Tensor | None = None
        """Codes of the last forward."""

    def forward(
        self, x: Float[Tensor, "*batch d_in"], y: Float[Tensor, "*batch d_out"]
    ) -> Float[Tensor, "*batch d_out"]:
        self.last = self.dictionary.encode(x)
        return y + self.dictionary.decode(self.last).to(y.dtype)


class HungRival(Rival):
    """A piece on each of some layers, as a child module so that it moves with the model, run by a forward hook."""

    def __init__(self, name: str, at: Target, pieces: Mapping[str, Piece], options: Mapping[str, Any]) -> None:
        self._pieces = dict(pieces)
        self._on, self._strength = True, 1.0
        self._handles = []
        for path, piece in pieces.items():
            layer = at.model.get_submodule(path)
            weight = next(layer.parameters())
            layer.add_module(PIECE, piece.to(weight.device).train(layer.training))
            self._handles.append(layer.register_forward_hook(partial(self._run, piece)))
        super().__init__(name, at, options)

    def _run(self, piece: Piece, layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
        if not self._on:
            return None
        adapted: Tensor = piece(args[0], y)
        return adapted if self._strength == 1 else y + self._strength * (adapted - y)

    @contextmanager
    def off(self) -> Iterator[None]:
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before

    @contextmanager
    def scaled(self, strength: float) -> Iterator[None]:
        before = self._strength
        self._strength = before * checked_strength(strength)
        try:
            yield
        finally:
            self._strength = before

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        for path in self._pieces:
            delattr(self._at.model.get_submodule(path), PIECE)


class TranscoderRival(HungRival):
    """Its penalty is the L1 of the codes times the norms of the decoder's rows, summed over the blocks."""

    def penalty(self) -> Tensor | None:
        terms = [
            sparsity(piece.last, piece.dictionary.atoms)
            for piece in self._pieces.values()
            if isinstance(piece, Transcoder) and piece.last is not None
        ]
        return self.config["penalty_weight"] * torch.stack(terms).sum() if terms else None


# --------------------------------------------------------------------------------------------- full fine-tuning


class FullRival(Rival):
    """The sites' own weights and biases; what they were is kept beside them."""

    def __init__(self, name: str, at: Target, options: Mapping[str, Any]) -> None:
        for layer in at.layers.values():
            layer.requires_grad_(True)
        super().__init__(name, at, options)
        self._base = {key: p.detach().clone() for key, p in self._named.items()}

    @contextmanager
    def _with(self, weight: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
        """Inside, each weight is weight(base, now). It is swapped, not written, so that a graph stays valid."""
        kept = {key: p.data for key, p in self._named.items()}
        for key, p in self._named.items():
            p.data = weight(self._base[key].to(p.device), p.data)
        try:
            yield
        finally:
            for key, p in self._named.items():
                p.data = kept[key]

    def off(self) -> AbstractContextManager[None]:
        return self._with(lambda base, now: base)

    def scaled(self, strength: float) -> AbstractContextManager[None]:
        checked_strength(strength)
        return self._with(lambda base, now: now if strength == 1 else base + strength * (now - base))

    @torch.no_grad()
    def _detach(self) -> None:
        for key, p in self._named.items():
            # What was trained stays with the rival, in a parameter of its own.
            self._named[key] = nn.Parameter(p.detach().clone())
            p.copy_(self._base[key])
            p.grad = None


# ------------------------------------------------------------------------------------------------------- sizes


def adapter(at: Target) -> Rival:
    """A bottleneck after each site; one width for all, the nearest to the budget."""
    outs = [d_out for _, d_out in at.shapes]
    width = max(1, round((at.budget - sum(outs)) / sum(2 * d_out + 1 for d_out in outs)))
    pieces = {path: Bottleneck(layer.out_features, width) for path, layer in at.layers.items()}
    return HungRival("adapter", at, pieces, {"width": width})


def ssf(at: Target) -> Rival:
    """Scale and shift of each site's output; two numbers an output feature, whatever the budget."""
    return HungRival("ssf", at, {path: ScaleShift(layer.out_features) for path, layer in at.layers.items()}, {})


def topk_lora(at: Target) -> Rival:
    """A LoRA of that rank that keeps a quarter of its activations."""
    k = max(1, at.rank // 4)
    pieces = {path: TopKLora(layer.in_features, layer.out_features, at.rank, k) for path, layer in at.layers.items()}
    return HungRival("topk_lora", at, pieces, {"k": k})


def transcoder(at: Target) -> Rival:
    """A transcoder beside each feed-forward block of the model; one width for all, the nearest to the budget."""
    blocks = _feed_forwards(at.model)
    width = max(1, round(at.budget / sum(d_in + d_out + 1 for d_in, d_out in blocks.values())))
    pieces = {path: Transcoder(d_in, d_out, width) for path, (d_in, d_out) in blocks.items()}
    return TranscoderRival("transcoder", at, pieces, {"blocks": list(blocks), "width": width, "penalty_weight": 1e-3})


def full(at: Target) -> Rival:
    """Every weight and bias of the sites."""
    return FullRival("full", at, {})


def _feed_forwards(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of the model's feed-forward blocks, by module path; a block inside a block does not count."""
    found: dict[str, tuple[int, int]] = {}
    for path, module in model.named_modules():
        if "FeedForward" in type(module).__name__ and not any(path.startswith(f"{outer}.") for outer in found):
            first = next(part for part in module.modules() if isinstance(part, nn.Linear))
            with torch.no_grad():
                y = module(torch.zeros(1, 1, first.in_features, dtype=first.weight.dtype, device=first.weight.device))
            found[path] = (first.in_features, y.shape[-1])
    if not found:
        raise UserError(
            f"`model` must have feed-forward blocks for transcoder, and this {type(model).__name__} has none."
        )
    return found


PLAIN: dict[str, Callable[[Target], Rival]] = {
    "adapter": adapter,
    "ssf": ssf,
    "full": full,
    "topk_lora": topk_lora,
    "transcoder": transcoder,
}
"""Our own, by name."""
