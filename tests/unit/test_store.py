import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from atomtune.errors import UserError
from atomtune.tuner import (
    AtomConfig,
    adapter_config,
    atom_layers,
    attach,
    fingerprint,
    load,
    load_statistics,
    prompt_gate,
    prune,
    save,
)
from atomtune.tuner import store as module
from atomtune.tuner.layer import AtomLinear


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}) for _ in range(3))

    def forward(self, x: Tensor, prompt: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = x + layer["down"](layer["up"](x))
        return x


X, PROMPT = torch.randn(2, 4, 6), torch.randn(2, 3, 5)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def config(**fields: Any) -> AtomConfig:
    return AtomConfig(**{"target_modules": ["up", "down"], "n_atoms": 5, "threshold": 0.0, **fields})


def adapted(adapter: str = "default", **fields: Any) -> Any:
    model = inject_adapter_in_model(config(**fields), net(), adapter)
    for layer in atom_layers(model, adapter).values():
        nn.init.normal_(layer.dictionary(adapter).atoms)
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(adapted(), tmp_path / "run")


def state(model: nn.Module) -> tuple[Any, ...]:
    """Everything a failed load must leave alone."""
    return (
        [(name, type(m).__name__, getattr(m, "_active_adapter", None)) for name, m in model.named_modules()],
        [(name, p.requires_grad, p.detach().clone().tolist()) for name, p in model.named_parameters()],
        sorted(getattr(model, "peft_config", {})),
        getattr(model, "_hf_peft_config_loaded", None),
        len(model._forward_pre_hooks),
    )


def refused(folder: Path, match: str, model: nn.Module | None = None, **kwargs: Any) -> None:
    model = net() if model is None else model
    before = state(model)
    with pytest.raises(UserError, match=match) as error:
        load(model, folder, **kwargs)
    assert "\n" not in str(error.value)
    assert state(model) == before


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sparsifier": "topk", "k": 2},
        {"sparsifier": "jumprelu"},
        {"sparsifier": "soft", "encoder": "ista"},
        {"gate_input": "prompt", "gate_dim": 5},
    ],
)
def test_round_trip_is_bit_equal(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = adapted(**fields)
    gate = prompt_gate(model)
    if gate is not None:
        gate.weight.data.normal_()
        gate.bias.data.fill_(0.1)
    save(model, tmp_path / "run")
    other = net()
    load(other, tmp_path / "run", "mine")
    assert torch.equal(other(X, PROMPT), model(X, PROMPT))
    assert not any(p.requires_grad for p in other.parameters())
    assert adapter_config(other, "mine").sites == adapter_config(model).sites
    again = net()
    load(again, tmp_path / "run", trainable=True)
    assert all(p.requires_grad == ("atom_" in name) for name, p in again.named_parameters())


def test_peft_reads_the_same_folder(folder: Path) -> None:
    model: Any = PeftModel.from_pretrained(net(), folder)
    assert torch.equal(model(X), adapted_from(folder)(X))


def adapted_from(folder: Path) -> Any:
    model = net()
    load(model, folder)
    return model


def test_every_kind_of_model(folder: Path) -> None:
    expected = adapted_from(folder)(X)
    peft_model: Any = get_peft_model(net(), config())
    load(peft_model, folder, "second")
    assert peft_model.active_adapters == ["second"]
    assert torch.equal(peft_model(X), expected)
    pipe = type("Pipe", (), {"transformer": net()})()
    load(pipe, folder)
    assert torch.equal(pipe.transformer(X), expected)
    stacked = inject_adapter_in_model(LoraConfig(target_modules=["up"], r=2), net(), "style")
    load(stacked, folder)
    assert torch.equal(stacked.eval()(X), expected)
    save(stacked, folder.with_name("again"))
    assert torch.equal(adapted_from(folder.with_name("again"))(X), expected)
    load(stacked, folder, "third")
    assert stacked.layers[0]["down"].active_adapters == ["third"]


def test_sets_the_flag_of_diffusers(folder: Path) -> None:
    model: Any = net()
    model._hf_peft_config_loaded = False
    refused(folder / "nowhere", "no folder", model)
    load(model, folder)
    assert model._hf_peft_config_loaded is True


def test_pruned_adapter_reloads_with_its_site_numbers(tmp_path: Path) -> None:
    model = adapted(sparsifier="topk", k=2)
    sites = list(atom_layers(model))
    prune(model, {sites[0]: torch.tensor([3, 0]), sites[2]: torch.tensor([], dtype=torch.int64)})
    prune(model, {sites[0]: torch.tensor([1])})
    other = adapted_from(save(model, tmp_path / "run"))
    assert adapter_config(other).sites == sites
    assert list(atom_layers(other)) == [site for site in sites if site != sites[2]]
    assert atom_layers(other)[sites[0]].dictionary("default").atom_ids.tolist() == [0]
    assert torch.equal(other(X), model(X))


def test_prune_keeps_strengths_and_checks_its_input() -> None:
    model = adapted()
    sites = list(atom_layers(model))
    layer = atom_layers(model)[sites[0]]
    layer.atom_strength["default"].copy_(torch.arange(5.0))
    prune(model, {sites[0]: torch.tensor([4, 2])})
    assert layer.atom_strength["default"].tolist() == [4.0, 2.0]
    for keep, match in (
        ({"layers.0.upp": torch.tensor([0])}, "Did you mean `layers.0.up`"),
        ({sites[0]: torch.tensor([2])}, "below 2"),
        ({sites[1]: torch.tensor([1, 1])}, "different"),
    ):
        with pytest.raises(UserError, match=match):
            prune(model, {sites[2]: torch.tensor([0]), **keep})
    assert layer.r == {"default": 2}
    assert atom_layers(model)[sites[2]].r == {"default": 5}


def test_statistics_and_card(tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    picture.write_bytes(b"png")
    statistics = {"layers.0.up": {"importance": torch.rand(5), "density": torch.rand(5)}}
    card = {
        "title": 'A "dog": --- x',
        "text": "Hello.",
        "drift": 0.001,
        "pictures": [(picture, "a dog"), picture],
    }
    folder = save(adapted(), tmp_path / "run", card=card, statistics=statistics)
    found = load_statistics(folder)
    assert torch.equal(found["layers.0.up"]["importance"], statistics["layers.0.up"]["importance"])
    text = (folder / "README.md").read_text()
    assert "![a dog](pictures/00.png)" in text
    assert "| drift | 0.001 |" in text
    assert "| atoms | 30 at 6 of 6 sites |" in text
    assert (folder / "pictures/01.png").read_bytes() == b"png"
    save(adapted(), folder)  # nothing stale may stay
    assert load_statistics(folder) == {}
    assert not (folder / "pictures").exists()


def test_saving_again_keeps_other_peoples_files(folder: Path) -> None:
    (folder / "log.txt").write_text("mine")
    (folder / "checkpoints").mkdir()
    model = adapted()
    save(model, folder)
    assert (folder / "log.txt").read_text() == "mine"
    assert (folder / "checkpoints").is_dir()
    assert torch.equal(adapted_from(folder)(X), model(X))
    assert sorted(p.name for p in folder.parent.iterdir()) == ["run"]


def test_saving_again_keeps_pictures_that_its_card_does_not_show(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "dog.png").write_bytes(b"png")
    save(adapted(), folder, card={"pictures": [tmp_path / "dog.png"]})
    (folder / "pictures/00000.png").write_bytes(b"painted later")
    save(adapted(), folder)
    assert [p.name for p in (folder / "pictures").iterdir()] == ["00000.png"]


@pytest.mark.parametrize("name", ["README.md", "adapter_config.json"])
def test_what_is_no_adapter_is_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match=rf"holds {name} that is no atom adapter's\. Choose another folder"):
        save(adapted(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("after", range(3))
def test_a_crash_at_any_rename_leaves_a_good_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    (folder / "log.txt").write_text("mine")
    old, model, calls = adapted_from(folder)(X), adapted(), []
    rename = os.rename

    def crash(*args: Any) -> None:
        calls.append(args)
        if len(calls) > after:
            raise KeyboardInterrupt
        rename(*args)

    monkeypatch.setattr(module.os, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        save(model, folder)
    monkeypatch.undo()
    out = adapted_from(folder)(X)
    assert torch.equal(out, model(X) if after == 2 else old)
    assert (folder / "log.txt").read_text() == "mine"
    save(model, folder)
    assert torch.equal(adapted_from(folder)(X), model(X))
    assert sorted(p.name for p in folder.parent.iterdir()) == ["run"]


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = adapted_from(folder)(X)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_tensors", full)
    with pytest.raises(UserError, match="No space left"):
        save(adapted(), folder)
    assert torch.equal(adapted_from(folder)(X), old)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["run"]


@pytest.mark.parametrize("spoil", [lambda t: t[:0], torch.zeros_like], ids=["empty", "zeros"])
def test_what_was_written_is_read_back_before_it_counts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Tensor], Tensor]
) -> None:
    """Complaint 32: the saved adapter is an empty file."""
    old, write = adapted_from(folder)(X), module._write_tensors

    def wrong(tensors: dict[str, Tensor], path: Path, **more: str) -> None:
        write({key: spoil(tensor) for key, tensor in tensors.items()}, path, **more)

    monkeypatch.setattr(module, "_write_tensors", wrong)
    with pytest.raises(UserError, match=r"read back differs.* is untouched"):
        save(adapted(), folder)
    assert torch.equal(adapted_from(folder)(X), old)


def test_what_cannot_be_cleaned_up_is_no_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Complaint 31: clean-up fails and takes the run with it."""
    model, remove = adapted(), os.rmdir

    def busy(path: Any, **more: Any) -> None:
        if str(path).endswith(".previous"):
            raise OSError(39, "Directory not empty")
        remove(path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", busy)
        save(model, folder)
        assert torch.equal(adapted_from(folder)(X), model(X))
    save(model, folder)
    assert [p.name for p in folder.parent.iterdir()] == ["run"]


def test_nan_weights_are_not_saved(folder: Path) -> None:
    model = adapted()
    atom_layers(model)["layers.0.up"].dictionary("default").atoms.data[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"layers.0.up.*NaN.*nothing was saved"):
        save(model, folder.with_name("other"))
    assert not folder.with_name("other").exists()
    (folder.parent / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        save(adapted(), folder.parent / "file")


def rewrite(folder: Path, change: Any) -> None:
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")


def reconfigure(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


KEY = "base_model.model.layers.0.up.atom_dictionary."


def break_files(folder: Path, how: str) -> None:
    weights, values = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    match how:
        case "no weights":
            weights.unlink()
        case "no config":
            values.unlink()
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "empty":
            weights.write_bytes(b"")
        case "huge header":
            weights.write_bytes(struct.pack("<Q", 2**60) + b"{}")
        case "lying offsets":
            header = b'{"a":{"dtype":"F32","shape":[9999],"data_offsets":[0,39996]}}'
            weights.write_bytes(struct.pack("<Q", len(header)) + header)
        case "pickle":
            torch.save({"a": torch.zeros(1)}, weights)
        case "foreign keys":
            safetensors.torch.save_file({"lora_A.weight": torch.zeros(1)}, weights)
        case "missing key":
            rewrite(folder, lambda t: t.pop(KEY + "bias"))
        case "missing site":
            rewrite(folder, lambda t: [t.pop(key) for key in list(t) if key.startswith(KEY)])
        case "extra key":
            rewrite(folder, lambda t: t.update({KEY + "extra": torch.zeros(1)}))
        case "wrong shape":
            rewrite(folder, lambda t: t.update({KEY + "encoder": torch.zeros(5, 7)}))
        case "wrong dtype":
            rewrite(folder, lambda t: t.update({KEY + "encoder": torch.zeros(5, 6, dtype=torch.int32)}))
        case "infinite":
            rewrite(folder, lambda t: t[KEY + "bias"].fill_(torch.inf))
        case "not json":
            values.write_text("{")
        case "not a config":
            values.write_text("[]")
        case "lora":
            reconfigure(folder, peft_type="LORA")
        case "newer":
            reconfigure(folder, format_version=2, atomtune_version="9.1")
        case "bomb":
            reconfigure(folder, n_atoms=10**12)
        case "bad value":
            reconfigure(folder, n_atoms="many")
        case "no sites":
            reconfigure(folder, sites=None)
        case "bad gate":
            reconfigure(folder, gate_input="promptt", gate_dim=5)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("no weights", "adapter_model.safetensors is missing"),
        ("no config", "adapter_config.json is missing"),
        ("truncated", "broken or not a safetensors"),
        ("empty", "broken or not a safetensors"),
        ("huge header", "broken or not a safetensors"),
        ("lying offsets", "broken or not a safetensors"),
        ("pickle", "broken or not a safetensors"),
        ("foreign keys", "holds no atoms"),
        ("missing key", "lacks 1 of 24 keys: .*layers.0.up.atom_dictionary.bias"),
        ("missing site", "says 5 atoms at layers.0.up, .* holds 0"),
        ("extra key", "1 keys that don't fit"),
        ("wrong shape", r"encoder is torch.float32 \(5, 7\), the base model needs torch.float32 \(5, 6\)"),
        ("wrong dtype", "torch.int32"),
        ("infinite", "NaN or infinite"),
        ("not json", "can't be read"),
        ("not a config", "describes a None adapter"),
        ("lora", "describes a LORA adapter"),
        ("newer", "written by atomtune 9.1; .* Upgrade"),
        ("bomb", "says 1000000000000 atoms"),
        ("bad value", "is not valid"),
        ("no sites", "`sites` must list"),
        ("bad gate", "Did you mean `prompt`"),
    ],
)
def test_bad_files_load_nothing(folder: Path, how: str, match: str) -> None:
    break_files(folder, how)
    refused(folder, match)
    refused(folder, match, adapted("first", gate_input="prompt", gate_dim=5), adapter="second")


def test_a_failed_load_leaves_a_peft_model_alone(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop(KEY + "bias"))
    model: Any = get_peft_model(net(), config())
    before, out = state(model), model(X)
    with pytest.raises(UserError, match="lacks 1"):
        load(model, folder, "second")
    assert state(model) == before
    assert model.active_adapters == ["default"]
    assert torch.equal(model(X), out)


def test_a_name_that_is_taken(folder: Path) -> None:
    refused(folder, "already attached", adapted_from(folder))


def test_another_base(folder: Path) -> None:
    refused(folder, "another base model than this Net. .*--allow-other-base", net(seed=1))
    other = net(seed=1)
    with pytest.warns(UserWarning, match="another base model"):
        load(other, folder, allow_other_base=True)
    assert len(atom_layers(other)) == 6
    smaller = net()
    del smaller.layers[2]
    with pytest.warns(UserWarning, match="another base model"):
        refused(folder, "no site 'layers.2.up'", smaller, allow_other_base=True)


def test_an_altered_bit_is_noticed_and_files_without_a_checksum_load(folder: Path) -> None:
    """Every tensor stays finite and of its shape: nothing but the checksum can tell."""
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    refused(folder, "checksum is wrong")
    path.write_bytes(whole)
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    adapted_from(folder)


def test_a_config_of_other_weights_is_refused(folder: Path) -> None:
    threshold = json.loads((folder / "adapter_config.json").read_text())["threshold"]
    reconfigure(folder, threshold=threshold + 0.25)
    refused(folder, "is not the one that")
    reconfigure(folder, threshold=threshold, base_model_name_or_path="moved")
    adapted_from(folder)


def test_the_same_adapter_is_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """safetensors alone writes metadata in an order that changes from process to process."""
    from safetensors import safe_open

    model = adapted_from(folder)
    again = save(model, tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (folder / name).read_bytes()
    with safe_open(again / name, "pt") as file:
        assert set(file.metadata()) == {"format", "sha256", "config"}
    head = (again / name).read_bytes()[8:200]
    assert head.index(b"format") < head.index(b"sha256")


def test_unknown_entries_of_a_config(folder: Path) -> None:
    reconfigure(folder, shiny=True)
    with pytest.warns(UserWarning, match="unknown entries ignored: shiny"):
        load(net(), folder)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern"])
def test_the_patterns_of_a_stranger_are_not_run(folder: Path, field: str) -> None:
    """One that finds other modules, or never ends: the sites stand in the file, and those are read."""
    reconfigure(folder, **{field: r"(\w+\.?)+!"})
    model = adapted_from(folder)
    assert list(atom_layers(model)) == list(atom_layers(adapted()))
    found = adapter_config(model)
    assert set(found.target_modules or ()) == set(found.sites or ())
    assert not found.exclude_modules
    assert not found.layers_pattern
    opened: Any = PeftModel.from_pretrained(net(), str(folder))
    assert torch.equal(opened(X), model(X))


def test_a_site_whose_name_ends_like_others_comes_back_alone(tmp_path: Path) -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = torch.nn.Linear(4, 4)
            self.block = torch.nn.ModuleDict({"out": torch.nn.Linear(4, 4)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.block["out"](x))

    def seeded() -> Twice:
        torch.manual_seed(0)
        return Twice()

    model, again = seeded(), seeded()
    attach(model, AtomConfig(n_atoms=3, target_modules="out", exclude_modules=["block.out"]))
    load(again, save(model, tmp_path / "run"))
    assert [name for name, m in again.named_modules() if isinstance(m, AtomLinear)] == ["out"]


def test_fingerprint() -> None:
    base = net()
    whole = fingerprint(base)
    assert fingerprint(net()) == whole
    assert fingerprint(net().to(torch.bfloat16)) == whole
    assert fingerprint(adapted()) == whole
    assert fingerprint(get_peft_model(net(), config())) == whole
    assert fingerprint(inject_adapter_in_model(LoraConfig(target_modules=["up"]), net())) == whole
    assert fingerprint(net(seed=1)) != whole
    assert fingerprint(net().half()) == fingerprint(net(), torch.float16)
    base.layers[2]["down"].bias.data[0] += 1
    assert fingerprint(base) != whole


def test_an_adapter_trained_on_a_half_precision_load(tmp_path: Path) -> None:
    save(adapted().half(), tmp_path / "half")
    load(net(), tmp_path / "half")
    with pytest.raises(UserError, match="another base"):
        load(net(seed=1), tmp_path / "half")


def test_an_adapter_on_a_half_precision_load(tmp_path: Path) -> None:
    """Trained in float32, used in float16: the usual way of older families."""
    save(adapted(), tmp_path / "whole")
    load(net().half(), tmp_path / "whole")
    with pytest.raises(UserError, match="another base"):
        load(net(seed=1).half(), tmp_path / "whole")


def test_a_base_that_cannot_be_checked(folder: Path) -> None:
    offloaded = net()
    offloaded.layers[1]["up"].weight = nn.Parameter(torch.zeros(8, 6, dtype=torch.int8), requires_grad=False)
    assert fingerprint(offloaded).startswith("partial:")
    with pytest.warns(UserWarning, match="can't be checked"):
        load(offloaded, folder)


def test_a_fresh_process_reads_it_after_one_import(folder: Path) -> None:
    code = f"import atomtune.tuner, peft; print(peft.PeftConfig.from_pretrained({str(folder)!r}).n_atoms)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "5"
