"""Atoms: measured against a naive loop, ranked, found by name, dialled."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from pipelines import random_atoms

from atomtune.atoms import (
    FORMULAS,
    Atom,
    contained,
    count,
    dialled,
    find,
    kept,
    measure,
    order_by_importance,
    ranking,
    strengths,
)
from atomtune.backbones import backbone_of
from atomtune.errors import UserError
from atomtune.tuner import AtomConfig, assigned, atom_layers, attach, base_only, record

SITES = ["layers.0.attn.to_q", "noise_refiner.0.attn.to_v", "context_refiner.0.attn.to_k"]
PROMPTS = ["a big flat kite on a red background, on the left", "a kite"]
TIMES = (0.2, 0.7)


@pytest.fixture
def pipe(shared: Any) -> Iterator[Any]:
    with random_atoms(shared, n_atoms=5, target_modules=SITES, threshold=0.5):
        yield shared


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def measured(pipe: Any, latents: torch.Tensor, **more: Any) -> dict[str, dict[str, torch.Tensor]]:
    backbone = backbone_of(pipe)
    conditioning = backbone.encode_prompts(pipe, PROMPTS)
    return measure(pipe.transformer, backbone, latents, conditioning, times=TIMES, repeats=1, **more)


# ----------------------------------------------------------------------------------------------------- measure


def test_measure_is_a_loop_over_positions(pipe: Any, latents: torch.Tensor) -> None:
    """Real positions, of words too; purity is of the picture's. Padding never counts."""
    masks = torch.rand(2, 64, generator=torch.Generator().manual_seed(1))
    found = measured(pipe, latents, masks=masks)
    backbone = backbone_of(pipe)
    conditioning = backbone.encode_prompts(pipe, PROMPTS)
    lengths = conditioning["encoder_attention_mask"].sum(1).tolist()
    assert lengths[0] != lengths[1]
    seen: dict[str, list[torch.Tensor]] = {site: [] for site in SITES}
    placed: dict[str, list[torch.Tensor]] = {site: [] for site in SITES}
    weights: dict[str, list[torch.Tensor]] = {site: [] for site in SITES}
    generator = torch.Generator().manual_seed(0)
    for time in TIMES:
        noise = torch.randn(latents.shape, generator=generator)
        with torch.no_grad(), record(pipe.transformer) as recording:
            x = (1 - time) * latents + time * noise
            backbone.predict(pipe.transformer, x, torch.full((2,), time), conditioning)
        for site, (codes,) in recording.codes.items():
            for i, length in enumerate(lengths):
                first, last = {"l": (length, length + 64), "n": (0, 64), "c": (0, length)}[site[0]]
                seen[site].append(codes[i, :last].double())
                placed[site].append(codes[i, first:last].double())
                weights[site].append(masks[i].double())
    for site in SITES:
        codes, statistics = torch.cat(seen[site]), found[site]
        norm = atom_layers(pipe)[site].dictionary("default").atoms.norm(dim=1)
        assert torch.allclose(statistics["norm"], norm)
        assert torch.allclose(statistics["mean"], codes.mean(0).float())
        assert torch.allclose(statistics["density"], (codes > 0).double().mean(0).float())
        assert torch.allclose(statistics["maximum"], codes.amax(0).float())
        active = codes.sum(0) / (codes > 0).sum(0).clamp_min(1)
        assert torch.allclose(statistics["mean_when_active"], active.float())
        assert statistics["density"][4] == 0
        if site.startswith("c"):
            assert statistics["purity"].isnan().all()
            continue
        energy, subject = torch.cat(placed[site]).square(), torch.cat(weights[site])[:, None]
        on, off = ((energy * w).sum(0) / w.sum() for w in (subject, 1 - subject))
        assert torch.allclose(statistics["purity"][:4], (on / (on + off))[:4].float(), atol=1e-5)
        assert statistics["by_time"].shape == (5, 8)


def test_without_masks_the_subject_is_where_predictions_differ(pipe: Any, latents: torch.Tensor) -> None:
    backbone = backbone_of(pipe)
    conditioning = backbone.encode_prompts(pipe, PROMPTS)
    total = torch.zeros(2, 64)
    generator = torch.Generator().manual_seed(0)
    for time in TIMES:
        x = (1 - time) * latents + time * torch.randn(latents.shape, generator=generator)
        s = torch.full((2,), time)
        with torch.no_grad():
            adapted = backbone.predict(pipe.transformer, x, s, conditioning)
            with base_only(pipe.transformer):
                plain = backbone.predict(pipe.transformer, x, s, conditioning)
        total += (adapted - plain).square().mean(1).flatten(1) / len(TIMES)
    masks = (total > 0.5 * total.quantile(0.98, dim=1, keepdim=True)).float()
    ours, theirs = measured(pipe, latents), measured(pipe, latents, masks=masks)
    for site in SITES:
        assert torch.equal(ours[site]["purity"].nan_to_num(-1), theirs[site]["purity"].nan_to_num(-1))


# -------------------------------------------------------------------------------------------------------- rank


@pytest.mark.parametrize("formula", sorted(FORMULAS.keys() - {"focus"}))
def test_ranking_is_by_the_formula(pipe: Any, latents: torch.Tensor, formula: str) -> None:
    statistics = measured(pipe, latents)
    ranked = ranking(pipe, statistics, formula)
    assert len({a.name for a in ranked}) == len(ranked) == 15
    assert [a.importance for a in ranked] == sorted((a.importance for a in ranked), reverse=True)
    for atom in ranked:
        s = statistics[atom.path]
        value = s[formula][atom.row].nan_to_num(0) * (1 if formula in ("effect", "purity") else s["norm"][atom.row])
        assert atom.importance == value.item()
        assert atom.dead == (s["density"][atom.row] == 0)
    assert sum(a.dead for a in ranked) == 3


def test_an_unknown_formula_is_an_error(pipe: Any) -> None:
    with pytest.raises(UserError, match=r"`formula` must be one of effect, .*got 'median'"):
        ranking(pipe, {}, "median")


def test_an_adapter_without_statistics_says_so(pipe: Any) -> None:
    with pytest.raises(UserError, match="no statistics at noise_refiner"):
        ranking(pipe, {})


def test_order_by_importance_moves_atoms_and_keeps_their_names(pipe: Any, latents: torch.Tensor) -> None:
    statistics = measured(pipe, latents)
    before = {a.name: a for a in ranking(pipe, statistics)}
    x = torch.randn(3, 24)
    layer = atom_layers(pipe)[SITES[0]]
    with torch.no_grad():
        out = layer(x)
    ordered = order_by_importance(pipe, statistics)
    after = {a.name: a for a in ranking(pipe, ordered)}
    assert before.keys() == after.keys()
    assert all(before[name].importance == after[name].importance for name in before)
    for site in SITES:
        values = [a.importance for a in sorted((a for a in after.values() if a.path == site), key=lambda a: a.row)]
        assert values == sorted(values, reverse=True)
    with torch.no_grad():
        assert torch.allclose(layer(x), out, atol=1e-6)


# --------------------------------------------------------------------------------------------------- selection


def atom(site: int, number: int, row: int, importance: float) -> Atom:
    return Atom(site, number, f"s{site}", row, importance, 0.5, math.nan)


RANKED = [atom(1, 7, 0, 4.0), atom(0, 3, 1, 3.0), atom(1, 2, 1, 2.0), atom(0, 12, 0, 1.0)]


@pytest.mark.parametrize(("density", "number"), [(0, 0), (0.001, 1), (0.25, 1), (0.26, 2), (0.5, 2), (1, 4)])
def test_density_counts_up(density: float, number: int) -> None:
    assert count(density, 4) == number


def test_density_is_not_fooled_by_rounding() -> None:
    assert [count(n / 1000, 1000) for n in range(1001)] == list(range(1001))


@pytest.mark.parametrize("density", [-0.1, 1.1, math.nan, math.inf])
def test_density_out_of_range_is_an_error(density: float) -> None:
    with pytest.raises(UserError, match="`density` must be between 0 and 1"):
        count(density, 4)


def test_dial_and_kept_take_the_first_of_the_ranking() -> None:
    assert {p: v.tolist() for p, v in dialled(RANKED, 0.5).items()} == {"s1": [1, 0], "s0": [0, 1]}
    assert {p: v.tolist() for p, v in kept(RANKED, 3).items()} == {"s1": [0, 1], "s0": [1]}
    assert {p: v.tolist() for p, v in kept(RANKED, 1).items()} == {"s1": [0], "s0": []}


def test_single_atoms_are_set_over_the_density() -> None:
    values = dialled(RANKED, 0.25, {"L0[12]": 2.0, " L1[7] ": -0.5})
    assert {p: v.tolist() for p, v in values.items()} == {"s1": [-0.5, 0], "s0": [2, 0]}
    with pytest.raises(UserError, match=r"strength of L0\[12\] must be a finite number"):
        dialled(RANKED, 1.0, {"L0[12]": math.nan})


def test_an_atom_is_found_by_name_or_close_ones_are_named() -> None:
    assert find(RANKED, "L0[12]") is RANKED[3]
    with pytest.raises(UserError, match=r"no atom L0\[13\]\. Did you mean .*L0\[12\]"):
        find(RANKED, "L0[13]")
    for name in ("atom 3", "L0", "0[12]", "L0[12] and more"):
        with pytest.raises(UserError, match=r"named like L17\[137\]"):
            find(RANKED, name)


def test_strengths_are_put_back_even_after_an_error(pipe: Any) -> None:
    buffer = atom_layers(pipe)[SITES[0]].atom_strength["default"]
    assert torch.equal(buffer, torch.ones(5))

    def inside() -> None:
        with strengths(pipe, {SITES[0]: torch.arange(5.0)}), strengths(pipe, {SITES[0]: 3.0}):
            assert torch.equal(buffer, torch.full((5,), 3.0))
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    assert torch.equal(buffer, torch.ones(5))


def test_strengths_are_put_back_where_the_model_was_cast_inside(pipe: Any) -> None:
    layer = atom_layers(pipe)[SITES[0]]
    with strengths(pipe, {SITES[0]: 0.5}):
        layer.to(torch.bfloat16)
    assert torch.equal(layer.atom_strength["default"].float(), torch.ones(5))
    layer.to(torch.float32)


def test_what_a_context_has_set_follows_a_model_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """As offloading has it, which moves the model inside its forward."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no meta
    model = torch.nn.Sequential(torch.nn.Linear(6, 6))
    attach(model, AtomConfig(n_atoms=4, target_modules=["0"]))
    layer = atom_layers(model)["0"]
    layer.steering["default"], layer.replaced["default"] = torch.ones(1, 1, 1), (torch.ones(2, 3, 1) > 0, torch.ones(1))
    x = torch.zeros(2, 3, 6, device="meta")
    with contained(model, {"0": torch.ones(4)}):
        assert model.to("meta")(x).device.type == "meta"
        layer.steering.clear(), layer.replaced.clear()
        with assigned(model, ["default"] * 2):
            assert model(x).device.type == "meta"


def test_focus_is_the_share_of_an_effect_that_is_on_the_subject(pipe: Any) -> None:
    number, sites = [5.0, 0.0, 3.0, 1.0, 0.0], atom_layers(pipe.transformer)
    beside = torch.tensor([5.0, 1.0, 4.0, 0.0, 0.0])
    known = {"effect": torch.tensor(number), "effect_beside": beside, "density": beside, "purity": beside}
    ranked = ranking(pipe, {site: dict(known) for site in sites}, "focus")
    first = [atom for atom in ranked if atom.path == ranked[0].path]
    assert [atom.row for atom in first] == [3, 0, 2, 1, 4]
    assert [atom.importance for atom in first] == pytest.approx([1, 0.5, 0.36, 0, 0])
    known.pop("effect_beside")
    with pytest.raises(UserError, match="lack the effect_beside of some atoms"):
        ranking(pipe, dict.fromkeys(sites, known), "focus")
