"""Single atoms kept, dropped, labelled; two adapters compared."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import atomtune
from atomtune.adapter import Adapter, load
from atomtune.atoms import diff
from atomtune.cli import main
from atomtune.errors import UserError
from atomtune.surgery import drop, keep, name
from atomtune.tuner import AtomConfig, atom_layers, attach, prompt_gate
from atomtune.tuner.notes import NOTES, notes
from atomtune.tuner.store import WEIGHTS

X = torch.randn(5, 6)


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor, prompt: torch.Tensor | None = None) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def adapted(base: nn.Module | None = None, **fields: Any) -> Adapter:
    """Four atoms at each of two sites, with statistics that rank L0[3] first and L1[0] last."""
    model = Net().eval() if base is None else base
    torch.manual_seed(1)
    attach(model, AtomConfig(**{"n_atoms": 4, "threshold": 0.0, "target_modules": ["up", "down"], **fields}))
    statistics = {}
    for i, (path, layer) in enumerate(atom_layers(model).items()):
        nn.init.normal_(layer.dictionary("default").atoms)
        statistics[path] = {k: torch.arange(4) + 1 - i / 2 for k in ("effect", "mean", "density", "purity")}
        statistics[path]["norm"] = torch.ones(4)
    return Adapter(model, statistics)


def again(adapter: Adapter, folder: Path) -> Adapter:
    adapter.save(folder)
    return load(Net().eval(), folder)


def test_keep_and_drop_are_strengths_of_0_for_good(tmp_path: Path) -> None:
    adapter = adapted()
    with adapter.using(strength={"L0[3]": 0.0, "L1[1]": 0.0}):
        expected = adapter.pipe(X)
    assert drop(adapter, ["L0[3]", "L1[1]"]) == 6
    reloaded = again(adapter, tmp_path / "run")
    assert [a.name for a in reloaded.atoms] == ["L1[3]", "L0[2]", "L1[2]", "L0[1]", "L0[0]", "L1[0]"]
    assert torch.equal(reloaded.pipe(X), adapter.pipe(X))
    assert torch.allclose(adapter.pipe(X), expected, atol=1e-6)
    with pytest.raises(UserError, match=r"no atom L0\[4\]\. Did you mean .*L0\["):
        drop(adapter, ["L0[0]", "L0[4]"])
    with pytest.raises(UserError, match="At least one atom of default must be left"):
        drop(adapter, [a.name for a in adapter.atoms])
    assert keep(adapter, ["L0[2]"]) == 1
    assert list(adapter.statistics) == ["up"]


def test_labels_and_notes_survive_pruning_saving_and_loading(tmp_path: Path) -> None:
    adapter = adapted()
    name(adapter, {"L0[3]": " big leaves ", "L1[0]": "shade"}, {"L0[3]": "fires on the crown", "L0[0]": "odd: ä=1"})
    adapter.prune(7)  # without L1[0]
    reloaded = again(again(adapter, tmp_path / "a"), tmp_path / "b")
    assert json.loads((tmp_path / "b" / NOTES).read_text(encoding="utf-8")) == {
        "L0[0]": {"note": "odd: ä=1"},
        "L0[3]": {"label": "big leaves", "note": "fires on the crown"},
    }
    assert reloaded.atoms["big leaves"] == reloaded.atoms["L0[3]"]
    with reloaded.using(strength={"big leaves": 0.0}):
        without = reloaded.pipe(X)
    with reloaded.using(strength={"L0[3]": 0.0}):
        assert torch.equal(reloaded.pipe(X), without)
    with pytest.raises(UserError, match="given twice"), reloaded.using(strength={"big leaves": 0, "L0[3]": 2}):
        pass
    with pytest.raises(UserError, match=r"named like L17\[137\], or as it was labelled, got 'big leafs'.*big leaves"):
        reloaded.atoms["big leafs"]
    name(reloaded, {"big leaves": "", "L1[1]": "shade"})  # the label of a pruned atom is free
    assert [a.called for a in reloaded.atoms if a.label] == ["shade"]
    name(reloaded, {"shade": ""}, {"L0[3]": "", "L0[0]": ""})
    reloaded.save(tmp_path / "b")
    assert not (tmp_path / "b" / NOTES).exists()


@pytest.mark.parametrize("label", ["here", "L1[2]", "L1", "a=b", "a/b", "two\nlines", "-", "x" * 61])
def test_wrong_labels_change_nothing(label: str) -> None:
    adapter = adapted()
    name(adapter, {"L1[1]": "here"})
    told = "the label 'here' is used twice, for" if label == "here" else "a label is 1 to 60 characters without"
    with pytest.raises(UserError, match=told) as error:
        name(adapter, {"L0[1]": "fine", "L0[0]": label})
    assert "\n" not in str(error.value)
    assert notes(adapter.pipe) == {"L1[1]": {"label": "here"}}


def test_a_label_takes_no_sites_name() -> None:
    adapter = adapted()
    with pytest.raises(UserError, match=r"a label must not be a site's name, got 'up' for L0\[1\]"):
        name(adapter, {"L0[1]": "up"})
    assert notes(adapter.pipe) == {}


def test_broken_notes_load_nothing(tmp_path: Path) -> None:
    adapted().save(tmp_path)
    for text in ("{", "[]", '{"L0[0]": "x"}', '{"L0[0]": {"label": 3}}', '{"L0[0]": {"colour": ""}}'):
        (tmp_path / NOTES).write_text(text)
        base = Net()
        with pytest.raises(UserError, match=r"notes\.json"):
            load(base, tmp_path)
        assert not hasattr(base, "peft_config")


def test_diff_by_id(tmp_path: Path) -> None:
    adapter = adapted()
    name(adapter, {"L0[1]": "leaves"})
    adapter.save(tmp_path / "a")
    drop(adapter, ["L1[0]"])
    atom_layers(adapter.pipe)["up"].dictionary("default").atoms.data[1] *= 2  # the same direction
    adapter.save(tmp_path / "b")
    found = diff(tmp_path / "a", tmp_path / "b")
    assert (found.by, found.settings, found.gate) == ("id", {}, "none")
    changed, lost = (m for m in found.matches if m.kind != "shared")
    assert (changed.kind, changed.path, changed.a, changed.b) == ("changed", "up", "leaves", "leaves")
    assert changed.likeness == pytest.approx(1)
    assert (lost.kind, lost.path, lost.a, lost.b) == ("only A", "down", "L1[0]", None)
    assert len(found.matches) == 8
    assert {m.kind for m in diff(tmp_path / "b", tmp_path / "a").matches} == {"shared", "changed", "only B"}


def test_diff_by_likeness_where_ids_mean_nothing(tmp_path: Path) -> None:
    adapter = adapted()
    adapter.save(tmp_path / "a")
    for layer in atom_layers(adapter.pipe).values():
        dictionary = layer.dictionary("default").select(torch.tensor([2, 0, 3, 1]))
        dictionary.atom_ids = torch.arange(4)
        dictionary.encoder.data[1:] *= 1.5
        dictionary.atoms.data[0] += 0.1
        dictionary.encoder.data[3] *= -1  # the same product, but it reads something else
        dictionary.atoms.data[3] *= -1
        layer.set_dictionary("default", dictionary, torch.ones(4))
    adapter.save(tmp_path / "b")
    found = diff(tmp_path / "a", tmp_path / "b")
    assert found.by == "likeness"
    assert [(m.kind[0], m.a, m.b) for m in found.matches if m.path == "up"] == [
        *[("c", f"L0[{i}]", f"L0[{j}]") for i, j in ((0, 1), (2, 0), (3, 2))],
        *[("o", "L0[1]", None), ("o", None, "L0[3]")],
    ]


def test_diff_names_settings_gates_and_bases(tmp_path: Path) -> None:
    adapted().save(tmp_path / "a")
    adapter = adapted(sparsifier="topk", k=2, gate_input="prompt", gate_dim=4)
    adapter.save(tmp_path / "b")
    prompt_gate(adapter.pipe).bias.data += 1  # type: ignore[union-attr]
    adapter.save(tmp_path / "c")
    adapted(Net(seed=3)).save(tmp_path / "other")
    found = diff(tmp_path / "a", tmp_path / "b")
    assert (found.settings, found.gate) == ({"sparsifier": ("relu", "topk"), "k": (None, 2)}, "only B")
    assert diff(tmp_path / "b", tmp_path / "c").gate == "changed"
    with pytest.raises(UserError, match=r"must be of one base: .*a is of a base without a name, .*other of another"):
        diff(tmp_path / "a", tmp_path / "other")


def test_commands(tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run, less, base = str(tmp_path / "run"), str(tmp_path / "less"), str(bases["lumina2"])
    fields = {"target_modules": ["layers.0.attn.to_q", "layers.1.attn.to_q"], "base_model_name_or_path": base}
    adapted(atomtune.open_pipeline(base).transformer, **fields).save(run)
    weights = Path(run, WEIGHTS).read_bytes()
    assert main(["surgery", run, "--name", "L0[3]=leaves", "--note", "L0[0]=a = b"]) == 0
    assert Path(run, WEIGHTS).read_bytes() == weights
    assert main(["atoms", run]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[2].startswith("leaves (L0[3]) ")
    assert rows[-2].endswith("layers.0.attn.to_q  a = b")
    assert main(["surgery", run, "--drop", "leaves", "--drop", "L1[0]", "--out", less]) == 0
    assert main(["diff", run, less]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1:6] == ["shared        6", "changed       0", "only A        2", "only B        0", "gate       none"]
    assert [line.split()[:4] for line in out[-2:]] == [["leaves", "-", "4.0000", "-"], ["L1[0]", "-", "0.5000", "-"]]
    assert main(["diff", run, less, "--top", "1"]) == 0
    assert "1 more than shown: --top" in capsys.readouterr().err
    assert main(["diff", run, run]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("gate "), "no table where nothing differs"
    assert main(["diff", run, less, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["matches"]) == 8
    for arguments, message in (
        (["--drop", "L0[0]"], "`out` must be given with --keep and --drop"),
        ([], "`name`, `note`, `keep` or `drop` must be given"),
        (["--drop", "L0[0]", "--out", run], "`out` must be a folder that does not exist yet"),
        (["--note", "leaves=a", "--note", "L0[3]=b"], "leaves (L0[3]) is given twice, by its label and its name"),
        (["--note", "leaves=a", "--note", "leaves=b"], "`note` must be like name=value, each name once"),
        (["--keep", "stalk", "--out", less + "2"], "or as it was labelled, got 'stalk'"),
    ):
        assert main(["surgery", run, *arguments]) == 2
        assert message in capsys.readouterr().err
