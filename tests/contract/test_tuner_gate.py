"""The prompt gate in models: who is silent is the base, bit for bit, however the adapter was attached."""

from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from peft import get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from tuner_models import BATCH, CASES, DIM, PLAIN, SD3, Case, fill

from atomtune.errors import UserError
from atomtune.tuner import (
    AtomConfig,
    atom_layers,
    hold_gate,
    override_gate,
    prompt_gate,
    remove_adapter,
    unwrap,
)

gated = pytest.mark.parametrize("case", [case for case in CASES if case.gate], ids=lambda case: case.name)


def attached(case: Case, **config: Any) -> Any:
    model = case.attach(case.base(), case.config(**case.gate, **config))
    fill(model)
    return model.eval()


def prompts(case: Case) -> torch.Tensor:
    return case.inputs()[case.gate["gate_input"]]


def split_first(case: Case, model: Any) -> None:
    """Teach the gate to open for the first prompt only."""
    gate = prompt_gate(model)
    assert gate is not None
    with torch.no_grad():
        gate.weight.copy_(prompts(case)[0, 0])
    z = gate.pre_code(prompts(case))
    assert gate.calibrate(z[1:], z[:1]) == (1.0, 1.0)


@gated
def test_silent_samples_are_the_base_and_open_ones_the_adapter(case: Case) -> None:
    base = case.run(case.base())
    model = attached(case)
    ungated = case.attach(case.base(), case.config())
    set_peft_model_state_dict(ungated, {k: v for k, v in get_peft_model_state_dict(model).items() if "gate" not in k})
    full = case.run(ungated.eval())
    assert torch.equal(case.run(model), full)  # a new gate is open
    split_first(case, model)
    out = case.run(model)
    assert torch.equal(out[1:], base[1:])
    assert torch.equal(out[0], full[0])
    with override_gate(model, 1.0):
        assert torch.equal(case.run(model), full)
    with override_gate(model, torch.tensor([0.0, 1.0, 0.0])):
        mixed = case.run(model)
    assert torch.equal(mixed[1], full[1])
    assert torch.equal(mixed[[0, 2]], base[[0, 2]])
    with override_gate(model, 0.0), override_gate(model, None):
        assert torch.equal(case.run(model), base)
    assert torch.equal(case.run(model), out)


@gated
def test_a_held_gate_is_the_prompts_whatever_is_read_inside(case: Case) -> None:
    model = attached(case)
    split_first(case, model)
    out = case.run(model)
    inputs = case.inputs()
    name = case.gate["gate_input"]
    other = torch.cat([inputs[name][1:], inputs[name][:1]]) if torch.is_tensor(inputs[name]) else None
    with hold_gate(model, case.inputs):
        assert torch.equal(case.run(model), out)
        if other is not None:
            gate = unwrap(model).atom_gate
            gate.compute((), inputs | {name: torch.cat([other, other])})
            assert gate.values.read("default").tolist() == [1, 0, 0, 1, 0, 0]
        with override_gate(model, 0.0), hold_gate(model, lambda: pytest.fail("an override comes first")):
            assert torch.equal(case.run(model), case.run(case.base()))
    assert torch.equal(case.run(model), out)


@gated
def test_gate_is_trained_saved_and_loaded(case: Case) -> None:
    model = attached(case)
    gate = prompt_gate(model)
    split_first(case, model)
    with torch.no_grad():
        gate.bias.add_(gate.pre_code(prompts(case))[0] - 0.3)  # half open for the first prompt
    case.run(model).square().mean().backward()
    assert gate.weight.grad.any()
    saved = get_peft_model_state_dict(model)
    assert {key.rpartition("atom_gate.")[2] for key in saved if "atom_gate" in key} == {
        "gates.weight",
        "gates.bias",
    }
    for low_cpu in (False, True):
        other = case.base()
        inject_adapter_in_model(case.config(**case.gate), other, "x", low_cpu_mem_usage=low_cpu)
        result = set_peft_model_state_dict(other, saved, "x", low_cpu_mem_usage=low_cpu)
        assert not result.unexpected_keys
        assert torch.equal(case.run(other.eval()), case.run(model))


@gated
def test_removing_takes_gate_and_hook_away(case: Case) -> None:
    names = [name for name, _ in case.base().named_modules()]
    model = attached(case)
    assert model._forward_pre_hooks
    remove_adapter(model)
    assert not model._forward_pre_hooks
    assert [name for name, _ in model.named_modules()] == names


def test_diffusers_deletes_and_unloads_gates() -> None:
    base = SD3.run(SD3.base())
    model = attached(SD3)
    model.delete_adapters("default")
    assert not model._forward_pre_hooks
    assert prompt_gate(model) is None
    assert torch.equal(SD3.run(model), base)
    model = attached(SD3)
    model.disable_adapters()
    assert torch.equal(SD3.run(model), base)
    model.enable_adapters()
    model.unload_lora()
    assert torch.equal(SD3.run(model), base)
    assert not hasattr(model, "atom_gate")
    assert not model._forward_pre_hooks


def test_peft_model_gate() -> None:
    base = PLAIN.run(PLAIN.base())
    model: Any = get_peft_model(PLAIN.base(), PLAIN.config(**PLAIN.gate))
    fill(model)
    split_first(PLAIN, model.eval())
    out = PLAIN.run(model)
    assert torch.equal(out[1:], base[1:])
    assert not torch.equal(out[0], base[0])
    model.add_adapter("other", PLAIN.config())
    fill(model, "other")
    mixed = PLAIN.run(model, adapter_names=["other", "default", "__base__"])
    assert not torch.equal(mixed[0], base[0])
    assert torch.equal(mixed[1:], base[1:])
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    assert not unwrap(model)._forward_pre_hooks
    assert not hasattr(unwrap(model), "atom_gate")
    model.add_adapter("again", PLAIN.config(**PLAIN.gate))
    assert not prompt_gate(model, "again").weight.requires_grad
    model.set_adapter("again")
    assert prompt_gate(model, "again").weight.requires_grad
    assert model.get_model_status().active_adapters == ["again"]
    assert torch.equal(PLAIN.run(model.unload()), base)
    assert not hasattr(unwrap(model), "atom_gate")


def test_active_adapters_of_the_gate_follow() -> None:
    model: Any = get_peft_model(PLAIN.base(), PLAIN.config(**PLAIN.gate), adapter_name="mine")
    assert model.get_model_status().active_adapters == ["mine"]


def test_zimage_passes_lists() -> None:
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=DIM,
        axes_dims=[8, 4, 4],
        axes_lens=[64, 32, 32],
    ).eval()
    inputs = (
        [torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)],
        torch.tensor([0.1, 0.5]),
        [torch.randn(5, DIM), torch.randn(9, DIM)],
    )
    base = model(*inputs, return_dict=False)[0]
    config = AtomConfig(target_modules=["to_q", "to_v"], n_atoms=4, gate_input="cap_feats", gate_dim=DIM)
    inject_adapter_in_model(config, model)
    fill(model)
    gate = prompt_gate(model)
    assert gate is not None
    with torch.no_grad():
        gate.weight.copy_(inputs[2][1][0])
    z = gate.pre_code(inputs[2])
    assert gate.calibrate(z[:1], z[1:]) == (1.0, 1.0)
    out = model(*inputs, return_dict=False)[0]
    assert torch.equal(out[0], base[0])
    assert not torch.equal(out[1], base[1])


def test_positional_prompts_masks_and_lists() -> None:
    base = PLAIN.run(PLAIN.base())
    model = attached(PLAIN)
    split_first(PLAIN, model)
    x, e = PLAIN.inputs()["x"], prompts(PLAIN)
    expected = PLAIN.run(model)
    assert torch.equal(model(x, e), expected)
    assert torch.equal(model(x, e, torch.ones(BATCH, 4)), expected)
    assert torch.equal(model(x, [one[: 1 + i] for i, one in enumerate(e)])[1:], base[1:])
    masked = torch.ones(BATCH, 4, dtype=torch.bool)
    masked[0, 0] = False  # the token that opens the gate
    assert torch.equal(model(x, e, prompt_mask=masked), base)


def test_folded_batches() -> None:
    base = PLAIN.base()
    e, x = prompts(PLAIN), torch.randn(2 * BATCH, 5, 8)
    expected = base(x)
    model = attached(PLAIN)
    split_first(PLAIN, model)
    out = model(x, e)  # rows 0 and 1 belong to the first prompt
    assert torch.equal(out[2:], expected[2:])
    assert not torch.equal(out[0], expected[0])
    assert not torch.equal(out[1], expected[1])
    assert model(x, e[:1]).shape == expected.shape
    for wrong in (torch.randn(7, 5, 8), torch.randn(2 * BATCH, 8)):
        with pytest.raises(UserError, match="can't be matched"):
            model(wrong, e)


def test_prompts_that_never_came() -> None:
    model = attached(PLAIN)
    with pytest.raises(UserError, match="no prompt embeddings reached"):
        model(PLAIN.inputs()["x"])
    with override_gate(model, 0.0):
        model(PLAIN.inputs()["x"])
    for layer in [*atom_layers(model).values(), model.atom_gate]:
        layer.enable_adapters(False)
    model(PLAIN.inputs()["x"])


def test_errors_name_what_to_do() -> None:
    wrong = PLAIN.config(gate_input="promt", gate_dim=DIM)
    with pytest.raises(UserError, match=r"argument of Plain.forward, got 'promt'\. Did you mean `prompt`"):
        PLAIN.attach(PLAIN.base(), wrong)
    model = PLAIN.attach(PLAIN.base(), PLAIN.config())
    with pytest.raises(UserError, match="needs an adapter with a prompt gate"), override_gate(model, 1.0):
        pass
    assert prompt_gate(model) is None
    model = PLAIN.attach(PLAIN.base(), PLAIN.config(gate_input="prompt", gate_dim=DIM + 1))
    with pytest.raises(UserError, match=r"must be \(batch, tokens, 17\), got \(3, 4, 16\)"):
        PLAIN.run(model)
    model = attached(PLAIN)
    with pytest.raises(UserError, match=r"mask must be \(batch, tokens\) = \(3, 4\), got \(3, 5\)"):
        PLAIN.run(model, prompt_mask=torch.ones(3, 5))


def test_a_cast_leaves_the_gate_calibrated() -> None:
    model = attached(PLAIN)
    split_first(PLAIN, model)
    before = prompt_gate(model).weight.detach().clone()
    model.to(torch.bfloat16)
    assert torch.equal(prompt_gate(model).weight, before)
    model.to("meta")
    assert prompt_gate(model).weight.is_meta
