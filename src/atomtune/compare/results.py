"""From outcomes of cells to a result file, and from that back to cells; what a result says of the machine."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from atomtune.compare.cells import Cell, Outcome, Row, Store, plain_rows
from atomtune.errors import UserError
from atomtune.files import write_whole


def rows(outcomes: Iterable[Outcome]) -> list[Row]:
    """All rows with the columns task, method, subject, seed and cell in front; a failed cell is one row, its error."""
    found = []
    for outcome in outcomes:
        cell = outcome.cell
        identity = {"task": cell.task, "method": cell.method, "subject": cell.subject, "seed": cell.seed}
        identity["cell"] = cell.key
        if outcome.rows is None:
            found.append(identity | {"error": outcome.error})
        else:
            found += [identity | row for row in outcome.rows]
    return found


def restore(path: Path, cells: Iterable[Cell], folder: Path) -> int:
    """Put those of the cells that a result file holds, and `folder` does not, into the folder; returns how many.

    So a grid goes on from its stored result alone. Raises UserError where the file is not a result.
    """
    if not path.is_file():
        return 0
    with _whole(path):
        result = json.loads(path.read_bytes())
        known, measured = result.get("cells", {}), [row for row in result["rows"] if "error" not in row]
        by_key: dict[str, list[Row]] = {}
        for row in measured:
            by_key.setdefault(row.get("cell", ""), []).append(row)
        store, restored = Store(folder), 0
        for cell in cells:
            if cell.key in known and cell.key in by_key and store.read(cell) is None:
                store.write(Outcome(cell, plain_rows(by_key[cell.key]), None, **known[cell.key]))
                restored += 1
    return restored


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Inside, a result file is read: what does not fit is told as a file that is not whole."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"`results` holds {path.name}, which is no whole result ({error}). Move it away.") from error


@dataclass(frozen=True)
class Others:
    """What a result file holds beside the cells of a grid."""

    command: str
    """One a line."""
    seconds: float
    cells: Mapping[str, Any]
    """How each was measured, by its key."""
    rows: Sequence[Row]


def others(path: Path, cells: Sequence[Cell], settings: Mapping[str, Any]) -> Others | None:
    """What a result file, if it is there, holds of other methods, subjects, seeds and sizes than those of the cells.

    Raises UserError where the file is not a result, or was made with other settings.
    """
    if not path.is_file():
        return None
    own = {(c.method, c.subject, c.seed, size) for c in cells for size in (c.config.get("size", 0), None)}
    with _whole(path):
        result = json.loads(path.read_bytes())
        theirs = result.get("settings")
        # The row of a failed cell has no size.
        rows = [r for r in result["rows"] if (r["method"], r["subject"], r["seed"], r.get("size")) not in own]
        keys = {r["cell"] for r in rows}
        kept = {key: how for key, how in result.get("cells", {}).items() if key in keys}
        found = Others(result["command"], sum(how["seconds"] for how in kept.values()), kept, rows)
    if theirs != settings:
        raise UserError(f"`add` needs a result with settings {settings}; {path.name} has {theirs}. Name another.")
    return found


def joined(
    command: str, rows: Sequence[Mapping[str, Any]], beside: Others | None
) -> tuple[str, list[Mapping[str, Any]]]:
    """The commands, one a line and each once, and the rows of a result: those of others before our own."""
    if beside is None:
        return command, list(rows)
    return "\n".join(dict.fromkeys([*beside.command.splitlines(), command])), [*beside.rows, *rows]


def write_result(
    path: Path,
    command: str,
    rows: Sequence[Mapping[str, Any]],
    seconds: float,
    *,
    outcomes: Iterable[Outcome] = (),
    settings: Mapping[str, Any] | None = None,
    beside: Others | None = None,
    started: str | None = None,
    commit: str | None = None,
    machine: str | None = None,
) -> None:
    """Write a result file, whole or not at all; absolute paths in it are cut to what says nothing of the machine.

    `outcomes` say how the cells of the rows were measured: `restore` needs it; `settings` what all cells share, and
    `beside` holds cells of other commands: `others` needs them. `started` is ISO time, None for `seconds` ago;
    `machine` is None for processor and system.
    """
    import importlib.metadata

    begin = datetime.now(UTC) - timedelta(seconds=seconds)
    # What is told of a folder that is somebody's own would lead nobody else to a result.
    commands, every = joined(re.sub(r" --[\w-]+ \.\.\./\S+", "", _without_paths(command)), rows, beside)
    result = {
        "command": commands,
        "atomtune": importlib.metadata.version("atomtune"),
        **({} if commit is None else {"commit": commit}),
        "machine": _without_paths(machine or f"{platform.machine()}, {platform.system()}"),
        "started": started or begin.isoformat(timespec="seconds"),
        "seconds": round(seconds + (beside.seconds if beside else 0), 1),
    }
    if settings is not None:
        result["settings"] = dict(settings)
    measured = {
        o.cell.key: {"seconds": round(o.seconds, 1), "code": o.code, "started": o.started}
        for o in outcomes
        if o.error is None
    }
    if measured := {**(beside.cells if beside else {}), **measured}:
        result["cells"] = measured
    result["rows"] = [
        {column: _short(value) for column, value in row.items()} for row in (plain_rows(every) if every else ())
    ]
    fields = ",\n".join(f" {json.dumps(name)}: {_entries(value)}" for name, value in result.items())
    write_whole(path, f"{{\n{fields}\n}}\n")


def _short(value: Any) -> Any:
    """Text without paths; six digits of a number are more than any measure is worth."""
    if isinstance(value, str):
        return _without_paths(value)
    return float(f"{value:.6g}") if isinstance(value, float) else value


def script_command() -> str:
    """What is running, as it is typed in the repository: a script of `scripts/` and its arguments."""
    return " ".join(["python", f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def _entries(value: Any) -> str:
    """JSON with a line for each cell and row, so that a change of one shows as such."""
    if isinstance(value, Mapping):
        ends, entries = "{}", [f"{json.dumps(key)}: {json.dumps(inner)}" for key, inner in value.items()]
    elif isinstance(value, list):
        ends, entries = "[]", [json.dumps(inner, allow_nan=False) for inner in value]
    else:
        return json.dumps(value)
    return ends[0] + ",".join(f"\n  {entry}" for entry in entries) + f"\n {ends[1]}"


_EDGE = r"(?<![\w.~/-])"
_PATH = re.compile(r"(?P<web>(?!file:)\b\w+://\S+)|" + _EDGE + r"(?:file://)?(?:/[^\s/'\"`:;,()\[\]{}<>|]+)+/?")


def _without_paths(text: str) -> str:
    """Paths below the working folder are made relative, others cut to their name; web addresses stay."""
    for folder, short in ((Path.cwd(), ""), (Path.home(), "~/")):
        if len(folder.parts) > 1:
            text = re.sub(f"{_EDGE}{re.escape(str(folder))}/", short, text)
    return _PATH.sub(lambda found: found[0] if found["web"] else f".../{Path(found[0]).name}", text)
