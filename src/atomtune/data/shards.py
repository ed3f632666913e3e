"""WebDataset shards: plain .tar files in which `key.jpg`, `key.txt`, `key.json` and `key.mask.png` belong together.

Pictures are read from their places in the archive; nothing is unpacked.
"""

import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

from atomtune.data.listing import METADATA, Listing, Skipped, json_of, normal, note_of, reason, text_of
from atomtune.data.packed import File, Packed
from atomtune.errors import UserError, did_you_mean


def listing(paths: Sequence[Path], caption_extension: str, caption_column: str | None) -> Listing:
    """What lies in some shards, by name. Raises UserError on a file that is no plain .tar, or not whole."""
    found = Listing()
    said: dict[str, File] = {}
    names: set[str] = set()
    for path in sorted(paths):
        for member, file in _members(path):
            if normal(file.name) in names:
                raise UserError(f"{file}: the shard holds that name twice. Remove one of them.")
            names.add(normal(file.name))
            inner = PurePosixPath(member.name).name
            if file.suffix.lower() == ".json":
                said[normal(file.stem)] = file
            elif inner.startswith("."):
                found.skipped.append(Skipped(file, "hidden file"))
            elif not member.isreg():
                found.skipped.append(Skipped(file, "special file"))
            elif inner == METADATA:
                found.skipped.append(
                    Skipped(file, "caption file not used: in a shard captions are NAME.txt or NAME.json")
                )
            elif (why := reason(inner, caption_extension)) is not None:
                found.skipped.append(Skipped(file, why))
            else:
                found.add(file, caption_extension)
    found.pictures.sort(key=lambda file: file.name)
    columns: set[str] = set()
    for picture in found.pictures:
        if (note := said.get(normal(picture.stem))) is not None:
            row = json_of(text_of(note), str(note))
            found.notes[normal(picture.name)] = note_of(row, str(note), "json", caption_column)
            columns |= row.keys()
    if found.notes and caption_column is not None and caption_column not in columns:
        hint = did_you_mean(caption_column, columns)
        raise UserError(f"`caption_column` must be in some NAME.json of the shards, got {caption_column!r}.{hint}")
    return found


def _members(path: Path) -> list[tuple[tarfile.TarInfo, Packed]]:
    """The archive's files and links."""
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as archive:
            members = [member for member in archive.getmembers() if not member.isdir()]
            end = archive.offset
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except tarfile.TarError as error:
        raise UserError(f"{path} must be a plain .tar, not compressed and whole: {error}. Make it again.") from error
    for member in members:
        name = PureWindowsPath(member.name)  # whose rules see both kinds of slash and drive letters
        if name.anchor or ".." in name.parts:
            raise UserError(f"{path}: names must stay inside the shard, got {member.name!r}. Make it again.")
        if member.offset_data + member.size > size:
            raise UserError(f"{path} ends within {member.name}: it was cut off. Fetch or make it again.")
    with path.open("rb") as file:  # tarfile takes a header that it can't read for the end
        file.seek(end)
        mark = file.read(tarfile.BLOCKSIZE)
    if len(mark) < tarfile.BLOCKSIZE or any(mark):
        raise UserError(f"{path} has no end: it was cut off, or is damaged at byte {end}. Fetch or make it again.")
    read = [partial(_read, path, member.offset_data, member.size) for member in members]
    return [
        (member, Packed(str(path.parent), f"{path.name}/{member.name}", fetch))
        for member, fetch in zip(members, read, strict=True)
    ]


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
