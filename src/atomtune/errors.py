"""Errors that are the user's to fix."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A user's mistake, told in one line: what it must be, what it was, what to do."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean ...?` for an error about an unknown name, or nothing where no known one is close."""
    close = difflib.get_close_matches(name, sorted(set(known)), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(f'`{other}`' for other in close)}?" if close else ""
