"""Files of a run, its cache and its data, damaged between two commands."""

from __future__ import annotations

import random
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

from .workplace import Ended, Place, Tally, finish, room, run, start

Harm = Callable[[Path, random.Random], None]


def cut(path: Path, lots: random.Random) -> None:
    """A file ends early."""
    data = path.read_bytes()
    path.write_bytes(data[: lots.randrange(len(data))])


def flip(path: Path, lots: random.Random) -> None:
    """One bit of a file is another."""
    data = bytearray(path.read_bytes())
    data[lots.randrange(len(data))] ^= 1 << lots.randrange(8)
    path.write_bytes(data)


def empty(path: Path, lots: random.Random) -> None:
    """A file has nothing in it."""
    path.write_bytes(b"")


def noise(path: Path, lots: random.Random) -> None:
    """A file has something else in it."""
    path.write_bytes(lots.randbytes(200))


def gone(path: Path, lots: random.Random) -> None:
    """A file is not there."""
    path.unlink()


HARMS: tuple[Harm, ...] = (cut, flip, empty, noise, gone)


def rows(place: Place, seed: int) -> list[Tally]:
    """A row a kind of file."""
    lots = random.Random(seed + 4)
    return [cache(place, lots), checkpoint(place, lots), papers(place, lots), shard(place, lots)]


def cache(place: Place, lots: random.Random, count: int = 4) -> Tally:
    """Every entry of a cache is damaged, each in another way."""
    tally = Tally("damaged cache", "all entries cut, flipped, emptied, overwritten or gone; made again, end bit-equal")
    for n in range(count):
        out = room(place, f"cache-{n}")
        for path in sorted((out.parent / ".cache").rglob("*.safetensors")):
            (HARMS[n % 5] if n < 3 else lots.choice(HARMS))(path, lots)
        ended = run(place.train(out), place)
        tally.note(_must_equal(place, out, ended))
    return tally


def checkpoint(place: Place, lots: random.Random, most: int | None = None) -> Tally:
    """A file of the newest checkpoint is damaged; or one of each checkpoint."""
    tally = Tally("damaged checkpoint", "a file of the newest, or of all, cut, flipped, ...; told, the end bit-equal")
    stopped = _stopped(place)
    names = sorted(path.relative_to(newest(stopped)) for path in newest(stopped).rglob("*") if path.is_file())
    for number, name in enumerate(names[:most]):
        for harm in (HARMS[number % 5], HARMS[(number + 2) % 5]):
            out = room(place, "damaged")
            shutil.copytree(stopped, out)
            some = [newest(out)] if number % 3 else sorted((out / "checkpoints").glob("step-*"))
            for folder in some:
                if (folder / name).exists():  # the oldest was being removed
                    harm(folder / name, lots)
            ended = run(place.go_on(out), place)
            told = None if "damaged and passed over" in ended.text else "the damage was not told"
            fault = _must_equal(place, out, ended) or told
            tally.note(fault and f"{name} {harm.__name__}: {fault}")
    return tally


def papers(place: Place, lots: random.Random, most: int | None = None) -> Tally:
    """What lies beside the checkpoints is damaged."""
    tally = Tally(
        "damaged run folder",
        "options, data list, config, status, log (half a line too) cut, flipped, ...; one line, or the end bit-equal",
    )
    stopped = _stopped(place)
    names = ("options.json", "data.json", "config.toml", "status.json", "log.jsonl")
    pairs = [(name, harm) for name in names for harm in (cut, empty, noise)]
    for name, harm in [("log.jsonl", half_a_line), ("log.jsonl", nonsense), *pairs][:most]:
        out = room(place, "damaged")
        shutil.copytree(stopped, out)
        harm(out / name, lots)
        ended = run(place.go_on(out), place)
        fault = ended.fault()
        if not ended.code and not fault:
            fault = "an unreadable file was believed" if name in ("options.json", "data.json") else None
            lost = name == "log.jsonl" and harm is not half_a_line
            fault = fault or (None if lost else place.differs(out))
        tally.note(fault and f"{name} {harm.__name__}: {fault}")
    return tally


def half_a_line(path: Path, lots: random.Random) -> None:
    """As a process leaves it that dies in a write."""
    with path.open("a") as file:
        file.write('{"step": 99, "loss": 1.')


def nonsense(path: Path, lots: random.Random) -> None:
    """Whole lines that tell of no step."""
    path.write_bytes(b'{"loss": 1}\n[]\n{"step": "x"}\n{"step": {}}\n\xff\xfe}\n' + path.read_bytes())


def shard(place: Place, lots: random.Random, cuts: int | None = None) -> Tally:
    """A WebDataset shard is cut off or altered: it must not be read as a smaller one."""
    tally = Tally("damaged shard", "a .tar cut at a random byte or between two files, or a header flipped; one line")
    whole = place.folder / "whole.tar"
    with tarfile.open(whole, "w") as archive:
        for path in sorted(place.data.iterdir()):
            archive.add(path, path.name)
    with tarfile.open(whole) as archive:
        starts = [member.offset for member in archive.getmembers()]
        end = archive.offset
    data = whole.read_bytes()
    short = [data[:at] for at in (*starts[1:], end, *(lots.randrange(end) for _ in range(6)))]
    flips = []
    for at in starts[1:]:
        flipped = bytearray(data)
        flipped[at + lots.randrange(100)] ^= 4
        flips.append(bytes(flipped))
    for number, content in enumerate((*short, *flips)[-(cuts or 0) :]):
        path = place.folder / "kites.tar"
        path.write_bytes(content)
        ended = run(place.train(room(place, "shard"), data=path, steps=1), place)
        fault = ended.fault() or (None if ended.code else "a part of a shard was taken for the whole")
        tally.note(fault and f"{'cut' if number < len(short) else 'flip'} {number}: {fault}")
    return tally


def newest(out: Path) -> Path:
    """The newest checkpoint."""
    return sorted((out / "checkpoints").glob("step-*"))[-1]


def _stopped(place: Place) -> Path:
    """A run that died after some checkpoints."""
    out = place.folder / "stopped" / "run"
    if not out.exists():
        out, half = room(place, "stopped"), place.options["steps"] // 4 * 2
        begun = start(place.train(out), place)
        while not (out / "checkpoints" / f"step-{half:06d}").exists():
            time.sleep(0.01)
        ended = finish(*begun, kill_after=0)
        if not ended.killed:
            raise SystemExit(f"the run to be damaged ended too soon:\n{ended.text}")
    return out


def _must_equal(place: Place, out: Path, ended: Ended) -> str | None:
    """What is wrong with a command that must succeed as if nothing had been."""
    return ended.fault() or (f"refused: {ended.last}" if ended.code else place.differs(out))
