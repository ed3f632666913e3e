"""What several commands need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atomtune.errors import UserError


def device_of(name: str | None) -> str | None:
    """The device asked for, or cuda where there is one. Raises UserError where there is none of that name."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else None
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"`device` must be one that torch has here, got {name!r}: {reason}") from error
    return name


def open_adapter(
    folder: Path, base: str | None, allow_other_base: bool, device: str | None = None, dtype: str | None = None
) -> Any:
    """The adapter in a folder, attached to its base (or to another, where that is allowed)."""
    import atomtune

    pipe = open_base_of(folder, base, device, dtype)
    return atomtune.load(pipe, folder, allow_other_base=allow_other_base)


def open_base_of(folder: Path, base: str | None, device: str | None = None, dtype: str | None = None) -> Any:
    """The base that an adapter names, or another; where no precision is given, in that of the run in the folder."""
    from atomtune.adapter import base_of
    from atomtune.training.base import open_base

    named = base or base_of(folder)
    if named is None:
        raise UserError(f"{folder} does not name its base. Give it with --base.")
    asked = {"dtype": dtype} if dtype else _precision(folder)
    return open_base(named, asked.get("dtype", "float32"), device_of(device), quantized=asked.get("quantize"))


def _precision(folder: Path) -> dict[str, str]:
    """What a run's config says of its base's precision; nothing where there is no run."""
    import tomllib

    from atomtune.training import config

    try:
        said = tomllib.loads((folder / config.FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # an adapter can be used without it
        return {}
    return {name: said[name] for name in ("dtype", "quantize") if isinstance(said.get(name), str)}


def parse_numbers(field: str, like: str, given: tuple[str, ...]) -> dict[str, float]:
    """`L17[137]=0.5` and the like, as a table."""
    found: dict[str, float] = {}
    for name, value in pairs(field, given, like).items():
        try:
            found[name] = float(value)
        except ValueError:
            pair = f"{name}={value}"
            raise UserError(f"`{field}` must be like {like}, each name once, got {pair!r}.") from None
    return found


def parse_density(given: tuple[str, ...]) -> float | dict[str, float]:
    """`0.5`, or `L17=0.2` and the like, as `Adapter.using` takes it; 1 where nothing is given."""
    if not given:
        return 1.0
    if any("=" in text for text in given):
        return parse_numbers("density", "L17=0.2", given)
    try:
        (share,) = map(float, given)
    except ValueError:
        raise UserError(f"`density` must be one number, or several like L17=0.2, got {' '.join(given)}.") from None
    return share


def parse_time(text: str | None) -> tuple[float, float] | None:
    """`0.6-1.0` as a pair."""
    if text is None:
        return None
    try:
        first, last = map(float, text.split("-"))
    except ValueError:
        raise UserError(f"`time` must be like 0.6-1.0, got {text}.") from None
    return first, last


def check_top(top: int) -> None:
    """Raises UserError where --top shows nothing."""
    if top < 1:
        raise UserError(f"`top` must be at least 1, got {top}.")


def unshown(number: int, top: int, before: str) -> str:
    """What ends a line below a table that --top cuts off, after `before`; nothing where it shows all."""
    return f"{before} {number - top} more than shown: --top" if number > top else ""


def counted(number: int, noun: str) -> str:
    """`1 picture`, `2 pictures`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def pairs(field: str, given: tuple[str, ...], like: str = "name=value") -> dict[str, Any]:
    """Arguments like `name=value` as a table."""
    found: dict[str, Any] = {}
    for pair in given:
        name, sign, value = (word.strip() for word in pair.partition("="))
        if not sign or not name or name in found:
            raise UserError(f"`{field}` must be like {like}, each name once, got {pair!r}.")
        found[name] = value
    return found
