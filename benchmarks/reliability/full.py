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

from .kills import at_write, count_writes
from .workplace import Place, Tally, run

Act = Callable[[], None]


def disk(place: Place, count: int, seed: int) -> Tally:
    """Runs on a disk that others fill, but for some pages, before the nth file operation; then they go on."""
    place, lots = place.watched(), random.Random(seed + 3)
    mounts = _can_mount(place.folder)
    what = "a tmpfs that others fill" if mounts else "RLIMIT_FSIZE falls"
    tally = Tally(
        "disk full", f"{what} before a random file operation: one line, exit code 2; with space again the end bit-equal"
    )
    size, moments = 4 * _size(place.truth.parent), count_writes(place)
    met: Counter[str] = Counter()
    for trial in range(count):
        if place.late():
            break
        moment, left = lots.randint(1, moments), 4096 * lots.randint(0, 8)
        with (_disk if mounts else _files)(place.folder / "disk", size, left) as (fill, free):
            out = place.folder / "disk" / "run"
            first = run(place.train(out), place, before=at_write(place, moment, fill))
            fault = first.fault() or _refused(place, out, fill, first.code)
            free()
            last = run(place.go_on(out), place) if fault is None and first.code else first
            fault = fault or last.fault() or (f"with space again: {last.last}" if last.code else place.differs(out))
            stage = _stage(first.text, first.code)
            met[stage] += 1
            print(f"  {trial + 1} of {count}: {stage}, {fault or 'bit-equal'}", file=sys.stderr, flush=True)
        tally.note(fault and f"{stage}, operation {moment}, {left} bytes left: {fault}")
    tally.facts |= {f"met at {stage}": number for stage, number in sorted(met.items())}
    return tally


def _refused(place: Place, out: Path, fill: Act, code: int) -> str | None:
    """What is wrong with a second try on the full disk."""
    return run(place.go_on(out), place, before=fill).fault() if code else None


def _stage(text: str, code: int) -> str:
    """Where the disk was full."""
    if "pictures at step" in text:
        return "a sample"
    if not code:
        return "nothing"
    written = text.strip().splitlines()[-1].partition("Could not write")[2].partition(":")[0]
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
        if sign in written:
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
def _disk(folder: Path, size: int, left: int) -> Iterator[tuple[Act, Act]]:
    """(what takes all its space but for some bytes, what gives space again), of a disk of a size."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)

    def fill() -> None:
        space = os.statvfs(folder)
        with (folder / "others").open("ab") as file:
            file.write(bytes(max(0, space.f_bavail * space.f_frsize - left)))

    try:
        yield fill, lambda: (folder / "others").unlink(missing_ok=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def _files(folder: Path, size: int, left: int) -> Iterator[tuple[Act, Act]]:
    """The same without a disk of one's own: no file of that process may grow beyond what is left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (left, resource.RLIM_INFINITY))

    yield limit, lambda: None
