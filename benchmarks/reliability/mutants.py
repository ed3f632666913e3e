"""Malformed adapters, configs and pictures from a seeded mutator, through the commands that read them."""

from __future__ import annotations

import io
import json
import random
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .workplace import PROMPT, Ended, Place, Tally, room, run

Mutate = Callable[[bytes, random.Random], bytes]
TOKENS = (
    b"null",
    b"-1",
    b"1e999",
    b"{}",
    b"[]",
    b'""',
    b"true",
    b"99999999999",
    b'"\\ud800"',
    b"NaN",
    b'"../x"',
    b"0.5",
)


def rows(place: Place, count: int, seed: int) -> list[Tally]:
    """A row a kind of file; a third of the mutants each."""
    third = count // 3
    return [
        adapters(place, count - 2 * third, random.Random(seed + 5)),
        configs(place, third, random.Random(seed + 6)),
        pictures(place, third, random.Random(seed + 7)),
    ]


# --------------------------------------------------------------------------------------------- bytes


def flips(data: bytes, lots: random.Random) -> bytes:
    """Some bits are others."""
    changed = bytearray(data)
    for _ in range(lots.choice((1, 1, 2, 8))):
        changed[lots.randrange(len(changed))] ^= 1 << lots.randrange(8)
    return bytes(changed)


def head(data: bytes, lots: random.Random) -> bytes:
    """The same, near the begin, where formats say what they are."""
    size = min(len(data), 300)
    return flips(data[:size], lots) + data[size:]


def ends(data: bytes, lots: random.Random) -> bytes:
    """It ends early, or goes on too long."""
    return data[: lots.randrange(len(data))] if lots.random() < 0.8 else data + lots.randbytes(lots.randrange(1, 50))


def moved(data: bytes, lots: random.Random) -> bytes:
    """A piece is gone, doubled, or zeros."""
    at, size = lots.randrange(len(data)), lots.randrange(1, 64)
    piece = lots.choice((b"", data[at : at + size] * 2, b"\0" * size))
    return data[:at] + piece + data[at + size :]


def tokens(data: bytes, lots: random.Random) -> bytes:
    """A word or a value of a text is another."""
    parts = _words(data)
    places = [i for i, part in enumerate(parts) if part.strip() and part.strip() not in b"{}[],:="]
    at = lots.choice(places)
    parts[at] = lots.choice((*TOKENS, parts[lots.choice(places)], b"", parts[at][:-1], b'"' + b"x" * 5000 + b'"'))
    return b"".join(parts)


def _words(data: bytes) -> list[bytes]:
    import re

    return re.findall(rb'"(?:[^"\\]|\\.)*"|[\w.+-]+|\s+|.', data, re.DOTALL)


def lines(data: bytes, lots: random.Random) -> bytes:
    """A line of a text is gone or there twice."""
    found = data.splitlines(keepends=True)
    at = lots.randrange(len(found))
    return b"".join(found[:at] + lots.choice(([], [found[at]] * 2)) + found[at + 1 :])


def nested(data: bytes, lots: random.Random) -> bytes:
    """Brackets, deeper than any reader likes."""
    return lots.choice((b"[" * 100_000, b'{"a":' * 100_000, b"a = " + b"[" * 100_000))


# ------------------------------------------------------------------------------------------- adapters


def header(data: bytes, lots: random.Random) -> bytes:
    """A safetensors file with something else in its header: dtypes, shapes, offsets, names, its length."""
    size = int.from_bytes(data[:8], "little")
    table: dict[str, Any] = json.loads(data[8 : 8 + size])
    body, names = data[8 + size :], [name for name in table if name != "__metadata__"]
    name = lots.choice(names)
    match lots.randrange(9):
        case 0:
            table[name]["dtype"] = lots.choice(("F16", "BF16", "I32", "U8", "F64", "BOOL", "X9", "I64", 7))
        case 1:
            table[name]["shape"] = lots.choice(([1], [], [0], table[name]["shape"][::-1], [2**40, 2**40], [-1], "x"))
        case 2:
            table[name]["data_offsets"] = lots.choice(([0, 4], [2**62, 2**63], [8, 4], [-4, 0], [0, 2**64]))
        case 3:
            table[lots.choice(("x", "base_model.model.x.atom_dictionary.atoms", name + "x"))] = table.pop(name)
        case 4:
            first = lots.choice(names)
            table[name], table[first] = table[first], table[name]
        case 5:
            table["__metadata__"] = lots.choice((None, {"format": "np"}, {"format": 7}, {}, "x"))
        case 6:
            return lots.choice((2**63, 2**64 - 1, 0, size - 1, size + 1, 2**31)).to_bytes(8, "little") + data[8:]
        case 7:
            begin, end = table[name]["data_offsets"]
            value = struct.pack("<f", lots.choice((float("nan"), float("inf"), 1e38, -1e9)))
            body = body[:begin] + value[: end - begin] + body[begin + 4 :]
        case 8:
            del table[name]
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + body


def adapters(place: Place, count: int, lots: random.Random) -> Tally:
    """Files of a saved adapter: it is refused in one line, or paints what the unharmed one paints."""
    tally = Tally("malformed adapter", "`generate` on a mutant: one line, or the same picture, bit for bit; no hang")
    # Of a quarter the checksums are taken out: those must be refused, or paint some picture.
    whole, truth = place.folder / "adapter", place.folder / "painted"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    for path in place.truth.iterdir():
        if path.is_file() and path.name not in (".lock", "log.jsonl", "status.json"):
            shutil.copyfile(path, whole / path.name)
    (whole / "notes.json").write_text('{"L0[0]": {"label": "ears", "note": "fires left"}}\n')
    wanted = _painted(place, whole, truth)
    if wanted.code:
        raise SystemExit(f"the unharmed adapter does not load:\n{wanted.text}")
    files: dict[str, tuple[Mutate, ...]] = {
        "adapter_model.safetensors": (flips, head, ends, moved, header, header, header),
        "adapter_config.json": (flips, ends, moved, tokens, tokens, tokens, lines, nested),
        "statistics.safetensors": (head, ends, header),
        "notes.json": (flips, tokens, nested),
        "mixture.json": (lambda data, lots: tokens(b'{"weights": {"a": 1.0, "b": 0.5}}', lots),),
    }
    met: Counter[str] = Counter()
    for number in range(count):
        folder, out = place.folder / "mutant", place.folder / "mutant-painted"
        for old in (folder, out):
            shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(whole, folder)
        name = lots.choices(list(files), weights=(8, 6, 2, 2, 1))[0]
        how = lots.choice(files[name])
        before = (whole / name).read_bytes() if (whole / name).exists() else b"{}"
        (folder / name).write_bytes(how(before, lots))
        bare = lots.random() < 0.25
        if bare:
            _strip(folder)
        ended = _painted(place, folder, out)
        fault = ended.fault()
        if fault is None and ended.code == 0 and not bare and _pixels(out) != _pixels(truth):
            fault = "it was loaded, and paints another picture"
        met["refused" if ended.code else "without a checksum, loaded" if bare else "the same"] += 1
        what = f"{number}: {name}, {getattr(how, '__name__', 'mixture')}"
        _told(tally, place, fault, what, f"adapter-{number}", folder)
    tally.facts |= met
    return tally


def _strip(folder: Path) -> None:
    """Take the checksums out, as in files of before there were any: what is altered then is checked in other ways."""
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        try:
            table = json.loads(data[8 : 8 + size])
            table["__metadata__"] = {"format": "pt"}
        except (ValueError, TypeError):
            continue
        text = json.dumps(table).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def _painted(place: Place, adapter: Path, out: Path) -> Ended:
    return run(["generate", str(adapter), PROMPT, "--steps=2", f"--out={out}", "--density=0.5"], place, limit=60)


def _pixels(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.png"))]


# -------------------------------------------------------------------------------------------- configs


def stop_before_encoding() -> None:
    """In a child: what comes after the reading of options and data is left out."""
    import importlib

    prepare = importlib.import_module("atomtune.training.prepare")

    def instead(pipe: Any, backbone: Any, cache: Any, base_print: str | None = None) -> None:
        raise SystemExit(0)

    prepare.Encoder = instead  # type: ignore[attr-defined]


def configs(place: Place, count: int, lots: random.Random) -> Tally:
    """`config.toml` and `options.json` of a run: refused in one line, or options that are all valid."""
    tally = Tally("malformed config", "`train --config` or `--resume` on a mutant: one line, or valid options; no hang")
    how_many: Counter[str] = Counter()
    kinds: tuple[Mutate, ...] = (flips, ends, moved, tokens, tokens, tokens, lines, nested)
    for number in range(count):
        out = room(place, "config", cached=False)
        how = lots.choice(kinds)
        if lots.random() < 0.6:
            name, path = "config.toml", place.folder / "mutant.toml"
            path.write_bytes(how((place.truth / name).read_bytes(), lots))
            argv = ["train", f"--config={path}", f"--out={out}"]
        else:
            name = lots.choice(("options.json", "options.json", "data.json"))
            out.mkdir()
            for part in ("options.json", "data.json", "config.toml"):
                shutil.copyfile(place.truth / part, out / part)
            path = out / name
            path.write_bytes(how(path.read_bytes(), lots))
            argv = ["train", f"--data={place.data}", f"--base={place.base}", f"--out={out}", "--resume"]
        ended = run(argv, place, limit=60, before=stop_before_encoding)
        how_many["refused" if ended.code else "valid"] += 1
        _told(tally, place, ended.fault(), f"{number}: {name}, {how.__name__}", f"config-{number}", path)
    tally.facts |= how_many
    return tally


# ------------------------------------------------------------------------------------------- pictures


def bomb(data: bytes, lots: random.Random) -> bytes:
    """A PNG whose header promises many more pixels than there are."""
    size = struct.pack(
        ">II", *lots.choice(((2**31 - 1, 2**31 - 1), (100_000, 100_000), (60_000, 2), (0, 5), (9000, 9000)))
    )
    chunk = b"IHDR" + size + data[24:29]
    return data[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def chunks(data: bytes, lots: random.Random) -> bytes:
    """A PNG with a wrong length, or with a text that unpacks to very much."""
    at = data.index(b"IDAT") - 4
    if lots.random() < 0.5:
        return data[:at] + struct.pack(">I", lots.choice((0, 5, 2**31 - 1, 2**32 - 1))) + data[at + 4 :]
    chunk = b"zTXtkey\0\0" + zlib.compress(b"\0" * 50_000_000)
    return data[:at] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[at:]


def text(data: bytes, lots: random.Random) -> bytes:
    """No picture at all."""
    return lots.choice((b"", b"hello", b"<svg/>", b"%!PS\n", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\0" * 1000))


def pictures(place: Place, count: int, lots: random.Random) -> Tally:
    """Pictures, masks, captions and metadata: refused in one line, or each picture decodes to the last pixel."""
    from PIL import Image

    tally = Tally("malformed picture", "`train` on a mutant picture, mask or caption: one line, or it decodes; no hang")
    originals: dict[str, bytes] = {}
    picture = Image.open(place.data / "0.png")
    for name, mode in (("png", "RGBA"), ("jpg", "RGB"), ("webp", "RGB"), ("gif", "P"), ("tif", "LAB"), ("bmp", "RGB")):
        held = io.BytesIO()
        if mode == "LAB":
            Image.merge("LAB", picture.convert("RGB").split()).save(held, "TIFF")
        else:
            picture.convert(mode).save(held, {"jpg": "JPEG", "tif": "TIFF"}.get(name, name.upper()))
        originals[name] = held.getvalue()
    how_many: Counter[str] = Counter()
    for number in range(count):
        folder = place.folder / "mutant-pictures"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(place.data, folder)
        kind = lots.choice((*originals, "png", "jpg", "mask", "txt", "jsonl"))
        how: Mutate
        if kind == "mask":
            path, data = folder / "1.mask.png", originals["png"]
            how = lots.choice((flips, head, ends, moved, bomb, chunks, text))
        elif kind == "txt":
            path, data = folder / "1.txt", (folder / "1.txt").read_bytes()
            how = lots.choice((flips, ends, moved, text, tokens))
        elif kind == "jsonl":
            path, data = folder / "metadata.jsonl", _metadata()
            (folder / "1.txt").unlink()
            how = lots.choice((flips, ends, moved, tokens, tokens, nested, lines))
        else:
            path = folder / f"x.{kind if lots.random() < 0.8 else lots.choice(list(originals))}"
            path.with_suffix(".txt").write_text("a kite")
            data = originals[kind]
            how = lots.choice((flips, head, head, ends, moved, text, *((bomb, bomb, chunks) if kind == "png" else ())))
        path.write_bytes(how(data, lots))
        argv = place.train(room(place, "pictures", cached=False), data=folder, steps=1)
        ended = run(argv, place, limit=60, before=stop_before_encoding)
        how_many["refused" if ended.code else "decoded"] += 1
        _told(tally, place, ended.fault(), f"{number}: {path.name}, {how.__name__}", f"picture-{number}", path)
    tally.facts |= how_many
    return tally


def _metadata() -> bytes:
    rows = [{"file_name": f"{n}.png", "text": f"a kite, number {n}", "repeats": n + 1} for n in range(3)]
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def _told(tally: Tally, place: Place, fault: str | None, what: str, name: str, path: Path) -> None:
    """One more trial; what was not survived is kept, to be looked at."""
    tally.note(fault and f"{what}: {fault}")
    if fault is None:
        return
    kept = place.folder / "failed" / name
    kept.parent.mkdir(exist_ok=True)
    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, kept)
