"""Seeing atoms: against naive loops, alone and in batches, and what a user gets wrong."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import beartype
import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import CAPTIONS

import atomtune
from atomtune import atoms as at
from atomtune.adapter import Adapter
from atomtune.atoms import Atom, strengths
from atomtune.backbones import backbone_of, base_name, token_texts
from atomtune.cli import main
from atomtune.data.picture import to_tensor
from atomtune.errors import UserError
from atomtune.explore.sheets import LINE, SIDE, curve, look
from atomtune.measure import maps, painting, regions
from atomtune.tuner import AtomConfig, atom_layers, attach, base_only, record, remove_adapter

SITES = {
    "lumina2": ["layers.0.attn.to_q", "noise_refiner.0.attn.to_q", "context_refiner.0.attn.to_q"],
    "sd3": ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_v", "transformer_blocks.0.attn.add_k_proj"],
}
PROMPTS = list(CAPTIONS[:3]) + ["a kite"]

# The shapes in the annotations are executed.
checked = jaxtyping.jaxtyped(typechecker=beartype.beartype)
fired, code_maps, twins = checked(maps.fired), checked(maps.code_maps), checked(maps.twins)
paint, strips = checked(painting.paint), checked(painting.strips)
density_curve, attribution = checked(painting.density_curve), checked(regions.attribution)


@pytest.fixture(params=SITES)
def pipe(pipes: dict[str, Any], request: pytest.FixtureRequest) -> Iterator[Any]:
    """A pipeline with random atoms at a site of each kind; the last of each site never fires."""
    pipe = pipes[request.param]
    torch.manual_seed(3)
    config = {"gate_input": "encoder_hidden_states", "gate_dim": {"sd3": 32, "lumina2": 192}[request.param]}
    attach(pipe.transformer, AtomConfig(n_atoms=4, target_modules=SITES[request.param], threshold=0.5, **config))
    for layer in atom_layers(pipe).values():
        torch.nn.init.normal_(layer.dictionary("default").atoms, std=1.0)
        layer.dictionary("default").bias.data[3] = 1e6
    yield pipe
    remove_adapter(pipe)


def ranking(pipe: Any) -> list[Atom]:
    """Every atom, in the order of the sites."""
    return [Atom(i, row, path, row, 1.0, 0.5, 0.5) for i, path in enumerate(atom_layers(pipe)) for row in range(4)]


def some(pipe: Any, prompts: list[str] = PROMPTS) -> tuple[Any, ...]:
    """What `fired` and `code_maps` take first."""
    backbone = backbone_of(pipe)
    latents = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipe, backbone, latents, backbone.encode_prompts(pipe, prompts)


def silence(pipe: Any, but: Atom | None = None) -> None:
    for atom in ranking(pipe):
        if atom != but:
            atom_layers(pipe)[atom.path].dictionary("default").atoms.data[atom.row] = 0


def picture(pipe: Any) -> Image.Image:
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))


def left_half(pipe: Any) -> Image.Image:
    side = picture(pipe).width
    return Image.fromarray(np.uint8(255 * (np.arange(side) < side // 2))[None].repeat(side, 0))


def test_codes_are_a_loop_over_pictures_and_times(pipe: Any) -> None:
    ranked, (_, backbone, latents, _), times = ranking(pipe), some(pipe), (0.2, 0.7)
    tables = fired(*some(pipe), ranked, times=times)
    grids = code_maps(*some(pipe), ranked, times=times)
    noises = torch.randn(2, *latents.shape[1:], generator=torch.Generator().manual_seed(0))
    for picture, prompt in enumerate(PROMPTS):
        given = backbone.encode_prompts(pipe, [prompt])
        for number, time in enumerate(times):
            x = (1 - time) * latents[picture] + time * noises[number]
            with torch.no_grad(), record(pipe) as recording:
                backbone.predict(pipe.transformer, x[None], torch.tensor([time]), given)
            for atom in ranked:
                layout = backbone.layout(atom.path, given, backbone.grid(pipe.transformer, latents))
                for table, mask in zip(tables, (layout.image, layout.real & ~layout.image), strict=True):
                    own = recording.codes[atom.path][0][mask][:, atom.row].numpy()
                    assert (atom.name in table) == bool(len(own))
                    if len(own):
                        assert np.allclose(table[atom.name][number, picture, : len(own)], own, atol=1e-4)
                        assert np.isnan(table[atom.name][number, picture, len(own) :]).all()
        words = token_texts(backbone.readings(pipe, prompt))
        assert {np.isfinite(codes[0, picture]).sum() for codes in tables[1].values()} == {len(words)}
        assert any("kite" in word for word in words) == ("kite" in prompt)
    assert tables[0].keys() == grids.keys()
    assert all(np.allclose(grids[name].reshape(4, -1), codes.mean(0)) for name, codes in tables[0].items())


def test_examples_are_the_strongest_the_quantiles_and_the_silent() -> None:
    peaks = np.array([0.0, 3.0, 1.0, 0.0, 5.0, 2.0, 4.0])
    assert maps.examples(peaks, 2, (1.0, 0.5, 0.0)) == {"most": [4, 6], "quantiles": [4, 1, 2], "silent": [0, 3]}
    assert maps.examples(np.zeros(2)) == {"most": [], "quantiles": [], "silent": [0, 1]}


def test_twins_are_found_by_what_they_add_and_when_they_fire(pipe: Any) -> None:
    ranked = ranking(pipe)
    first, second = (layer.dictionary("default") for layer in list(atom_layers(pipe).values())[:2])
    for parameter in (first.encoder, first.bias, first.atoms):
        parameter.data[1] = parameter.data[0]
    second.atoms.data[0] = 3 * first.atoms.data[0]
    first.atoms.data[2] = 0
    found = twins(pipe, ranked, ranked, fired(*some(pipe), ranked), number=11)
    near = {name: (cosine, together) for name, cosine, together in found[ranked[0].name]}
    assert {*list(near)[:2]} == {ranked[1].name, ranked[4].name}
    assert near[ranked[1].name] == pytest.approx((1, 1), abs=1e-5)
    assert near[ranked[4].name][0] == pytest.approx(1)
    assert all(math.isnan(near[a.name][1]) for a in ranked[3:] if a.name in near)  # never fires, or another site
    assert {cosine for _, cosine, _ in found[ranked[2].name]} == {0.0}


def test_a_strip_is_what_the_dials_paint_one_by_one(pipe: Any) -> None:
    """With guidance, so that a family may run both branches in one batch."""
    ranked, call = ranking(pipe), {"num_inference_steps": 2, "guidance_scale": 3.0}
    pictures, away = strips(pipe, ranked, ["L0[1]", "L0[0]"], CAPTIONS[0], seed=5, **call)["L0[0]"]
    with base_only(pipe):
        expected = atomtune.generate(pipe, [CAPTIONS[0]], seed=5, steps=2, guidance=3.0)
    for strength in (0.0, 1.0, 2.0, 4.0):
        with strengths(pipe, {ranked[0].path: torch.tensor([strength, 1, 1, 1])}):
            expected += atomtune.generate(pipe, [CAPTIONS[0]], seed=5, steps=2, guidance=3.0)
    assert np.abs(255 * pictures - np.stack([np.asarray(one) for one in expected])).max() <= 1
    assert [distance > 0 for distance in away] == [True, True, False, True, True]
    assert all(torch.equal(layer.atom_strength["default"], torch.ones(4)) for layer in atom_layers(pipe).values())
    with pytest.raises(UserError, match=r"no atom L0\[9\]\. Did you mean `L0"):
        strips(pipe, ranked, ["L0[9]"], CAPTIONS[0])


def test_the_curve_runs_from_the_base_to_the_whole(pipe: Any) -> None:
    ranked, call = ranking(pipe), {"num_inference_steps": 2, "densities": (0.5,), "seeds": (0, 1)}
    rows = density_curve(pipe, ranked, PROMPTS[:2], **call)
    assert [(row["density"], row["atoms"]) for row in rows] == [(0.0, 0), (0.5, 6), (1.0, 12)]
    assert [rows[0]["closeness"], rows[2]["closeness"], rows[2]["deviation"]] == [0, 1, 0]
    dials = [at.dialled(ranked, density) for density in (0.0, 0.5, 1.0)]
    painted = [paint(pipe, [(p, s, d) for d in dials], num_inference_steps=2) for p in PROMPTS[:2] for s in (0, 1)]
    ratios = [np.abs(half - whole).mean() / np.abs(base - whole).mean() for base, half, whole in painted]
    assert rows[1]["closeness"] == pytest.approx(1 - np.mean(ratios), abs=1e-3)
    assert len(ElementTree.fromstring(painting.curve_svg(rows)).find("{*}polyline").get("points").split()) == 3
    with pytest.raises(UserError, match="must name at least one picture"):
        density_curve(pipe, ranked, [])
    silence(pipe)
    with pytest.raises(UserError, match="the adapter changes no picture of"):
        density_curve(pipe, ranked, PROMPTS[:1], **call)


def test_shares_are_those_of_a_naive_loop_and_of_small_steps(pipe: Any) -> None:
    ranked, backbone = ranking(pipe), backbone_of(pipe)
    clean = backbone.encode_pictures(pipe, to_tensor(picture(pipe))[None])
    conditioning = backbone.encode_prompts(pipe, ["a kite"])
    noise = torch.randn(2, *clean.shape[1:], generator=torch.Generator().manual_seed(0))
    columns = clean.shape[-1] // 2

    def left(dial: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad(), strengths(pipe, dial):
            return torch.cat([
                backbone.predict(pipe.transformer, (1 - t) * clean + t * own, torch.tensor([t]), conditioning)
                for t, own in zip((0.3, 0.6), noise, strict=True)
            ])[..., :columns].double()  # fmt: skip

    full = left(at.dialled(ranked))
    change = full - left(at.dialled(ranked, 0.0))
    whole = change.square().sum()
    rows = attribution(pipe, ranked, picture(pipe), "a kite", left_half(pipe), times=(0.3, 0.6), top=20)
    assert {row["atom"] for row in rows} == {a.name for a in ranked}
    assert any(abs(row["exact"]) > 0.01 for row in rows)
    for row in rows:
        lost = full - left(at.dialled(ranked, strength={row["atom"]: 0.0}))
        less, more = (left(at.dialled(ranked, strength={row["atom"]: 1 + sign * 0.01})) for sign in (-1, 1))
        assert row["exact"] == pytest.approx(((lost * change).sum() / whole).item(), abs=1e-4)
        assert row["inside"] == pytest.approx((lost.square().sum() / whole).sqrt().item(), abs=1e-4)
        assert row["additive"] == pytest.approx((((more - less) * change).sum() / whole / 0.02).item(), abs=3e-3)
        assert row["error"] == row["additive"] - row["exact"]


def test_the_only_atom_made_all_of_it(pipe: Any) -> None:
    ranked = ranking(pipe)
    silence(pipe, but=ranked[0])
    whole = picture(pipe)
    first, *others = attribution(pipe, ranked, whole, "a kite", Image.new("1", whole.size, 1), top=3)
    assert first["atom"] == ranked[0].name
    assert (first["exact"], first["inside"], first["outside"]) == pytest.approx((1, 1, 0), abs=1e-5)
    assert all((row["exact"], row["additive"]) == pytest.approx((0, 0), abs=1e-5) for row in others)


def test_wrong_masks_are_told(pipe: Any) -> None:
    ranked, whole, mask = ranking(pipe), picture(pipe), left_half(pipe)
    with pytest.raises(UserError, match=r"`mask` must be a picture of mode L or 1, got RGB\. Convert it"):
        attribution(pipe, ranked, whole, "a kite", whole)
    with pytest.raises(UserError, match=r"`mask` must have the picture's size .* got \(8, 9\)"):
        attribution(pipe, ranked, whole, "a kite", mask.resize((8, 9)))
    with pytest.raises(UserError, match="got an empty region"):
        attribution(pipe, ranked, whole, "a kite", Image.new("L", mask.size))
    silence(pipe)
    with pytest.raises(UserError, match="where the adapter changes the picture"):
        attribution(pipe, ranked, whole, "a kite", mask)


def everything(pipe: Any, batch_size: int = 8) -> dict[str, Any]:
    """All that can be seen, as arrays."""
    ranked, size = ranking(pipe), {"batch_size": batch_size}
    seen = fired(*some(pipe), ranked, **size)
    near = twins(pipe, ranked, ranked, seen)
    shares = attribution(pipe, ranked, picture(pipe), "a kite", left_half(pipe), **size)
    found = {f"{kind}{name}": codes for kind, table in enumerate(seen) for name, codes in table.items()}
    found["strip"], _ = strips(pipe, ranked, ["L0[1]"], CAPTIONS[1], num_inference_steps=1, **size)["L0[1]"]
    found |= {f"twins{name}": np.array([numbers for _, *numbers in rows]) for name, rows in near.items()}
    return found | {f"share{row['atom']}": np.array(list(row.values())[1:]) for row in shares}


def test_a_batch_changes_nothing_and_a_reloaded_adapter_shows_the_same(
    pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, alone = everything(pipe), everything(pipe, 1)
    assert all(np.allclose(alone[name], value, atol=1e-4, equal_nan=True) for name, value in before.items())
    few, _ = fired(*some(pipe, PROMPTS[:1]), ranking(pipe))
    assert all(np.allclose(codes, before[f"0{name}"][:, :1], atol=1e-4) for name, codes in few.items())
    Adapter(pipe, at.measure(*some(pipe))).save(tmp_path / "saved")
    remove_adapter(pipe)
    atomtune.load(pipe, tmp_path / "saved")
    after = everything(pipe)
    assert all(np.array_equal(after[name], value, equal_nan=True) for name, value in before.items())
    command = ["atoms", str(tmp_path / "saved"), "--top", "2", "--base", str(base_name(pipe)), "--steps", "1"]
    command += ["--look", str(tmp_path / "look")]
    assert main([*command, "--curve", str(tmp_path / "curve.png")]) == 2
    assert main([*command, "--curve", str(tmp_path / "curve.svg")]) == 2  # it does not know the concept
    assert main([*command, "--curve", str(tmp_path / "curve.svg"), "--prompts", "a kite"]) == 0
    told = capsys.readouterr().err.splitlines()
    assert {str(tmp_path / "curve.svg"), f"2 sheets in {tmp_path / 'look'}"} <= set(told)
    assert (tmp_path / "curve.svg").read_text().startswith("<svg")
    sheets = [np.asarray(Image.open(path)).shape for path in (tmp_path / "look").glob("L*.png")]
    width = -(-SIDE // picture(pipe).width) * picture(pipe).width  # its labels want room
    assert sheets == [(width + 2 * LINE + 4, 6 * (width + 4), 3)] * 2
    remove_adapter(pipe)
    atoms = atomtune.load(pipe, tmp_path / "saved", name="other").atoms
    look(atoms, atoms.top(1), "a kite", tmp_path / "named", num_inference_steps=1)
    curve(atoms, ["a kite"], tmp_path / "named.svg", seeds=(0,), densities=(), num_inference_steps=1)
    assert len(list((tmp_path / "named").glob("L*.png"))) == 1
    remove_adapter(pipe, "other")
    atomtune.load(pipe, tmp_path / "saved")  # as the fixture left it
