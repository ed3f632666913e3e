"""What PEFT promises of any adapter, over every way an adapter reaches a model."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from tuner_models import BATCH, CASES, GPT2, LLAMA, PLAIN, SD3, Case, fill

from atomtune.errors import UserError
from atomtune.tuner import AtomConfig, AtomLinear, atom_layers, prune, record, remove_adapter, unwrap

# PEFT 0.21 asks transformers 5.23 by a deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def attached(case: Case, **config: Any) -> Any:
    model = case.attach(case.base(), case.config(**config))
    fill(model)
    return model.eval()


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.clone() for name, p in unwrap(model).state_dict().items() if "atom_" in name}


@each
def test_step_zero_is_the_base(case: Case) -> None:
    expected = case.run(case.base())
    model = case.attach(case.base(), case.config())
    assert torch.equal(case.run(model), expected)
    assert list(atom_layers(model)) == unwrap(model).peft_config["default"].sites


@each
def test_trains_atoms_only(case: Case) -> None:
    torch.manual_seed(1)
    model = case.attach(case.base(), case.config())
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names
    assert all(".atom_dictionary." in name for name in names)
    goal = case.run(model).detach() + 0.3
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = (case.run(model) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@each
@pytest.mark.parametrize("sparsifier", ["relu", "jumprelu", "batch_topk"])
def test_state_dict_round_trip(case: Case, sparsifier: str) -> None:
    model = attached(case, sparsifier=sparsifier, k=2)
    saved = get_peft_model_state_dict(model)
    assert saved
    assert not any("default" in key for key in saved)
    assert not any("strength" in key for key in saved)
    for low_cpu in (False, True):
        other = inject_adapter_in_model(
            case.config(sparsifier=sparsifier, k=2), case.base(), "other", low_cpu_mem_usage=low_cpu
        )
        result = set_peft_model_state_dict(other, saved, "other", low_cpu_mem_usage=low_cpu)
        assert not result.unexpected_keys
        assert not [key for key in result.missing_keys if "atom_" in key]
        assert torch.equal(case.run(other.eval()), case.run(model))


@each
def test_disable_is_the_base(case: Case) -> None:
    expected = case.run(case.base())
    model = attached(case)
    assert not torch.equal(case.run(model), expected)
    for layer in atom_layers(model).values():
        layer.enable_adapters(False)
    assert torch.equal(case.run(model), expected)
    for layer in atom_layers(model).values():
        layer.enable_adapters(True)
    assert not torch.equal(case.run(model), expected)


@each
def test_scale_and_atom_strength(case: Case) -> None:
    expected = case.run(case.base())
    model = attached(case)
    full = case.run(model)
    layers = atom_layers(model).values()
    for layer in layers:
        layer.set_scale("default", 0.0)
    assert torch.equal(case.run(model), expected)
    for layer in layers:
        layer.unscale_layer()
        layer.scale_layer(2.0)
        layer.unscale_layer(2.0)
    assert torch.equal(case.run(model), full)
    for layer in layers:
        layer.atom_strength["default"].zero_()
    assert torch.equal(case.run(model), expected)


@each
def test_remove_adapter_gives_the_base_back(case: Case) -> None:
    base = case.base()
    expected, names = case.run(base), [name for name, _ in base.named_modules()]
    model = attached(case)
    remove_adapter(model)
    assert [name for name, _ in unwrap(model).named_modules()] == names
    assert torch.equal(case.run(unwrap(model)), expected)


@each
def test_deepcopy(case: Case) -> None:
    model = attached(case, **case.gate)
    twin = copy.deepcopy(model)
    assert torch.equal(case.run(twin), case.run(model))
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert not torch.equal(case.run(twin), case.run(model))


def test_two_adapters_add_up() -> None:
    model = PLAIN.base()
    x = torch.randn(2, 12)
    layer = AtomLinear(model.blocks[0]["up"])
    for name in ("a", "b"):
        layer.update_layer(name, PLAIN.config(), 6)
    for name in ("a", "b"):
        torch.nn.init.normal_(layer.dictionary(name).atoms)
    layer.set_adapter(["a", "b"])
    layer.set_scale("b", 0.5)
    a, b = (layer.dictionary(name)(x) for name in ("a", "b"))
    torch.testing.assert_close(layer(x), layer.base_layer(x) + a + 0.5 * b)


def test_second_adapter_and_weights_in_diffusers() -> None:
    expected = SD3.run(SD3.base())
    model = attached(SD3)
    first = SD3.run(model)
    SD3.attach(model, SD3.config(n_atoms=3), "second")
    fill(model, adapter="second")
    model.set_adapters(["default", "second"], [0.0, 0.0])
    assert torch.equal(SD3.run(model), expected)
    model.set_adapters(["default", "second"], [1.0, 0.5])
    assert not torch.equal(SD3.run(model), first)
    with (
        pytest.warns(UserWarning, match="Already found"),
        pytest.raises(UserError, match="no module is named 'nope'"),
    ):
        model.add_adapter(SD3.config(target_modules=["nope"]), "third")
    model.delete_adapters("default")
    assert list(model.peft_config) == ["second"]
    assert model.active_adapters() == ["second"]
    model.disable_adapters()
    assert torch.equal(SD3.run(model), expected)
    model.enable_adapters()
    model.unload_lora()
    assert torch.equal(SD3.run(model), expected)


def test_attention_kwargs_scale() -> None:
    model = attached(SD3)
    full = SD3.run(model)
    none = SD3.run(model, joint_attention_kwargs={"scale": 1e-30})
    torch.testing.assert_close(none, SD3.run(SD3.base()))
    assert not torch.equal(SD3.run(model, joint_attention_kwargs={"scale": 0.5}), full)
    torch.testing.assert_close(SD3.run(model), full)


def test_peft_model_adapters() -> None:
    expected = LLAMA.run(LLAMA.base())
    model = attached(LLAMA)
    first = LLAMA.run(model)
    model.add_adapter("second", LLAMA.config(n_atoms=3))
    fill(model, adapter="second")
    assert torch.equal(LLAMA.run(model), first)
    with model.disable_adapter():
        assert torch.equal(LLAMA.run(model), expected)
    model.set_adapter("second")
    second = LLAMA.run(model)
    assert not torch.equal(second, first)
    mixed = LLAMA.run(model, adapter_names=["default", "__base__", "second"])
    for row, alone in enumerate((first, expected, second)):
        torch.testing.assert_close(mixed[row], alone[row])
    assert torch.equal(mixed[1], expected[1])
    with pytest.raises(UserError, match="must name attached adapters, got nope"):
        LLAMA.run(model, adapter_names=["nope"] * BATCH)
    with pytest.raises(UserError, match="one adapter a sample"):
        LLAMA.run(model, adapter_names=["default"])
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("second")
    assert torch.equal(LLAMA.run(model), first)
    status = model.get_model_status()
    assert status.available_adapters == ["default"]
    assert status.active_adapters == ["default"]
    assert torch.equal(LLAMA.run(model.unload()), expected)


def test_merging_raises_and_leaves_the_model_alone() -> None:
    model = attached(LLAMA)
    before, full = weights(model), LLAMA.run(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(UserError, match="can't be merged"):
            merge()
    after = weights(model)
    assert before.keys() == after.keys()
    assert torch.equal(LLAMA.run(model), full)
    diffusion = attached(SD3)
    with pytest.raises(UserError, match="can't be merged"):
        diffusion.fuse_lora()


def test_peft_save_and_from_pretrained(tmp_path: Any) -> None:
    model = attached(GPT2, sparsifier="jumprelu")
    full = GPT2.run(model)
    model.save_pretrained(tmp_path)
    for low_cpu in (False, True):
        again = PeftModel.from_pretrained(GPT2.base(), tmp_path, low_cpu_mem_usage=low_cpu)
        assert torch.equal(GPT2.run(again.eval()), full)


def test_transformers_own_integration(tmp_path: Any) -> None:
    model: Any = LLAMA.base()
    model.add_adapter(LLAMA.config())
    fill(model)
    full = LLAMA.run(model)
    model.save_pretrained(tmp_path)
    again: Any = LLAMA.base()
    again.load_adapter(str(tmp_path))
    assert torch.equal(LLAMA.run(again.eval()), full)
    again.disable_adapters()
    assert torch.equal(LLAMA.run(again), LLAMA.run(LLAMA.base()))


@pytest.mark.parametrize("case", [SD3, LLAMA, PLAIN], ids=lambda case: case.name)
def test_lora_stacked_on_top_and_below(case: Case) -> None:
    expected = case.run(case.base())
    lora = LoraConfig(target_modules=list(case.targets), r=2, init_lora_weights=False)
    for order in ("above", "below"):
        model = case.base()
        configs: list[tuple[Any, str]] = [(case.config(), "default"), (lora, "style")]
        for config, name in configs if order == "above" else configs[::-1]:
            if hasattr(model, "peft_config"):
                with pytest.warns(UserWarning, match="Already found"):
                    inject_adapter_in_model(config, model, name)
            else:
                inject_adapter_in_model(config, model, name)
        fill(model)
        layers = atom_layers(model)
        assert not any("base_layer" in site for site in layers)
        saved = get_peft_model_state_dict(model)
        assert not any("base_layer" in key or "lora" in key for key in saved)
        plain = inject_adapter_in_model(case.config(), case.base())
        set_peft_model_state_dict(plain, saved)
        both, alone = case.run(model.eval()), case.run(plain.eval())
        assert not torch.equal(both, alone)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.enable_adapters(False)
        assert torch.equal(case.run(model), alone)
        remove_adapter(model)
        assert torch.equal(case.run(model), expected)


@pytest.mark.parametrize("case", [SD3, LLAMA], ids=lambda case: case.name)
def test_gradient_checkpointing_gives_equal_gradients(case: Case) -> None:
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        model = attached(case, **case.gate)
        model.train()
        if checkpointed and case is LLAMA:
            unwrap(model).activation_checkpointing_enable({"use_reentrant": False})
        elif checkpointed:
            model.enable_gradient_checkpointing()
        with record(model) as recording:
            out = case.run(model, **({"use_cache": False} if case is LLAMA else {}))
            assert all(len(calls) == 1 for calls in recording.codes.values())
            penalty = sum(calls[0].sum() for calls in recording.codes.values())
            (out.square().mean() + 0.01 * penalty).backward()
            assert all(len(calls) == 1 for calls in recording.codes.values())
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(grad is not None for grad in found[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("case", [SD3, LLAMA, PLAIN], ids=lambda case: case.name)
def test_bfloat16_base_with_float32_adapter(case: Case) -> None:
    base = case.base().to(torch.bfloat16)
    inputs = {
        name: v.to(torch.bfloat16) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for name, v in case.inputs().items()
    }
    expected = case.run(base, **inputs)
    model = case.attach(base, case.config())
    layers = atom_layers(model)
    assert all(p.dtype == torch.float32 for layer in layers.values() for p in layer.atom_dictionary.parameters())
    assert torch.equal(case.run(model, **inputs), expected)
    fill(model)
    out = case.run(model, **inputs)
    assert out.dtype == torch.bfloat16
    assert not torch.equal(out, expected)
    out.float().square().mean().backward()
    for layer in layers.values():
        layer.dictionary("default").bias.data.fill_(1e3)  # nothing fires
    assert torch.equal(case.run(model, **inputs), expected)


def test_autocast_keeps_the_base_bit_for_bit() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = PLAIN.run(PLAIN.base())
        model = PLAIN.attach(PLAIN.base(), PLAIN.config())
        assert torch.equal(PLAIN.run(model), expected)


class Wide(nn.Linear):
    """A layer that stays in float32 under autocast, as some quantized ones do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


def test_autocast_does_not_round_a_wider_output() -> None:
    layer = AtomLinear(Wide(12, 20))
    layer.update_layer("default", PLAIN.config(), 6)
    x = torch.randn(3, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), layer.base_layer(x))


def test_new_atoms_take_the_mode_of_the_base() -> None:
    for training in (True, False):
        model = PLAIN.attach(PLAIN.base().train(training), PLAIN.config(sparsifier="batch_topk", k=2))
        for layer in atom_layers(model).values():
            assert layer.dictionary("default").sparsifier.training is training


def test_a_first_adapter_that_fails_leaves_no_trace_in_diffusers() -> None:
    model: Any = SD3.base()
    with pytest.raises(UserError, match="no module is named 'nope'"):
        model.add_adapter(SD3.config(target_modules=["nope"]))
    model.add_adapter(SD3.config())


def test_removing_one_of_two_active_adapters() -> None:
    model = attached(PLAIN)
    alone = PLAIN.run(model)
    PLAIN.attach(model, PLAIN.config(target_modules=["up"]), "second")
    fill(model, "second")
    for layer in atom_layers(model).values():
        layer.set_adapter(["default", "second"])
    remove_adapter(model, "second")
    assert torch.equal(PLAIN.run(model), alone)
    assert {tuple(layer.active_adapters) for layer in atom_layers(model).values()} == {("default",)}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.usefixtures("shapes_unchecked")
# Dynamo looks at the gate's `.grad` under a filter of its own, which loses against warnings as errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiles_to_one_graph(gated: bool) -> None:
    torch._dynamo.reset()
    model = attached(PLAIN, **(PLAIN.gate if gated else {}))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(PLAIN.run(compiled), PLAIN.run(model))
    for layer in atom_layers(compiled).values():
        layer.atom_strength["default"].fill_(0.5)
    torch.testing.assert_close(PLAIN.run(compiled), PLAIN.run(model))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    PLAIN.run(compiled).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@each
def test_pruned_adapter_reloads_through_peft(case: Case) -> None:
    model = attached(case)
    sites = list(atom_layers(model))
    prune(model, {sites[0]: torch.tensor([4, 1]), sites[1]: torch.tensor([], dtype=torch.long)})
    config = unwrap(model).peft_config["default"]
    assert config.sites == sites
    assert sites[1] not in atom_layers(model)
    assert atom_layers(model)[sites[0]].dictionary("default").atom_ids.tolist() == [4, 1]
    other = inject_adapter_in_model(config, case.base())
    assert list(atom_layers(other)) == [sites[0], *sites[2:]]
    assert other.peft_config["default"].sites == sites
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert torch.equal(case.run(other.eval()), case.run(model))


def test_quantized_bases_bitsandbytes_nf4() -> None:
    import bitsandbytes as bnb

    base = PLAIN.base()
    for block in base.blocks:
        linear = bnb.nn.Linear4bit(12, 20, quant_type="nf4", compute_dtype=torch.float32)
        linear.load_state_dict(block["up"].state_dict())
        block["up"] = linear.to("cpu")
    _check_quantized(base, "params4bit")


def test_quantized_bases_torchao_int8() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    base = PLAIN.base()
    quantize_(base.blocks, Int8WeightOnlyConfig(version=2))
    _check_quantized(base, "int8")


def _check_quantized(base: nn.Module, kind: str) -> None:
    assert kind in type(base.blocks[0]["up"].weight).__name__.lower()
    with torch.no_grad():
        expected = PLAIN.run(base)
    model = PLAIN.attach(base, PLAIN.config())
    assert torch.equal(PLAIN.run(model), expected)
    fill(model)
    out = PLAIN.run(model)
    assert not torch.equal(out, expected)
    out.square().mean().backward()
    assert all(layer.dictionary("default").atoms.grad is not None for layer in atom_layers(model).values())
    remove_adapter(model)
    assert torch.equal(PLAIN.run(base), expected)


def test_default_targets_come_from_peft() -> None:
    model = get_peft_model(LLAMA.base(), AtomConfig(n_atoms=4))
    assert {site.rpartition(".")[2] for site in atom_layers(model)} == {"q_proj", "v_proj"}
