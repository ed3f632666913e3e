"""Which tokens a prompt becomes, where they lie among the text tokens of a site, and which of them spell some words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from atomtune.errors import UserError, did_you_mean


class Reading(NamedTuple):
    """How one tokenizer reads a prompt; its tokens follow those of the readings before it."""

    tokenizer: Any
    """None: tokens that stand for no text."""
    prompt: str
    length: int
    """The most tokens there are; the rest of the text is cut off."""
    padded: bool = False
    """Whether padding up to that length is attended, so that the next reading starts behind it."""
    before: str = ""
    after: str = ""
    """A template around the prompt."""
    cut: slice = slice(0)
    """Tokens that the family takes out again."""
    special: bool = True
    """Whether the tokenizer adds its special tokens."""

    def tokens(self) -> list[tuple[str, bool, int, int]]:
        """(text of the token, whether it is of the prompt, and there from which character to which)."""
        if self.tokenizer is None:
            return [("", False, 0, 0)] * self.length
        found = self.tokenizer(
            self.before + self.prompt + self.after,
            truncation=True,
            max_length=self.length,
            padding="max_length" if self.padded else False,
            add_special_tokens=self.special,
            return_offsets_mapping=True,
        )
        start, end = len(self.before), len(self.before) + len(self.prompt)
        tokens = [
            (self.tokenizer.decode([token]).strip(), b > start and a < end, a - start, b - start)
            for token, (a, b) in zip(found.input_ids, found.offset_mapping, strict=True)
        ]
        del tokens[self.cut]
        return tokens


def around(render: Callable[[str], str]) -> tuple[str, str]:
    """What a chat template puts before and after a prompt."""
    before, _, after = render("\ue000").partition("\ue000")
    return before, after


def token_texts(readings: list[Reading]) -> list[str]:
    """The text of each token."""
    return [text for reading in readings for text, *_ in reading.tokens()]


SPACELESS = "\u0e00"
"""From here on in Unicode, Thai and most others, scripts put no spaces between words."""


def spelling(words: str) -> re.Pattern[str]:
    """Finds words in a text, in any case and spacing; whole ones, in scripts that have spaces between them."""
    first, last = words.strip()[:1], words.strip()[-1:]
    before, after = r"(?<!\w)" * (first < SPACELESS), r"(?!\w)" * (last < SPACELESS)
    return re.compile(before + r"\s+".join(map(re.escape, words.split())) + after, re.IGNORECASE)


def word_tokens(readings: list[Reading], words: str) -> list[int]:
    """Which tokens spell these words, in any case and spacing. Raises UserError where the prompt lacks them."""
    pattern = spelling(words)
    at, found = 0, []
    for reading in readings:
        spans = [match.span() for match in pattern.finditer(reading.prompt)]
        if reading.tokenizer is not None and not spans:
            hint = did_you_mean(words, re.findall(r"\w+", reading.prompt))
            raise UserError(f"`words` must be in every prompt, got {words!r} for {reading.prompt!r}.{hint}")
        tokens = reading.tokens()
        for number, (_, inside, a, b) in enumerate(tokens):
            if inside and any(a < end and b > begin for begin, end in spans):
                found.append(at + number)
        at += len(tokens)
    return found


@contextmanager
def encoding(pipe: Any, note: Callable[[list[str], Any], None]) -> Iterator[None]:
    """Inside, `note` gets the prompts that the pipeline encodes, and what came of them."""
    encode, around = pipe.encode_prompt, vars(pipe).get("encode_prompt")

    def noted(*args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("prompt", args[0] if args else None) or []
        prompts = [given] if isinstance(given, str) else list(given)  # Z-Image's pipeline overwrites it
        found = encode(*args, **kwargs)
        if prompts:
            note(prompts, found)
        return found

    pipe.encode_prompt = noted
    try:
        yield
    finally:
        del pipe.encode_prompt
        if around is not None:
            pipe.encode_prompt = around
