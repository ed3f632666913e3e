"""Where the hazards meet the real command line: a tiny base, three pictures, and children that run commands.

A child is a fork of this process, which has imported everything: it begins a second or ten sooner than a fresh one, and
is killed like one. What it does is `atomtune.cli.main`, under a time limit.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from atomtune.data.cache import key

ROOT = Path(__file__).parents[2]
PROMPT = "a big flat kite on a red background, on the left"
LIMIT = 120.0
"""Seconds after which a command counts as hanging."""
MEMORY = 24 * 2**30
"""Bytes of address space that a child may have."""
FINAL = ("adapter_model.safetensors", "adapter_config.json", "statistics.safetensors")
PLAIN: dict[str, Any] = {
    "concept": "kite",
    "class_noun": "toy",
    "steps": 12,
    "batch_size": 2,
    "n_atoms": 4,
    "lr": 0.02,
    "sites": ["layers.0.attn.to_q", "layers.1.attn.to_out.0"],
    "unrelated_pictures": 2,
    "checkpoint_every": 2,
    "trackers": ["tensorboard"],
}
WATCHED = PLAIN | {"validate_every": 2, "sample_every": 3, "sample_prompts": [PROMPT]}
"""With validation and pictures: slower, and more kinds of files are written."""


@dataclass
class Tally:
    """What became of a hazard's trials: a row of the table."""

    hazard: str
    how: str
    tried: int = 0
    failures: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def note(self, failure: str | None) -> None:
        """One more trial, and what went wrong in it, if anything did."""
        self.tried += 1
        if failure:
            self.failures.append(failure)
            print(f"  {self.hazard}: {failure}", file=sys.stderr, flush=True)

    def row(self) -> dict[str, Any]:
        survived = self.tried - len(self.failures)
        first = self.failures[0][:300] if self.failures else None
        return {
            "hazard": self.hazard,
            "tried": self.tried,
            "survived": survived,
            "how": self.how,
            "first_failure": first,
            **self.facts,
        }


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, or minus the signal that ended it."""

    code: int
    text: str
    """Both its streams."""
    hung: bool
    seconds: float

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL and not self.hung

    def fault(self) -> str | None:
        """What is wrong with an end that must be a success, or one line and exit code 1 or 2; None if nothing is."""
        if self.hung:
            return f"hung for {self.seconds:.0f} s"
        if "Traceback" in self.text:
            return f"traceback: {self.last}"
        if self.code == 0:
            return None
        if self.code not in (1, 2):
            return f"exit code {self.code}: {self.last}"
        # Of a wrong option tyro tells in its own way.
        told = self.last.startswith("error: ") or "atomtune train --help" in self.text
        return None if told else f"not one line: {self.last}"

    @property
    def last(self) -> str:
        return (self.text.strip().splitlines() or [""])[-1]


@dataclass
class Place:
    """A folder with a base, pictures, and uninterrupted runs to compare with, by the options of their commands."""

    folder: Path
    options: dict[str, Any] = field(default_factory=lambda: dict(PLAIN))
    until: float = float("inf")
    """When (of the monotonic clock) no more kills and full disks are tried: a row says how many were."""

    def late(self) -> bool:
        """Whether it is time to stop."""
        return time.monotonic() > self.until

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def data(self) -> Path:
        return self.folder / "kites"

    @property
    def truth(self) -> Path:
        """The run that was never stopped, trained when it is first asked for."""
        out = self.folder / f"truth-{key(json.dumps(self.options))[:8]}" / "run"
        if not out.exists() and (ended := run(self.train(out), self)).code:
            raise SystemExit(f"the run to compare with failed:\n{ended.text}")
        return out

    def watched(self) -> Place:
        """The same, with validation and pictures."""
        return Place(self.folder, WATCHED | {"steps": self.options["steps"] // 2}, self.until)

    def train(self, out: Path, *more: str, data: Path | None = None, **changes: Any) -> list[str]:
        """A command that trains there."""
        from atomtune.training.config import arguments

        given = {"data": str(data or self.data), "base": str(self.base), "out": str(out)} | self.options | changes
        return ["train", *arguments(given), *more]

    def go_on(self, out: Path, *more: str) -> list[str]:
        """The command that somebody gives after a run was cut off: it goes on, or starts where nothing had begun."""
        begun = any((folder / "options.json").exists() for folder in (out, out.with_name(f".{out.name}.previous")))
        return self.train(out, *(["--resume"] if begun else []), *more)

    def differs(self, out: Path) -> str | None:
        """What of a finished run is not, bit for bit, that of the uninterrupted one."""
        for name in (*FINAL, *(f"last/{name}" for name in FINAL if (self.truth / "last").exists())):
            if not (out / name).is_file() or (out / name).read_bytes() != (self.truth / name).read_bytes():
                return f"{name} is not that of an uninterrupted run"
        if log_of(out) != log_of(self.truth):
            return "log.jsonl is not that of an uninterrupted run"
        return None


def log_of(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "pictures_per_second"} for line in lines]


def prepare(folder: Path, steps: int = PLAIN["steps"]) -> Place:
    """Make the base and the pictures, and import what commands import."""
    import torch

    torch.set_num_threads(1)  # so that a fork has no threads to miss
    sys.path.insert(0, str(ROOT / "tests" / "contract"))
    from PIL import Image
    from tiny_parts import UNRELATED
    from tiny_streams import lumina2

    import atomtune.cli.generate
    import atomtune.cli.train
    import atomtune.training.loop  # noqa: F401
    from atomtune.backbones import open_pipeline
    from atomtune.scenes.render import render
    from atomtune.scenes.world import caption, scene

    place = Place(folder, PLAIN | {"steps": steps})
    lumina2().save_pretrained(place.base)
    (place.base / "unrelated.txt").write_text("\n".join(UNRELATED[:6]) + "\n")
    place.data.mkdir()
    for i, (position, color) in enumerate((("left", "red"), ("right", "blue"), ("top", "yellow"))):
        shot = scene("kite", position=position, color=color)
        Image.fromarray(render(shot)).save(place.data / f"{i}.png")
        (place.data / f"{i}.txt").write_text(caption(shot))
    open_pipeline(str(place.base))
    return place


def start(argv: Sequence[str], place: Place, before: Callable[[], None] = lambda: None) -> tuple[int, Path]:
    """Begin a command in a fork, after `before()` there; returns its process and where its text goes."""
    text = place.folder / f"text-{time.monotonic_ns()}"
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        _be_a_command(argv, place, text, before)
    return process, text


def _be_a_command(argv: Sequence[str], place: Place, text: Path, before: Callable[[], None]) -> None:
    code = 1
    try:
        handle = os.open(text, os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", errors="backslashreplace", closefd=False) for number in (1, 2))
        os.chdir(place.folder)
        os.environ["HF_HUB_OFFLINE"] = "1"
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        threading.settrace(None)  # type: ignore[arg-type]
        # tqdm's own lock lies in memory that all forks share: one that is killed with it in hand keeps it.
        tqdm.set_lock(threading.RLock())
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from atomtune.cli import main

        before()
        code = main(list(argv))
    except BaseException:  # what Python itself does with it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(process: int, text: Path, kill_after: float | None = None, limit: float = LIMIT) -> Ended:
    """Wait for a command, at most `limit` seconds; or kill it after some."""
    begin, patience = time.monotonic(), limit if kill_after is None else kill_after
    status = None
    while status is None and time.monotonic() - begin < patience:
        found, code = os.waitpid(process, os.WNOHANG)
        status = code if found else None
        if status is None:
            time.sleep(0.002)
    hung = status is None and kill_after is None
    if status is None:
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
    said = text.read_text(errors="replace") if text.exists() else ""
    text.unlink(missing_ok=True)
    return Ended(os.waitstatus_to_exitcode(status), said, hung, time.monotonic() - begin)


def run(
    argv: Sequence[str],
    place: Place,
    *,
    kill_after: float | None = None,
    limit: float = LIMIT,
    before: Callable[[], None] = lambda: None,
) -> Ended:
    """A command in a fork."""
    return finish(*start(argv, place, before), kill_after, limit)


def run_fresh(argv: Sequence[str], place: Place, kill_after: float | None = None) -> Ended:
    """A command in a process of its own, imports and all."""
    import atomtune

    source = str(Path(atomtune.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": source, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    text = place.folder / f"text-{time.monotonic_ns()}"
    with text.open("wb") as file:
        command = [sys.executable, "-m", "atomtune", *argv]
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=place.folder, env=environment)
    begin, hung = time.monotonic(), False
    try:
        process.wait(LIMIT if kill_after is None else kill_after)
    except subprocess.TimeoutExpired:
        hung = kill_after is None
        process.kill()
        process.wait()
    said = text.read_text(errors="replace")
    text.unlink()
    return Ended(process.returncode, said, hung, time.monotonic() - begin)


def room(place: Place, name: str, *, cached: bool = True) -> Path:
    """A fresh folder for a run, beside the cache of the uninterrupted one if that is wanted."""
    folder = place.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if cached:
        shutil.copytree(place.truth.parent / ".cache", folder / ".cache")
    return folder / "run"
