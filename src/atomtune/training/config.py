"""config.toml: a command's options as a file."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from atomtune.errors import UserError, did_you_mean


def read(path: Path, known: Collection[str]) -> dict[str, Any]:
    """The options in a file. Raises UserError on unknown ones, naming the nearest, and on values of no use."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"`config` can't be read: {path}: {error}.") from error
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{path}: unknown option {name!r}.{did_you_mean(name, known)}")
        if not isinstance(value, bool | int | float | str | list):
            raise UserError(f"{path}: `{name}` must be a value, got {value!r}.")
    return values


def text(values: Mapping[str, Any]) -> str:
    """A file that `read` reads back; None, which TOML has not, is left out: it is every such option's default."""
    return "".join(f"{name} = {_value(value)}\n" for name, value in values.items() if value is not None)


def _value(value: Any) -> str:
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    # JSON's text is TOML's, but for one control character.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def arguments(values: Mapping[str, Any]) -> list[str]:
    """The options as a command line has them."""
    found: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            found += [f"--{flag}", *map(str, value)]
        else:
            found.append(f"--{flag}={value}")
    return found
