"""The order in which samples are seen: a pure function of seed and step, so that resuming is exact."""

import hashlib
from collections import Counter
from collections.abc import Sequence
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


def visits_at(
    step: int, n: int, batch_size: int, seed: int, groups: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """(sample, epoch) of each place in batch `step` (from 0). With accumulation, a step is a micro-batch.

    The epochs' orders are laid end to end, and a batch is full when `batch_size` samples of one group have come:
    without `groups` (one number a sample) that is a cut every `batch_size`. A batch may straddle epochs, and no
    sample is dropped.
    """
    for name, value, least in (("step", step, 0), ("batch_size", batch_size, 1), ("n", n, 1)):
        if value < least:
            raise UserError(f"`{name}` must be {'0 or more' if not least else 'at least 1'}, got {value}.")
    groups = [0] * n if groups is None else groups
    sizes = Counter(groups)

    def full_after(epochs: int) -> int:
        return sum(epochs * size // batch_size for size in sizes.values())

    epoch = step * batch_size // n
    while full_after(epoch + 1) <= step:
        epoch += 1
    number, come = full_after(epoch), {group: epoch * size for group, size in sizes.items()}
    for sample in epoch_order(n, seed, epoch):
        group = groups[sample]
        come[group] += 1
        if come[group] % batch_size == 0:
            if number == step:
                break
            number += 1
    found, orders, last = [], {}, come[group]
    for position in range(last - batch_size, last):
        epoch, place = divmod(position, sizes[group])
        if epoch not in orders:
            orders[epoch] = [sample for sample in epoch_order(n, seed, epoch) if groups[sample] == group]
        found.append((orders[epoch][place], epoch))
    return found


def batch_at(step: int, n: int, batch_size: int, seed: int) -> list[int]:
    """The samples of batch `step`, where all can stand in one batch."""
    return [sample for sample, _ in visits_at(step, n, batch_size, seed)]
