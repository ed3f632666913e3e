import pytest
import torch

from atomtune.sparse import IMPORTANCE, CodeStatistics, importance

ARRAYS = ["density", "mean", "mean_when_active", "maximum", "energy", "dead", "by_time"]
ARRAYS += ["on_subject", "on_background", "purity", "maximum_beside"]


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        codes = torch.randn(4, 6, 5, generator=generator).relu()
        codes[..., 2] = 0
        time, mask = torch.rand(4, generator=generator), torch.rand(4, 6, generator=generator)
        made.append({"codes": codes, "time": time, "mask": mask})
    return made


def seen(parts: list[dict[str, torch.Tensor]]) -> CodeStatistics:
    statistics = CodeStatistics(5, time_buckets=4)
    for part in parts:
        statistics.update(**part)
    return statistics


def assert_same(one: CodeStatistics, two: CodeStatistics) -> None:
    assert one.count == two.count
    for name in ARRAYS:
        torch.testing.assert_close(getattr(one, name), getattr(two, name), equal_nan=True)


def test_merge_is_the_same_as_seeing_all():
    parts = batches()
    first = seen(parts[:1])
    first.merge(seen(parts[1:]))
    assert_same(first, seen(parts))


def test_state_dict_round_trip():
    statistics = seen(batches())
    state = statistics.state_dict()
    assert all(type(value) is torch.Tensor for value in state.values())
    other = CodeStatistics(5, time_buckets=4)
    other.load_state_dict(state)
    assert_same(other, statistics)
    other.update(batches()[0]["codes"])
    assert statistics.count == 72  # its own memory
    with pytest.raises(ValueError, match="`state` must hold"):
        CodeStatistics(6, time_buckets=4).load_state_dict(state)


def test_select():
    statistics = seen(batches())
    index = torch.tensor([4, 1])
    for name in ARRAYS:
        chosen, expected = getattr(statistics.select(index), name), getattr(statistics, name)[..., index]
        torch.testing.assert_close(chosen, expected, equal_nan=True)


def test_what_was_not_seen_is_nan():
    statistics = CodeStatistics(3)
    assert statistics.count == 0
    assert statistics.mean.isnan().all()
    assert statistics.dead.all()
    statistics.update(torch.tensor([[[1.0, 0.0, 2.0]]]))
    assert statistics.purity.isnan().all()
    assert statistics.by_time.isnan().all()
    assert statistics.dead.tolist() == [False, True, False]
    statistics.update(torch.tensor([[[1.0, 0.0, 2.0], [0.0, 0.0, 2.0]]]), mask=torch.tensor([[True, False]]))
    assert statistics.purity.tolist() == pytest.approx([1.0, float("nan"), 0.5], nan_ok=True)


def test_the_largest_code_beside_the_subject():
    statistics = CodeStatistics(2)
    codes = torch.tensor([[[9.0, -9.0], [1.0, 0.0], [2.0, -3.0]]])
    statistics.update(codes)
    assert statistics.maximum_beside.tolist() == [0.0, 0.0], "nobody said where the subject is"
    statistics.update(codes, mask=torch.tensor([[0.5, 0.4, 0.0]]))
    assert statistics.maximum_beside.tolist() == [2.0, 3.0]
    assert statistics.maximum.tolist() == [9.0, 9.0]


def test_signed_and_bfloat16_codes():
    statistics = CodeStatistics(2)
    statistics.update(torch.tensor([[[-1.0, 2.0], [1.0, 0.0]]], dtype=torch.bfloat16))
    assert statistics.mean.tolist() == [1.0, 1.0]
    assert statistics.density.tolist() == [1.0, 0.5]
    assert statistics.maximum.tolist() == [1.0, 2.0]


def test_no_autograd():
    codes = torch.ones(1, 2, 3, requires_grad=True)
    statistics = CodeStatistics(3)
    statistics.update(codes)
    assert not statistics.mean.requires_grad


def test_importance_formulas():
    statistics = seen(batches())
    atoms = torch.randn(5, 7)
    norms = atoms.norm(dim=-1).double()
    for formula in ("mean", "mean_when_active", "maximum"):
        expected = getattr(statistics, formula) * norms
        torch.testing.assert_close(importance(statistics, atoms, formula), expected)
    purity = importance(statistics, atoms, "purity")
    assert purity[2] == 0
    torch.testing.assert_close(purity[:2], statistics.purity[:2])
    assert set(IMPORTANCE) == {"mean", "mean_when_active", "maximum", "purity"}
    with pytest.raises(ValueError, match="`formula` must be one of mean"):
        importance(statistics, atoms, "median")
    unmasked = CodeStatistics(5)
    unmasked.update(batches()[0]["codes"])
    with pytest.raises(ValueError, match="Give `mask` to `update`"):
        importance(unmasked, atoms, "purity")


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"time": torch.full((2,), 500.0)}, r"`time` must lie in \[0, 1\], got values from 500 to 500"),
        ({"time": torch.full((2,), float("nan"))}, r"`time` must lie in \[0, 1\]"),
        ({"mask": torch.full((2, 4), -1.0)}, r"`mask` must lie in \[0, 1\], got values from -1 to -1"),
    ],
)
def test_values_out_of_range_are_named_and_leave_nothing_behind(extra, says):
    statistics = CodeStatistics(3)
    with pytest.raises(ValueError, match=says):
        statistics.update(torch.ones(2, 4, 3), **extra)
    assert statistics.count == 0


def test_merge_and_sizes_are_checked():
    with pytest.raises(ValueError, match=r"`other` must have .* \(3, 8\), got \(4, 8\)"):
        CodeStatistics(3).merge(CodeStatistics(4))
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 8"):
        CodeStatistics(0)
    with pytest.raises(ValueError, match=r"`codes` must be of shape \(batch, positions, 3\)"):
        CodeStatistics(3).update(torch.ones(1, 2, 4))
