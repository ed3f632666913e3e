"""Training penalties on codes: plain functions, each a scalar in float32 or better.

Pre-codes are read as firing above 0. Where a sparsifier has its own threshold, subtract it first.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def sparsity(codes: Float[Tensor, "*batch n_atoms"], atoms: Float[Tensor, "n_atoms d_out"]) -> Float[Tensor, ""]:
    """mean over positions of sum_i |code_i| ||D_i||; the norm stops codes from hiding in larger atoms."""
    size = codes.abs().reshape(-1, codes.shape[-1]).mean(0, dtype=_wide(codes))
    norms = torch.linalg.vector_norm(atoms, dim=-1, dtype=_wide(atoms))
    return (size * norms).sum()


def silence(pre_codes: Float[Tensor, "*batch n_atoms"], margin: float = 0.2) -> Float[Tensor, ""]:
    """mean over positions and atoms of relu(pre_i + margin), for inputs on which no atom should fire."""
    return torch.relu(pre_codes + margin).mean(dtype=_wide(pre_codes))


def dead_atoms(pre_codes: Float[Tensor, "*batch n_atoms"], dead: Bool[Tensor, " n_atoms"]) -> Float[Tensor, ""]:
    """mean over positions and atoms of dead_i relu(-pre_i): pulls a dead atom up until it fires.

    After the pre-act loss of Anthropic's Circuits Updates, January 2025, which takes dead what is silent now
    and weighs by ||D_i||; here D starts at zero, and the caller says which atoms are dead.
    """
    below = torch.relu(-pre_codes).reshape(-1, pre_codes.shape[-1]).mean(0, dtype=_wide(pre_codes))
    return (below * dead).mean()


def l0(codes: Float[Tensor, "*batch n_atoms"]) -> Float[Tensor, ""]:
    """mean number of atoms with code_i != 0 at a position; carries no gradient."""
    return (codes != 0).sum(-1).float().mean()
