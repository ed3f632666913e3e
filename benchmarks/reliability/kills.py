"""Killed at any moment, a run goes on, and ends as if nothing had been."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .workplace import Ended, Place, Tally, room, run, run_fresh

WRITES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree", "shutil.copyfile"}


def at_random_moments(place: Place, count: int, seed: int) -> Tally:
    """Forked commands, killed at a moment drawn from their whole life."""
    tally = Tally("SIGKILL at a random moment", "killed, resumed, killed again ...; the end bit-equal to no kill")
    return _kill(place, tally, count, random.Random(seed), run)


def at_random_moments_of_a_fresh_process(place: Place, count: int, seed: int) -> Tally:
    """Processes of their own, killed in their imports too."""
    tally = Tally("SIGKILL at a random moment of a fresh process", "the same, `python -m atomtune`, imports included")
    return _kill(place, tally, count, random.Random(seed + 1), run_fresh)


def _kill(place: Place, tally: Tally, count: int, lots: random.Random, do: Callable[..., Ended]) -> Tally:
    begin = time.monotonic()
    whole = do(place.train(room(place, "life", cached=False)), place)
    life = time.monotonic() - begin
    if whole.code:
        raise SystemExit(f"the command to be killed fails by itself:\n{whole.text}")

    def attempt(out: Path) -> Ended:
        return do(place.go_on(out), place, kill_after=lots.uniform(0, life))

    return _until(place, tally, count, lots, attempt)


def at_random_writes(place: Place, count: int, seed: int) -> Tally:
    """Forked commands, killed just before the nth file is opened, renamed or removed."""
    tally = Tally(
        "SIGKILL before a random file operation",
        "the same, killed as a file is opened, renamed or removed; with validation and pictures",
    )
    place, lots = place.watched(), random.Random(seed + 2)
    tally.facts["moments"] = writes = count_writes(place)

    def attempt(out: Path) -> Ended:
        before = at_write(place, lots.randint(1, writes), lambda: os.kill(os.getpid(), signal.SIGKILL))
        return run(place.go_on(out), place, before=before)

    return _until(place, tally, count, lots, attempt)


def at_write(place: Place, chosen: int, act: Callable[[], None]) -> Callable[[], None]:
    """What a command begins with, so that `act` comes just before its nth file operation."""

    def begin() -> None:
        _on_writes(place, lambda number: act() if number == chosen else None)

    return begin


def count_writes(place: Place) -> int:
    """How many operations of a whole run change a file."""
    counted = place.folder / "writes"

    def count_them() -> None:
        writes = _on_writes(place, lambda number: None)
        _at_exit(lambda: counted.write_text(str(writes[0])))

    run(place.train(room(place, "life", cached=False)), place, before=count_them)
    return int(counted.read_text())


def _on_writes(place: Place, act: Callable[[int], None]) -> list[int]:
    """From here on, `act` hears the number of each operation that changes a file in the place; returns how many yet."""
    seen, inside = [0], os.fspath(place.folder)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in WRITES or not args or not isinstance(args[0], str | os.PathLike):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        if os.path.abspath(os.fspath(args[0])).startswith(inside):
            seen[0] += 1
            act(seen[0])

    sys.addaudithook(hook)
    return seen


def _at_exit(act: Callable[[], Any]) -> None:
    """Before a forked command's `os._exit`, which runs no handlers."""
    leave = os._exit

    def instead(code: int) -> None:
        act()
        leave(code)

    os._exit = instead  # type: ignore[assignment]


def _until(place: Place, tally: Tally, count: int, lots: random.Random, attempt: Callable[[Path], Ended]) -> Tally:
    """Kill runs until so many kills are done, and let each run end. A kill survives if its run ends as it should."""
    runs = 0
    while tally.tried < count and not place.late():
        runs += 1
        out = room(place, f"killed-{runs}", cached=bool(lots.getrandbits(1)))
        kills, fault, ended = 0, None, False
        while not ended and fault is None:
            last = attempt(out) if tally.tried + kills < count and not place.late() else run(place.go_on(out), place)
            kills += last.killed
            ended = not last.killed
            if ended:
                fault = last.fault() or (f"refused: {last.last}" if last.code else place.differs(out))
        print(f"  run {runs}: {kills} kills, {fault or 'bit-equal'}", file=sys.stderr, flush=True)
        for _ in range(kills - 1):
            tally.note(None)
        if kills:
            tally.note(fault and f"run {runs}, after {kills} kills: {fault}")
        elif fault:
            tally.failures.append(f"run {runs}, without a kill: {fault}")
        if fault:
            keep = place.folder / "failed" / f"{tally.hazard.replace(' ', '-')}-{runs}"
            shutil.copytree(out.parent, keep, dirs_exist_ok=True)
        shutil.rmtree(out.parent)
    tally.facts["runs"] = runs
    return tally
