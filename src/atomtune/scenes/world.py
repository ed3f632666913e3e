"""The vocabulary of the embedded world: what a scene may hold, and how a caption says it."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from importlib import resources

SIDE = 64
"""Width and height of a picture, in pixels."""

SIZES = {"small": 22, "big": 32}
"""Longest side of a sprite, in pixels."""

POSITIONS = {
    "left": (16, 32),
    "right": (48, 32),
    "top": (32, 16),
    "bottom": (32, 48),
    "middle": (32, 32),
}
"""Centre of a sprite (x, y), in pixels; all on the grid of 8 pixels that the autoencoder has."""

PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}

COLORS = {
    "red": (214, 48, 49),
    "orange": (240, 147, 43),
    "yellow": (250, 220, 90),
    "green": (60, 170, 90),
    "blue": (52, 110, 219),
    "purple": (142, 68, 173),
    "pink": (247, 160, 200),
    "gray": (150, 155, 160),
}

PATTERNS = ("plain", "striped", "dotted", "checkered")

STYLES = ("flat", "shaded", "3d")
"""Twemoji, Noto and Fluent 3D, in this order."""

OBJECTS = {
    "panda": "animal",
    "fox": "animal",
    "frog": "animal",
    "pig": "animal",
    "tiger": "animal",
    "rabbit": "animal",
    "koala": "animal",
    "monkey": "animal",
    "owl": "animal",
    "fish": "animal",
    "butterfly": "animal",
    "ladybug": "animal",
    "turtle": "animal",
    "elephant": "animal",
    "whale": "animal",
    "bee": "animal",
    "banana": "fruit",
    "apple": "fruit",
    "strawberry": "fruit",
    "watermelon": "fruit",
    "grapes": "fruit",
    "cherries": "fruit",
    "lemon": "fruit",
    "avocado": "fruit",
    "donut": "food",
    "cupcake": "food",
    "cookie": "food",
    "fried egg": "food",
    "cheese": "food",
    "sushi": "food",
    "ice cream": "food",
    "fries": "food",
    "car": "vehicle",
    "airplane": "vehicle",
    "bicycle": "vehicle",
    "helicopter": "vehicle",
    "ship": "vehicle",
    "train": "vehicle",
    "sunflower": "plant",
    "rose": "plant",
    "palm tree": "plant",
    "clover": "plant",
    "pine tree": "plant",
    "house": "building",
    "church": "building",
    "tent": "building",
    "violin": "instrument",
    "trumpet": "instrument",
    "drum": "instrument",
    "saxophone": "instrument",
    "basketball": "ball",
    "soccer ball": "ball",
    "hat": "clothing",
    "dress": "clothing",
    "shoe": "clothing",
    "crown": "clothing",
    "hammer": "tool",
    "scissors": "tool",
    "key": "tool",
    "umbrella": "tool",
    "camera": "device",
    "television": "device",
    "clock": "device",
    "bell": "device",
}
"""The objects that the embedded model has learned, and the class noun of each."""

RESERVED = {
    "dog face": "animal",
    "pineapple": "fruit",
    "unicorn face": "animal",
    "guitar": "instrument",
    "rocket": "vehicle",
    "octopus": "animal",
    "cactus": "plant",
    "slice of pizza": "food",
    "teapot": "tool",
    "lion face": "animal",
    "mushroom": "plant",
    "bus": "vehicle",
    "hamburger": "food",
    "snail": "animal",
    "accordion": "instrument",
    "european castle": "building",
    "bactrian camel": "animal",
    "tractor": "vehicle",
    "tulip": "plant",
    "crab": "animal",
    "penguin": "animal",
    "hot pepper": "food",
    "electric light bulb": "device",
    "sailboat": "vehicle",
}
"""Objects that no pretraining has seen; the first twelve are the benchmark's subjects."""

TUNING = {
    "mouse": "animal",
    "cow": "animal",
    "dolphin": "animal",
    "spider": "animal",
    "peach": "fruit",
    "carrot": "food",
    "taco": "food",
    "truck": "vehicle",
    "blossom": "plant",
    "pagoda": "building",
    "banjo": "instrument",
    "telescope": "tool",
    "microscope": "tool",
    "teddy bear": "toy",
    "snowman": "toy",
    "kite": "toy",
}
"""Objects outside the embedded model, free for tests and for choosing hyperparameters."""

CLASS_OF = OBJECTS | RESERVED | TUNING
CLASSES = tuple(dict.fromkeys(OBJECTS.values()))


@dataclass(frozen=True)
class Thing:
    """One object as it stands in a scene."""

    name: str
    style: str
    size: str
    position: str


@dataclass(frozen=True)
class Scene:
    """One or two things on a background; two stand left and right."""

    things: tuple[Thing, ...]
    color: str
    pattern: str = "plain"

    @property
    def key(self) -> str:
        """The scene as one line, in a fixed order."""
        things = " + ".join(f"{t.size} {t.style} {t.name} {t.position}" for t in self.things)
        return f"{things} / {self.pattern} {self.color}"


def scene(
    name: str,
    style: str = "3d",
    size: str = "big",
    position: str = "middle",
    color: str = "blue",
    pattern: str = "plain",
) -> Scene:
    """A scene of one thing."""
    return Scene((Thing(name, style, size, position),), color, pattern)


def held_out(scene: Scene) -> bool:
    """Whether pretraining must never draw this combination (one scene in ten, by hash)."""
    return hashlib.sha256(scene.key.encode()).digest()[0] < 26


def random_scene(rng: random.Random, names: tuple[str, ...] = tuple(OBJECTS), pairs: float = 0.2) -> Scene:
    """A scene drawn at random; `pairs` is the share of scenes with two things."""
    color = rng.choice(tuple(COLORS))
    pattern = rng.choice(PATTERNS) if rng.random() < 0.6 else "plain"

    def thing(position: str) -> Thing:
        return Thing(rng.choice(names), rng.choice(STYLES), rng.choice(tuple(SIZES)), position)

    if rng.random() < pairs:
        return Scene((thing("left"), thing("right")), color, pattern)
    return Scene((thing(rng.choice(tuple(POSITIONS))),), color, pattern)


def article(words: str) -> str:
    """`words` with its indefinite article."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def background(scene: Scene) -> str:
    """The background in words: `a red background`, `a red striped background`."""
    pattern = "" if scene.pattern == "plain" else f"{scene.pattern} "
    return article(f"{scene.color} {pattern}background")


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """The scene in plain words.

    Without `rng` the words are canonical and complete. With it they vary as people's captions do: another
    order, the class noun for the name, or a size, style or background left unsaid.
    """
    draw = rng.random if rng else lambda: 1.0
    things = []
    for t in scene.things:
        noun = CLASS_OF[t.name] if draw() < 0.1 else t.name
        size = "" if draw() < 0.06 else f"{t.size} "
        style = "" if draw() < 0.06 else f"{t.style} "
        things.append(article(f"{size}{style}{noun}"))
    ground = background(scene)
    if len(things) == 2:
        return f"{things[0]} on the left and {things[1]} on the right, on {ground}"
    place = PLACES[scene.things[0].position]
    order = draw()
    if order < 0.06:
        return f"{things[0]} on {ground}"
    if order < 0.10:
        return f"{things[0]} {place}"
    if order < 0.4:
        return f"{things[0]} {place}, on {ground}"
    return f"{things[0]} on {ground}, {place}"


def with_style(scene: Scene, style: str) -> Scene:
    """The same scene with every thing in another style."""
    return replace(scene, things=tuple(replace(t, style=style) for t in scene.things))


def notice() -> str:
    """The licences of the sprites."""
    return resources.files("atomtune.scenes").joinpath("assets/NOTICE.md").read_text(encoding="utf-8")
