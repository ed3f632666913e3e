import pytest
import torch

from atomtune.sparse import SPARSIFIERS, anneal_k, make_sparsifier

N = 12


def pre_codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, N, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SPARSIFIERS)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_shape_dtype_and_sign(name, shape, dtype, training):
    codes = make_sparsifier(name, N, k=3).train(training)(pre_codes(*shape).to(dtype))
    assert codes.shape == (*shape, N)
    assert codes.dtype == dtype
    assert name == "dense" or (codes >= 0).all()


@pytest.mark.parametrize("name", [name for name in SPARSIFIERS if name != "dense"])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_fires_below_zero(name, training):
    codes = make_sparsifier(name, N, k=3).train(training)(-pre_codes(4).abs())
    assert torch.equal(codes, torch.zeros(4, N))


@pytest.mark.parametrize("name", SPARSIFIERS)
def test_k_and_threshold_are_none_where_meaningless(name):
    made = make_sparsifier(name, N, k=3)
    assert made.k == (3 if "topk" in name else None)
    assert (made.threshold is None) == (name == "dense")


def test_topk_breaks_ties_at_exactly_k():
    codes = make_sparsifier("topk", N, k=3)(torch.ones(5, N))
    assert ((codes != 0).sum(-1) == 3).all()


def test_topk_follows_a_changed_k():
    topk = make_sparsifier("topk", N, k=N)
    topk.k = 1
    assert ((topk(pre_codes(5).abs()) != 0).sum(-1) == 1).all()
    topk.k = N + 5
    assert torch.equal(topk(pre_codes(5)), pre_codes(5).relu())


def trained_batch_topk() -> torch.nn.Module:
    sparsifier = make_sparsifier("batch_topk", N, k=3).train()
    for seed in range(5):
        sparsifier(pre_codes(8, 16, seed=seed))
    return sparsifier.eval()


def test_batch_topk_in_eval_does_not_see_neighbours():
    sparsifier = trained_batch_topk()
    x = pre_codes(6, 7, seed=9)
    together = sparsifier(x)
    alone = torch.stack([torch.stack([sparsifier(token) for token in row]) for row in x])
    assert torch.equal(together, alone)


def test_batch_topk_threshold_keeps_about_k():
    sparsifier = trained_batch_topk()
    assert sparsifier(pre_codes(64, 16, seed=9)).count_nonzero() / (64 * 16) == pytest.approx(3, rel=0.1)


def test_batch_topk_threshold_is_saved_and_not_moved_by_eval_or_silence():
    sparsifier = trained_batch_topk()
    threshold = sparsifier.threshold.clone()
    sparsifier(pre_codes(4, seed=10))
    sparsifier.train()(-pre_codes(4).abs())
    assert torch.equal(sparsifier.threshold, threshold)
    other = make_sparsifier("batch_topk", N, k=3)
    other.load_state_dict(sparsifier.state_dict())
    assert torch.equal(other.threshold, threshold)


def test_jumprelu_threshold_learns():
    sparsifier = make_sparsifier("jumprelu", N, threshold=0.5, bandwidth=0.5)
    optimizer = torch.optim.SGD(sparsifier.parameters(), lr=1.0)
    for seed in range(20):
        optimizer.zero_grad()
        sparsifier(pre_codes(64, seed=seed)).sum(-1).mean().backward()
        optimizer.step()
    assert (sparsifier.threshold > 0.6).all()  # less L1 is a higher threshold


@pytest.mark.parametrize("name", SPARSIFIERS)
def test_select_takes_what_belongs_to_the_atoms(name):
    sparsifier = make_sparsifier(name, N, k=5)
    if name == "jumprelu":
        sparsifier.threshold.data.uniform_()
    index = torch.tensor([7, 0, 3])
    chosen = sparsifier.select(index)
    assert chosen.k == (3 if "topk" in name else None)
    assert sparsifier.k == (5 if "topk" in name else None)
    x = pre_codes(4)[:, index]
    if name == "jumprelu":
        assert torch.equal(chosen.threshold, sparsifier.threshold[index])
    assert chosen(x).shape == x.shape


@pytest.mark.parametrize(
    ("name", "k", "says"),
    [
        ("topk", 900, r"`k` must be between 1 and n_atoms \(512\), got 900\. Lower `k` or raise `n_atoms`\."),
        ("batch_topk", 0, r"`k` must be between 1 and n_atoms \(512\), got 0\. Raise `k`\."),
        ("topk", None, r"got None\. Give `k`\."),
        ("jumprelo", 1, r"must be one of jumprelu, .*got 'jumprelo'"),
        ("top_k", 1, r"must be one of topk, batch_topk"),
    ],
)
def test_mistakes_are_named(name, k, says):
    with pytest.raises(ValueError, match=says):
        make_sparsifier(name, 512, k=k)


def test_bandwidth_must_be_positive():
    with pytest.raises(ValueError, match="`bandwidth` must be above 0, got 0"):
        make_sparsifier("jumprelu", N, bandwidth=0.0)


def test_anneal_k_is_stepped_geometric_and_monotone():
    ks = [anneal_k(i / 100, 64, 4) for i in range(101)]
    assert (ks[0], ks[-1]) == (64, 4)
    assert ks == sorted(ks, reverse=True)
    assert list(dict.fromkeys(ks)) == [64, 25, 10, 4]
    assert anneal_k(0.0, 64, 4, stages=1) == 4
    assert anneal_k(2.0, 64, 4) == 4
    assert anneal_k(-1.0, 64, 4) == 64
    with pytest.raises(ValueError, match="must be at least 1"):
        anneal_k(0.5, 64, 0)
