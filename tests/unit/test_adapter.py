"""The handle on an adapter: its dials, pruning, saving, and what a user gets wrong."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import atomtune
from atomtune.adapter import base_of
from atomtune.errors import UserError
from atomtune.sampling import save_pictures
from atomtune.training.options import TrainOptions
from atomtune.tuner import atom_layers

PROMPT = "a big 3d kite on a red background"
OPTIONS = TrainOptions(
    steps=3, batch_size=2, n_atoms=4, lr=0.1, sites=("layers.0.attn.to_q", "to_out.0"), unrelated_pictures=2
)


@pytest.fixture(scope="module")
def pipe(bases: dict[str, Path]) -> Any:
    return atomtune.open_pipeline(str(bases["lumina2"]))


@pytest.fixture(scope="module")
def run(pipe: Any, kites: Path, runs: Path) -> Path:
    atomtune.train(pipe, kites, runs / "adapter", OPTIONS, progress=False).remove()
    return runs / "adapter"


@pytest.fixture
def adapter(pipe: Any, run: Path) -> Iterator[atomtune.Adapter]:
    adapter = atomtune.load(pipe, run)
    yield adapter
    adapter.remove()


def paint(pipe: Any, **more: Any) -> np.ndarray:
    return np.asarray(atomtune.generate(pipe, [PROMPT], steps=2, **more)[0])


def strength(adapter: atomtune.Adapter) -> dict[str, torch.Tensor]:
    return {site: layer.atom_strength["default"].clone() for site, layer in atom_layers(adapter.pipe).items()}


def test_atoms_are_ranked_and_found(adapter: atomtune.Adapter) -> None:
    atoms = adapter.atoms
    assert len(atoms) == len(list(atoms)) == sum(len(v) for v in strength(adapter).values())
    assert atoms.top(3) == list(atoms)[:3]
    assert atoms[atoms.top(1)[0].name] == atoms.top(1)[0]
    assert len(atoms.by("maximum")) == len(atoms)
    with pytest.raises(UserError, match="Did you mean "):
        atoms["L0[99]"]


def test_dials_turn_and_return(adapter: atomtune.Adapter) -> None:
    top = adapter.atoms.top(1)[0]
    full = paint(adapter.pipe)
    with adapter.using(density=0.5, strength={top.name: 0.0}) as same:
        assert same is adapter
        assert strength(adapter)[top.path][top.row] == 0
        total = sum(v.sum().item() for v in strength(adapter).values())
        assert total == -(-len(adapter.atoms) // 2) - 1
    with adapter.using(strength=2.0, atoms={top.name: 3.0}):
        assert strength(adapter)[top.path][top.row] == 6
        assert not np.array_equal(paint(adapter.pipe), full)
    assert all((v == 1).all() for v in strength(adapter).values())
    assert np.array_equal(paint(adapter.pipe), full)


@pytest.mark.parametrize(
    ("dial", "statistic", "where"),
    [("contain", "reach", "on unrelated pictures"), ("beside", "reach_beside", "beside the subject")],
)
def test_contained_atoms_fire_only_above_what_they_reach_elsewhere(
    adapter: atomtune.Adapter, dial: str, statistic: str, where: str
) -> None:
    full = paint(adapter.pipe)
    with adapter.using(density=0.0):
        base = paint(adapter.pipe)
    highest = {site: s[statistic].clone() for site, s in adapter.statistics.items()}
    assert any(r.any() for r in highest.values())
    with adapter.using(**{dial: 1.0}):
        assert all(
            torch.equal(layer.floors["default"], highest[site]) for site, layer in atom_layers(adapter.pipe).items()
        )
        with adapter.using(**{dial: 0.5}):  # the inner one holds, then the outer one again
            assert not np.array_equal(paint(adapter.pipe), full)
        assert not np.array_equal(paint(adapter.pipe), full)
    assert all("default" not in layer.floors for layer in atom_layers(adapter.pipe).values())
    assert np.array_equal(paint(adapter.pipe), full)
    for s in adapter.statistics.values():
        s[statistic] = torch.full_like(s[statistic], 1e9)
    with adapter.using(**{dial: 1}):
        assert np.array_equal(paint(adapter.pipe), base), "no code is above its floor"
    for s in adapter.statistics.values():
        del s[statistic]
    message = f"`{dial}` needs what atoms reach {where}"
    with pytest.raises(UserError, match=message), adapter.using(**{dial: 1}):
        pass


def test_the_higher_of_two_floors_holds(adapter: atomtune.Adapter) -> None:
    with adapter.using(contain=0.5, beside=1.0):
        for site, layer in atom_layers(adapter.pipe).items():
            found = adapter.statistics[site]
            assert torch.equal(layer.floors["default"], torch.maximum(0.5 * found["reach"], found["reach_beside"]))


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"contain": -0.1}, "`contain` must be 0 or more, got -0.1"),
        ({"beside": math.inf}, "`beside` must be 0 or more, got inf"),
        ({"density": 1.5}, "`density` must be between 0 and 1, got 1.5"),
        ({"density": math.nan}, "`density` must be between 0 and 1"),
        ({"strength": math.inf}, "`strength` must be a finite number"),
        ({"strength": {"L0[0]": math.nan}}, "must be a finite number"),
        ({"atoms": {"L77[0]": 1.0}}, r"no atom L77\[0\]"),
        ({"formula": "best"}, "`formula` must be one of"),
    ],
)
def test_wrong_dials_are_told_and_change_nothing(adapter: atomtune.Adapter, dials: Any, message: str) -> None:
    with pytest.raises(UserError, match=message), adapter.using(**dials):
        pass
    assert all((v == 1).all() for v in strength(adapter).values())


def test_removing_gives_the_base_back(pipe: Any, run: Path) -> None:
    """Complaint 36: unloading leaves traces, and a second load does nothing."""
    before = paint(pipe)
    adapter = atomtune.load(pipe, run)
    first = paint(pipe)
    assert not np.array_equal(first, before)
    adapter.remove()
    assert np.array_equal(paint(pipe), before)
    again = atomtune.load(pipe, run)
    assert np.array_equal(paint(pipe), first)
    again.remove()


@pytest.mark.parametrize("keep", [0, -1, 10_000, 0.0, 1.5, -0.1, math.nan])
def test_pruning_to_nothing_or_to_more_is_an_error(adapter: atomtune.Adapter, keep: float) -> None:
    before = len(adapter.atoms)
    with pytest.raises(UserError, match="`keep` must leave between 1 and"):
        adapter.prune(keep)
    assert len(adapter.atoms) == before


def test_pruning_keeps_the_first_and_drops_empty_sites(adapter: atomtune.Adapter, tmp_path: Path) -> None:
    top = [a.name for a in adapter.atoms.top(3)]
    assert adapter.prune(3) == 3
    assert [a.name for a in adapter.atoms] == top
    atomtune.save(adapter, tmp_path / "three", note="three atoms")
    config = json.loads((tmp_path / "three" / "adapter_config.json").read_text())
    assert sum(config["size_pattern"].values()) == 3
    assert len(atom_layers(adapter.pipe)) <= 3
    assert "| note | three atoms |" in (tmp_path / "three" / "README.md").read_text()


def test_another_base_is_refused_unless_allowed(run: Path) -> None:
    from pipelines import lumina2

    other = lumina2()
    other.transformer.layers[0].attn.to_q.weight.data.mul_(2)
    with pytest.raises(UserError, match="trained on another base model"):
        atomtune.load(other, run)
    with pytest.warns(UserWarning, match="trained on another base model"):
        atomtune.load(other, run, allow_other_base=True)


def test_the_base_is_named_in_the_file(run: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    assert base_of(run) == str(bases["lumina2"])
    with pytest.raises(UserError, match=r"adapter_config\.json is missing"):
        base_of(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(UserError, match="can't be read"):
        base_of(tmp_path)


# ---------------------------------------------------------------------------------------------------- sampling


def test_a_prompt_has_its_noise_whatever_its_batch(pipe: Any) -> None:
    """Each picture equals, to a rounding of one level, the one that is painted alone with its seed."""
    prompts = ["a kite", "a big flat house on a red background, on the left", "an apple"]
    together = atomtune.generate(pipe, prompts, seed=4, steps=2)
    apart = atomtune.generate(pipe, prompts, seed=4, steps=2, batch_size=1)
    for i, prompt in enumerate(prompts):
        alone = np.asarray(atomtune.generate(pipe, [prompt], seed=4 + i, steps=2)[0]).astype(int)
        assert np.abs(alone - np.asarray(together[i])).max() <= 1
        assert np.abs(alone - np.asarray(apart[i])).max() <= 1


def test_a_text_is_one_prompt_and_lists_of_prompts_are_cut_with_them(pipe: Any) -> None:
    call = {"steps": 1, "guidance": 3.0, "output_type": "latent"}
    prompts, negative = ["a kite", "an apple", "a house"], ["red", "blue", "flat"]
    assert torch.equal(*atomtune.generate(pipe, "a kite", **call), *atomtune.generate(pipe, ["a kite"], **call))
    found = atomtune.generate(pipe, prompts, negative_prompt=negative, batch_size=2, **call)
    alone = atomtune.generate(pipe, prompts[2:], negative_prompt=negative[2:], seed=2, **call)
    assert len(found) == 3
    assert torch.allclose(found[2], alone[0], atol=1e-4)
    assert not torch.allclose(found[2], atomtune.generate(pipe, prompts[2:], seed=2, **call)[0], atol=1e-3)
    sigmas = {"sigmas": [1.0, 0.6, 0.3], "batch_size": 1}
    assert len(atomtune.generate(pipe, prompts, output_type="latent", **sigmas)) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"seed": -1}, "`seed` must be at least 0 and below 2[*][*]63, got -1"),
        ({"seed": 2**63}, "`seed` must be"),
        ({"guidance": math.inf}, "`guidance` must be a finite number, got inf"),
    ],
)
def test_what_no_picture_can_be_painted_with_is_told(pipe: Any, call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        atomtune.generate(pipe, ["a kite"], **call)


def test_a_handle_says_what_it_is(pipe: Any, run: Path) -> None:
    adapter = atomtune.load(pipe, run)
    number, sites = len(adapter.atoms), len(strength(adapter))
    assert repr(adapter) == f"<adapter 'default': {number} atoms at {sites} sites, no prompt gate>"
    adapter.remove()
    assert repr(adapter) == "<adapter 'default': not attached>"


def test_no_prompts_are_an_error(pipe: Any) -> None:
    with pytest.raises(UserError, match="at least one picture"):
        atomtune.generate(pipe, [])


def test_pictures_are_never_overwritten(pipe: Any, tmp_path: Path) -> None:
    pictures = atomtune.generate(pipe, ["a kite"], steps=1)
    names = [save_pictures(pictures, tmp_path / "out", 3)[0].name for _ in range(3)]
    assert names == ["00003.png", "00003-2.png", "00003-3.png"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="`out` can't be written"):
        save_pictures(pictures, tmp_path / "file", 0)
