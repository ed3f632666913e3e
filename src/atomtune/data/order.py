"""The order in which samples are seen: a pure function of seed and step, so that resuming is exact."""

import hashlib
from functools import lru_cache

import numpy as np

from atomtune.errors import UserError


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    # RandomState, not default_rng: NumPy promises that its stream stays the same in every version.
    words = np.frombuffer(hashlib.sha256(f"{n}/{seed}/{epoch}".encode()).digest(), dtype="<u4")
    return tuple(np.random.RandomState(words).permutation(n).tolist())


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """Every index below `n` once, shuffled by seed and epoch. Two epochs agree by chance once in n! times."""
    if n < 1:
        raise UserError(f"`n` must be at least 1 sample, got {n}.")
    if epoch < 0:
        raise UserError(f"`epoch` must be 0 or more, got {epoch}.")
    return list(_permutation(n, seed, epoch))


def batch_at(step: int, n: int, batch_size: int, seed: int) -> list[int]:
    """The samples of batch `step` (from 0): the epochs' orders laid end to end, cut every `batch_size`.

    A batch may straddle two epochs, and no sample is dropped. With accumulation, a step is a micro-batch.
    """
    if step < 0:
        raise UserError(f"`step` must be 0 or more, got {step}.")
    if batch_size < 1:
        raise UserError(f"`batch_size` must be at least 1, got {batch_size}.")
    first = step * batch_size
    if n < 1:
        raise UserError(f"`n` must be at least 1 sample, got {n}.")
    last = first + batch_size - 1
    order_of = {epoch: epoch_order(n, seed, epoch) for epoch in range(first // n, last // n + 1)}
    return [order_of[position // n][position % n] for position in range(first, last + 1)]
