"""Captions that have nothing to do with the concept, and a split that keeps some of them unseen."""

import hashlib
from collections.abc import Iterable
from importlib.resources import files

from atomtune.errors import UserError


def unrelated_prompts() -> tuple[str, ...]:
    """The shipped captions for real models: everyday objects, people, places, interiors and styles."""
    text = files("atomtune.data").joinpath("unrelated.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def _place(prompt: str, seed: int) -> float:
    """A prompt's place in [0, 1): by its words alone, so a twin in other case or spacing has the same."""
    words = " ".join(prompt.split()).casefold()
    return int.from_bytes(hashlib.sha256(f"{seed}/{words}".encode()).digest()[:6], "big") / 2**48


def split_held_out(
    prompts: Iterable[str], share: float = 0.2, seed: int = 0
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Prompts to train on and prompts held out, in their order; about `share` (0 to 1) of them are held out.

    A prompt's side depends on its own text, not on its neighbours: adding one moves no other. Only a side
    that would stay empty takes the prompt nearest to it.
    """
    prompts = tuple(prompts)
    if not 0 < share < 1:
        raise UserError(f"`share` must lie between 0 and 1, got {share}. A fifth is 0.2.")
    places = [_place(prompt, seed) for prompt in prompts]
    if len(set(places)) < 2:
        raise UserError(f"`prompts` must hold at least 2 different ones to split, got {len(set(places))}.")
    # Held out are the places below the limit: at least the lowest, never the highest.
    lowest, highest = min(places), max(places)
    is_held_out = [place == lowest or (place < share and place != highest) for place in places]
    train = tuple(prompt for prompt, held_out in zip(prompts, is_held_out, strict=True) if not held_out)
    held = tuple(prompt for prompt, held_out in zip(prompts, is_held_out, strict=True) if held_out)
    return train, held
