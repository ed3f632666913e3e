"""The parts of a comparison: lessons, asks, scores, methods, the grid, and LoRA taken apart."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from atomtune.backbones import backbone_of, denoiser, open_pipeline
from atomtune.compare import tasks
from atomtune.compare.controls import attach_autoencoded, attach_factors, factors, rotated
from atomtune.compare.fit import Fit, Knob, Lesson, exclusive, obtain, train_rival
from atomtune.compare.grid import Grid
from atomtune.compare.methods import METHODS, options_of, parse
from atomtune.compare.rivals import RIVALS, attach_rival
from atomtune.errors import UserError
from atomtune.scenes.render import NEW_STYLES, render
from atomtune.scenes.world import OBJECTS, RESERVED, STYLES, TUNING
from atomtune.training.batch import draw, generator_of
from atomtune.training.ends import training_mode
from atomtune.training.options import TrainOptions
from atomtune.training.prepare import prepare
from atomtune.training.run import Run
from atomtune.tuner import atom_layers, remove_adapter

# ---------------------------------------------------------------------------------------------- tasks


def true(asks: list[tasks.Ask]) -> list[Image.Image]:
    return [Image.fromarray(render(a.scene)) for a in asks]


@pytest.mark.parametrize(
    ("asks", "learned"),
    [
        (tasks.subject_asks("cow"), "3d"),
        (tasks.style_asks("neon"), None),
        (tasks.edit_asks("cow"), "3d"),
        (tasks.mixed_asks("cow", "sepia"), None),
        (tasks.both_asks("cow", "kite"), None),
    ],
    ids=["subject", "style", "edit", "mix", "both"],
)
def test_true_pictures_score_as_true(asks: list[tasks.Ask], learned: str | None) -> None:
    found = tasks.score(true(asks), asks, learned)
    assert found["similarity"] > 0.999
    assert found["true_distance"] == 0
    assert found["background"] == 1.0
    assert min(found["alignment"], found["object_accuracy"]) > 0.9, "the judge's own limit"


def test_asks_are_the_same_every_time_and_hold_what_they_promise() -> None:
    asks = tasks.subject_asks("cow")
    assert asks == tasks.subject_asks("cow") != tasks.subject_asks("kite")
    kinds = [a.kind for a in asks]
    assert [kinds.count(k) for k in ("pair", "style", "place")] == [6, 6, 12]
    assert kinds == sorted(kinds, key=["pair", "style", "place"].index), "pairs first: their noise is the neighbours'"
    for ask in asks:
        assert ask.scene.things[ask.at].name == "cow"
        assert (ask.scene.things[ask.at].style != tasks.LEARNED) == (ask.kind == "style")
        assert ask.words.count("cow") == 1


def test_class_asks_name_the_class_and_not_a_subject() -> None:
    for ask in tasks.class_asks("animal"):
        assert "animal" in ask.words
        assert not any(name in ask.words for name in (*OBJECTS, *RESERVED, *TUNING))


def test_neighbours_change_the_concept_alone() -> None:
    pairs = [a for a in tasks.subject_asks("cow") if a.kind == "pair"]
    for ask, other in zip(pairs, tasks.neighbour_asks(pairs), strict=True):
        assert other.scene.things[ask.at].name in OBJECTS
        assert other.scene.things[1 - ask.at] == ask.scene.things[1 - ask.at]
        assert (other.scene.color, other.scene.pattern) == (ask.scene.color, ask.scene.pattern)


def test_inner_leak_sees_the_other_half_only() -> None:
    pairs = [a for a in tasks.subject_asks("cow") if a.kind == "pair"]
    neighbours = true(tasks.neighbour_asks(pairs))
    assert tasks.inner_leak(neighbours, true(pairs), pairs)["inner_leak"] < 0.01
    changed = []
    for ask in pairs:
        other = dataclasses.replace(ask.scene.things[1 - ask.at], name="bell", style="flat")
        things = list(ask.scene.things)
        things[1 - ask.at] = other
        changed.append(dataclasses.replace(ask, scene=dataclasses.replace(ask.scene, things=tuple(things))))
    assert tasks.inner_leak(neighbours, true(changed), pairs)["inner_leak"] > 0.03


def test_no_task_teaches_what_it_asks() -> None:
    for subject in tasks.SUBJECTS:
        taught = {scene.key for scene, _ in tasks.subject_lesson(subject).shots}
        assert not taught & {a.scene.key for a in tasks.subject_asks(subject)}
        one = {scene.key for scene, _ in tasks.single_lesson(subject, "bare").shots}
        assert not one & {a.scene.key for a in tasks.edit_asks(subject)}
    for style in NEW_STYLES:
        names = {scene.things[0].name for scene, _ in tasks.style_lesson(style).shots}
        assert not names & {a.scene.things[a.at].name for a in tasks.style_asks(style)}


def test_benchmark_subjects_are_the_first_reserved_ones() -> None:
    assert tuple(RESERVED)[:12] == tasks.SUBJECTS
    for task in tasks.TASKS.values():
        assert not set(task.tuning) & set(RESERVED)
    assert len(tasks.TASKS["mixing"].subjects) == len(tasks.TASKS["both"].subjects) == 12
    assert set(STYLES).isdisjoint(NEW_STYLES)


# -------------------------------------------------------------------------------------------- methods


def test_every_rival_has_a_method_and_the_other_way_round() -> None:
    assert {m.rival for m in METHODS.values() if m.rival} == set(RIVALS)


def test_a_method_is_written_with_its_options() -> None:
    assert parse("atoms:silence=0.01,gate=False,sites=to_q+to_k") == (
        "atoms",
        {"silence": 0.01, "gate": False, "sites": ("to_q", "to_k")},
    )
    options = options_of("lora:lr=0.5", 8, steps=7)
    assert (options.lr, options.steps, options.n_atoms) == (0.5, 7, 8)
    assert options_of("atoms-topk", 8).k == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("atmos", "Did you mean `atoms`"),
        ("atoms:silense=1", "Did you mean `silence`"),
        ("atoms:silence", "name=value"),
    ],
)
def test_a_wrong_method_is_told(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "custom"}, "`task` must be one of"),
        ({"subjects": ("pinapple",)}, "Did you mean `pineapple`"),
        ({"sizes": (0,)}, "`sizes` must be ranks"),
        ({"methods": ("lorra",)}, "Did you mean `lora`"),
    ],
)
def test_a_wrong_grid_is_told(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"task": "customization", "methods": ("lora",)}
    with pytest.raises(UserError, match=message):
        Grid(**given | change).cells()


def test_cells_are_told_apart_by_all_that_matters() -> None:
    def keys(**change: Any) -> set[str]:
        given: dict[str, Any] = {"task": "customization", "methods": ("base", "atoms", "lora"), "subjects": ("cow",)}
        return {cell.key for cell in Grid(**given | change).cells()}

    plain = keys()
    assert len(plain) == 9
    assert plain == keys()
    for change in ({"sizes": (4,)}, {"options": {"steps": 3}}, {"sampler": 3}, {"subjects": ("kite",)}):
        assert len(plain & keys(**change)) in (0, 3), change  # the base has neither size nor options
    assert not plain & keys(task="editing")


# ------------------------------------------------------------------------------------------- training

SMALL = TrainOptions(
    concept="cow", class_noun="animal", steps=3, batch_size=2, lr=0.01, unrelated_pictures=2, n_atoms=4
)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return open_pipeline("embedded")


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    return tasks.subject_lesson("cow")


@pytest.fixture(scope="module")
def material(pipe: Any, lesson: Lesson, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("material")
    lesson.write(folder / "data")
    return prepare(pipe, backbone_of(pipe), folder / "data", SMALL, folder / "run")


def prediction(pipe: Any, material: Any) -> torch.Tensor:
    backbone = backbone_of(pipe)
    batch = draw(material, backbone, SMALL, 0, generator_of(SMALL, 0))
    with torch.no_grad():
        return backbone.predict(denoiser(pipe), batch.x, batch.s, batch.conditioning)


def test_lora_by_the_rivals_loop_is_dense_atoms_by_ours(pipe: Any, material: Any) -> None:
    """Equal terms: with the same numbers to start from, the two loops give the same losses."""
    backbone, base = backbone_of(pipe), denoiser(pipe)
    plain = {"silence": 0.0, "gate": False, "nested": False, "contain": False}
    options = dataclasses.replace(SMALL, sparsifier="dense", **plain)
    rival = attach_rival("lora", base, backbone.sites, 4, 0)
    started = factors(base)
    theirs = train_rival(backbone, base, material, rival, options)
    rival.remove()
    attach_factors(pipe, backbone, started, options)
    with training_mode(base, options):
        run = Run(pipe, backbone, material, options, Path("unused"), None)  # type: ignore[arg-type]
        run.processes = type("One", (), {"num_processes": 1, "process_index": 0})()
        ours = [run.step(step)["loss"] for step in range(options.steps)]
    remove_adapter(pipe)
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_lora_as_components_paints_the_same(pipe: Any, material: Any) -> None:
    backbone, base = backbone_of(pipe), denoiser(pipe)
    rival = attach_rival("lora", base, backbone.sites, 4, 0)
    train_rival(backbone, base, material, rival, SMALL)
    adapted, parts = prediction(pipe, material), factors(base)
    rival.remove()
    plain = dataclasses.replace(SMALL, gate=False)
    for found in (parts, rotated(parts)):
        attach_factors(pipe, backbone, found, plain)
        torch.testing.assert_close(prediction(pipe, material), adapted, rtol=1e-3, atol=1e-4)
        remove_adapter(pipe)
    down, up = next(iter(rotated(parts).values()))
    sizes = (down.norm(dim=1) * up.norm(dim=1)).tolist()
    assert sizes == sorted(sizes, reverse=True)


def test_an_autoencoder_takes_the_place_of_an_update(pipe: Any, material: Any) -> None:
    backbone, base = backbone_of(pipe), denoiser(pipe)
    rival = attach_rival("lora", base, backbone.sites, 2, 0)
    train_rival(backbone, base, material, rival, dataclasses.replace(SMALL, lr=0.02))
    adapted, parts = prediction(pipe, material), factors(base)
    rival.remove()
    plain = prediction(pipe, material)
    lost = attach_autoencoded(pipe, backbone, material, parts, dataclasses.replace(SMALL, gate=False))
    assert lost < 0.3
    error = (prediction(pipe, material) - adapted).square().mean()
    assert error < 0.3 * (plain - adapted).square().mean()
    remove_adapter(pipe)


@pytest.mark.parametrize("method", ["atoms", "lora", "ssf"])
def test_a_trained_method_is_kept_and_found_again(pipe: Any, lesson: Lesson, tmp_path: Path, method: str) -> None:
    options = dataclasses.replace(SMALL, steps=2)
    fit = Fit(method, options, 4, lesson, "print")
    before = {name: p.detach().clone() for name, p in denoiser(pipe).named_parameters()}
    tuned = obtain(fit, pipe, tmp_path)
    assert tuned.facts["trained_parameters"] > 0
    assert tuned.facts["bytes"] > 0
    tuned.remove()
    written = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    again = obtain(fit, pipe, tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == written, "trained once"
    assert again.gated == (method != "ssf")
    for knob in (Knob(), Knob("scale", 0.5), *([Knob("purity", 0.5), Knob("random", 0.5)] if again.gated else [])):
        with again.turned(knob):
            pass
    again.remove()
    after = dict(denoiser(pipe).named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert not list(tmp_path.glob(".*-*")), "nothing half written is left"


def test_random_atoms_are_as_many_as_asked(pipe: Any, lesson: Lesson, tmp_path: Path) -> None:
    tuned = obtain(Fit("atoms", dataclasses.replace(SMALL, steps=1), 4, lesson, "print"), pipe, tmp_path)
    with tuned.turned(Knob("random", 0.25)):
        on = [layer.atom_strength["default"] for layer in atom_layers(pipe).values()]
        assert torch.cat(on).sum() == round(0.25 * 4 * len(on))
    tuned.remove()


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    import fcntl

    with exclusive(tmp_path / "lock"), (tmp_path / "lock").open("w") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_scores_are_numbers() -> None:
    asks = tasks.subject_asks("cow")[:2]
    noise = [Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))] * 2
    assert all(np.isfinite(value) for value in tasks.score(noise, asks).values())
