"""Errors that are the user's to fix, and libraries that tell of nothing else."""

import difflib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A user's mistake, told in one line: what it must be, what it was, what to do."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean ...?` for an error about an unknown name, or nothing where no known one is close."""
    names = sorted(set(known))
    tails = [other for other in names if other.partition("/")[2] == name]
    close = tails[:3] or difflib.get_close_matches(name, names, n=3, cutoff=0.7)
    return f" Did you mean {' or '.join(f'`{other}`' for other in close)}?" if close else ""


OPTIONAL = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao", "bitsandbytes")
"""Loggers of parts that may be missing, which is no news to a user."""


@contextmanager
def hushed(*libraries: str, level: int = logging.ERROR) -> Iterator[None]:
    """Inside, these libraries log nothing below a level."""
    loggers = [logging.getLogger(name) for name in libraries]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, old in zip(loggers, before, strict=True):
            logger.setLevel(old)
