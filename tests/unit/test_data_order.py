"""Orders: each item once, epochs differ, reruns agree, and a batch depends on its step alone."""

import pytest

from atomtune.data.order import batch_at, epoch_order, visits_at
from atomtune.errors import UserError


def test_each_item_once_epochs_differ_reruns_agree() -> None:
    """Complaint: no shuffling, or the same order each epoch."""
    epochs = [epoch_order(20, seed=3, epoch=epoch) for epoch in range(5)]
    assert all(sorted(order) == list(range(20)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 5
    assert epochs == [epoch_order(20, seed=3, epoch=epoch) for epoch in range(5)]
    assert epoch_order(20, seed=4, epoch=0) != epochs[0]
    assert epoch_order(20, seed=-1, epoch=0) != epoch_order(20, seed=1, epoch=0)


def test_the_order_is_the_same_for_ever() -> None:
    """Written down once: a new NumPy or a refactoring must not change what a resumed run sees."""
    assert epoch_order(8, seed=0, epoch=0) == [6, 3, 4, 0, 1, 5, 7, 2]


def test_a_callers_change_stays_the_callers() -> None:
    epoch_order(5, 0, 0).clear()
    assert sorted(epoch_order(5, 0, 0)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("n", "batch_size"), [(7, 3), (8, 4), (3, 8), (1, 1), (5, 1)])
def test_batches_are_the_epochs_laid_end_to_end(n: int, batch_size: int) -> None:
    steps = 3 * n
    seen = [item for step in range(steps) for item in batch_at(step, n, batch_size, seed=1)]
    epochs = -(-len(seen) // n)
    assert seen == [item for epoch in range(epochs) for item in epoch_order(n, 1, epoch)][: len(seen)]


def test_any_step_can_be_asked_for_first() -> None:
    run = [batch_at(step, 7, 3, seed=1) for step in range(20)]
    assert [batch_at(step, 7, 3, seed=1) for step in reversed(range(20))] == run[::-1]
    assert len(batch_at(10**9, 7, 3, seed=1)) == 3


@pytest.mark.parametrize(
    ("step", "n", "batch_size", "named"), [(-1, 3, 1, "step"), (0, 0, 1, "n"), (0, 3, 0, "batch_size")]
)
def test_senseless_numbers_are_told(step: int, n: int, batch_size: int, named: str) -> None:
    with pytest.raises(UserError, match=f"`{named}` must be .* got "):
        batch_at(step, n, batch_size, seed=0)


@pytest.mark.parametrize(("n", "epoch", "named"), [(0, 0, "n"), (3, -1, "epoch")])
def test_senseless_epochs_are_told(n: int, epoch: int, named: str) -> None:
    with pytest.raises(UserError, match=f"`{named}` must be .* got "):
        epoch_order(n, 0, epoch)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_batches_of_one_group_still_show_each_item_once_an_epoch(batch_size: int) -> None:
    """Complaint: an order that repeats or forgets pictures, here where batches must have one size."""
    groups = [0, 1, 0, 0, 2, 1, 0, 0, 1]
    batches = [visits_at(step, len(groups), batch_size, 5, groups) for step in range(80)]
    assert all(len({groups[item] for item, _ in batch}) == 1 for batch in batches)
    assert all(len(batch) == batch_size for batch in batches)
    seen = [visit for batch in batches for visit in batch]
    assert len(set(seen)) == len(seen), "no item twice in an epoch"
    whole = min(epoch for _, epoch in seen[-batch_size * 3 :]) - batch_size
    assert whole > 1
    assert {(item, epoch) for item in range(9) for epoch in range(whole)} <= set(seen), "and none is forgotten"
    one = [visits_at(step, 9, batch_size, 5, [4] * 9) for step in range(80)]
    assert [[item for item, _ in batch] for batch in one] == [batch_at(step, 9, batch_size, 5) for step in range(80)]
