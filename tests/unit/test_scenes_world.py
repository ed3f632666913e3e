"""The embedded world: pictures are exact, readers read them back, captions say what is there."""

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image

from atomtune.scenes import judge, render
from atomtune.scenes.read import attributes, crops, read
from atomtune.scenes.render import NEW_STYLES, ground, names, sprite, subject_mask
from atomtune.scenes.score import features, mean, score
from atomtune.scenes.world import (
    CLASS_OF,
    COLORS,
    OBJECTS,
    PATTERNS,
    PLACES,
    POSITIONS,
    RESERVED,
    STYLES,
    TUNING,
    Scene,
    article,
    caption,
    held_out,
    notice,
    random_scene,
    scene,
    with_style,
)

FREE = tuple(OBJECTS | TUNING)
"""What tests may draw: never a reserved object."""


def drawn(number: int, seed: int = 0, **more: float) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng, FREE, **more) for _ in range(number)]


# ------------------------------------------------------------------------------------------------- the vocabulary


def test_the_vocabularies_are_apart() -> None:
    for a, b in itertools.combinations((OBJECTS, RESERVED, TUNING), 2):
        assert not set(a) & set(b)
    assert not set(RESERVED) & set(names("other"))
    assert set(names("named")) >= set(CLASS_OF)
    assert len(OBJECTS) >= 64
    assert len(RESERVED) == 24


def test_a_random_scene_never_holds_a_reserved_object() -> None:
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(4000)]
    seen = {thing.name for s in scenes for thing in s.things}
    assert seen == set(OBJECTS)
    assert 0.17 < np.mean([len(s.things) == 2 for s in scenes]) < 0.23
    assert {s.color for s in scenes} == set(COLORS)
    assert {s.pattern for s in scenes} == set(PATTERNS)
    assert {t.position for s in scenes for t in s.things} == set(POSITIONS)
    assert all([t.position for t in s.things] == ["left", "right"] for s in scenes if len(s.things) == 2)


def test_random_scenes_follow_their_seed() -> None:
    assert drawn(20, 5) == drawn(20, 5) != drawn(20, 6)


def test_one_scene_in_ten_is_held_out_always_the_same() -> None:
    scenes = drawn(4000)
    held = [held_out(s) for s in scenes]
    assert 0.08 < np.mean(held) < 0.125
    assert held == [held_out(s) for s in scenes]
    keys = {s.key for s in scenes}
    assert len(keys) == len(set(scenes))


# ---------------------------------------------------------------------------------------------------- captions


def test_the_canonical_caption_is_complete_and_tells_scenes_apart() -> None:
    scenes = set(drawn(2000))
    assert len({caption(s) for s in scenes}) == len(scenes)
    for s in scenes:
        text = caption(s)
        words = [s.color, *([] if s.pattern == "plain" else [s.pattern])]
        words += [word for t in s.things for word in (t.name, t.style, t.size)]
        words += [PLACES[t.position] for t in s.things]
        assert all(word in text for word in words), text
        assert "  " not in text
    assert (
        caption(scene("kite", color="orange", position="left")) == "a big 3d kite on an orange background, on the left"
    )


def test_varied_captions_say_nothing_that_is_not_there() -> None:
    rng = random.Random(0)
    one = scene("kite", "flat", "small", "top", "orange", "striped")
    texts = [caption(one, rng) for _ in range(2000)]
    assert len(set(texts)) > 20
    other = set(COLORS) - {"orange"} | {"big", "shaded", "3d"} | set(PATTERNS) - {"striped"}
    assert not any(word in text.replace(",", "").split() for text in texts for word in other)
    share = np.mean(["toy" in text for text in texts])
    assert 0.07 < share < 0.13
    assert all(("kite" in text) != ("toy" in text) for text in texts)
    assert texts == [caption(one, again) for again in [random.Random(0)] for _ in range(2000)]


@pytest.mark.parametrize(("words", "want"), [("apple", "an apple"), ("kite", "a kite"), ("3d owl", "a 3d owl")])
def test_articles(words: str, want: str) -> None:
    assert article(words) == want


# ------------------------------------------------------------------------------------------------------ pictures


def test_render_is_deterministic_and_leaves_its_caches_alone() -> None:
    scenes = drawn(40)
    first = [render.render(s) for s in scenes]
    second = [render.render(s) for s in reversed(scenes)][::-1]
    sprite.cache_clear()
    third = [render.render(s) for s in scenes]
    for a, b, c in zip(first, second, third, strict=True):
        assert a.shape == (64, 64, 3)
        assert a.dtype == np.uint8
        assert np.array_equal(a, b)
        assert np.array_equal(a, c)


def test_a_scene_is_its_background_and_its_sprites() -> None:
    for s in drawn(60):
        picture = render.render(s)
        masks = [subject_mask(s, i) for i in range(len(s.things))]
        clear = np.all([mask == 0 for mask in masks], axis=0)
        plain = (ground(s.color, s.pattern) * 255).round().astype(np.uint8)
        # Resampling rings a little beyond the sprite's edge.
        assert np.abs(picture[clear].astype(int) - plain[clear]).max(initial=0) <= 5
        assert all(mask.max() == 1 for mask in masks)
        assert 0.02 < 1 - clear.mean() < 0.6


@pytest.mark.parametrize("name", ["kite", "apple"])
def test_styles_differ(name: str) -> None:
    one = scene(name)
    pictures = {style: render.render(with_style(one, style)).astype(int) for style in (*STYLES, *NEW_STYLES)}
    assert len(pictures) == 9
    for a, b in itertools.combinations(pictures, 2):
        assert np.abs(pictures[a] - pictures[b]).mean() > 0.5, (a, b)


def test_every_free_object_has_a_sprite_in_every_style() -> None:
    for name, style in itertools.product(FREE, STYLES):
        s = sprite(name, style, 32)
        assert s.shape == (32, 32, 4)
        assert (s[..., 3] > 0.5).mean() > 0.08, (name, style)
        assert (s[..., :3] <= s[..., 3:] + 0.1).all()


def test_the_licences_are_at_hand() -> None:
    assert "CC-BY" in notice()


# ------------------------------------------------------------------------------------------------------- readers


def test_readers_are_exact_on_true_scenes() -> None:
    scenes = drawn(150, seed=11)
    rows = [attributes(render.render(s), s) for s in scenes]
    for name in ("color", "pattern", "background", "position"):
        wrong = [s.key for s, row in zip(scenes, rows, strict=True) if row[name] != 1]
        assert wrong == [], name
    assert np.mean([row["size"] for row in rows]) >= 0.95


def test_readers_see_what_is_wrong() -> None:
    asked = scene("kite", "3d", "big", "left", "red", "striped")
    for shown, gone in (
        (scene("kite", "3d", "big", "right", "red", "striped"), {"position"}),
        (scene("kite", "3d", "big", "left", "blue", "striped"), {"color", "background"}),
        (scene("kite", "3d", "big", "left", "red"), {"pattern", "background"}),
        (scene("kite", "3d", "small", "left", "red", "striped"), {"size"}),
    ):
        row = attributes(render.render(shown), asked)
        assert {name for name, value in row.items() if value == 0} == gone


def test_an_empty_picture_has_no_boxes() -> None:
    bare = (ground("red", "dotted") * 255).round().astype(np.uint8)
    for things in (1, 2):
        reading = read(bare, things)
        assert (reading.color, reading.pattern) == ("red", "dotted")
        assert reading.boxes == (None,) * things
    pair = Scene(
        (scene("kite", position="left").things[0], scene("apple", position="right").things[0]), "red", "dotted"
    )
    assert attributes(bare, pair)["position"] == 0
    assert crops(bare, pair).shape == (2, 36, 36, 3)


# --------------------------------------------------------------------------------------------- judge and scores


def test_the_judge_knows_true_scenes() -> None:
    scenes = drawn(150, seed=23)
    rows = judge.look([render.render(s) for s in scenes], scenes)
    assert np.mean([row["named"] for row in rows]) >= 0.97
    assert np.mean([row["styled"] for row in rows]) >= 0.97
    assert all(row["similarity"] > 0.9999 for row in rows)


def test_the_judge_is_not_pleased_by_another_object() -> None:
    asked = scene("kite")
    row = judge.look([render.render(scene("apple"))], [asked])[0]
    assert row["named"] == 0
    assert row["similarity"] < 0.9


def test_a_true_picture_scores_full_marks() -> None:
    scenes = [scene("kite"), scene("apple", "flat", "small", "top", "green", "checkered")]
    pictures = [Image.fromarray(render.render(s)) for s in scenes]
    total = mean(score(pictures, scenes))
    assert {k: round(v, 6) for k, v in total.items() if k != "true_distance"} == dict.fromkeys(
        ("named", "styled", "similarity", "color", "pattern", "background", "position", "size"), 1.0
    )
    assert total["true_distance"] == 0
    assert score([pictures[1]], [scenes[0]])[0]["true_distance"] > 0.01
    assert features(pictures, scenes).shape == (2, 128)
    assert judge.load().training is False
    assert judge.load()(torch.zeros(1, 36, 36, 3, dtype=torch.uint8))[1].shape == (1, len(judge.NAMES))
