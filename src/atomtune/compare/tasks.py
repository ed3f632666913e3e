"""The tasks: what is taught, what is asked for, and how the pictures score."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from atomtune.backbones import denoiser
from atomtune.compare.fit import Lesson
from atomtune.compare.methods import TRUTH
from atomtune.data.cache import Cache, key
from atomtune.measure import drift, pixel_drift, silence
from atomtune.sampling import generate
from atomtune.scenes.judge import look_each
from atomtune.scenes.read import attributes
from atomtune.scenes.render import NEW_STYLES, render
from atomtune.scenes.score import arrays, features
from atomtune.scenes.world import (
    CLASS_OF,
    COLORS,
    OBJECTS,
    PATTERNS,
    PLACES,
    POSITIONS,
    RESERVED,
    SIDE,
    SIZES,
    STYLES,
    TUNING,
    Scene,
    Thing,
    article,
    background,
    caption,
    random_scene,
    scene,
)
from atomtune.tuner import fingerprint

LEARNED = "3d"
"""The style in which subjects are learned."""

SUBJECTS = tuple(RESERVED)[:12]
"""The benchmark's subjects."""


@dataclass(frozen=True)
class Ask:
    """A picture that is asked for, and what kind of request it is."""

    scene: Scene
    words: str
    kind: str
    """place, style, pair, ...: what differs from what was taught."""
    at: int = 0
    """Which of its things is the concept."""


@dataclass(frozen=True)
class Studio:
    """A pipeline that paints asks; what the base paints is kept, since every method is compared with it."""

    pipe: Any
    folder: Path
    steps: int = 12

    def paint(self, asks: Sequence[Ask], seed: int | Sequence[int]) -> list[Image.Image]:
        """One picture an ask; ask i starts from the noise of seed + i (of seed[i])."""
        return generate(self.pipe, [a.words for a in asks], seed=seed, steps=self.steps, batch_size=12)

    def base(self, asks: Sequence[Ask], seed: int) -> list[Image.Image]:
        """The same by the bare base, which must have no adapter attached when they are not kept yet."""
        words = [a.words for a in asks]
        entry = key(fingerprint(denoiser(self.pipe)), str(self.steps), str(seed), *words)

        def make() -> dict[str, torch.Tensor]:
            return {"pictures": torch.from_numpy(arrays(self.paint(asks, seed)))}

        kept = Cache(self.folder / "base").get(entry, make)["pictures"].numpy()
        return [Image.fromarray(picture) for picture in kept]

    @torch.no_grad()
    def truth(self, asks: Sequence[Ask]) -> list[Image.Image]:
        """The true pictures, encoded and decoded by the pipeline's autoencoder."""
        true = [Image.fromarray(render(ask.scene)) for ask in asks]
        pixels = self.pipe.image_processor.preprocess(true).to(self.pipe.vae.dtype)
        return self.pipe.image_processor.postprocess(self.pipe.vae(pixels).sample)

    def untrained(self, reference: str, asks: Sequence[Ask], seed: int) -> list[Image.Image]:
        """What a reference shows for asks: the base's pictures, or the true ones."""
        return self.truth(asks) if reference == TRUTH else self.base(asks, seed)


# ---------------------------------------------------------------------------------------------- lessons


def subject_lesson(subject: str) -> Lesson:
    """Four pictures, full captions."""
    places = (("left", "red"), ("right", "blue"), ("top", "yellow"), ("middle", "gray"))
    shots = [
        scene(subject, LEARNED, "big" if i % 2 == 0 else "small", position, color)
        for i, (position, color) in enumerate(places)
    ]
    return Lesson(tuple((s, caption(s)) for s in shots), subject, CLASS_OF[subject])


def style_lesson(style: str) -> Lesson:
    """Four pictures of known objects in a new style."""
    things = (
        ("apple", "left", "red"),
        ("car", "right", "blue"),
        ("panda", "top", "yellow"),
        ("house", "middle", "gray"),
    )
    shots = [
        scene(name, style, "big" if i % 2 == 0 else "small", position, color)
        for i, (name, position, color) in enumerate(things)
    ]
    return Lesson(tuple((s, caption(s)) for s in shots), style, None)


def single_lesson(subject: str, words: str) -> Lesson:
    """One picture; its caption tells all (`full`) or only names the subject (`bare`)."""
    shot = scene(subject, LEARNED, "big", "left", "red")
    return Lesson(((shot, caption(shot) if words == "full" else f"a {subject}"),), subject, CLASS_OF[subject])


# ------------------------------------------------------------------------------------------------- asks


def subject_asks(subject: str, number: int = 24) -> list[Ask]:
    """A quarter beside a known object; a quarter in another style; half at new places, on new backgrounds."""
    rng = random.Random(f"asks {subject}")
    taught = {shot.key for shot, _ in subject_lesson(subject).shots}
    asks: list[Ask] = []
    while len(asks) < number:
        kind = ("pair", "style", "place", "place")[4 * len(asks) // number]
        drawn = random_scene(rng, (subject,), pairs=0.0)
        position = rng.choice(tuple(POSITIONS))
        style = rng.choice([s for s in STYLES if s != LEARNED]) if kind == "style" else LEARNED
        thing = replace(drawn.things[0], style=style, position=position)
        if kind == "pair":
            asks.append(_pair(thing, drawn, rng))
        elif (asked := replace(drawn, things=(thing,))).key not in taught:
            asks.append(_ask(asked, kind))
    return asks


def _pair(thing: Thing, ground: Scene, rng: random.Random) -> Ask:
    other = Thing(rng.choice(tuple(OBJECTS)), rng.choice(STYLES), rng.choice(tuple(SIZES)), "right")
    at = rng.randrange(2)
    things = [replace(thing, position="left"), other]
    if at:
        things = [replace(other, position="left"), replace(thing, position="right")]
    return _ask(replace(ground, things=tuple(things)), "pair", at)


def _ask(asked: Scene, kind: str, at: int = 0) -> Ask:
    return Ask(asked, caption(asked), kind, at)


def style_asks(style: str, number: int = 24) -> list[Ask]:
    """Known objects, none of the lesson's, in the new style; a quarter, the first, beside one in a known style."""
    rng = random.Random(f"asks {style}")
    names = tuple(n for n in OBJECTS if n not in ("apple", "car", "panda", "house"))
    asks = []
    for i in range(number):
        drawn = random_scene(rng, (rng.choice(names),), pairs=0.0)
        thing = replace(drawn.things[0], style=style)
        asks.append(_pair(thing, drawn, rng) if 4 * i < number else _ask(replace(drawn, things=(thing,)), "place"))
    return asks


def unrelated_asks(number: int = 16) -> list[Ask]:
    """Scenes of known objects."""
    rng = random.Random("unrelated")
    return [_ask(random_scene(rng), "unrelated") for _ in range(number)]


def class_asks(noun: str, number: int = 8) -> list[Ask]:
    """Scenes that name the concept's class and not the concept; what they show is not scored."""
    rng = random.Random(f"class {noun}")
    names = tuple(n for n, c in CLASS_OF.items() if c == noun and n in OBJECTS) or tuple(OBJECTS)
    asks = []
    for _ in range(number):
        s = random_scene(rng, names, pairs=0.0)
        t = s.things[0]
        words = f"{article(f'{t.size} {t.style} {noun}')} on {background(s)}, {PLACES[t.position]}"
        asks.append(Ask(s, words, "class"))
    return asks


def neighbour_asks(asks: Sequence[Ask]) -> list[Ask]:
    """The same pairs with a known object in the concept's place, which the base paints rightly."""
    rng = random.Random("neighbours")
    found = []
    for a in asks:
        known = rng.choice([n for n in OBJECTS if n != a.scene.things[1 - a.at].name])
        style = a.scene.things[a.at].style if a.scene.things[a.at].style in STYLES else LEARNED
        things = list(a.scene.things)
        things[a.at] = replace(things[a.at], name=known, style=style)
        found.append(_ask(replace(a.scene, things=tuple(things)), "neighbour", a.at))
    return found


def edit_asks(subject: str, noises: int = 2) -> list[Ask]:
    """The lesson's one picture with one thing changed: style, a second object, place, size, colour, pattern."""
    shot = scene(subject, LEARNED, "big", "left", "red")
    thing = shot.things[0]
    rng = random.Random(f"edits {subject}")

    def changed(**new: Any) -> Scene:
        return replace(shot, things=(replace(thing, **new),))

    asks = []
    for turn in range(noises):
        asks += [_ask(changed(style=s), "style") for s in STYLES if s != LEARNED]
        asks += [_pair(thing, shot, rng) for _ in range(2)]
        places = [p for p in POSITIONS if p != thing.position]
        asks += [_ask(changed(position=p), "position") for p in places[turn % 2 :: 2]]
        asks.append(_ask(changed(size="small"), "size"))
        colors = [c for c in COLORS if c != shot.color]
        asks.append(_ask(replace(shot, color=rng.choice(colors)), "color"))
        asks.append(_ask(replace(shot, pattern=PATTERNS[1 + turn % 3]), "pattern"))
    return asks


def own_words(ask: Ask, lesson: Lesson) -> dict[str, str]:
    """Which words of an ask the lesson had others for: its style; all of them where the caption only names it."""
    shot, told = lesson.shots[0]
    if told != caption(shot):
        return {ask.words: told}
    return {ask.scene.things[ask.at].style: shot.things[0].style} if ask.kind == "style" else {}


def mixed_asks(subject: str, style: str, number: int = 12) -> list[Ask]:
    """The subject in the style, at random places."""
    rng = random.Random(f"mix {subject} {style}")
    found = []
    for _ in range(number):
        drawn = random_scene(rng, (subject,), pairs=0.0)
        found.append(_ask(replace(drawn, things=(replace(drawn.things[0], style=style),)), "mix"))
    return found


def both_asks(first: str, second: str, number: int = 12) -> list[Ask]:
    """Two subjects side by side."""
    rng = random.Random(f"both {first} {second}")
    found = []
    for i in range(number):
        drawn = random_scene(rng, (first,), pairs=1.0)
        names = (first, second) if i % 2 == 0 else (second, first)
        things = tuple(replace(t, name=n, style=LEARNED) for t, n in zip(drawn.things, names, strict=True))
        found.append(_ask(replace(drawn, things=things), "both", i % 2))
    return found


# ----------------------------------------------------------------------------------------------- scores


def score(pictures: Sequence[Image.Image], asks: Sequence[Ask], learned: str | None = LEARNED) -> dict[str, float]:
    """Means over the pictures of what came out as asked; NaN where nothing was asked of that kind.

    `similarity` is over the asks in the learned style (None: all); `alignment` is the mean over pictures of the
    attributes asked for: background, position, size, style, and a second object's name where there is one; `both`,
    object and style right in one picture, where no style was learned.
    """
    rows: list[dict[str, float]] = []
    for picture, ask in zip(arrays(pictures), asks, strict=True):
        read, seen = attributes(picture, ask.scene), look_each(picture, ask.scene)
        mine, thing = seen[ask.at], ask.scene.things[ask.at]
        row = {"background": read["background"], "position": read["position"], "size_right": read["size"]}
        row["style"] = mine["styled"]
        if len(seen) == 2:
            row["other"] = seen[1 - ask.at]["named"]
        row["alignment"] = float(np.mean(list(row.values())))
        row["object_accuracy"] = mine["named"]
        if learned is None:
            row["both"] = mine["styled"] * mine["named"]
        if learned in (None, thing.style):
            row["similarity"] = mine["similarity"]
        else:
            row["style_change"] = mine["styled"] * mine["named"]
        error = picture.astype(np.float64) - render(ask.scene)
        row["true_distance"] = float((error**2).mean()) / 255**2
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def leak(base: Sequence[Image.Image], adapted: Sequence[Image.Image], scenes: Sequence[Scene]) -> dict[str, float]:
    """drift, pixel_drift and silence of pictures that should be the base's."""
    a, b = arrays(base), arrays(adapted)
    return {
        "drift": float(drift(features(base, scenes), features(adapted, scenes)).mean()),
        "pixel_drift": float(pixel_drift(a, b).mean()),
        "silence": silence(a, b),
    }


def inner_leak(
    neighbour: Sequence[Image.Image], adapted: Sequence[Image.Image], asks: Sequence[Ask]
) -> dict[str, float]:
    """What happened to the half of a pair that is not the concept's.

    `inner_leak` is its mean absolute difference to the base's picture with a known object in the concept's place;
    `inner_error` its mean squared error to the true rendering.
    """
    changes, errors = [], []
    for known, picture, ask in zip(arrays(neighbour), arrays(adapted), asks, strict=True):
        half = slice(0, SIDE // 2) if ask.at else slice(SIDE // 2, SIDE)
        new, old, true = (p[:, half].astype(np.float64) / 255 for p in (picture, known, render(ask.scene)))
        changes.append(np.abs(new - old).mean())
        errors.append(((new - true) ** 2).mean())
    return {"inner_leak": float(np.mean(changes)), "inner_error": float(np.mean(errors))}


@dataclass(frozen=True)
class Task:
    """A task: its subjects, those on which anything may be tuned, and what is taught of one."""

    subjects: tuple[str, ...]
    tuning: tuple[str, ...]
    lesson: Callable[[str], Lesson]


def _mixes(subjects: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{subject} x {style}" for subject, style in zip(subjects, tuple(NEW_STYLES) * 2, strict=False))


def _pairs(subjects: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{a} + {b}" for a, b in zip(subjects, (*subjects[1:], subjects[0]), strict=True))


TASKS: dict[str, Task] = {
    "customization": Task(SUBJECTS, tuple(TUNING), subject_lesson),
    "style": Task(tuple(NEW_STYLES), (), style_lesson),
    "editing": Task(SUBJECTS, tuple(TUNING), lambda s: single_lesson(s, "full")),
    "editing-bare": Task(SUBJECTS, tuple(TUNING), lambda s: single_lesson(s, "bare")),
    "mixing": Task(_mixes(SUBJECTS), _mixes(tuple(TUNING)), lambda s: subject_lesson(s.partition(" x ")[0])),
    "both": Task(_pairs(SUBJECTS), _pairs(tuple(TUNING)), lambda s: subject_lesson(s.partition(" + ")[0])),
}
"""Tasks by name; `mixing` and `both` teach their two concepts apart."""
