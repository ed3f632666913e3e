"""One cell of the benchmark: train or find a method, turn its knobs, score what it paints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from atomtune.backbones import open_pipeline
from atomtune.compare import tasks
from atomtune.compare.cells import Cell
from atomtune.compare.fit import COMPONENTS, Fit, Knob, Lesson, Tuned, obtain, refitted, singular
from atomtune.compare.methods import BASE, REFERENCES, parse
from atomtune.compare.tasks import Ask, Studio
from atomtune.editing.sweep import sweep
from atomtune.scenes.world import CLASS_OF, Scene
from atomtune.training.options import TrainOptions
from atomtune.tuner import activate
from atomtune.tuner.model import unwrap

Row = dict[str, Any]

LEAK_SEED, CLASS_SEED = 900_000, 800_000
FULL = Knob()
STRENGTHS = (FULL, Knob("scale", 1.2), Knob("scale", 1.4))
"""Turned in customization and style, on every method."""
DIALS = (*(Knob("atoms", v, "effect") for v in (0.5, 0.25, 0.1)), Knob("atoms", 0.25, "mean"), Knob("scale", 0.8))
"""Turned there on methods that have components."""

CONTAINED = (*(Knob("contain", v) for v in (0.5, 0.75, 1.0)), Knob("beside", 1.0), Knob("contain-beside", 1.0))
"""Turned there on the same, any gate held open: what codes contain by themselves."""

REFITTED = (Knob("refit", 0.1, "effect"),)
"""Turned there on the same, any gate held open: what is left is trained to do what all of it did."""

OWN_WORDS = {Knob("own-words", 0.0): FULL, Knob("own-words", 0.3): FULL, Knob("own-strong", 0.3): Knob("scale", 1.2)}
"""Turned there and where one picture is edited, on the same: the knob beside which asks in words that the lesson did
not have are read in the lesson's, down to a value of s."""

SCALES = tuple(Knob("scale", v) for v in (1.4, 1.2, 0.9, 0.8, 0.6))
FORMULAS = ("effect", "focus", "mean", "purity")
EDIT_KNOBS = (
    FULL,
    *SCALES,
    *(Knob("atoms", v, f) for f in FORMULAS for v in (0.5, 0.25)),
    Knob("atoms", 0.75, "focus"),
    *(Knob("purity", v) for v in (0.2, 0.4, 0.6)),
    *(Knob("beside", v) for v in (0.25, 0.5, 0.75, 1.0)),
    Knob("random", 0.5),
)
"""Turned where one picture is edited; on methods without components, `SCALES` alone."""

TOGETHER: dict[Knob, tuple[float, float, float | None]] = {
    FULL: (1.0, 1.0, None),
    Knob("scale", 0.8): (0.8, 0.8, None),
    Knob("scale", 0.6): (0.6, 0.6, None),
    Knob("balance", 0.8): (0.8, 1.2, None),
    Knob("balance", 1.2): (1.2, 0.8, None),
    Knob("strong", 1.2): (1.2, 1.0, None),
    Knob("own-words", 0.0): (1.0, 1.0, 0.0),
    Knob("own-words", 0.3): (1.0, 1.0, 0.3),
    Knob("own-strong", 0.3): (1.2, 1.0, 0.3),
}
"""Turned on two adapters at once: strengths of the first and the second, and until when codes are read in words of
their own (a subject's in the style in which it was learned; of two subjects, each with the other's class noun). None:
they are not; reading them needs components."""


def work(cell: Cell, folder: Path) -> list[Row]:
    """Measure one cell. Trained methods and the base's pictures are kept in `folder`."""
    pipe = open_pipeline(cell.config["base"])
    studio = Studio(pipe, folder, cell.config["sampler"])
    return [_facts(cell) | row for row in MEASURES[cell.task](cell, studio)]


def _facts(cell: Cell) -> Row:
    """What every row of a cell says about it."""
    facts: Row = {"task": cell.task, "method": cell.method, "subject": cell.subject, "seed": cell.seed}
    if cell.method in REFERENCES:
        return facts | {"size": 0, "knob": "full", "knob_value": 1.0}
    options = TrainOptions.from_dict(cell.config["options"])
    return facts | {
        "size": cell.config["size"],
        "lr": options.lr,
        "steps": options.steps,
        "prior": prior_of(options),
    }


def prior_of(options: TrainOptions) -> str:
    """none, data (prior preservation) or distill, as the options have it."""
    if not options.unrelated_rows:
        return "none"
    return "distill" if options.distill else "data" if options.prior else "none"


def fit_of(cell: Cell, lesson: Lesson) -> Fit:
    """The training that a cell asks for."""
    options = dataclasses.replace(
        TrainOptions.from_dict(cell.config["options"]), concept=lesson.concept, class_noun=lesson.class_noun
    )
    return Fit(parse(cell.method)[0], options, cell.config["size"], lesson, cell.config["fingerprint"])


def _tuned(cell: Cell, studio: Studio, lesson: Lesson, name: str = "default") -> Tuned:
    return obtain(fit_of(cell, lesson), studio.pipe, studio.folder / "fits", name)


def _noise(cell: Cell) -> int:
    """Where the noise of a cell's pictures starts: the same for all methods."""
    return 10_000 * (cell.seed + 1)


def _gates(tuned: Tuned) -> tuple[bool | None, ...]:
    return (True, False) if tuned.gated else (None,)


def _at(tuned: Tuned, knob: Knob, gate: bool | None) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(tuned.turned(knob))
    if gate is not None:
        stack.enter_context(tuned.gate(gate))
    return stack


def _knob(knob: Knob, gate: bool | None) -> Row:
    kept = knob.value if knob.name in ("atoms", "random", "refit") else 1.0
    return {
        "gate": gate,
        "knob": knob.name,
        "knob_value": knob.value,
        "formula": knob.formula,
        "density": kept,
    }


# ------------------------------------------------------------------------------- subjects and styles


def customization(cell: Cell, studio: Studio) -> Iterator[Row]:
    """A new subject from four pictures."""
    lesson = tasks.subject_lesson(cell.subject)
    yield from _learned(cell, studio, lesson, tasks.subject_asks(cell.subject), tasks.LEARNED)


def style(cell: Cell, studio: Studio) -> Iterator[Row]:
    """A new style from four pictures."""
    yield from _learned(cell, studio, tasks.style_lesson(cell.subject), tasks.style_asks(cell.subject), None)


def scenes(asks: Sequence[Ask]) -> list[Scene]:
    """What is asked for."""
    return [ask.scene for ask in asks]


def _learned(cell: Cell, studio: Studio, lesson: Lesson, asks: list[Ask], learned: str | None) -> Iterator[Row]:
    pairs = [a for a in asks if a.kind == "pair"]
    assert asks[: len(pairs)] == pairs
    quiet = tasks.unrelated_asks()
    nouns = tasks.class_asks(lesson.class_noun) if lesson.class_noun else []
    noise = _noise(cell)
    neighbours = studio.base(tasks.neighbour_asks(pairs), noise)
    base_quiet = studio.base(quiet, LEAK_SEED)
    base_nouns = studio.base(nouns, CLASS_SEED) if nouns else []
    if cell.method in REFERENCES:
        pictures = studio.untrained(cell.method, asks, noise)
        row = tasks.score(pictures, asks, learned) | {"drift": 0.0}
        if cell.method == BASE:
            row |= tasks.inner_leak(neighbours, pictures[: len(pairs)], pairs) | {"pixel_drift": 0.0, "silence": 1.0}
        yield row
        return

    def outside() -> tuple[Row, bool]:
        """What leaks beyond the concept as things stand, and whether that is nothing at all."""
        found = tasks.leak(base_quiet, studio.paint(quiet, LEAK_SEED), scenes(quiet))
        whole = found["silence"]
        if nouns:
            kind = tasks.leak(base_nouns, studio.paint(nouns, CLASS_SEED), scenes(nouns))
            found["bleed"], whole = kind["drift"], min(whole, kind["silence"])
        return found, whole == 1

    tuned = _tuned(cell, studio, lesson)
    same = tuned.gated and tuned.wide_open([a.words for a in asks])
    shut: Row | None = None
    leaks: dict[tuple[Knob, bool | None], Row] = {}
    painted: dict[Knob, list[Any]] = {}
    gated = _gates(tuned)[0]
    opened = False if tuned.gated else None
    points = [(knob, gate) for knob in STRENGTHS for gate in _gates(tuned)]
    if tuned.adapter is not None and cell.config["dials"]:
        points += [(knob, opened) for knob in CONTAINED]
    for knob, gate in points:
        with _at(tuned, knob, gate):
            if gate is not False or not same or knob in CONTAINED:
                pictures = studio.paint(asks, noise)
            # A gate that was shut for all that is not the concept is so at every strength.
            if not gate or shut is None:
                beyond, whole = outside()
                shut = beyond if gate and whole else shut
            else:
                beyond = shut
        leaks[knob, gate] = beyond
        if gate == gated:
            painted[knob] = pictures
        row = tuned.facts | _knob(knob, gate) | tasks.score(pictures, asks, learned)
        yield row | tasks.inner_leak(neighbours, pictures[: len(pairs)], pairs) | beyond
    if tuned.adapter is not None and cell.config["dials"]:
        for knob in DIALS:
            with _at(tuned, knob, gated):
                pictures = studio.paint(asks, noise)
                inner = tasks.inner_leak(neighbours, pictures[: len(pairs)], pairs)
                yield tuned.facts | _knob(knob, gated) | tasks.score(pictures, asks, learned) | inner
        for knob, pictures in _in_own_words(tuned, studio, asks, lesson, noise, painted):
            inner = tasks.inner_leak(neighbours, pictures[: len(pairs)], pairs)
            row = tuned.facts | _knob(knob, gated) | tasks.score(pictures, asks, learned)
            yield row | inner | leaks[OWN_WORDS[knob], gated]
        tuned.remove()
        for knob in REFITTED:
            few = refitted(fit_of(cell, lesson), studio.pipe, studio.folder / "fits", knob.value)
            with _at(few, FULL, opened):
                pictures, (beyond, _) = studio.paint(asks, noise), outside()
            inner = tasks.inner_leak(neighbours, pictures[: len(pairs)], pairs)
            row = few.facts | _knob(knob, opened) | tasks.score(pictures, asks, learned)
            yield row | inner | beyond
            few.remove()


def _in_own_words(
    tuned: Tuned, studio: Studio, asks: Sequence[Ask], lesson: Lesson, noise: int, painted: Mapping[Knob, Sequence[Any]]
) -> Iterator[tuple[Knob, list[Any]]]:
    """The asks at each knob of `OWN_WORDS`; nothing where the lesson has words for all of them.

    `painted` holds them by the knob beside it, in their own words.
    """
    words = [tasks.own_words(ask, lesson) for ask in asks]
    other = [i for i, own in enumerate(words) if own]
    if not other:
        return
    instead = {said: own for table in words for said, own in table.items()}
    for knob, beside in OWN_WORDS.items():
        pictures = list(painted[beside])
        with _at(tuned, beside, _gates(tuned)[0]), tuned.reading(instead, knob.value):
            again = studio.paint([asks[i] for i in other], [noise + i for i in other])
        for i, picture in zip(other, again, strict=True):
            pictures[i] = picture
        yield knob, pictures


# ------------------------------------------------------------------------------------------- editing


def editing(cell: Cell, studio: Studio) -> Iterator[Row]:
    """One picture, full caption."""
    yield from _edited(cell, studio, tasks.single_lesson(cell.subject, "full"))


def editing_bare(cell: Cell, studio: Studio) -> Iterator[Row]:
    """One picture, bare caption."""
    yield from _edited(cell, studio, tasks.single_lesson(cell.subject, "bare"))


def _edited(cell: Cell, studio: Studio, lesson: Lesson) -> Iterator[Row]:
    asks, noise = tasks.edit_asks(cell.subject), _noise(cell)
    if cell.method in REFERENCES:
        yield from _kinds(studio.untrained(cell.method, asks, noise), asks)
        return
    tuned = _tuned(cell, studio, lesson)
    gate = True if tuned.gated else None
    knobs = EDIT_KNOBS if tuned.adapter is not None else (FULL, *SCALES)
    painted = {}
    for knob, pictures in sweep(knobs, lambda knob: _at(tuned, knob, gate), lambda: studio.paint(asks, noise)):
        painted[knob] = pictures
        for row in _kinds(pictures, asks):
            yield tuned.facts | _knob(knob, gate) | row
    if tuned.adapter is not None:
        for knob, pictures in _in_own_words(tuned, studio, asks, lesson, noise, painted):
            for row in _kinds(pictures, asks):
                yield tuned.facts | _knob(knob, gate) | row
    if parse(cell.method)[0] in COMPONENTS:
        tuned.remove()
        cut = singular(fit_of(cell, lesson), studio.pipe, studio.folder / "fits")
        few = [Knob("atoms", value) for value in (0.5, 0.25)]
        for knob, pictures in sweep(few, cut.turned, lambda: studio.paint(asks, noise)):
            for row in _kinds(pictures, asks):
                yield cut.facts | _knob(Knob("svd", knob.value), None) | row | {"density": knob.value}


def _kinds(pictures: Sequence[Any], asks: Sequence[Ask]) -> Iterator[Row]:
    """The scores of all edits together, and of each kind."""
    yield {"edit": "all"} | tasks.score(pictures, asks)
    for kind in dict.fromkeys(a.kind for a in asks):
        chosen = [i for i, a in enumerate(asks) if a.kind == kind]
        yield {"edit": kind} | tasks.score([pictures[i] for i in chosen], [asks[i] for i in chosen])


# ------------------------------------------------------------------------------- two adapters at once


def mixing(cell: Cell, studio: Studio) -> Iterator[Row]:
    """A subject and a style, taught apart, in one picture."""
    subject, _, look = cell.subject.partition(" x ")
    asks = tasks.mixed_asks(subject, look)
    lessons = (tasks.subject_lesson(subject), tasks.style_lesson(look))
    yield from _together(cell, studio, lessons, asks, ({look: tasks.LEARNED}, {}))


def both(cell: Cell, studio: Studio) -> Iterator[Row]:
    """Two subjects, taught apart, side by side."""
    first, _, second = cell.subject.partition(" + ")
    asks = tasks.both_asks(first, second)
    lessons = (tasks.subject_lesson(first), tasks.subject_lesson(second))
    own_words = ({second: CLASS_OF[second]}, {first: CLASS_OF[first]})
    yield from _together(cell, studio, lessons, asks, own_words)


def _together(
    cell: Cell,
    studio: Studio,
    lessons: tuple[Lesson, Lesson],
    asks: list[Ask],
    own_words: tuple[Mapping[str, str], Mapping[str, str]],
) -> Iterator[Row]:
    noise = _noise(cell)
    if cell.method in REFERENCES:
        yield tasks.score(studio.untrained(cell.method, asks, noise), asks, None)
        return
    # One after the other, since training needs a base without adapters.
    for lesson in lessons:
        _tuned(cell, studio, lesson).remove()
    first, second = (_tuned(cell, studio, lesson, name) for lesson, name in zip(lessons, ("a", "b"), strict=True))
    activate(unwrap(studio.pipe), "a", "b")
    for knob, (strength, other, until) in TOGETHER.items():
        if until is not None and first.adapter is None:
            continue
        for gate in _gates(first) if knob == FULL else _gates(first)[:1]:
            with ExitStack() as stack:
                stack.enter_context(_at(first, Knob("scale", strength), gate))
                stack.enter_context(_at(second, Knob("scale", other), gate))
                for tuned, words in zip((first, second), own_words, strict=True):
                    stack.enter_context(nullcontext() if until is None else tuned.reading(words, until))
                pictures = studio.paint(asks, noise)
            yield first.facts | _knob(knob, gate) | tasks.score(pictures, asks, None)


MEASURES: dict[str, Callable[[Cell, Studio], Iterator[Row]]] = {
    "customization": customization,
    "style": style,
    "editing": editing,
    "editing-bare": editing_bare,
    "mixing": mixing,
    "both": both,
}
