"""The contract of a rival, run over every method; what is special to one follows below."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import Lumina2Transformer2DModel, SD3Transformer2DModel
from peft.tuners.lora.model import LoraModel
from pipelines import randomize
from torch import Tensor, nn

from atomtune.backbones.lumina2 import BACKBONE as LUMINA2
from atomtune.backbones.sd3 import BACKBONE as SD3
from atomtune.compare.plain_rivals import MARK, TopKLora, Transcoder
from atomtune.compare.rivals import RIVALS, Rival, attach_rival
from atomtune.errors import UserError

RANK, SEED, WIDTH = 8, 3, 64
NATURAL = {"vera", "ssf", "full"}
# Not zero at the start: a magnitude is divided by itself; a bank of vectors that is all zero would never learn.
NEARLY_ZERO = {"dora", "vblora"}


def lumina2() -> nn.Module:
    torch.manual_seed(0)
    return Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        hidden_size=WIDTH,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=4,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(32, 32, 32),
        cap_feat_dim=16,
    )


def sd3() -> nn.Module:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=16,
        joint_attention_dim=16,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "lumina2": (lumina2, LUMINA2.sites),
    "sd3": (sd3, SD3.sites),
}
both = pytest.mark.parametrize("family", FAMILIES)
every = pytest.mark.parametrize("name", RIVALS)


def run(family: str, model: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, generator=g)
    inputs: dict[str, Tensor] = {"encoder_hidden_states": torch.randn(2, 5, 16, generator=g)}
    if family == "lumina2":
        inputs["encoder_attention_mask"] = torch.arange(5) < torch.tensor([[5], [3]])
    else:
        inputs["pooled_projections"] = torch.randn(2, 16, generator=g)
    return model(hidden_states=x, timestep=torch.tensor([0.2, 0.7]), return_dict=False, **inputs)[0]


@pytest.fixture(scope="module")
def bases() -> dict[str, nn.Module]:
    made = {family: build().eval() for family, (build, _) in FAMILIES.items()}
    for model in made.values():
        randomize(model)
    return made


@pytest.fixture
def model(bases: dict[str, nn.Module], family: str) -> nn.Module:
    return copy.deepcopy(bases[family])


@pytest.fixture
def lumina(bases: dict[str, nn.Module]) -> nn.Module:
    return copy.deepcopy(bases["lumina2"])


def attach(name: str, model: nn.Module, family: str = "lumina2", rank: int = RANK, seed: int = SEED) -> Rival:
    return attach_rival(name, model, FAMILIES[family][1], rank, seed)


def train(rival: Rival, model: nn.Module, family: str = "lumina2", steps: int = 2) -> None:
    optimizer = torch.optim.Adam(rival.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = (run(family, model) - 1).square().mean()
        penalty = rival.penalty()
        if penalty is not None:
            loss = loss + penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Everything that must be the same once a rival is gone."""
    return {
        "modules": {path: id(module) for path, module in model.named_modules()},
        "parameters": {path: (id(p), p.requires_grad, p.grad) for path, p in model.named_parameters()},
        "attributes": {path: sorted(vars(module)) for path, module in model.named_modules()},
        "order": list(model.state_dict()),
        "hooks": hooks(model),
    }


# ------------------------------------------------------------------------------------------------ every method


@every
@both
def test_lifecycle(name: str, family: str, model: nn.Module) -> None:
    before, weights = anatomy(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        base = run(family, model)
    rng = torch.get_rng_state()
    rival = attach(name, model, family)
    assert torch.equal(torch.get_rng_state(), rng)

    with torch.no_grad():
        fresh = run(family, model)
    torch.testing.assert_close(fresh, base, rtol=1e-4, atol=2e-5)
    if name not in NEARLY_ZERO:
        assert torch.equal(fresh, base)

    assert not any(module.training for module in model.modules())
    trained = {id(p) for p in rival.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    train(rival, model, family)
    for p in model.parameters():
        assert (p.grad is not None) == (id(p) in trained)

    with torch.no_grad():
        changed = run(family, model)
        assert not torch.allclose(changed, base, rtol=1e-3, atol=1e-3)
        with rival.off():
            assert torch.equal(run(family, model), base)
            with rival.scaled(0.5):
                assert torch.equal(run(family, model), base)
        with rival.scaled(0):
            torch.testing.assert_close(run(family, model), base)
        with rival.scaled(1):
            torch.testing.assert_close(run(family, model), changed)
        with rival.scaled(0.5), rival.off():
            assert torch.equal(run(family, model), base)
        with rival.scaled(0.5):
            half = run(family, model)
            with rival.scaled(2):
                torch.testing.assert_close(run(family, model), changed)
        assert not torch.allclose(half, base, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(half, changed, rtol=1e-3, atol=1e-4)
        assert torch.equal(run(family, model), changed)

    state = rival.state()
    rival.remove()
    after = anatomy(model)
    assert after == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(run(family, model), base)
    rival.remove()

    again = attach(name, model, family)
    again.load(state)
    with torch.no_grad():
        assert torch.equal(run(family, model), changed)
    for key, value in again.state().items():
        assert torch.equal(value, state[key])
    again.remove()
    assert anatomy(model) == before


@every
def test_a_change_of_one_layer_is_scaled(name: str, lumina: nn.Module) -> None:
    rival = attach(name, lumina)
    train(rival, lumina)
    path = "layers.0.feed_forward" if name == "transcoder" else "layers.0.attn.to_q"
    layer, x = lumina.get_submodule(path), torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        with rival.off():
            base = layer(x)
        full = layer(x)
        assert not torch.allclose(full, base, atol=1e-4)
        for strength in (0.5, -1.0, 2.0):
            with rival.scaled(strength):
                torch.testing.assert_close(layer(x), base + strength * (full - base), rtol=1e-4, atol=1e-5)
        assert torch.equal(layer(x), full)


@both
def test_sizes(family: str, bases: dict[str, nn.Module]) -> None:
    for name in RIVALS:
        rival = attach(name, copy.deepcopy(bases[family]), family)
        config = rival.config
        assert config["trained"] == sum(p.numel() for p in rival.parameters())
        assert config["sized"] == ("natural" if name in NATURAL else "equal")
        if name not in NATURAL:
            assert config["trained"] == pytest.approx(config["budget"], rel=0.1)
        assert json.loads(json.dumps(config)) == config
        assert (config["rank"], config["seed"], config["sites"]) == (RANK, SEED, list(FAMILIES[family][1]))


@every
def test_the_seed_decides(name: str, lumina: nn.Module) -> None:
    def drawn(seed: int) -> tuple[dict[str, Tensor], Tensor]:
        rival = attach(name, lumina, seed=seed)
        state = rival.state()
        train(rival, lumina, steps=1)
        with torch.no_grad():
            out = run("lumina2", lumina)
        rival.remove()
        return state, out

    (state, out), (same, same_out), (_, other_out) = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(value, same[key]) for key, value in state.items())
    assert torch.equal(out, same_out)
    if name not in ("oft", "ssf", "full"):  # nothing is drawn
        assert not torch.equal(out, other_out)


def test_nothing_is_kept_of_a_removed_one(bases: dict[str, nn.Module]) -> None:
    """A benchmark attaches hundreds in one process."""
    kept: list[tuple[str, weakref.ref[Any]]] = []
    for name in RIVALS:
        model = copy.deepcopy(bases["lumina2"])
        rival = attach(name, model)
        train(rival, model, steps=1)
        rival.remove()
        kept += [(name, weakref.ref(model)), *((name, weakref.ref(p)) for p in rival.parameters())]
    del rival, model
    gc.collect()
    assert {name for name, ref in kept if ref() is not None} == set()


@every
def test_a_state_of_another_size_is_refused(name: str, lumina: nn.Module) -> None:
    rival = attach(name, lumina)
    state = rival.state()
    key = next(key for key in state if key != "seed")
    with pytest.raises(UserError, match="lack"):
        rival.load({k: v for k, v in state.items() if k != key})
    with pytest.raises(UserError, match="also hold"):
        rival.load({**state, "more": torch.zeros(1)})
    with pytest.raises(UserError, match="must be of shape"):
        rival.load({**state, key: torch.zeros(1, 1, 1)})
    if "seed" in state:
        with pytest.raises(UserError, match="`seed` must be 9"):
            rival.load({**state, "seed": torch.tensor(9)})


@every
def test_wide_parameters_on_a_half_base(name: str, lumina: nn.Module) -> None:
    lumina.to(torch.bfloat16)
    path = "layers.0.feed_forward" if name == "transcoder" else "layers.0.attn.to_q"
    layer, x = lumina.get_submodule(path), torch.randn(2, 5, WIDTH).bfloat16()
    base = layer(x).detach()
    rival = attach(name, lumina)
    if name != "full":
        assert {p.dtype for p in rival.parameters()} == {torch.float32}
    layer = lumina.get_submodule(path)
    out = layer(x)
    torch.testing.assert_close(out, base)
    out.float().square().mean().backward()
    with torch.no_grad(), rival.off():
        assert torch.equal(layer(x), base)


# ------------------------------------------------------------------------------------------- what is said to all


def test_unknown_name(lumina: nn.Module) -> None:
    with pytest.raises(UserError, match=r"`name` must be one of lora, .*got 'vblorra'\. Did you mean `vblora`"):
        attach("vblorra", lumina)


def test_bad_arguments_leave_the_model_alone(lumina: nn.Module) -> None:
    before = anatomy(lumina)
    with pytest.raises(UserError, match=r"no linear layer is named 'to_qq'\. Did you mean .*`to_q`"):
        attach_rival("lora", lumina, ["to_k", "to_qq"], RANK, SEED)
    with pytest.raises(UserError, match=r"`sites` must name linear layers, got '.*to_out', a ModuleList"):
        attach_rival("lora", lumina, ["to_out"], RANK, SEED)
    with pytest.raises(UserError, match="`sites` must be a list"):
        attach_rival("lora", lumina, "to_q", RANK, SEED)
    with pytest.raises(UserError, match="`rank` must be at least 1, got 0"):
        attach("lora", lumina, rank=0)
    with pytest.raises(UserError, match=r"`rank` must be at most 32 for shira .*got 33"):
        attach("shira", lumina, rank=33)
    with pytest.raises(UserError, match="feed-forward"):
        attach_rival("transcoder", nn.ModuleDict({"a": nn.Linear(4, 4)}), ["a"], 1, 0)
    assert anatomy(lumina) == before


@every
def test_one_at_a_time(name: str, lumina: nn.Module) -> None:
    rival = attach(name, lumina)
    carrying = anatomy(lumina)
    with pytest.raises(UserError, match="`model` must carry no adapter"):
        attach("lora", lumina)
    assert anatomy(lumina) == carrying
    with pytest.raises(UserError, match="`strength` must be a finite number"), rival.scaled(float("nan")):
        pass
    rival.remove()
    assert not hasattr(lumina, MARK)


def test_an_injection_that_fails_is_undone(lumina: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls, before = LoraModel._create_and_replace, iter(range(100)), anatomy(lumina)

    def fails(*args: Any, **kwargs: Any) -> None:
        if next(calls) == 5:
            raise RuntimeError("no memory")
        real(*args, **kwargs)

    monkeypatch.setattr(LoraModel, "_create_and_replace", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        attach("lora", lumina)
    assert anatomy(lumina) == before


# ---------------------------------------------------------------------------------------------------- some methods


def test_lora_is_the_measure(lumina: nn.Module) -> None:
    sites = [m for n, m in lumina.named_modules() if n.endswith(FAMILIES["lumina2"][1]) and isinstance(m, nn.Linear)]
    rival = attach("lora", lumina)
    assert len(sites) == 12
    assert (
        rival.config["trained"] == rival.config["budget"] == sum(RANK * (m.in_features + m.out_features) for m in sites)
    )


def test_sites_of_other_shapes(bases: dict[str, nn.Module]) -> None:
    """Coefficients follow the shape of each site; those of the feed-forward are not square."""
    for name in ("fourierft", "waveft"):
        model = copy.deepcopy(bases["sd3"])
        rival = attach_rival(name, model, ["to_q", "ff.net.2"], RANK, SEED)
        assert rival.config["trained"] == rival.config["budget"]
        assert len(rival.config["n_frequency_pattern"]) == 2
        assert all(
            p.numel() == RANK * (layer.base_layer.in_features + layer.base_layer.out_features)
            for layer in model.modules()
            for p in getattr(layer, f"{name}_spectrum", {}).values()
        )


def test_topk_lora_keeps_the_largest() -> None:
    torch.manual_seed(0)
    piece, x = TopKLora(6, 5, 8, 2), torch.randn(3, 4, 6)
    codes, dense = piece.codes(x), x @ piece.A.T
    for got, all_ in zip(codes.flatten(0, 1), dense.flatten(0, 1), strict=True):
        kept = sorted(range(8), key=lambda i: -abs(all_[i].item()))[:2]
        expected = [all_[i].item() if i in kept else 0.0 for i in range(8)]
        assert got.tolist() == expected
    assert (codes < 0).any()


def test_transcoder_against_its_formula(lumina: nn.Module) -> None:
    rival = attach("transcoder", lumina)
    assert rival.penalty() is None
    train(rival, lumina)
    with torch.no_grad():
        run("lumina2", lumina)
        penalty = rival.penalty()
        assert penalty is not None
        assert penalty > 0
        with rival.off():
            run("lumina2", lumina)
        assert torch.equal(rival.penalty(), penalty)
        rival.config["penalty_weight"] *= 2
        assert torch.equal(rival.penalty(), 2 * penalty)
        block, x = lumina.get_submodule("layers.0.feed_forward"), torch.randn(2, 3, WIDTH)
        piece = block.get_submodule("rival")
        assert isinstance(piece, Transcoder)
        d = piece.dictionary
        with rival.off():
            base = block(x)
        torch.testing.assert_close(block(x), base + torch.relu(x @ d.encoder.T - d.bias) @ d.atoms)


@pytest.mark.parametrize("name", ["transcoder", "topk_lora", "lora"])
def test_under_gradient_checkpointing(name: str, lumina: nn.Module) -> None:
    """The recompute in backward must not change what is trained, by the penalty neither."""
    states = []
    for checkpointing in (False, True):
        model = copy.deepcopy(lumina).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        rival = attach(name, model)
        train(rival, model)
        states.append(rival.state())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value)


def test_a_graph_outlives_off(lumina: nn.Module) -> None:
    """Training runs the base between an adapted forward and its backward."""
    for name in RIVALS:
        model = copy.deepcopy(lumina)
        rival = attach(name, model)
        train(rival, model)
        grads = []
        for between in (False, True):
            loss = run("lumina2", model).square().mean()
            if between:
                with torch.no_grad(), rival.off():
                    run("lumina2", model)
            for p in rival.parameters():
                p.grad = None
            loss.backward()
            grads.append([p.grad for p in rival.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)), name
