"""A dictionary of atoms: codes are read from the input by an encoder, the delta is their sum of atoms."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .ista import ista
from .sparsifiers import Sparsifier, closest_first, make_sparsifier

ENCODERS = ("linear", "ista")


class InverseRms(torch.autograd.Function):
    """1 / sqrt(mean(x^2)) over features, (*batch, 1), in float32 or better; at most 1e6.

    Written out because torch's own backward makes float32 copies of a bfloat16 x; this one makes none.
    """

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = (x.shape[-1] ** 0.5 / norm).clamp_max(1e6)
        ctx.save_for_backward(x, inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, inverse = ctx.saved_tensors
        scale = (-grad * inverse**3 / x.shape[-1]).masked_fill(inverse >= 1e6, 0)
        # float16 alone cannot hold the scale.
        return (x * (scale if x.dtype == torch.float16 else scale.to(x.dtype))).to(x.dtype)


class Dictionary(nn.Module):
    """delta = sparsify(E x / rms(x) - b) D.

    `threshold` is where an atom starts to fire, in standard deviations of its pre-code at the start. It is
    the start of `bias` where there is one, else the fixed threshold of `soft` and `ista` and the start of
    `jumprelu`'s; `dense` ignores it. With `encoder="ista"` the rows of E, made unit length, are input atoms
    and codes come from `steps` shrinkage steps, `bias` being lambda. `dtype` is the parameters'; they are
    cast to the dtype of x, which is not kept twice, and codes come in that dtype (or autocast's).
    """

    atom_ids: Tensor

    def __init__(
        self,
        d_in: int,
        d_out: int,
        n_atoms: int,
        *,
        sparsifier: str = "relu",
        k: int | None = None,
        threshold: float = 1.0,
        encoder: str = "linear",
        steps: int = 3,
        normalize: bool = True,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check(d_in=d_in, d_out=d_out, n_atoms=n_atoms, steps=steps)
        if encoder not in ENCODERS:
            raise ValueError(f"`encoder` must be one of {closest_first(encoder, ENCODERS)}, got {encoder!r}.")
        if encoder == "ista" and sparsifier != "soft":
            raise ValueError(f"`sparsifier` must be soft with encoder 'ista', got {sparsifier!r}.")
        self.method = encoder
        self.steps = steps
        self.normalize = normalize
        self.threshold = 0.0 if sparsifier == "dense" else float(threshold)
        self.encoder = nn.Parameter(torch.empty(n_atoms, d_in, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(n_atoms, dtype=dtype, device=device)) if bias else None
        self.atoms = nn.Parameter(torch.empty(n_atoms, d_out, dtype=dtype, device=device))
        self.register_buffer("atom_ids", torch.empty(n_atoms, dtype=torch.int64, device=device))
        # The threshold stands in one place only: in the bias, in ista's lambda, or here.
        left = 0.0 if bias or encoder == "ista" else self.threshold
        self.sparsifier: Sparsifier = make_sparsifier(sparsifier, n_atoms, k=k, threshold=left)
        self.sparsifier.to(device=device, dtype=dtype)
        self.reset_parameters()

    @property
    def n_atoms(self) -> int:
        return self.encoder.shape[0]

    @property
    def d_in(self) -> int:
        return self.encoder.shape[1]

    @property
    def d_out(self) -> int:
        return self.atoms.shape[1]

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start afresh: E normal with std d_in^-1/2 (pre-codes of unit variance), b = threshold, D = 0."""
        # Drawn on the generator's device, so that a seed gives the same atoms on every device.
        where = self.encoder.device if generator is None else generator.device
        E = torch.randn(self.encoder.shape, generator=generator, device=where)
        self.encoder.copy_(E / self.d_in**0.5)
        if self.bias is not None:
            self.bias.fill_(self.threshold)
        self.atoms.zero_()
        self.atom_ids.copy_(torch.arange(self.n_atoms))
        self.sparsifier.reset_parameters()

    def pre_codes(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch n_atoms"]:
        """E x / rms(x) - b, and for `ista` the last step before its shrinkage; with a bias, 0 is the edge."""
        E = self.encoder if self.method == "linear" else F.normalize(self.encoder, dim=-1)
        pre = F.linear(x, E.to(x.dtype))
        if self.normalize:
            # (E x) / r, not E (x / r): scales n columns instead of copying x.
            # An input of zeros (padding) has an inverse that float16 can't hold; 0 * inf would be NaN.
            pre = pre * InverseRms.apply(x).clamp_max(torch.finfo(pre.dtype).max).to(pre.dtype)
        if self.bias is not None:
            pre = pre - self.bias.to(pre.dtype)
        if self.method == "linear":
            return pre
        if self.bias is None:
            pre = pre - self.threshold
        return ista(pre, E @ E.T, self.steps)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch n_atoms"]:
        """x to codes."""
        codes: Tensor = self.sparsifier(self.pre_codes(x))
        return codes

    def decode(self, codes: Float[Tensor, "*batch n_atoms"]) -> Float[Tensor, "*batch d_out"]:
        """Codes to the delta of the output; exactly zero where all codes are."""
        return codes @ self.atoms.to(codes.dtype)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.decode(self.encode(x))

    def stacks_with(self, other: "Dictionary") -> bool:
        """Whether `stacked_codes` takes both at once: linear encoders, as many atoms, the same settings."""
        mine, its = (
            (d.encoder.shape, d.atoms.shape, d.normalize, d.bias is None, type(d.sparsifier)) for d in (self, other)
        )
        return self.method == other.method == "linear" and mine == its

    def select(self, index: Int[Tensor, " kept"]) -> "Dictionary":
        """A new dictionary of the atoms at `index`, in that order; ids and thresholds go with them."""
        index = _checked_index(index, self.n_atoms).to(self.encoder.device)
        other = copy.deepcopy(self)
        for name, parameter in self.named_parameters(recurse=False):
            kept = nn.Parameter(parameter.detach()[index], requires_grad=parameter.requires_grad)
            setattr(other, name, kept)
        other.atom_ids = self.atom_ids[index]
        other.sparsifier = self.sparsifier.select(index)
        return other

    def extra_repr(self) -> str:
        return (
            f"d_in={self.d_in}, d_out={self.d_out}, n_atoms={self.n_atoms}, encoder={self.method}, "
            f"normalize={self.normalize}, bias={self.bias is not None}"
        )


def stacked_codes(
    dictionaries: Sequence[Dictionary], x: Float[Tensor, "blocks positions d_in"]
) -> tuple[Float[Tensor, "blocks positions n_atoms"], Float[Tensor, "blocks positions n_atoms"]]:
    """(pre-codes, codes) of each block by its own dictionary, in one product; all must `stacks_with` each other."""
    first = dictionaries[0]
    pre = torch.bmm(x, torch.stack(tuple(d.encoder for d in dictionaries)).to(x.dtype).mT)
    if first.normalize:
        pre = pre * InverseRms.apply(x).clamp_max(torch.finfo(pre.dtype).max).to(pre.dtype)
    biases = tuple(d.bias for d in dictionaries if d.bias is not None)
    if biases:
        pre = pre - torch.stack(biases).to(pre.dtype)[:, None]
    if first.sparsifier.elementwise:
        return pre, first.sparsifier(pre)
    return pre, torch.stack([d.sparsifier(own) for d, own in zip(dictionaries, pre, strict=True)])


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1, got {size}.")


def _checked_index(index: Tensor, n_atoms: int) -> Tensor:
    if index.dtype != torch.int64 or index.ndim != 1:
        found = f"{index.dtype} of shape {tuple(index.shape)}"
        raise ValueError(f"`index` must be 1-D int64, got {found}. From a mask: `mask.nonzero().flatten()`.")
    listed = index.tolist()
    if not listed:
        raise ValueError("`index` must name at least one atom, got none. Drop an empty dictionary instead.")
    if min(listed) < 0 or max(listed) >= n_atoms:
        raise ValueError(
            f"`index` must lie between 0 and n_atoms - 1 ({n_atoms - 1}), got {min(listed)} to {max(listed)}."
        )
    if len(set(listed)) < len(listed):
        raise ValueError("`index` must name each atom at most once, got a repeated one.")
    return index
