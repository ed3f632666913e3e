"""Cells of a benchmark grid, and the folder that keeps what each of them gave."""

from __future__ import annotations

import ast
import fcntl
import hashlib
import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeAlias, Union

from atomtune.errors import UserError
from atomtune.files import write_whole

log = logging.getLogger(__name__)

JSON: TypeAlias = Union[bool, int, float, str, Sequence["JSON"], Mapping[str, "JSON"], None]  # noqa: UP007

Row = dict[str, Any]
"""Column -> text, finite number, truth value or None."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One measurement of a grid; equal where the keys are. `config` is kept as a copy, in plain JSON types."""

    task: str
    method: str
    subject: str
    seed: int
    config: Mapping[str, Any]
    """All else that decides the result: size, lr, steps, prior, fingerprint of the base, version of the method."""

    def __post_init__(self) -> None:
        for name in ("task", "method", "subject"):
            if not isinstance(value := getattr(self, name), str):
                raise UserError(f"`{name}` of a cell must be text, got {value!r}.")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise UserError(f"`seed` of a cell must be a whole number, got {self.seed!r}.")
        if not isinstance(self.config, Mapping):
            raise UserError(f"`config` of a cell must be a mapping, got {self.config!r}.")
        object.__setattr__(self, "config", json.loads(json.dumps(_plain(self.config, "config"))))

    @cached_property
    def key(self) -> str:
        """20 hex digits of the sha256 of all fields; the order in `config` does not matter, and 1.0 is 1."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    @property
    def label(self) -> str:
        """For people: "customization lora pineapple seed 0"."""
        return " ".join(filter(None, (self.task, self.method, self.subject, f"seed {self.seed}")))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cell) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)


def _plain(value: Any, name: str) -> JSON:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() else value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, f"{name}[{i}]") for i, inner in enumerate(value)]
    kinds = "text, truth values, finite numbers, null, lists, and mappings with text keys"
    raise UserError(f"`{name}` of a cell must be JSON ({kinds}), got {value!r}.")


def plain_rows(rows: Any) -> list[Row]:
    """The rows in JSON types, numbers of numpy and torch included; ValueError names the column that does not fit."""
    if not isinstance(rows, list | tuple):
        raise ValueError(f"a cell must give a list of rows, got {type(rows).__name__}")
    if not rows:
        raise ValueError("a cell must give at least one row, got none")
    return [_plain_row(row, i) for i, row in enumerate(rows)]


def _plain_row(row: Any, number: int) -> Row:
    if not isinstance(row, Mapping):
        raise ValueError(f"row {number} must be a mapping of columns, got {type(row).__name__}")
    found: Row = {}
    for column, given in row.items():
        value = given
        if not isinstance(given, bool | int | float | str) and hasattr(given, "item"):
            with suppress(Exception):  # more than one element
                value = given.item()
        fits = value is None or isinstance(value, bool | int | str)
        fits = fits or (isinstance(value, float) and math.isfinite(value))
        if not fits or not isinstance(column, str):
            raise ValueError(
                f"column `{column}` of row {number} must be text, a finite number or None, "
                f"got {' '.join(repr(given).split())[:80]}"
            )
        found[column] = value
    return json.loads(json.dumps(found))


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: `rows`, or one line of `error`."""

    cell: Cell
    rows: list[Row] | None
    error: str | None
    seconds: float
    code: str
    """`code_digest` of the source that measured it."""
    started: str = ""
    """ISO time."""


@dataclass(frozen=True)
class Store:
    """A folder with one JSON file a cell, cells/<key>.json. Any number of processes may share it."""

    folder: Path

    def path(self, cell: Cell) -> Path:
        """Where the cell's outcome lies, or would lie."""
        return self.folder / "cells" / f"{cell.key}.json"

    def log(self, cell: Cell) -> Path:
        """What the cell printed, and the traceback if it failed."""
        return self.path(cell).with_suffix(".log")

    def read(self, cell: Cell) -> Outcome | None:
        """The cell's outcome; None if it is not there, or (said in the log) not whole."""
        path = self.path(cell)
        try:
            return _outcome(cell, json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"Could not read {path}: {error.strerror or error}. Name another folder.") from error
        except (ValueError, TypeError, KeyError) as error:
            log.warning("%s is broken (%s): %s is measured again", path, error, cell.label)
            return None

    def write(self, outcome: Outcome) -> None:
        """Put the outcome in place of what was there, whole or not at all; UserError if that can't be done."""
        data: dict[str, Any] = {"cell": asdict(outcome.cell), "rows": outcome.rows}
        if outcome.error is not None:
            data["error"] = outcome.error
        data |= {"seconds": outcome.seconds, "code": outcome.code, "started": outcome.started}
        write_whole(self.path(outcome.cell), json.dumps(data, indent=1, allow_nan=False) + "\n")

    @contextmanager
    def claim(self, cell: Cell) -> Iterator[bool]:
        """True if the cell is ours alone until the block ends; False if someone else works on it.

        A claim is a lock of the system's, so a killed process lets go of it.
        """
        path = self.path(cell).with_suffix(".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = _lock(path)
        except OSError as error:
            raise UserError(
                f"`folder` must be a folder that can be written, got {self.folder} ({error.strerror or error}). "
                "Free space or name another."
            ) from error
        if handle is None:
            yield False
            return
        try:
            for stale in path.parent.glob(f".{cell.key}.*.tmp"):  # of a killed process
                stale.unlink(missing_ok=True)
            yield True
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)  # before the lock goes: see _lock
            os.close(handle)


def _lock(path: Path) -> int | None:
    """The open, locked file; None if another has it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it before may have deleted it after we opened it; then a lock on it keeps nobody out.
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _outcome(cell: Cell, data: Any) -> Outcome:
    """A file's content as an outcome; ValueError, TypeError or KeyError if it isn't whole, or is another's."""
    if Cell(**{field.name: data["cell"][field.name] for field in fields(Cell)}) != cell:
        raise ValueError("it belongs to another cell")
    rows, error = data["rows"], data.get("error")
    if (rows is None) == (error is None) or not isinstance(error, str | None):
        raise ValueError("it must have rows or an error")
    seconds, code, started = float(data["seconds"]), str(data["code"]), str(data["started"])
    return Outcome(cell, None if rows is None else plain_rows(rows), error, seconds, code, started)


# ---------------------------------------------------------------------------------------------------- code
class _Bare(ast.NodeTransformer):
    """Without docstrings, those under fields included."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if text else self.generic_visit(node)


@lru_cache(maxsize=4096)
def _source_digest(path: Path, modified: int, size: int) -> str:
    source = path.read_bytes()
    with suppress(SyntaxError, ValueError):  # no Python yet, such as a file that is being edited
        source = ast.dump(_Bare().visit(ast.parse(source))).encode()
    return hashlib.sha256(source).hexdigest()


def _sources(module: str) -> Iterable[tuple[str, Path]]:
    """Name and place of each .py file of a module or package, without importing it."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise UserError(f"`modules` must name modules that can be imported, got {module!r}.")
    if spec.submodule_search_locations is not None:
        for place in map(Path, spec.submodule_search_locations):
            yield from ((path.relative_to(place).as_posix(), path) for path in sorted(place.rglob("*.py")))
    elif spec.origin and spec.origin.endswith(".py"):
        yield Path(spec.origin).name, Path(spec.origin)
    else:
        raise UserError(f"`modules` must name modules with Python source, got {module!r}.")


def code_digest(modules: Sequence[str]) -> str:
    """20 hex digits for the source of the named modules and packages; comments, docstrings and layout don't count.

    It is that of one version of Python: the syntax tree differs a little between them.
    """
    digest = hashlib.sha256()
    for module in sorted(set(modules)):
        for name, path in _sources(module):
            with suppress(FileNotFoundError):  # an editor's link, or a file that is being replaced
                status = path.stat()
                # A file that was just written may change once more within the same tick of its clock.
                settled = time.time() - status.st_mtime > 2
                read = _source_digest if settled else _source_digest.__wrapped__
                content = read(path, status.st_mtime_ns, status.st_size)
                digest.update(f"{module} {name} {content}\n".encode())
    return digest.hexdigest()[:20]
