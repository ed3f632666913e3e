"""Files that somebody made to do harm: each is refused in one line, and nothing outside is read."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .mutants import stop_before_encoding
from .workplace import PROMPT, Ended, Place, Tally, room, run


def rows(place: Place, every: int = 1) -> list[Tally]:
    """A row a kind; of its cases, one of so many."""
    return [headers(place, every), links(place, every), pickles(place, every)]


def _refusal(ended: Ended, sign: str = "") -> str | None:
    """What is wrong with an end that must be a refusal."""
    if ended.fault() or not ended.code:
        return ended.fault() or "it was not refused"
    return None if sign in ended.text else f"refused for another reason: {ended.last}"


def headers(place: Place, every: int = 1) -> Tally:
    """safetensors files made by hand."""
    tally = Tally(
        "malicious safetensors header", "overlaps, offsets beyond the file, length 2^63, deep JSON ...; one line"
    )
    for name, data in list(_headers((place.truth / "adapter_model.safetensors").read_bytes()))[::every]:
        folder = _copy(place)
        (folder / "adapter_model.safetensors").write_bytes(data)
        fault = _refusal(_generate(place, folder))
        tally.note(fault and f"{name}: {fault}")
    return tally


def _headers(data: bytes) -> Iterator[tuple[str, bytes]]:
    size = int.from_bytes(data[:8], "little")
    table: dict[str, Any] = json.loads(data[8 : 8 + size])
    body = data[8 + size :]
    first, second = [name for name in table if name != "__metadata__" and table[name]["shape"]][:2]

    def made(changed: Any, length: int | None = None, rest: bytes = body) -> bytes:
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        return (len(text) if length is None else length).to_bytes(8, "little") + text + rest

    def entry(name: str, **values: Any) -> dict[str, Any]:
        return table | {name: table[name] | values}

    yield "two tensors on one place", made(entry(first, data_offsets=table[second]["data_offsets"]))
    yield "beyond the file", made(entry(first, data_offsets=[0, 2**40], shape=[2**38]))
    yield "backwards", made(entry(first, data_offsets=[64, 0]))
    yield "a negative offset", made(entry(first, data_offsets=[-64, 0]))
    yield "a shape that overflows", made(entry(first, shape=[2**33, 2**33]))
    yield "a hole", made(entry(first, data_offsets=[4, 4], shape=[0]))
    yield "length 2^63", made(table, 2**63)
    yield "length 2^64 - 1", made(table, 2**64 - 1)
    yield "length beyond the file", made(table, len(data) * 2)
    yield "length 0", made(table, 0)
    yield "deep JSON", made(b'{"a":' * 200_000)
    yield "deep lists", made(b"[" * 200_000)
    yield "a name twice", made(json.dumps(table)[:-1].encode() + b"," + json.dumps({first: table[second]})[1:].encode())
    yield "no text", made(b"\xff\xfe" * 50)
    yield "a list", made(b"[]")
    yield "nothing", made(b"{}", rest=b"")
    yield "more after the end", made(table, rest=body + b"x" * 1000)
    yield "a polyglot", b"PK\x03\x04" + data


def links(place: Place, every: int = 1) -> Tally:
    """Names and links that lead out of a folder."""
    tally = Tally(
        "link or name out of the folder",
        "links of pictures, captions, masks, notes; `..` in metadata, tar, mixture: nothing outside read or written",
    )
    secret = place.folder / "secret"
    shutil.rmtree(secret, ignore_errors=True)
    secret.mkdir()
    shutil.copyfile(place.data / "0.png", secret / "secret.png")
    (secret / "secret.txt").write_text("a kite, my secret")
    for name, make, sign in list(_ways_out(secret))[::every]:
        folder = place.folder / "hostile"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(place.data, folder)
        source = make(folder) or folder
        argv = place.train(room(place, "links", cached=False), data=source, steps=1)
        ended = run(argv, place, limit=60, before=stop_before_encoding)
        fault = _refusal(ended, sign)
        tally.note(fault and f"{name}: {fault}")
    outside, folder = secret / "notes.json", _copy(place)
    outside.write_text("{}")
    (folder / "notes.json").symlink_to(outside)
    ended = run(["surgery", str(folder), "--note", "L0[0]=mine"], place, limit=60)
    written = None if outside.read_text() == "{}" and ended.code == 0 else "what a link of notes names was written"
    tally.note(ended.fault() or written)
    folder = _copy(place)
    (folder / "mixture.json").write_text('{"weights": {"../adapter": 1, "..": 1}}')
    fault = _refusal(_generate(place, folder), "must be")
    tally.note(fault and f"a mixture's part outside: {fault}")
    return tally


def _ways_out(secret: Path) -> Iterator[tuple[str, Callable[[Path], Path | None], str]]:
    def link(name: str, target: str) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(target if target.startswith(".") else secret / target)

        return make

    yield "a picture", link("0.png", "secret.png"), "link out of the folder"
    yield "a caption", link("0.txt", "secret.txt"), "link out of the folder"
    yield "a mask", link("0.mask.png", "secret.png"), "link out of the folder"
    yield "metadata", link("metadata.jsonl", "secret.txt"), "link out of the folder"
    yield "a relative link", link("0.png", f"../{secret.name}/secret.png"), "link out of the folder"
    yield "a link to itself", link("0.png", "./0.png"), ""
    yield "a link to nothing", link("0.png", "./nothing.png"), ""
    yield "a caption that links to a device", link("0.txt", "../../../../../../dev/zero"), "no caption"

    def metadata(name: str) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a kite"}) + "\n")

        return make

    for name in (
        "../secret/secret.png",
        "../../etc/passwd",
        "/etc/passwd",
        "..\\secret.png",
        "C:\\x.png",
        "a/../../b.png",
    ):
        yield f"metadata that names {name}", metadata(name), '"file_name" must'

    def packed(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            with tarfile.open(folder / "x.tar", "w") as archive:
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, target
                data = b"" if target else (folder / "0.png").read_bytes()
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            return folder / "x.tar"

        return make

    yield "a tar's member ../x.png", packed("../x.png"), "must stay inside"
    yield "a tar's member /x.png", packed("/x.png"), "must stay inside"
    yield "a tar's symlink", packed("x.png", tarfile.SYMTYPE, str(secret / "secret.png")), "special file"
    yield "a tar's hard link", packed("x.png", tarfile.LNKTYPE, "../secret/secret.png"), "special file"


def pickles(place: Place, every: int = 1) -> Tally:
    """Weights as pickle, which runs code when it is read: they are not, under any name."""
    tally = Tally(
        "pickle for weights", "an adapter, and a base, whose weights are .bin, .pt or renamed; the code never runs"
    )
    ran = place.folder / "ran"

    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (ran,)

    code = pickle.dumps({"x": Harm()})
    for name in ("adapter_model.bin", "adapter_model.pt", "adapter_model.safetensors")[::every]:
        folder = _copy(place)
        (folder / "adapter_model.safetensors").unlink()
        (folder / name).write_bytes(code)
        fault = _refusal(_generate(place, folder)) or ("the code ran" if ran.exists() else None)
        tally.note(fault and f"{name}: {fault}")
    for part in ("text_encoder", "vae", "transformer")[::every]:
        base = place.folder / "pickled"
        shutil.rmtree(base, ignore_errors=True)
        shutil.copytree(place.base, base)
        for path in (base / part).glob("*.safetensors"):
            path.with_suffix(".bin").write_bytes(code)
            path.with_name("pytorch_model.bin").write_bytes(code)
            path.unlink()
        argv = place.train(room(place, "pickled-run", cached=False), base=str(base), steps=1)
        fault = _refusal(run(argv, place, limit=60)) or ("the code ran" if ran.exists() else None)
        tally.note(fault and f"a base's {part}: {fault}")
    return tally


def _copy(place: Place) -> Path:
    """The uninterrupted run's adapter, to be altered."""
    folder = place.folder / "hostile-adapter"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in place.truth.iterdir():
        if path.is_file() and path.name != ".lock":
            shutil.copyfile(path, folder / path.name)
    return folder


def _generate(place: Place, adapter: Path) -> Ended:
    return run(["generate", str(adapter), PROMPT, "--steps=1", f"--out={place.folder / 'x'}"], place, limit=60)
