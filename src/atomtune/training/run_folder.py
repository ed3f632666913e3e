"""A run's folder: what it began with, who trains in it, and where that stands."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from atomtune.data.folder import Scan
from atomtune.data.packed import File
from atomtune.errors import UserError
from atomtune.files import is_unfinished, write_whole
from atomtune.training import config
from atomtune.training.options import TrainOptions
from atomtune.tuner import previous_of, recover
from atomtune.tuner.store import RUN_STATUS, WEIGHTS

try:
    import fcntl
except ImportError:  # not on Windows, where nobody is kept from a run that is being trained
    fcntl = None  # type: ignore[assignment]

OPTIONS, CONFIG, DATA, STATUS, LOCK, LOG = (
    "options.json",
    config.FILE,
    "data.json",
    RUN_STATUS,
    ".lock",
    "log.jsonl",
)


UNRELATED = "unrelated pictures and prompts"
"""Their name among those of pictures."""


def say(text: str) -> None:
    """A message on stderr, above the progress bar; stdout is for data."""
    tqdm.write(text, file=sys.stderr)


def mend(run: Path) -> None:
    """Finish what a process that died was doing to the folder; one that lives is left alone."""
    previous = previous_of(run)
    if previous.is_dir() and not _is_held(previous) and not _is_held(run):
        recover(run)


def check_free(run: Path, options: TrainOptions) -> TrainOptions:
    """The options, where the folder is free for a new run. Raises UserError where it is not."""
    if run.is_mount():  # the finished adapter takes the folder's place in one rename
        raise UserError(f"`out` must be a folder that can be renamed, got the mount point {run}. Name one inside it.")
    if run.exists() and not _is_free(run):
        more = ""
        if (found := status(run)) and found["state"] in ("preparing", "training"):
            who = f"process {found['pid']} on {found['host']}"
            gone = "is training there" if _is_held(run) else f"ended without a word at step {found['step']}"
            more = f" ({who} {gone})"
        raise UserError(f"`out` exists and is not empty: {run}{more}. Choose another folder, or go on with --resume.")
    return options


def _is_free(run: Path) -> bool:
    """Whether a folder is empty, or holds only what a run left that died before it had claimed it."""
    if not run.is_dir():
        return False
    names = {path.name for path in run.iterdir()}
    return all(name in (CONFIG, DATA, LOCK) or is_unfinished(name) for name in names)


def stored(run: Path, given: TrainOptions) -> TrainOptions:
    """The options that a run began with: a resumed run keeps them, and says so where others were given."""
    path = run / OPTIONS
    if not path.is_file():
        raise UserError(
            f"`out` must be the folder of a run to resume, but {run} has no {OPTIONS}. A run that had not begun is "
            "started again without --resume."
        )
    found = TrainOptions.from_dict(_table(path))
    for field in dataclasses.fields(TrainOptions):
        old, new = getattr(found, field.name), getattr(given, field.name)
        if new not in (old, field.default):
            say(f"warning: a resumed run keeps its options: `{field.name}` stays {old}, not {new}")
    return found


@contextmanager
def claimed(run: Path, options: TrainOptions, settings: Mapping[str, Any], scan: Scan, beside: str) -> Iterator[None]:
    """Inside, the folder is ours, as `held`; claimed once nothing is known to be wrong: a second try finds it free.

    The options come last: with them the run has begun, and `stored` finds it. `beside`: as in `check_data`.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"`out` can't be written: {error}.") from error
    with held(run):
        check_free(run, options)  # another may have begun and ended since the folder was found free
        write_whole(run / CONFIG, config.text({**settings, **options.to_dict()}))
        write_whole(run / DATA, json.dumps(_digests(scan, beside), indent=1, ensure_ascii=False) + "\n")
        write_whole(run / OPTIONS, options.to_json())
        yield


def check_data(run: Path, scan: Scan, beside: str | None, allow_changed: bool) -> None:
    """Raises UserError where pictures, captions or masks are not those that the run began with.

    `beside` stands for what else is trained on, the unrelated pictures and prompts; None: that is not known.
    """
    if not (run / DATA).is_file():
        return
    before, now = _table(run / DATA), _digests(scan, beside)
    if UNRELATED not in before or beside is None:  # a run from before it was kept
        before.pop(UNRELATED, None)
        now.pop(UNRELATED, None)
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if not changed:
        return
    kinds = ("gone" if n not in now else "new" if n not in before else "changed" for n in changed)
    told = ", ".join(f"{name} ({kind})" for name, kind in list(zip(changed, kinds, strict=True))[:3])
    told += f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    if not allow_changed:
        raise UserError(
            f"`data` is not what this run began with: {told}. Put it back, start a new run, or go on with "
            "--allow-changed-data."
        )
    say(f"warning: data has changed since the run began: {told}")


def _table(path: Path) -> dict[str, Any]:
    """What a JSON file of the run holds. Raises UserError where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read: {error}. Put it back, or start a new run.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a table, got {str(found)[:60]!r}. Put it back, or start a new run.")
    return found


def _digests(scan: Scan, beside: str | None) -> dict[str, Any]:
    """What is learned from, by the picture's name, and what stands for all beside it."""
    found: dict[str, Any] = {
        sample.path.name: {"sha256": sample.digest, "caption": sample.caption, "mask": _bytes(sample.mask)}
        | ({"repeats": sample.repeats} if sample.repeats != 1 else {})
        for sample in scan.samples
    }
    return found | {UNRELATED: beside}


def _bytes(file: File | None) -> str | None:
    if file is None:
        return None
    with file.open("rb") as opened:
        return hashlib.sha256(opened.read()).hexdigest()


# ------------------------------------------------------------------------------------------------------- status


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Inside, no other process can train here; the system lets go of it when this one dies, however it does."""
    with (run / LOCK).open("a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                found = status(run) or {}
                raise UserError(
                    f"`out` is being trained by process {found.get('pid')} on {found.get('host')}, at step "
                    f"{found.get('step')}: {run}. Stop that one first, or choose another folder."
                ) from None
        for path in run.iterdir():
            if is_unfinished(path.name):
                path.unlink(missing_ok=True)
        yield


def _is_held(run: Path) -> bool:
    if not (run / LOCK).exists():
        return False
    try:
        with held(run):
            return False
    except UserError:
        return True


def status(run: Path) -> dict[str, Any] | None:
    """Where a run stands, as it was last written."""
    try:
        found: dict[str, Any] = json.loads((run / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(found, dict) and {"state", "step", "pid", "host"} <= found.keys()
    return found if whole else None


def is_finished(run: Path) -> bool:
    """Whether the run has ended by itself, and its adapter lies there."""
    return (found := status(run)) is not None and found["state"] == "finished" and (run / WEIGHTS).is_file()


def set_status(run: Path, state: str, step: int, steps: int, **more: Any) -> None:
    """Write where the run stands: preparing, training, stopped, failed or finished."""
    facts = {"state": state, "step": step, "steps": steps, "pid": os.getpid(), "host": socket.gethostname()}
    facts |= {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **more}
    write_whole(run / STATUS, json.dumps(facts, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------- log


@contextmanager
def log_of(path: Path) -> Iterator[BinaryIO]:
    """A log to add lines to. Raises UserError where the disk is full."""
    try:
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise _unwritten(path, error) from error
    with file:
        yield file


def note(log: BinaryIO, line: Mapping[str, Any]) -> None:
    """Add a line to a log, at once. Raises UserError where the disk is full."""
    data = f"{json.dumps(line)}\n".encode()
    try:
        if log.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise _unwritten(Path(log.name), error) from error


def _unwritten(path: Path, error: OSError) -> UserError:
    return UserError(f"Could not write {path}: {error.strerror}. Free space, and go on with --resume.")


def cut_log(path: Path, done: int) -> None:
    """Forget logged steps after the checkpoint that a resumed run starts from, and lines that were cut off."""
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        write_whole(path, "".join(f"{line}\n" for line in lines if _step(line) <= done))


def _step(line: str) -> float:
    """The step that a line of the log tells of; none is reached where it tells of none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf


def tell(found: Scan, said: Sequence[str] = ()) -> None:
    """What lies in the data folder and is not learned from, and why, and what became of the rest; not in silence."""
    for reason, names in found.by_reason().items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        if reason not in ("caption", "mask"):  # those of a picture
            say(f"passed over, {reason}: {', '.join(names[:3])}{more}")
    for line in said:
        say(line)
