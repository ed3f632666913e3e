"""A disk that fills up at any point of a run: one line, and what was whole is whole when there is space again."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .workplace import Place, Tally, room, run

Free = Callable[[], None]


def disk(place: Place, count: int, seed: int) -> Tally:
    """Runs on a disk of a size drawn between nothing and all that a run needs; then it grows, and they go on."""
    place, lots = place.watched(), random.Random(seed + 3)
    mounts = _can_mount(place.folder)
    what = "a tmpfs of a random size" if mounts else "RLIMIT_FSIZE at a random size"
    tally = Tally("disk full", f"{what}: one line, exit code 2; with space again the run ends bit-equal")
    room(place, "disk", cached=False)
    need = _size(place.truth.parent)
    met: Counter[str] = Counter()
    for trial in range(count):
        if place.late():
            break
        begin = f"{trial + 1} of {count}"
        with (_small_disk if mounts else _small_files)(place.folder / "disk", lots.randint(4096, need)) as (
            before,
            free,
        ):
            out = place.folder / "disk" / "run"
            first = run(place.train(out), place, before=before)
            fault = first.fault() or _refused(place, out, before, first.code)
            free()
            last = run(place.go_on(out), place) if fault is None and first.code else first
            fault = fault or last.fault() or (f"with space again: {last.last}" if last.code else place.differs(out))
            stage = _stage(first.text, first.code)
            met[stage] += 1
            print(f"  {begin}: {stage}, {fault or 'bit-equal'}", file=sys.stderr, flush=True)
        tally.note(fault and f"{stage}: {fault}")
    tally.facts |= {f"met at {stage}": number for stage, number in sorted(met.items())}
    return tally


def _refused(place: Place, out: Path, before: Callable[[], None], code: int) -> str | None:
    """What is wrong with a second try on the full disk."""
    if not code:
        return None
    again = run(place.go_on(out), place, before=before)
    return again.fault()


def _stage(text: str, code: int) -> str:
    """Where the disk was full."""
    if not code:
        return "a sample" if "failed: " in text else "nothing"
    last = text.strip().splitlines()[-1]
    for sign, stage in (
        (".cache", "the cache"),
        ("log", "the log"),
        ("status", "the status"),
        ("best", "the best adapter"),
        ("step-", "a checkpoint"),
        ("last", "the last adapter"),
        ("options", "the claim"),
        ("config", "the claim"),
        ("data.json", "the claim"),
    ):
        if sign in last.partition("Could not write")[2].partition(":")[0]:
            return stage
    return "the adapter"


def _size(folder: Path) -> int:
    """Bytes of its files, in pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 if path.is_file() else 4096 for path in folder.rglob("*"))


def _can_mount(folder: Path) -> bool:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    probe = folder / "probe"
    probe.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(probe)], capture_output=True)
    if done.returncode == 0:
        subprocess.run(["umount", str(probe)], check=True)
    return done.returncode == 0


@contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[tuple[Callable[[], None], Free]]:
    """(what a child does first: nothing, what gives it space again)."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        more = ["mount", "-o", "remount,size=256m", str(folder)]
        yield lambda: None, lambda: subprocess.run(more, check=True) and None  # type: ignore[func-returns-value]
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def _small_files(folder: Path, size: int) -> Iterator[tuple[Callable[[], None], Free]]:
    """The same without a disk of one's own: no file may grow beyond a size."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 32, resource.RLIM_INFINITY))

    yield limit, lambda: None
