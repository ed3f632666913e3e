"""Sparsifiers turn pre-codes into codes; all but `dense` give codes that are never negative."""

import copy
import difflib
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Sparsifier(nn.Module):
    """The protocol: `forward` maps pre-codes to codes of the same shape and dtype.

    `k` is the number kept at a position. `threshold` is the pre-code above which an atom may fire.
    Each is None where it has no meaning.
    """

    k: int | None = None
    threshold: float | Tensor | None
    elementwise = False
    """Whether all of its kind compute the same of a single pre-code, so that one serves for several dictionaries."""

    def forward(self, pre_codes: Float[Tensor, "*batch n_atoms"]) -> Float[Tensor, "*batch n_atoms"]:
        raise NotImplementedError  # each kind has its own

    def reset_parameters(self) -> None:
        """Return learned and running values to where they started."""

    def select(self, index: Int[Tensor, " kept"]) -> "Sparsifier":
        """A copy for a subset or reorder of the atoms; `k` shrinks where fewer than `k` are left."""
        other = copy.deepcopy(self)
        if other.k is not None:
            other.k = min(other.k, len(index))
        return other


class Dense(Sparsifier):
    """Identity, signed: this is LoRA."""

    threshold = None
    elementwise = True

    def forward(self, pre_codes: Float[Tensor, "*batch n_atoms"]) -> Float[Tensor, "*batch n_atoms"]:
        return pre_codes


class Relu(Sparsifier):
    """max(pre, 0)."""

    threshold = 0.0
    elementwise = True

    def forward(self, pre_codes: Float[Tensor, "*batch n_atoms"]) -> Float[Tensor, "*batch n_atoms"]:
        return torch.relu(pre_codes)


class Soft(Sparsifier):
    """Non-negative soft threshold, max(pre - threshold, 0), with a fixed threshold."""

    threshold: float

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = float(threshold)

    def forward(self, pre_codes: Float[Tensor, "*batch n_atoms"]) -> Float[Tensor, "*batch n_atoms"]:
        return torch.relu(pre_codes - self.threshold)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


class TopK(Sparsifier):
    """The k largest pre-codes of each position, then relu; ties never keep more than k.

    `k` may be changed between steps; a compiled model then compiles again.
    """

    threshold = 0.0

    def __init__(self, n_atoms: int, k: int | None) -> None:
        super().__init__()
        self.k: int = _checked_k(k, n_atoms)

    def forward(self, pre_codes: Float[Tensor, "*batch n_atoms"]) -> Float[Tensor, "*batch n_atoms"]:
        return _keep_largest(pre_codes, self.k)

    def extra_repr(self) -> str:
        return f"k={self.k}"


class BatchTopK(Sparsifier):
    """Training keeps the k * positions largest of the whole batch; eval keeps all above a running threshold.

    The threshold is the running mean of the smallest code kept, so that in eval a token never depends on
    its neighbours (Bussmann et al. 2024, arXiv 2412.06410). It reads 0 before the first training batch.
    """

    threshold: Tensor
    batches: Tensor

    def __init__(self, n_atoms: int, k: int | None, decay: float = 0.95) -> None:
        super().__init__()
        self.k: int = _checked_k(k, n_atoms)
        self.decay = decay
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def reset_parameters(self) -> None:
        self.threshold.zero_()
        self.batches.zero_()

    def forward(self, pre_codes: Float[Tensor, "*batch n_atoms"]) -> Float[Tensor, "*batch n_atoms"]:
        if not self.training:
            return torch.relu(pre_codes).masked_fill(pre_codes < self.threshold, 0)
        n_atoms = pre_codes.shape[-1]
        positions = pre_codes.numel() // n_atoms
        flat = pre_codes.reshape(positions * n_atoms)
        codes = _keep_largest(flat, positions * min(self.k, n_atoms)).view_as(pre_codes)
        self._follow(codes.detach())
        return codes

    @torch.no_grad()
    def _follow(self, codes: Tensor) -> None:
        active = codes > 0
        smallest = codes.masked_fill(~active, torch.inf).amin().to(self.threshold.dtype)
        # A plain mean over the first batches, so that the start at 0 leaves no bias.
        weight = (1 / (self.batches + 1)).clamp_min(1 - self.decay)
        moved = torch.lerp(self.threshold, smallest, weight.to(self.threshold.dtype))
        any_active = active.any()
        self.threshold.copy_(torch.where(any_active, moved, self.threshold))
        self.batches.add_(any_active)

    def extra_repr(self) -> str:
        return f"k={self.k}"


class JumpRelu(Sparsifier):
    """pre where pre > threshold, else 0, with a learned threshold an atom.

    The threshold's gradient is straight-through, a rectangle kernel: -(threshold / bandwidth) where
    |pre - threshold| < bandwidth / 2 (Rajamanoharan et al. 2024, arXiv 2407.14435). It vanishes at a
    threshold of 0, so the start is bandwidth / 2 or above.
    """

    threshold: nn.Parameter

    def __init__(self, n_atoms: int, threshold: float, bandwidth: float) -> None:
        super().__init__()
        if bandwidth <= 0:
            raise ValueError(f"`bandwidth` must be above 0, got {bandwidth}. Try 0.5.")
        self.start = max(float(threshold), bandwidth / 2)
        self.bandwidth = bandwidth
        self.threshold = nn.Parameter(torch.full((n_atoms,), self.start))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.threshold.fill_(self.start)

    def forward(self, pre_codes: Float[Tensor, "*batch n_atoms"]) -> Float[Tensor, "*batch n_atoms"]:
        codes: Tensor = _Jump.apply(pre_codes, self.threshold.to(pre_codes.dtype), self.bandwidth)
        return codes

    def select(self, index: Int[Tensor, " kept"]) -> "Sparsifier":
        other = super().select(index)
        kept = self.threshold.detach()[index.to(self.threshold.device)]
        other.threshold = nn.Parameter(kept, requires_grad=self.threshold.requires_grad)
        return other

    def extra_repr(self) -> str:
        return f"bandwidth={self.bandwidth}"


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        # relu: a threshold that was trained below zero must not let negative codes through.
        return torch.relu(pre).masked_fill(pre <= threshold, 0)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        pre, threshold = ctx.saved_tensors
        grad_pre = grad.masked_fill((pre <= threshold) | (pre <= 0), 0)
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        at_edge = (grad * near).reshape(-1, len(threshold)).sum(0)
        return grad_pre, -(threshold / ctx.bandwidth) * at_edge, None


def _keep_largest(pre_codes: Tensor, k: int) -> Tensor:
    if k >= pre_codes.shape[-1]:
        return torch.relu(pre_codes)
    # The choice carries no gradient; a mask makes the backward pass one plain product, with no scatter.
    chosen = pre_codes.detach().topk(k, dim=-1, sorted=False).indices
    dropped = torch.ones_like(pre_codes, dtype=torch.bool).scatter(-1, chosen, False)
    return torch.relu(pre_codes).masked_fill(dropped, 0)


def _checked_k(k: int | None, n_atoms: int) -> int:
    if k is None or not 1 <= k <= n_atoms:
        advice = "Give `k`." if k is None else "Raise `k`." if k < 1 else "Lower `k` or raise `n_atoms`."
        raise ValueError(f"`k` must be between 1 and n_atoms ({n_atoms}), got {k}. {advice}")
    return k


# Each row: (n_atoms, k, threshold, bandwidth) -> Sparsifier.
SPARSIFIERS: dict[str, Callable[[int, int | None, float, float], Sparsifier]] = {
    "dense": lambda n_atoms, k, threshold, bandwidth: Dense(),
    "relu": lambda n_atoms, k, threshold, bandwidth: Relu(),
    "soft": lambda n_atoms, k, threshold, bandwidth: Soft(threshold),
    "topk": lambda n_atoms, k, threshold, bandwidth: TopK(n_atoms, k),
    "batch_topk": lambda n_atoms, k, threshold, bandwidth: BatchTopK(n_atoms, k),
    "jumprelu": lambda n_atoms, k, threshold, bandwidth: JumpRelu(n_atoms, threshold, bandwidth),
}


def make_sparsifier(
    name: str, n_atoms: int, *, k: int | None = None, threshold: float = 0.0, bandwidth: float = 0.5
) -> Sparsifier:
    """The sparsifier of that name; it reads what it needs of `k`, `threshold`, `bandwidth` (code units)."""
    if name not in SPARSIFIERS:
        raise ValueError(f"`sparsifier` must be one of {closest_first(name, SPARSIFIERS)}, got {name!r}.")
    return SPARSIFIERS[name](n_atoms, k, threshold, bandwidth)


def closest_first(name: str, known: Iterable[str]) -> str:
    """The known names as text, the one most like `name` first."""
    return ", ".join(sorted(known, key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio()))


def anneal_k(progress: float, k_start: int, k_end: int, stages: int = 4) -> int:
    """`k` at a point of the anneal: geometric from `k_start` to `k_end` in `stages` equal steps of time.

    Few distinct values keep shapes static for `torch.compile`. `progress` is clipped to [0, 1].
    """
    if min(k_start, k_end, stages) < 1:
        raise ValueError(f"`k_start`, `k_end` and `stages` must be at least 1, got {k_start}, {k_end} and {stages}.")
    stage = min(int(min(max(progress, 0.0), 1.0) * stages), stages - 1)
    share = stage / (stages - 1) if stages > 1 else 1.0
    return round(k_start * (k_end / k_start) ** share)
