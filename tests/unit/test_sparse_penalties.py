import jaxtyping
import pytest
import torch
from torch.autograd import gradcheck

from atomtune.sparse import dead_atoms, l0, silence, sparsity

CODES = torch.tensor([[[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]]])
ATOMS = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])


def test_values():
    assert sparsity(CODES, ATOMS).item() == (1 * 5 + 2 * 2 + 3 * 2) / 2
    assert l0(CODES).item() == 1.5
    pre = torch.tensor([[-1.0, -0.1, 0.5], [-0.3, -0.2, 0.0]])
    assert silence(pre).item() == pytest.approx((0.1 + 0.7 + 0.2) / 6)
    assert silence(pre, margin=0.0).item() == pytest.approx(0.5 / 6)
    dead = torch.tensor([True, False, True])
    assert dead_atoms(pre, dead).item() == pytest.approx((1.0 + 0.3) / 6)
    assert dead_atoms(pre, torch.zeros(3, dtype=torch.bool)).item() == 0


def test_gradients():
    codes = CODES.double().requires_grad_()
    pre = (CODES.double() - 1.3).requires_grad_()
    assert gradcheck(sparsity, (codes + 0.5, ATOMS.double().requires_grad_()))
    assert gradcheck(silence, (pre,))
    assert gradcheck(dead_atoms, (pre, torch.tensor([True, False, True])))


def test_zero_atoms_have_a_finite_gradient():
    atoms = torch.zeros(3, 2, requires_grad=True)
    sparsity(CODES, atoms).backward()
    assert torch.equal(atoms.grad, torch.zeros(3, 2))


def test_bfloat16_codes_are_summed_in_float32():
    codes = torch.full((5000, 3), 0.1, dtype=torch.bfloat16)
    for value in (sparsity(codes, ATOMS), silence(codes), l0(codes)):
        assert value.dtype == torch.float32
        assert value.shape == ()
    assert silence(codes, 0.0).item() == pytest.approx(codes[0, 0].item(), rel=1e-5)


def test_shapes_are_executed():
    with pytest.raises(jaxtyping.TypeCheckError):
        sparsity(CODES, ATOMS[:2])
