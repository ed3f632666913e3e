import importlib
import json
from typing import Any

import peft
import pytest
import torch
from peft.utils.peft_types import PeftType
from torch import nn

import atomtune.tuner
from atomtune.errors import UserError
from atomtune.tuner import AtomConfig, atom_layers, record, unwrap
from atomtune.tuner.model import site_name
from atomtune.tuner.register import register


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(4, 4)
        self.conv = nn.Conv2d(3, 3, 1)
        self.mix = nn.MultiheadAttention(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_q(x)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"sparsifier": "topk", "n_atoms": 512, "k": 900},
            r"^`k` must be between 1 and n_atoms \(512\), got 900. Lower `k` or raise `n_atoms`.$",
        ),
        ({"k": 0}, "Raise `k`"),
        ({"sparsifier": "topk"}, "`k` must be given"),
        ({"n_atoms": 0}, "`n_atoms` must be at least 1"),
        ({"sparsifier": "rellu"}, "Did you mean `relu`"),
        ({"encoder": "mlp"}, "`encoder` must be one of linear, ista"),
        ({"encoder": "ista"}, "must be soft"),
        ({"threshold": float("nan")}, "finite"),
        ({"steps": 0}, "`steps`"),
        ({"gate_input": "prompt"}, "`gate_dim` must be"),
        ({"gate_mask": "mask"}, "no meaning without `gate_input`"),
        ({"size_pattern": {"a": -1}}, "`size_pattern` must not be negative"),
    ],
)
def test_says_what_is_wrong(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AtomConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["to_k"]}, "no module is named 'to_k'. Did you mean `to_q`"),
        ({"target_modules": ["to_q", "tq"]}, "no module is named 'tq'"),
        ({"target_modules": "nothing.*"}, "must match at least one module"),
        ({"target_modules": ["conv"]}, "'conv' is a Conv2d"),
        ({"target_modules": ["out_proj"]}, "MultiheadAttention"),
        ({"target_modules": ["to_q"], "exclude_modules": ["to_q"]}, "at least one"),
        (
            {"target_modules": ["to_q"], "size_pattern": {"to_p": 3}},
            "no site is named 'to_p'. Did you mean `to_q`",
        ),
        ({"target_modules": ["to_q"], "sites": ["to_v"]}, "no site 'to_v'"),
        ({}, "`target_modules` must name"),
    ],
)
def test_bad_targets_leave_the_model_alone(fields: dict[str, Any], message: str) -> None:
    net = Net()
    with pytest.raises(UserError, match=message):
        peft.inject_adapter_in_model(AtomConfig(**fields), net)
    assert type(net.to_q) is nn.Linear
    assert not hasattr(net, "peft_config")
    assert all(p.requires_grad for p in net.parameters())


def test_adapter_names() -> None:
    net = Net()
    config = AtomConfig(target_modules=["to_q"], n_atoms=3)
    with pytest.raises(UserError, match=r"without '\.'"):
        peft.inject_adapter_in_model(config, net, "a.b")
    peft.inject_adapter_in_model(config, net, "a")
    with pytest.raises(UserError, match="already attached"):
        peft.inject_adapter_in_model(config, net, "a")
    with pytest.raises(UserError, match="No atom adapter 'b' is attached; attached: a"):
        atom_layers(net, "b")
    assert config.sites is None  # the caller's config is not touched
    assert list(atom_layers(net, "a")) == ["to_q"]


def test_record() -> None:
    net = peft.inject_adapter_in_model(AtomConfig(target_modules=["to_q"], n_atoms=3), Net())
    x = torch.randn(2, 5, 4)
    layer = atom_layers(net)["to_q"]
    layer.set_scale("default", 0.0)
    with record(net) as outer, record(net, "default") as inner:
        net(x)
        net(x)
    net(x)
    assert [len(seen.codes["to_q"]) for seen in (outer, inner)] == [2, 2]
    dictionary = layer.dictionary("default")
    torch.testing.assert_close(outer.pre_codes["to_q"][0], dictionary.pre_codes(x))
    torch.testing.assert_close(outer.codes["to_q"][1], dictionary.encode(x))
    assert outer.codes["to_q"][0].requires_grad
    outer.clear()
    assert outer.codes == {"to_q": []}
    assert not layer.recorders["default"]
    with pytest.raises(UserError, match="`adapter` must be given"), record(Net()):
        pass


def test_json_round_trip(tmp_path: Any) -> None:
    config = AtomConfig(n_atoms=8, k=2, sparsifier="topk", target_modules=["a"], size_pattern={"a": 3}, sites=["a"])
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "ATOMS"
    assert peft.PeftConfig.from_pretrained(tmp_path) == config
    assert config.atoms_at("a") == 3
    assert config.atoms_at("b") == 0
    assert AtomConfig().atoms_at("b") == 64


def test_registering_twice_changes_nothing() -> None:
    before = peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType["ATOMS"]]
    register(AtomConfig, atomtune.tuner.AtomModel)
    importlib.reload(importlib.import_module("atomtune.tuner.register"))
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType["ATOMS"]] is before
    assert [member.value for member in PeftType].count("ATOMS") == 1


def test_unwrap() -> None:
    net = Net()
    pipe = type("Pipe", (), {"transformer": torch.compile(net, backend="eager")})()
    assert unwrap(pipe) is net
    with pytest.raises(UserError, match="Expected a model"):
        unwrap("folder")


@pytest.mark.parametrize(
    "path",
    [
        "blocks.0.to_q",
        "base_model.model.blocks.0.to_q",
        "_orig_mod.blocks.0.to_q",
        "blocks.0.to_q.base_layer",
    ],
)
def test_site_names(path: str) -> None:
    assert site_name(path) == "blocks.0.to_q"
