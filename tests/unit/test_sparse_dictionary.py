import pytest
import torch
from torch.autograd import gradcheck

from atomtune.sparse import Dictionary

KINDS = [
    {"sparsifier": "dense"},
    {"sparsifier": "relu"},
    {"sparsifier": "soft", "bias": False},
    {"sparsifier": "topk", "k": 3},
    {"sparsifier": "batch_topk", "k": 3},
    {"sparsifier": "jumprelu"},
    {"sparsifier": "soft", "encoder": "ista"},
    {"sparsifier": "soft", "encoder": "ista", "bias": False},
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))


def made(n_atoms=10, d_in=16, d_out=6, dtype=None, **kind) -> Dictionary:
    """A dictionary with atoms that are no longer zero."""
    dictionary = Dictionary(d_in, d_out, n_atoms, dtype=dtype, **kind)
    generator = torch.Generator().manual_seed(0)
    dictionary.reset_parameters(generator)
    dictionary.atoms.data.copy_(torch.randn(n_atoms, d_out, generator=generator))
    return dictionary


def inputs(*shape: int, dtype=torch.float32, d_in=16) -> torch.Tensor:
    return torch.randn(*shape, d_in, generator=torch.Generator().manual_seed(1), dtype=dtype)


@every_kind
def test_delta_is_exactly_zero_at_the_start(kind):
    assert torch.equal(Dictionary(16, 6, 10, **kind)(inputs(3, 4)), torch.zeros(3, 4, 6))


@every_kind
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_shapes(kind, shape):
    dictionary = made(**kind).eval()
    codes = dictionary.encode(inputs(*shape))
    assert codes.shape == (*shape, 10)
    assert torch.equal(dictionary.decode(codes), dictionary(inputs(*shape)))


@pytest.mark.parametrize("kind", KINDS[1:6], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silent_codes_leave_the_output_bit_equal(kind, dtype):
    dictionary = made(**kind)
    dictionary.threshold = 100.0
    if dictionary.bias is None:
        dictionary.sparsifier.threshold = 100.0
    else:
        dictionary.bias.data.fill_(100.0)
    base = inputs(5, dtype=dtype)[:, :6]
    delta = dictionary(inputs(5, dtype=dtype))
    assert torch.equal(delta, torch.zeros(5, 6, dtype=dtype))
    assert torch.equal(base + delta, base)


@every_kind
def test_bfloat16_input_stays_bfloat16_and_close(kind):
    dictionary = made(**kind)
    x = inputs(8, 4, dtype=torch.bfloat16).requires_grad_()
    delta = dictionary(x)
    assert (dictionary.pre_codes(x).dtype, dictionary.encode(x).dtype, delta.dtype) == (torch.bfloat16,) * 3
    delta.float().square().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert {p.grad.dtype for p in dictionary.parameters()} == {torch.float32}
    # Pre-codes rather than codes: near a threshold the two precisions may differ about who fires.
    torch.testing.assert_close(
        dictionary.pre_codes(x).float(), dictionary.pre_codes(x.detach().float()), atol=0.05, rtol=0.02
    )


@every_kind
def test_autocast(kind):
    with torch.autocast("cpu", torch.bfloat16):
        delta = made(**kind)(inputs(4))
    assert delta.dtype == torch.bfloat16
    assert delta.isfinite().all()


def test_about_a_sixth_fires_at_the_start_whatever_the_scale_of_the_input():
    dictionary = made(n_atoms=64, d_in=64)
    x = inputs(500, d_in=64)
    codes = dictionary.encode(x)
    assert (codes > 0).float().mean().item() == pytest.approx(0.159, abs=0.02)
    assert (dictionary.pre_codes(x) + 1).std().item() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(codes, dictionary.encode(1000 * x), atol=1e-5, rtol=1e-5)


def test_threshold_stands_in_one_place():
    def places(**kind):
        dictionary = Dictionary(4, 4, 5, threshold=2.0, **kind)
        return None if dictionary.bias is None else dictionary.bias[0].item(), dictionary.sparsifier.threshold

    assert places(sparsifier="soft") == (2.0, 0.0)
    assert places(sparsifier="soft", bias=False) == (None, 2.0)
    assert places(sparsifier="soft", encoder="ista", bias=False) == (None, 0.0)
    assert places(sparsifier="dense") == (0.0, None)
    assert places(sparsifier="jumprelu", bias=False)[1].tolist() == [2.0] * 5
    assert places(sparsifier="jumprelu")[1].tolist() == [0.25] * 5


def test_a_zero_input_is_finite_in_both_directions():
    x = torch.zeros(2, 16, requires_grad=True)
    dictionary = made(sparsifier="dense")
    delta = dictionary(x)
    delta.sum().backward()
    assert torch.equal(delta, torch.zeros(2, 6))
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], KINDS[3], KINDS[6]], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_are_exact(kind, normalize):
    dictionary = made(d_in=5, n_atoms=4, d_out=3, dtype=torch.float64, normalize=normalize, **kind)
    dictionary.bias.data.fill_(0.1)
    names, values = zip(*dictionary.named_parameters(), strict=True)

    def f(x, *values):
        return torch.func.functional_call(dictionary, dict(zip(names, values, strict=True)), (x,))

    x = inputs(3, d_in=5, dtype=torch.float64).requires_grad_()
    assert gradcheck(f, (x, *values))


@every_kind
def test_select_keeps_numbers_bit_equal(kind):
    dictionary = made(**kind).eval()
    if kind["sparsifier"] == "jumprelu":
        dictionary.sparsifier.threshold.data.uniform_()
    index = torch.tensor([7, 0, 3, 9])
    chosen = dictionary.select(index)
    assert chosen.n_atoms == 4
    assert chosen.atom_ids.tolist() == index.tolist()
    for name, value in dictionary.state_dict().items():
        expected = value[index] if value.ndim else value
        assert torch.equal(chosen.state_dict()[name], expected), name
    again = chosen.select(torch.tensor([2, 0]))
    assert again.atom_ids.tolist() == [3, 7]
    assert again.sparsifier.k in (None, 2)
    chosen.atoms.data.zero_()
    chosen.encoder.data.zero_()
    assert dictionary.atoms.all()  # its own memory
    assert dictionary.encoder.all()


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], KINDS[2], KINDS[5]], ids=str)
def test_codes_of_selected_atoms_do_not_depend_on_the_others(kind):
    dictionary = made(**kind)
    index = torch.tensor([7, 0, 3, 9])
    x = inputs(20)
    torch.testing.assert_close(dictionary.select(index).encode(x), dictionary.encode(x)[:, index])


def test_select_of_every_atom_is_the_same_dictionary():
    dictionary = made(sparsifier="topk", k=3)
    assert torch.equal(dictionary.select(torch.arange(10))(inputs(20)), dictionary(inputs(20)))


def test_select_leaves_global_randomness_and_frozen_state_alone():
    dictionary = made().requires_grad_(False)
    before = torch.get_rng_state()
    chosen = dictionary.select(torch.tensor([1]))
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(p.requires_grad for p in chosen.parameters())


@every_kind
def test_state_dict_round_trip(kind):
    first = made(**kind)
    first(inputs(30))
    second = Dictionary(16, 6, 10, **kind)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.eval()(inputs(7)), second.eval()(inputs(7)))


def test_meta_device_and_reset():
    dictionary = Dictionary(16, 6, 10, sparsifier="batch_topk", k=3, device="meta")
    assert {value.device.type for value in dictionary.state_dict().values()} == {"meta"}
    dictionary = dictionary.to_empty(device="cpu")
    dictionary.reset_parameters(torch.Generator().manual_seed(0))
    expected = Dictionary(16, 6, 10, sparsifier="batch_topk", k=3)
    expected.reset_parameters(torch.Generator().manual_seed(0))
    for name, value in expected.state_dict().items():
        assert torch.equal(dictionary.state_dict()[name], value), name


def test_dtype_is_the_parameters():
    dictionary = Dictionary(16, 6, 10, sparsifier="jumprelu", dtype=torch.bfloat16)
    assert {p.dtype for p in dictionary.parameters()} == {torch.bfloat16}
    assert dictionary(inputs(3)).dtype == torch.float32


@every_kind
@pytest.mark.usefixtures("shapes_unchecked")
def test_compiles_whole(kind):
    dictionary = made(**kind)
    x = inputs(3, 4).requires_grad_()
    (expected,) = torch.autograd.grad(dictionary(x).square().sum(), x)
    delta = torch.compile(dictionary, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(delta, dictionary(x))
    torch.testing.assert_close(torch.autograd.grad(delta.square().sum(), x)[0], expected)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"n_atoms": 0}, "`n_atoms` must be at least 1, got 0"),
        ({"encoder": "liner"}, "`encoder` must be one of linear, ista, got 'liner'"),
        ({"encoder": "ista"}, "`sparsifier` must be soft with encoder 'ista', got 'relu'"),
        ({"encoder": "ista", "sparsifier": "soft", "steps": 0}, "`steps` must be at least 1, got 0"),
        ({"sparsifier": "topk", "k": 11}, r"`k` must be between 1 and n_atoms \(10\), got 11"),
    ],
)
def test_mistakes_are_named(wrong, says):
    with pytest.raises(ValueError, match=says):
        Dictionary(**({"d_in": 4, "d_out": 4, "n_atoms": 10} | wrong))


@pytest.mark.parametrize(
    ("index", "says"),
    [([], "at least one atom"), ([0, 10], r"n_atoms - 1 \(9\), got 0 to 10"), ([1, 1], "at most once")],
)
def test_wrong_index_is_named(index, says):
    with pytest.raises(ValueError, match=says):
        made().select(torch.tensor(index, dtype=torch.int64))


@pytest.mark.usefixtures("shapes_unchecked")
def test_a_mask_is_not_an_index():
    with pytest.raises(ValueError, match=r"must be 1-D int64, got torch.bool of shape \(10,\)\. From a mask"):
        made().select(torch.ones(10, dtype=torch.bool))
