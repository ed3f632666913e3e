"""Editing one picture: what it is tuned on, when that stops, what the measures say, and what a user gets wrong."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pipelines import random_atoms

import atomtune
from atomtune.backbones import BACKBONES, backbone_of
from atomtune.cli import main
from atomtune.data.picture import to_tensor
from atomtune.editing import tune
from atomtune.editing.options import TUNING, EditOptions, Point
from atomtune.editing.sweep import Edit, best, blended, edit, sweep, table
from atomtune.errors import UserError
from atomtune.measure.edits import REPEATS, TIMES, alignment, likeness
from atomtune.sampling import generate
from atomtune.scenes.render import render
from atomtune.scenes.world import scene
from atomtune.training.batch import draw
from atomtune.training.encode import Bucket
from atomtune.training.objective import among
from atomtune.training.options import TrainOptions
from atomtune.training.prepare import Item
from atomtune.tuner import atom_layers, base_only, prompt_gate

SOURCE, PROMPTS = "a kite on a red background", ["a kite on a blue background", "a big kite"]
SHORT = dataclasses.replace(TUNING, steps=3, n_atoms=4, lr=0.1, sites=("layers.0.attn.to_q", "to_out.0"))


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(render(scene("kite", position="left", color="red")))


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    """White on the left half."""
    return Image.fromarray(np.uint8(255 * np.tile(np.repeat([1, 0], 32), (64, 1))))


# ------------------------------------------------------------------------------------------------------- tune


def test_variants_are_the_picture_and_small_moves_of_it_with_its_mask(
    picture: Image.Image, mask: Image.Image, tmp_path: Path
) -> None:
    tune.write_data(tmp_path / "data", picture, SOURCE, mask, EditOptions(variants=6, mirror=True))
    pictures = [np.asarray(Image.open(p), float) for p in sorted((tmp_path / "data").glob("??.png"))]
    masks = [np.asarray(Image.open(p), float) for p in sorted((tmp_path / "data").glob("*.mask.png"))]
    assert len(pictures) == len(masks) == 6
    assert np.array_equal(pictures[0], np.asarray(picture))
    assert {p.read_text() for p in (tmp_path / "data").glob("*.txt")} == {SOURCE + "\n"}
    whole = np.asarray(picture, float)
    for i, (moved, covered) in enumerate(zip(pictures[1:], masks[1:], strict=True), 1):
        mirror = slice(None, None, -1) if i % 2 else slice(None)
        assert 0 < np.abs(moved[:, mirror] - whole).mean() < 40
        assert np.abs(covered[:, mirror] - np.asarray(mask, float)).mean() < 255 * 0.15
        # Edges are repeated: the background goes on.
        assert np.abs(moved[:, mirror][:2, -2:] - whole[:2, -2:]).max() < 12
    again = tmp_path / "again"
    tune.write_data(again, picture, SOURCE, None, EditOptions(variants=1))
    assert [p.name for p in sorted(again.iterdir())] == ["00.png", "00.txt"]


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ([1.0, 0.5, 0.4, 0.39, 0.389, 0.388], 5),
        ([1.0, 0.5, 0.4, 0.3, 0.2, 0.1], None),
        ([1.0, 1.1, 1.2, 1.3], 4),
        ([1.0, 1.0, 1.0, 1.0], 4),
    ],
    ids=["plateau", "falling", "never fell", "never moved"],
)
def test_tuning_stops_where_the_loss_has_stopped_falling(
    monkeypatch: pytest.MonkeyPatch, losses: list[float], stops: int | None
) -> None:
    looks = iter(losses)
    monkeypatch.setattr(tune, "fixed_loss", lambda run: next(looks))
    stop = tune.plateau(looks=2, every=5)
    done = [step for step in range(1, 5 * len(losses) + 1) if stop(SimpleNamespace(done=step))]  # type: ignore[arg-type]
    assert done[:1] == ([] if stops is None else [5 * stops])


def test_a_stopped_run_is_a_whole_one(shared: Any, kites: Path, runs: Path) -> None:
    adapter = atomtune.train(shared, kites, runs / "stopped", SHORT, progress=False, stop=lambda run: run.done == 2)
    assert "| steps | 2 |" in (runs / "stopped/README.md").read_text()
    assert len((runs / "stopped/log.jsonl").read_text().splitlines()) == 2
    assert (runs / "stopped/checkpoints/step-000002").is_dir()
    adapter.remove()


@pytest.mark.parametrize(("said", "steps"), [({}, 50), ({"steps": 7}, 7)])
def test_a_quick_tuning_leaves_what_is_said(
    picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, Any], steps: int
) -> None:
    seen: list[TrainOptions] = []
    monkeypatch.setattr("atomtune.editing.tune.train", lambda pipe, data, run, options, **_: seen.append(options))
    training = dataclasses.replace(TUNING, **said)
    tune.tune(None, picture, SOURCE, None, tmp_path / "out", EditOptions(quick=True), training)
    assert [(o.steps, o.times) for o in seen] == [(steps, tune.QUICK["times"])]


def test_chosen_times_are_the_only_ones() -> None:
    times = (0.25, 0.5, 1.0)
    drawn = among(times)(200, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == set(times)
    options = dataclasses.replace(TUNING, times=times)
    assert type(options).from_json(options.to_json()) == options
    assert "times" not in TUNING.essence()
    with pytest.raises(UserError, match=r"`times` must lie in \[0, 1\], got \(0\.5, 2\.0\)"):
        dataclasses.replace(TUNING, times=(0.5, 2.0))
    bucket = Bucket((8, 8), (0, 1), torch.zeros(1, 2, 4, 8, 8), torch.zeros(1, 2, 4), None, torch.zeros(0))
    items = [Item(0, 0, 0), Item(0, 1, 0)]
    material = SimpleNamespace(items=items, buckets=[bucket], conditioning={})
    batch = draw(material, BACKBONES["Lumina2Pipeline"], options, 0, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert set(batch.s.tolist()) <= set(times)


# --------------------------------------------------------------------------------------------------- measures


def test_likeness_is_one_for_the_same_wherever_it_is(picture: Image.Image) -> None:
    source, other = to_tensor(picture), to_tensor(Image.fromarray(render(scene("house", position="left", color="red"))))
    weight = torch.zeros(8, 8)
    weight[2:6, :4] = 1
    plain = other[:, :1, :1].expand_as(other)
    moved = torch.cat([source[..., -26:], source[..., :-26]], -1)
    same, elsewhere, foreign, gone = likeness(source, weight, torch.stack([source, moved, other, plain])).tolist()
    assert same == elsewhere == pytest.approx(1, abs=1e-4)
    assert elsewhere > foreign > gone > 0
    # Against a loop, the weight of two patches on the subject.
    share, edits = torch.zeros(8, 8), torch.stack([other, torch.rand(3, 64, 64) * 2 - 1])
    share[2, 1], share[5, 3] = 1, 0.5
    for value, edit_ in zip(likeness(source, share, edits), edits, strict=True):
        error = 0.0
        for row, column, w in ((2, 1, 1.0), (5, 3, 0.5)):
            patch = source[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            places = [(y, x) for y in range(0, 57, 2) for x in range(0, 57, 2)]
            error += w * min((edit_[:, y : y + 8, x : x + 8] - patch).square().mean().item() for y, x in places) / 1.5
        assert value.item() == pytest.approx(1 - error**0.5 / 2, abs=1e-4)
    large = to_tensor(picture.resize((512, 512)))
    assert likeness(large, weight, large[None]).item() == pytest.approx(1, abs=1e-3)


def test_alignment_asks_the_base_which_words_fit_and_knows_no_adapter(shared: Any) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    first = alignment(shared, latents, [PROMPTS[0], SOURCE], SOURCE)
    assert first[0] != 0
    assert first[1] == pytest.approx(0, abs=1e-6)
    assert alignment(shared, latents[:1], [SOURCE], PROMPTS[0]).item() == pytest.approx(-first[0].item(), abs=1e-6)
    with random_atoms(shared, n_atoms=4, target_modules=["to_q"]):
        assert torch.equal(alignment(shared, latents, [PROMPTS[0], SOURCE], SOURCE), first)


def test_alignment_is_by_the_familys_own_noise_and_target(pipes: dict[str, Any]) -> None:
    pipe = pipes["sd15"]
    backbone, latents = backbone_of(pipe), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    generator, errors = torch.Generator().manual_seed(0), {}
    draws = [(t, torch.randn(1, 4, 8, 8, generator=generator)) for t in TIMES for _ in range(REPEATS)]
    for words in (PROMPTS[0], SOURCE):
        given, errors[words] = backbone.encode_prompts(pipe, [words]), 0.0
        for time, noise in draws:
            x, target = backbone.noised(latents, time, noise)
            with torch.no_grad():
                predicted = backbone.predict(pipe.unet, x, torch.tensor([time]), given)
            errors[words] += (predicted - target).square().mean().item()
    asked, told = errors.values()
    found = alignment(pipe, latents, [PROMPTS[0]], SOURCE).item()
    assert found == pytest.approx((told - asked) / (told + asked), abs=1e-5)


# ------------------------------------------------------------------------------------------------------- edit


def found(rows: list[tuple[Point, float, float]]) -> list[Edit]:
    return [Edit(point, "a", 0, Image.new("RGB", (2, 2)), like, right) for point, like, right in rows]


def test_the_best_point_trades_both_measures_on_their_own_scales() -> None:
    points = [Point(strength=s) for s in (1.0, 0.9, 0.5)]
    edits = found([(points[0], 0.9, 0.001), (points[1], 0.89, 0.005), (points[2], 0.3, 0.006)])
    assert best(edits) == points[1]
    assert [row["score"] for row in table(edits)] == pytest.approx([1.0, 0.59 / 0.6 + 0.8, 1.0])
    assert best(edits[:1]) == points[0]
    assert table(edits + found([(points[0], 0.7, 0.003)]))[0]["likeness"] == pytest.approx(0.8)


def test_a_sweep_paints_while_the_dials_are_turned() -> None:
    from contextlib import contextmanager

    turned: list[int] = []

    @contextmanager
    def turn(point: int) -> Any:
        turned.append(point)
        yield
        turned.pop()

    assert list(sweep([1, 2], turn, lambda: list(turned))) == [(1, [1]), (2, [2])]


def test_blending_is_the_mean_of_both_predictions(shared: Any) -> None:
    backbone, latents = backbone_of(shared), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    given = backbone.encode_prompts(shared, PROMPTS)

    @torch.no_grad()
    def predict() -> torch.Tensor:
        return backbone.predict(shared.transformer, latents, torch.tensor([0.3, 0.8]), given)

    with random_atoms(shared, n_atoms=4, target_modules=["to_q"], threshold=0.0):
        tuned = predict()
        with base_only(shared):
            base = predict()
        with blended(shared, 0.25):
            torch.testing.assert_close(predict(), 0.25 * tuned + 0.75 * base)
        assert torch.equal(predict(), tuned)
    assert not shared.transformer._forward_hooks


def test_pictures_in_a_list_are_blended_each(pipes: dict[str, Any]) -> None:
    pipe = pipes["z_image"]
    call = {"steps": 1, "guidance": 0.0, "output_type": "latent", "height": 64, "width": 64}
    with random_atoms(pipe, n_atoms=4, target_modules=["to_q"], threshold=0.0):
        with base_only(pipe):
            base = generate(pipe, ["a kite"], **call)[0]
        tuned = generate(pipe, ["a kite"], **call)[0]
        with blended(pipe, 0.25):
            found = generate(pipe, ["a kite"], **call)[0]
    assert torch.allclose(found, 0.25 * tuned + 0.75 * base, atol=1e-4)
    assert not torch.allclose(found, base, atol=1e-4)


def test_the_whole_way_by_command_and_function(
    bases: dict[str, Path], picture: Image.Image, mask: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture.save(tmp_path / "kite.png")
    mask.save(tmp_path / "mask.png")
    asked = ["edit", str(tmp_path / "kite.png"), "--source", SOURCE, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]
    asked += ["--base", str(bases["lumina2"]), "--sampler", "1", "--mask", str(tmp_path / "mask.png")]
    train = [
        "--steps",
        "3",
        "--n-atoms",
        "4",
        "--lr",
        "0.1",
        "--sites",
        *(SHORT.sites or ()),
        "--looks",
        "0",
        "--variants",
        "8",
    ]
    out = tmp_path / "out"
    assert main([*asked, *train, "--out", str(out), "--purity", "0", "--strength", "1", "0"]) == 0
    text, err = capsys.readouterr()
    head, *rows = text.splitlines()
    assert head.split() == ["purity", "beside", "keep", "strength", "likeness", "alignment", "score"]
    assert len(rows) == 4
    assert sum("best" in row for row in rows) == 1
    assert "likeness: 1 - rms difference of pixels" in err
    assert len(list((out / "data").glob("*.mask.png"))) == 8
    assert len(list((out / "pictures").glob("*.png"))) == 8
    assert [path.name for path in sorted((out / "strips").iterdir())] == ["00.png", "01.png"]
    assert np.asarray(Image.open(out / "strips/00.png")).shape[1] == 5 * (192 + 4)

    # The same adapter again, nothing trained; strength 0 is the base.
    again = [*asked, "--tuned", str(out / "run"), "--purity", "0", "--beside", "0", "--strength", "1", "0", "--json"]
    assert main([*again, "--out", str(tmp_path / "again")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(e["strength"], e["prompt"]) for e in found] == [(s, p) for s in (1.0, 0.0) for p in PROMPTS]
    assert not (tmp_path / "again/data").exists()
    pipe = atomtune.open_pipeline(str(bases["lumina2"]))
    base = atomtune.generate(pipe, PROMPTS, steps=1)
    for i, name in enumerate(("00-01", "01-01")):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"again/pictures/{name}.png")), np.asarray(base[i]))
        assert np.array_equal(
            np.asarray(Image.open(tmp_path / f"again/pictures/{name}.png")),
            np.asarray(Image.open(out / f"pictures/{name}.png")),
        )
    mistakes: list[tuple[list[str], str]] = [
        ([*asked, "--out", str(out)], "`out` must not exist yet"),
        ([*asked, "--out", str(tmp_path / "x"), "--blend", "2"], "`blend` must be between 0 and 1, got 2.0"),
        ([*asked, "--out", str(tmp_path / "x"), "--variants", "0"], "`variants` must be at least 1"),
        ([*asked, "--out", str(tmp_path / "x"), "--sites", "to_qq"], "no module is named 'to_qq'"),
        ([*again, "--out", str(tmp_path / "x"), "--purity", "2"], "`purity` must be between 0 and 1, got 2.0"),
        ([*again, "--out", str(tmp_path / "x"), "--time", "0.5", "0.5"], "`time` must be (from, to)"),
    ]
    for arguments, message in mistakes:
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "x").exists()


def test_a_shut_gate_is_told_and_nothing_is_best(
    bases: dict[str, Path], picture: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = atomtune.open_pipeline(str(bases["lumina2"]))
    gate = {"gate_input": "encoder_hidden_states", "gate_mask": "encoder_attention_mask", "gate_dim": 192}
    with random_atoms(pipe, n_atoms=2, target_modules=["layers.0.attn.to_q"], **gate):
        names = ("effect", "density", "purity")
        adapter = atomtune.Adapter(pipe, {site: {n: torch.ones(2) for n in names} for site in atom_layers(pipe)})
        bias = prompt_gate(pipe.transformer).bias.data  # type: ignore[union-attr]
        bias.fill_(0)
        assert adapter.shut(PROMPTS) == []
        bias.fill_(99)
        assert adapter.shut(PROMPTS) == PROMPTS
        adapter.save(tmp_path / "run")
    picture.save(tmp_path / "kite.png")
    asked = ["edit", str(tmp_path / "kite.png"), "--source", SOURCE, "--prompt", PROMPTS[0], "--sampler", "1"]
    asked += ["--base", str(bases["lumina2"]), "--tuned", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert main([*asked, "--purity", "0", "--beside", "0", "--strength", "1", "0.5"]) == 0
    out, err = capsys.readouterr()
    assert f"the gate is shut for {PROMPTS[0]!r}" in err
    assert len(out.splitlines()) == 3
    assert "best" not in out


def test_mistakes_are_told_before_anything_is_written(
    shared: Any, picture: Image.Image, mask: Image.Image, tmp_path: Path
) -> None:
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: edit(shared, picture, " ", PROMPTS, tmp_path / "x"), "`source` must say what the picture shows"),
        (lambda: edit(shared, picture, SOURCE, [], tmp_path / "x"), "`prompt` what the edits shall show"),
        (lambda: edit(shared, tmp_path / "no.png", SOURCE, PROMPTS, tmp_path / "x"), "no.png cannot be read"),
        (
            lambda: edit(shared, picture, SOURCE, PROMPTS, tmp_path / "x", mask=mask.resize((8, 8))),
            "`mask` must have the picture's size",
        ),
        (
            lambda: edit(shared, picture, SOURCE, PROMPTS, tmp_path / "x", mask=picture),
            "`mask` must be a picture of mode L or 1, got RGB",
        ),
        (
            lambda: edit(
                shared,
                picture.resize((300, 64)),
                SOURCE,
                PROMPTS,
                tmp_path / "x",
                mask=ImageOps.expand(Image.new("L", (20, 64), 255), (0, 0, 280, 0)),
            ),
            "`mask` must be white somewhere in the picture's middle square",
        ),
        (lambda: EditOptions(sampler=0), "`sampler` must be at least 1 step, got 0"),
        (lambda: EditOptions(guidance=float("nan")), "`guidance` must be a finite number, got nan"),
        (lambda: EditOptions(noise=-1), "`noise` must be a seed of 0 or more, got -1"),
        (lambda: EditOptions(purity=()), "`purity` must have at least one value"),
        (lambda: EditOptions(looks=-1), "`looks` must be 0 or more"),
        (lambda: EditOptions(keep=(2.0,)), "`keep` must be between 0 and 1, got 2.0"),
        (lambda: EditOptions(beside=(-1.0,)), "`beside` must be between 0 and 1, got -1.0"),
        (lambda: EditOptions(strength=(float("nan"),)), "`strength` must be finite numbers"),
        (
            lambda: edit(shared, picture, SOURCE, PROMPTS, tmp_path / "x", EditOptions(time=(0.6, 0.3))),
            "`time` must be (from, to)",
        ),
    ]
    for call, message in wrong:
        with pytest.raises(UserError) as caught:
            call()
        assert message in str(caught.value)
        assert not (tmp_path / "x").exists()
