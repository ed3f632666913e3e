"""Sparse coding by unrolled shrinkage: the `ista` encoder (Daubechies et al. 2004, arXiv math/0307152)."""

import torch
from jaxtyping import Float
from torch import Tensor


def spectral_bound(gram: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """An upper bound of the largest eigenvalue of a positive semi-definite matrix: ||G^4||_F ^ (1/4).

    Never below the truth and at most n^(1/8) above it (1.7 at n = 64), for two n x n products; power
    iteration approaches from below, where a step is too long and ISTA may diverge.
    """
    scale = torch.linalg.matrix_norm(gram)
    squared = (gram / scale) @ (gram / scale)
    return scale * torch.linalg.matrix_norm(squared @ squared) ** 0.25


def ista(drive: Float[Tensor, "*batch n"], gram: Float[Tensor, "n n"], steps: int) -> Float[Tensor, "*batch n"]:
    """Pre-codes whose relu is step `steps` of ISTA on min_z |x - z A|^2 / 2 + lambda sum(z), z >= 0.

    `drive` is A x - lambda (one lambda, or one an atom), `gram` is G = A A^T. From z = 0:
    z <- relu(z (1 - G / L) + drive / L), with L from `spectral_bound`; x itself is not read again.
    """
    step = 1 / spectral_bound(gram)
    keep = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) - step * gram
    keep, drive = keep.to(drive.dtype), drive * step.to(drive.dtype)
    pre = drive
    for _ in range(steps - 1):
        pre = torch.relu(pre) @ keep + drive
    return pre
