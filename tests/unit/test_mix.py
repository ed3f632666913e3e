"""Several adapters together: the same outputs whichever way, which atoms fight, and what a user gets wrong."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from pipelines import lumina2

import atomtune
from atomtune import atoms, surgery
from atomtune.adapter import Adapter, base_of
from atomtune.atoms import noised_pass
from atomtune.backbones import backbone_of
from atomtune.cli import main
from atomtune.data.picture import to_tensor
from atomtune.errors import UserError
from atomtune.lora import export_lora
from atomtune.measure.regions import attribution
from atomtune.mix import TIMES, concepts, conflicts, merge, mix, orthogonality, weaker
from atomtune.sparse import Dictionary
from atomtune.steering import Steer
from atomtune.tuner import (
    AtomConfig,
    activate,
    atom_layers,
    attach,
    open_gate,
    override_gate,
    prompt_gate,
    remove_adapter,
)
from atomtune.tuner.mixture import MIXTURE
from atomtune.tuner.store import WEIGHTS

PROMPTS = ["a big flat kite on a red background, on the left", "a kite"]
SITES = {"lumina2": ["layers.0.attn.to_q", "to_out.0"], "sd3": ["transformer_blocks.0.attn.to_q", "to_add_out"]}
SITE = SITES["lumina2"][0]


@pytest.fixture
def pipe(pipes: dict[str, Any], request: pytest.FixtureRequest) -> Iterator[Any]:
    """A tiny pipeline, Lumina2 where nothing is said; the base before and after."""
    pipe = pipes[getattr(request, "param", "lumina2")]
    yield pipe
    for adapter in list(getattr(pipe.transformer, "peft_config", {})):
        remove_adapter(pipe, adapter)


every_family = pytest.mark.parametrize("pipe", SITES, indirect=True)


def save(pipe: Any, folder: Path, seed: int, gate: float | None = None, change: Callable = id, **fields: Any) -> Path:
    """Random atoms, more important with a higher seed and lower id; `gate` is what a prompt gate says to any prompt."""
    backbone = backbone_of(pipe)
    if gate is not None:
        width = backbone.encode_prompts(pipe, ["a"])[backbone.gate_input].shape[-1]
        fields |= {"gate_input": backbone.gate_input, "gate_mask": backbone.gate_mask, "gate_dim": width}
    torch.manual_seed(seed)
    fields = {"n_atoms": 4, "threshold": 0.5, "target_modules": SITES[backbone.family.lower()]} | fields
    attach(pipe.transformer, AtomConfig(base_model_name_or_path=str(pipe.name_or_path), **fields))
    statistics = {}
    for path, layer in atom_layers(pipe).items():
        change(torch.nn.init.normal_(layer.dictionary("default").atoms, std=0.3).data)
        importance = seed + torch.arange(layer.r["default"], 0.0, -1)
        statistics[path] = {key: importance.clone() for key in ("effect", "mean", "density", "purity")}
        statistics[path]["norm"] = torch.ones_like(importance)
    if gate is not None:
        prompt_gate(pipe.transformer).bias.data.fill_(1 - 2 * gate)  # type: ignore[union-attr]
    Adapter(pipe, statistics).save(folder)
    remove_adapter(pipe)
    return folder


@pytest.fixture(scope="module")
def places(pipes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters, good and bad."""
    pipe, root = pipes["lumina2"], tmp_path_factory.mktemp("places")
    for folder, seed in (("a", 1), ("same", 1), ("b", 9), ("broken", 3)):
        save(pipe, root / folder, seed)
    tensors = safetensors.torch.load_file(root / "broken" / WEIGHTS)
    tensors.pop(next(key for key in tensors if key.endswith("bias")))
    safetensors.torch.save_file(tensors, root / "broken" / WEIGHTS)
    other = lumina2()
    other.transformer.layers[0].attn.to_q.weight.data.mul_(2)
    for seed, folder in enumerate(("alien", "martian")):
        save(other, root / folder, seed)
    return root


def lumina2_of(folder: str) -> Any:
    return atomtune.open_pipeline(base_of(folder) or "")


def paint(pipe: Any) -> torch.Tensor:
    return torch.stack(atomtune.generate(pipe, PROMPTS, steps=2, output_type="latent"))


@every_family
def test_a_mixture_is_its_parts_together_saved_or_merged(pipe: Any, tmp_path: Path) -> None:
    some = SITES[backbone_of(pipe).family.lower()][1:]
    folders = {"a": save(pipe, tmp_path / "a", 1), "b": save(pipe, tmp_path / "b", 2, target_modules=some)}
    folders["c"] = save(pipe, tmp_path / "c", 3, n_atoms=3)
    weights, plain = {"b": 0.5, "c": -2.0}, paint(pipe)
    for part, folder in folders.items():
        atomtune.load(pipe, folder, name=part)
        for layer in atom_layers(pipe, part).values():
            layer.set_scale(part, weights.get(part, 1.0))
    activate(pipe, *folders)
    together = paint(pipe)
    for part in folders:
        remove_adapter(pipe, part)
    mixture = mix(pipe, folders, weights)
    assert torch.equal(paint(pipe), together)
    long = {f"L0[{i}]": f"{'long ' * 11}{i}" for i in (2, 3)}  # too long with the part before it, and then the same
    surgery.name(mixture.parts["b"], {"L0[1]": "leaves", **long})
    mixture.save(tmp_path / "m")
    merge(mixture).save(tmp_path / "one")
    total = len(mixture.atoms)
    mixture.remove()
    remove_adapter(pipe, "merged")
    assert torch.equal(paint(pipe), plain)
    again = atomtune.load(pipe, tmp_path / "m")
    assert torch.equal(paint(pipe), together)
    assert again.atoms["b/leaves"] == again.atoms["b/L0[1]"]
    assert base_of(tmp_path / "m") == base_of(tmp_path / "a")
    again.remove()
    one = atomtune.load(pipe, tmp_path / "one")
    assert torch.allclose(paint(pipe), together, atol=1e-4)
    assert not torch.allclose(together, plain, atol=1e-2)
    assert len({a.name for a in one.atoms}) == total
    assert one.atoms["b leaves"].importance == pytest.approx((2 + 3) * 0.5)
    assert sum("long" in a.label for a in one.atoms) == 2
    with pytest.raises(UserError, match="The parts are a, b, c, got 'd'"):
        orthogonality(mixture, "a", "d")
    with pytest.raises(UserError, match=r"A mixture can't be exported as it is\. Merge"):
        export_lora(mixture, tmp_path / "lora", PROMPTS)
    with pytest.raises(UserError, match=r"m is a mixture\. Give one of its parts, or merge them"):
        atoms.diff(tmp_path / "m", tmp_path / "a")


@every_family
def test_where_no_gate_opens_the_picture_is_the_base(pipe: Any, tmp_path: Path) -> None:
    folders = {part: save(pipe, tmp_path / part, i, gate=i % 2) for i, part in enumerate(("shut", "wide", "closed"))}
    plain = paint(pipe)
    alone = atomtune.load(pipe, folders["wide"])
    wide = paint(pipe)
    alone.remove()
    mixture = mix(pipe, {part: folders[part] for part in ("shut", "closed")})
    assert torch.equal(paint(pipe), plain)
    mixture.remove()
    mixture = mix(pipe, folders)
    assert torch.equal(paint(pipe), wide)
    assert not torch.equal(wide, plain)
    with mixture.using(density=0):
        assert torch.equal(paint(pipe), plain)
    merge(mixture).save(tmp_path / "one")
    mixture.remove()
    remove_adapter(pipe, "merged")
    one = atomtune.load(pipe, tmp_path / "one")
    assert torch.allclose(paint(pipe), wide, atol=1e-4)
    # Pruned, ids tell still which gate is an atom's: without those of the part that is open nothing is left.
    one.keep([a for a in one.atoms if not 4 <= a.id < 8])
    assert torch.equal(paint(pipe), plain)


def test_one_file_keeps_every_gate_of_parts_that_were_one_themselves(pipe: Any, tmp_path: Path) -> None:
    folders = {part: save(pipe, tmp_path / part, i, gate=g) for i, (part, g) in enumerate((("a", 0.5), ("b", 0.0)))}
    merge(mix(pipe, folders)).save(tmp_path / "ab")
    for name in list(pipe.transformer.peft_config):
        remove_adapter(pipe, name)
    three = {"ab": tmp_path / "ab", "c": save(pipe, tmp_path / "c", 5), "d": save(pipe, tmp_path / "d", 6, gate=1.0)}
    mixture = mix(pipe, three, {"c": 0.5})
    together = paint(pipe)
    merge(mixture)
    assert torch.allclose(paint(pipe), together, atol=1e-4)
    gate = prompt_gate(pipe.transformer, "merged")
    assert gate is not None
    assert torch.equal(gate(torch.ones(2, 3, gate.weight.shape[-1])), torch.tensor([[0.5, 0, 1, 1]] * 2))
    with open_gate(pipe.transformer):
        wide = paint(pipe)
    with override_gate(pipe.transformer, torch.tensor([1.0, 0.0]), "merged"):
        first, second = paint(pipe)
    assert torch.allclose(first, wide[0], atol=1e-4)
    assert not torch.allclose(second, wide[1], atol=1e-2)


SOFT = {"sparsifier": "soft", "encoder_bias": False}


@pytest.mark.parametrize(
    ("fields", "other", "refused"),
    [
        *[(f, {}, None) for f in ({"sparsifier": "jumprelu"}, SOFT, {"sparsifier": "dense", "normalize": False})],
        *[({"sparsifier": kind, "k": 2}, {}, f"atoms of {kind} compete") for kind in ("topk", "batch_topk")],
        ({"sparsifier": "soft", "encoder": "ista"}, {}, "atoms of soft compete"),
        (SOFT, {"threshold": 0.7}, "their `threshold` differs"),
    ],
)
def test_what_can_be_one_adapter(pipe: Any, tmp_path: Path, fields: Any, other: Any, refused: str | None) -> None:
    folders = {"a": save(pipe, tmp_path / "a", 1, **fields), "b": save(pipe, tmp_path / "b", 2, **fields | other)}
    mixture = mix(pipe, folders, {"a": 0.7})
    together = paint(pipe)
    with pytest.raises(UserError, match=f"a, b can't become one adapter: {refused}") if refused else nullcontext():
        merge(mixture)
    assert torch.allclose(paint(pipe), together, atol=1e-4)


def test_dials_are_over_all_parts(pipe: Any, places: Path) -> None:
    mixture = mix(pipe, {"a": places / "a", "b": places / "b"}, {"b": 0.1})
    layers = {part: atom_layers(pipe, part) for part in mixture.parts}

    def strength(part: str) -> torch.Tensor:
        return torch.cat([layer.atom_strength[part] for layer in layers[part].values()])

    with mixture.using(density=0.5, strength={"b/L0[2]": 3.0}, atoms={"a/L0[0]": 0.0}):
        assert strength("a").sum() == len(mixture.atoms) / 2 - 1
        assert strength("b").sum() == strength("b").max() == 3
    assert (strength("a") == 1).all()
    everything = paint(pipe)
    for inside, same in ((1.0, True), (0.0, False)):
        with mixture.using(steer={"b": [Steer(where=np.full((4, 4), inside))]}):
            assert torch.allclose(paint(pipe), everything, atol=1e-5) == same
    with pytest.raises(UserError, match="`steer`: the parts are a, b, got 'c'"), mixture.using(steer={"c": []}):
        pass
    assert mixture.prune(0.9) == math.ceil(0.9 * 2 * len(strength("a"))) == len(mixture.atoms)


def test_steers_that_name_a_part_are_its_alone(pipe: Any, places: Path) -> None:
    mixture = mix(pipe, {"a": places / "a", "b": places / "b"})
    mixed = paint(pipe)
    for one, by_part in (
        ([Steer("b/L0[0]", 0)], {"b": [Steer("L0[0]", 0)]}),
        ([Steer(["b/L0", "L1"], 0.5)], {"a": [Steer("L1", 0.5)], "b": [Steer(["L0", "L1"], 0.5)]}),
    ):
        with mixture.using(steer=one):
            found = paint(pipe)
        with mixture.using(steer=by_part):
            assert torch.equal(paint(pipe), found)
        assert not torch.equal(found, mixed)
    surgery.drop(mixture, [a.name for a in mixture.atoms if a.part == "a" and a.site == 1])
    surgery.name(mixture, {"b/L1[0]": "ears"})
    for name in ("L1", "ears", "b/to_out.0"):  # of one part only, whether it is named or not
        with mixture.using(steer=[Steer(name, 0)]):
            found = paint(pipe)
        with mixture.using(steer={"b": [Steer(name.removeprefix("b/"), 0)]}):
            assert torch.equal(paint(pipe), found)
    with mixture.using(density={"b/to_out.0": 0.0}):
        assert torch.equal(paint(pipe), found)
    with pytest.raises(UserError, match=r"got 'ears'\. Did you mean `b/ears`"):
        mixture.atoms["ears"]
    with pytest.raises(UserError, match="no site 'c/L0'"), mixture.using(steer=[Steer("c/L0", 0)]):
        pass


def test_shares_of_a_mixture_are_those_of_its_parts_whatever_their_weights(pipe: Any, places: Path) -> None:
    mixture = mix(pipe, {"a": places / "a", "b": places / "b"}, {"b": 0.1})
    for part in mixture.parts.values():
        for table in part.statistics.values():
            table["effect_beside"] = table["effect"].clone()
    assert {a.importance for a in mixture.ranking("focus")} == {0.5}
    assert {a.importance for a in merge(mixture).ranking("focus")} == {0.5}


def test_merging_takes_parts_with_other_statistics_and_without_gates(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"a": save(pipe, tmp_path / "a", 1, gate=0.5), "b": save(pipe, tmp_path / "b", 2)}
    for more in ("a", "b"):
        mixture = mix(pipe, folders)
        for table in mixture.parts[more].statistics.values():
            table["reach"] = table["norm"].clone()
        merged = merge(mixture)
        assert all("reach" not in table and len(table["norm"]) == 8 for table in merged.statistics.values())
        merged.remove()
        if more == "a":
            mixture.remove()
    activate(pipe, "a", "b")
    together = paint(pipe)
    monkeypatch.setattr(Dictionary, "load_state_dict", lambda *_: (_ for _ in ()).throw(RuntimeError("half")))
    with pytest.raises(RuntimeError, match="half"):
        merge(mixture)
    assert list(pipe.transformer.peft_config) == ["a", "b"]
    assert torch.equal(paint(pipe), together)


def test_what_made_a_region_is_asked_with_the_gates_of_all_parts_open(pipe: Any, tmp_path: Path) -> None:
    found = []
    for gate in (0.0, 1.0):
        folders = {name: save(pipe, tmp_path / f"{name}{gate}", n, gate=gate) for n, name in enumerate("ab", 1)}
        mixture = mix(pipe, folders)
        whole = atomtune.generate(pipe, ["a"], steps=1)[0]
        white = Image.new("1", whole.size, 1)
        pixels = Image.new("RGB", whole.size, "red")
        found.append(attribution(pipe, mixture.atoms.ranked, pixels, "a kite", white, top=2, times=(0.5,)))
        mixture.remove()
    assert found[0] == found[1]


def test_conflicts_are_pairs_that_fire_together_along_or_against(pipe: Any, tmp_path: Path) -> None:
    one: dict[str, Any] = {"n_atoms": 1, "target_modules": [SITE]}
    folders = {"a": save(pipe, tmp_path / "a", 1, **one), "c": save(pipe, tmp_path / "c", 7, **one | {"n_atoms": 3})}
    folders["b"] = save(pipe, tmp_path / "b", 1, change=torch.Tensor.neg_, **one)
    mixture = mix(pipe, folders, {"a": 2.0})
    found = conflicts(mixture, PROMPTS, together=-1, along=0, steps=2)
    assert len(found) == 1 + 3 + 3
    (worst,) = conflicts(mixture, PROMPTS, together=0.99, along=0.99, steps=2)
    assert (worst.together, worst.cosine) == (pytest.approx(1), pytest.approx(-1))
    assert weaker([worst]) == ["b/L0[0]"]
    # Against NumPy, on the codes of each adapter read by itself.
    backbone = backbone_of(pipe)
    painted = torch.stack([to_tensor(picture) for picture in atomtune.generate(pipe, PROMPTS, steps=2)])
    latents, conditioning = backbone.encode_pictures(pipe, painted), backbone.encode_prompts(pipe, PROMPTS)
    real, seen = backbone.layout(SITE, conditioning, (8, 8)).real, {}
    for part in folders:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            passes = [noised_pass(pipe.transformer, backbone, latents, conditioning, t, generator, part) for t in TIMES]
        seen[part] = np.concatenate([codes[SITE][real].numpy() for *_, codes in passes]).T
    for c in found:
        pair = [seen[atom.part][atom.row] for atom in (c.first, c.second)]
        assert c.together == pytest.approx(np.corrcoef(pair)[0, 1], abs=1e-5)
    assert orthogonality(mixture, "a", "b") == pytest.approx(0)
    assert 0.5 < orthogonality(mixture, "a", "c") <= 1
    with pytest.raises(UserError, match="At least one atom of b must be left"):
        surgery.drop(mixture, ["c/L0[1]", *weaker([worst])])
    assert surgery.drop(mixture, ["c/L0[1]"]) == len(mixture.atoms) == 4


@pytest.mark.parametrize(
    ("folders", "weights", "message"),
    [
        ({"a": "a"}, {}, "at least two parts, got 1"),
        ({"a": "a", "../b": "b"}, {}, r"A part's name must be 1 to 20 letters.*got '\.\./b'"),
        ({"a": "a", "update": "b"}, {}, "no word of torch's, got 'update'"),
        ({"a": "a", "b": "b/../a"}, {}, "is given twice, as a and b"),
        ({"a": "a", "style": "b"}, {"styel": 1}, "the parts are a, style, got 'styel'. Did you mean `style`"),
        ({"a": "a", "b": "b"}, {"b": math.nan}, "`weight` of b must be a finite number, got nan"),
        ({"a": "a", "b": "nowhere"}, {}, "There is no folder"),
        ({"a": "a", "b": "alien"}, {}, "must be of one base: a is of .*, b of another"),
        ({"a": "alien", "b": "martian"}, {}, "trained on another base model"),
        ({"a": "a", "b": "broken"}, {}, "lacks 1 of"),
    ],
)
def test_mistakes_leave_the_pipeline_as_it_was(
    pipe: Any, places: Path, folders: Any, weights: Any, message: str
) -> None:
    atomtune.load(pipe, places / "b", name="mine")
    before, modules = paint(pipe), [path for path, _ in pipe.transformer.named_modules()]
    with pytest.raises(UserError, match=message) as error:
        mix(pipe, {part: places / folder for part, folder in folders.items()}, weights)
    assert "\n" not in str(error.value)
    assert torch.equal(paint(pipe), before)
    assert [path for path, _ in pipe.transformer.named_modules()] == modules


def test_saving_is_whole_or_nothing(pipe: Any, places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    mixture, out = mix(pipe, {"a": places / "a", "b": places / "b"}), tmp_path / "m"
    monkeypatch.setattr("atomtune.mix.write_whole", full)
    with pytest.raises(UserError, match="No space left"):
        mixture.save(out)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    mixture.save(out)
    mixture.remove()
    with pytest.raises(UserError, match="`out` must not exist yet"):
        mixture.save(out)
    for text in ("{", "[]", '{"weights": 3}', '{"weights": {"a": 1, "b": "x"}}'):
        (out / MIXTURE).write_text(text)
        with pytest.raises(UserError, match=r"mixture\.json can't be read: "):
            base_of(out)
    (out / MIXTURE).write_text('{"weights": {"a": 1, "b": 1}}')
    shutil.rmtree(out / "b")
    with pytest.raises(UserError, match=r"There is no folder .*/b"):
        atomtune.load(pipe, out)


def test_commands(places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, m = ["mix", f"a={places / 'a'}", f"same={places / 'same'}"], str(tmp_path / "m")
    assert main([*given, "--prompt", "a kite", "--limits", "0.9", "0.9"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["atom", "weaker", "correlation", "cosine", "site"]
    assert main([*given, "--prompt", "a kite", "--limits", "0.9", "0.9", "--top", "1"]) == 0
    out, err = capsys.readouterr()
    assert [line.split() for line in out.splitlines()] == rows[:2]
    assert f"{len(rows) - 2} more than shown: --top" in err
    assert ["a/L2[0]", "same/L2[0]", "1.00", "1.00", SITE] in rows
    assert main([*given, "--weight", "same=0.5", "--out", m]) == 0
    assert json.loads((tmp_path / "m" / MIXTURE).read_text())["weights"] == {"a": 1.0, "same": 0.5}
    assert main(["atoms", m, "--top", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "a/L0[0]"
    painted = ["generate", m, "a kite", "--steps", "2", "--out", str(tmp_path / "out")]
    assert main([*painted, "--density", "0.5", "--atom", "a/L0[0]=0"]) == 0
    assert main([*painted, "--site", "a/L0=2", "--atom", "same/L0[0]=0", "--time", "0.5-1.0"]) == 0
    assert main(["surgery", m, "--name", "same/L0[0]=leaves", "--note", "a/L0[1]=odd"]) == 0
    assert json.loads((tmp_path / "m" / "same" / "notes.json").read_text()) == {"L0[0]": {"label": "leaves"}}
    assert json.loads((tmp_path / "m" / "a" / "notes.json").read_text()) == {"L0[1]": {"note": "odd"}}
    assert main(["surgery", m, "--drop", "same/leaves", "--name", "a/L0[2]=kept", "--out", str(tmp_path / "less")]) == 0
    assert "a/kept" in {a.called for a in atomtune.load(lumina2_of(m), tmp_path / "less").atoms}
    assert (
        main(["atoms", m, "--top", "16", "--look", str(tmp_path / "look"), "--prompts", "a kite", "--steps", "1"]) == 0
    )
    assert {path.parent.name for path in (tmp_path / "look").rglob("*.png")} == {"a", "same"}
    capsys.readouterr()
    left, right = (tmp_path / f"{side}.png" for side in ("left", "right"))
    Image.fromarray(np.uint8(255 * np.tile([1, 0], (2, 1)))).save(left)
    Image.fromarray(np.uint8(255 * np.tile([0, 1], (2, 1)))).save(right)
    assert main([*painted, "--where", f"a={left}", "--where", f"same={right}"]) == 0
    regions = np.asarray(Image.open(capsys.readouterr().out.strip()))
    mixture = atomtune.load(lumina2_of(m), m)
    with mixture.using(steer={"a": [Steer(where=Image.open(left))], "same": [Steer(where=Image.open(right))]}):
        assert np.array_equal(np.asarray(atomtune.generate(mixture.pipe, ["a kite"], steps=2)[0]), regions)
    for arguments, message in (
        (["--where", f"b={left}"], "`steer`: the parts are a, same, got 'b'"),
        (["--where", str(left), "--where", str(right)], "`where` must be like PART=MASK, each name once"),
        (["--density", "a/L9=0.5"], "no site 'a/L9'. Did you mean `a/L"),
        (["--density", "0.5", "--density", "much"], "`density` must be one number, or several like L17=0.2"),
        (["--density", "L0=much"], "`density` must be like L17=0.2, each name once, got 'L0=much'"),
        (["--purity", "2"], "`purity` must be between 0 and 1, got 2.0"),
    ):
        assert main([*painted, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["generate", str(places / "a"), "a kite", "--where", f"a={left}"]) == 2
    assert "`steer` by part is for mixtures" in capsys.readouterr().err
    assert main([*given, "--one-file", "--out", str(tmp_path / "one")]) == 0
    for arguments, message in (
        ([*given, "--out", m], "`out` must not exist yet"),
        ([*given, "--one-file"], "`one_file` needs `out`"),
        ([*given, "--drop-weaker"], "`drop_weaker` needs `out`"),
        ([*given, f"a={places / 'b'}"], "`adapter` must be like NAME=ADAPTER, each name once, got 'a="),
        ([*given, "--weight", "a=much"], "`weight` of a must be a finite number, got 'much'"),
        ([*given, "--drop-weaker", "--out", str(tmp_path / "x")], "`prompt` must be given"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    for concept in ("kite", "neon"):
        (tmp_path / concept).mkdir()
        (tmp_path / concept / "options.json").write_text(json.dumps({"concept": concept}))
    assert concepts({"a": tmp_path / "kite", "b": tmp_path / "neon"}) == ["kite", "neon", "kite, neon"]
