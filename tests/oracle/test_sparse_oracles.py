"""Sparse codes against things we did not write: naive loops, scikit-learn, PEFT's LoRA."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from sklearn.decomposition import sparse_encode

from atomtune.sparse import CodeStatistics, Dictionary, ista, make_sparsifier, spectral_bound

GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order() -> None:
    GENERATOR.manual_seed(0)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def naive_topk(row, k):
    best = sorted(range(len(row)), key=lambda i: -row[i])[:k]
    return [max(v, 0.0) if i in best else 0.0 for i, v in enumerate(row)]


def naive_batch_topk(rows, k):
    flat = naive_topk([v for row in rows for v in row], k * len(rows))
    return [flat[start : start + len(rows[0])] for start in range(0, len(flat), len(rows[0]))]


NAIVE = {
    "dense": lambda rows: rows,
    "relu": lambda rows: [[max(v, 0.0) for v in row] for row in rows],
    "soft": lambda rows: [[max(v - 0.75, 0.0) for v in row] for row in rows],
    "topk": lambda rows: [naive_topk(row, 3) for row in rows],
    "batch_topk": lambda rows: naive_batch_topk(rows, 3),
    "jumprelu": lambda rows: [[v if v > 0.75 else 0.0 for v in row] for row in rows],
}


@pytest.mark.parametrize("name", NAIVE)
def test_sparsifier_is_the_naive_loop_and_its_gradient_is_the_mask(name):
    pre = rand(7, 12).requires_grad_()
    codes = make_sparsifier(name, 12, k=3, threshold=0.75)(pre)
    torch.testing.assert_close(codes.detach(), torch.tensor(NAIVE[name](pre.tolist())))
    codes.sum().backward()
    assert torch.equal(pre.grad, (codes != 0).float())


def test_batch_topk_threshold_is_the_running_mean_of_the_smallest_kept():
    sparsifier = make_sparsifier("batch_topk", 12, k=3)
    expected = 0.0
    for step in range(40):
        pre = rand(7, 12)
        sparsifier(pre)
        smallest = sorted(v for v in pre.flatten().tolist() if v > 0)[::-1][: 3 * 7][-1]
        weight = max(1 / (step + 1), 0.05)
        expected += weight * (smallest - expected)
    assert sparsifier.threshold.item() == pytest.approx(expected, rel=1e-5)


def test_jumprelu_gradient_is_the_papers_pseudo_derivative():
    pre, out = rand(50, 4), rand(50, 4)
    sparsifier = make_sparsifier("jumprelu", 4, threshold=0.6, bandwidth=0.8)
    sparsifier.threshold.data.add_(0.1 * rand(4))
    (sparsifier(pre) * out).sum().backward()
    expected = [0.0] * 4
    for i, theta in enumerate(sparsifier.threshold.tolist()):
        for row in range(50):
            kernel = 1.0 if abs((pre[row, i].item() - theta) / 0.8) < 0.5 else 0.0
            expected[i] += -theta / 0.8 * kernel * out[row, i].item()
    torch.testing.assert_close(sparsifier.threshold.grad, torch.tensor(expected))


def test_soft_is_sklearn_threshold():
    dictionary = Dictionary(16, 4, 10, sparsifier="soft", threshold=0.4, bias=False, normalize=False)
    x = rand(20, 16)
    theirs = sparse_encode(
        x.numpy(), dictionary.encoder.detach().numpy(), algorithm="threshold", alpha=0.4, positive=True
    )
    np.testing.assert_allclose(dictionary.encode(x).detach().numpy(), theirs, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n_atoms", [8, 24])
def test_ista_converges_to_sklearn_lasso(bias, n_atoms):
    dictionary = Dictionary(
        16, 4, n_atoms, sparsifier="soft", encoder="ista", steps=3000, threshold=0.3, bias=bias,
        dtype=torch.float64,
    )  # fmt: skip
    dictionary.reset_parameters(torch.Generator().manual_seed(3))
    x = rand(6, 16).double()
    unit = dictionary.encoder.detach() / dictionary.encoder.detach().norm(dim=1, keepdim=True)
    scaled = x / x.square().mean(1, keepdim=True).sqrt()
    # Not lasso_lars: its non-negative path often stops at a larger value of the same objective.
    theirs = sparse_encode(scaled.numpy(), unit.numpy(), algorithm="lasso_cd", alpha=0.3, positive=True, max_iter=20000)
    np.testing.assert_allclose(dictionary.encode(x).detach().numpy(), theirs, atol=2e-4)
    assert 0 < (theirs > 0).mean() < 1


def test_each_ista_step_is_the_textbook_one():
    atoms, x = torch.nn.functional.normalize(rand(10, 16), dim=1), rand(5, 16)
    L = spectral_bound(atoms @ atoms.T)
    z = torch.zeros(5, 10)
    for _ in range(4):
        z = torch.relu(z - (z @ atoms - x) @ atoms.T / L - 0.3 / L)
    torch.testing.assert_close(torch.relu(ista(x @ atoms.T - 0.3, atoms @ atoms.T, 4)), z)


@pytest.mark.parametrize("shape", [(1, 8), (8, 8), (64, 16), (64, 256)])
def test_spectral_bound_is_above_the_largest_eigenvalue_and_near(shape):
    atoms = torch.nn.functional.normalize(rand(*shape), dim=1)
    largest = torch.linalg.eigvalsh(atoms @ atoms.T)[-1].item()
    bound = spectral_bound(atoms @ atoms.T).item()
    assert largest * (1 - 1e-5) <= bound <= largest * shape[0] ** 0.125 * (1 + 1e-5)


def test_rms_norm_is_torchs():
    dictionary = Dictionary(16, 4, 10, sparsifier="dense", bias=False)
    x = rand(5, 16).requires_grad_()
    ours = dictionary.pre_codes(x)
    theirs = torch.nn.functional.rms_norm(x, (16,), eps=1e-12) @ dictionary.encoder.T
    torch.testing.assert_close(ours, theirs)
    out = rand(5, 10)
    torch.testing.assert_close(*(torch.autograd.grad((y * out).sum(), x)[0] for y in (ours, theirs)))


def test_dense_is_peft_lora():
    base = torch.nn.Sequential(torch.nn.Linear(16, 6))
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["0"], lora_dropout=0.0)
    lora = get_peft_model(base, config).base_model.model[0]
    A, B = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    B.data.copy_(rand(6, 4))
    dictionary = Dictionary(16, 6, 4, sparsifier="dense", normalize=False, bias=False)
    dictionary.encoder.data.copy_(A.data)
    dictionary.atoms.data.copy_(B.data.T)

    x = rand(3, 5, 16)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours = lora.base_layer(x_ours) + dictionary(x_ours)
    theirs = lora(x_theirs)
    torch.testing.assert_close(ours, theirs)
    out = rand(3, 5, 6)
    (ours * out).sum().backward()
    (theirs * out).sum().backward()
    torch.testing.assert_close(x_ours.grad, x_theirs.grad)
    torch.testing.assert_close(dictionary.encoder.grad, A.grad)
    torch.testing.assert_close(dictionary.atoms.grad, B.grad.T)


def test_statistics_are_the_naive_loops():
    statistics = CodeStatistics(3, time_buckets=2)
    rows = []
    for time in ([0.0, 0.2], [0.5, 1.0]):
        codes, mask = rand(2, 4, 3).relu(), torch.rand(2, 4, generator=GENERATOR)
        statistics.update(codes, time=torch.tensor(time), mask=mask)
        rows += [(codes[b, p], time[b], mask[b, p].item()) for b in range(2) for p in range(4)]

    def mean(values, weights=None):
        weights = [1.0] * len(values) if weights is None else weights
        return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)

    assert statistics.count == len(rows) == 16
    for i in range(3):
        c = [row[0][i].item() for row in rows]
        m = [row[2] for row in rows]
        energy = [v * v for v in c]
        on, off = mean(energy, m), mean(energy, [1 - w for w in m])
        assert statistics.density[i].item() == pytest.approx(mean([float(v > 0) for v in c]))
        assert statistics.mean[i].item() == pytest.approx(mean(c))
        assert statistics.mean_when_active[i].item() == pytest.approx(mean([v for v in c if v > 0]))
        assert statistics.maximum[i].item() == pytest.approx(max(c))
        assert statistics.energy[i].item() == pytest.approx(mean(energy))
        assert statistics.on_subject[i].item() == pytest.approx(on)
        assert statistics.purity[i].item() == pytest.approx(on / (on + off))
        early = [v for v, row in zip(c, rows, strict=True) if row[1] < 0.5]
        late = [v for v, row in zip(c, rows, strict=True) if row[1] >= 0.5]
        assert statistics.by_time[:, i].tolist() == pytest.approx([mean(early), mean(late)])
