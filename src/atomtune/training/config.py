"""config.toml: a command's options as a file."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from atomtune.errors import UserError, did_you_mean

FILE = "config.toml"
"""Its name in the folder of a run."""

CONCEPTS = "concepts"
"""Tables of a file for many concepts."""


def read(path: Path, known: Collection[str]) -> dict[str, Any]:
    """The options in a file. Raises UserError on unknown ones, naming the nearest, and on values of no use."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path} can't be read: {error}.") from error
    _check(str(path), values, known)
    return values


def read_concepts(path: Path, known: Collection[str], own: Collection[str]) -> list[dict[str, Any]]:
    """The options of each [[concepts]] table in a file, those of the file before them. Raises UserError as `read`."""
    shared = read(path, [*known, CONCEPTS])
    tables = shared.pop(CONCEPTS, None)
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{path}: there must be a [[{CONCEPTS}]] table for each concept, got {tables!r}.")
    for number, table in enumerate(tables, 1):
        where = f"{path}: [[{CONCEPTS}]] {number}"
        _check(where, table, own)
        if "data" not in table:
            raise UserError(f"{where}: `data` must be a folder of pictures, got none.")
    return [shared | table for table in tables]


def _check(where: str, values: Mapping[str, Any], known: Collection[str]) -> None:
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{where}: unknown option {name!r}.{did_you_mean(name, known)}")
        if not isinstance(value, bool | int | float | str | list):
            raise UserError(f"{where}: `{name}` must be a value, got {value!r}.")


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
