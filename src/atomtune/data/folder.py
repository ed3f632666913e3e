"""A source of pictures and captions, scanned once: each file is a sample, or skipped for a reason."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from atomtune.data import shards, tables
from atomtune.data.listing import (
    CAPTIONS,
    FOREIGN,
    METADATA,
    READABLE,
    Listing,
    Note,
    Skipped,
    json_of,
    normal,
    note_of,
    reason,
    text_of,
    words,
)
from atomtune.data.packed import File
from atomtune.data.picture import MAX_PIXELS, clear_share, decode, on_matte, open_mask
from atomtune.errors import UserError, did_you_mean

__all__ = ["Sample", "Scan", "Skipped", "Survey", "scan", "survey"]

_NAMED_AT_MOST = 3


@dataclass(frozen=True)
class Sample:
    """One picture to learn from; width and height in pixels as seen upright, digest of the file's bytes."""

    path: File
    caption: str
    caption_source: str
    """sidecar, metadata.jsonl, shared prompt, or where else it was found."""
    mask: File | None
    width: int
    height: int
    digest: str
    clear: bool = False
    """Whether a part of it is transparent."""
    repeats: int = 1
    """How often an epoch shows it."""


@dataclass(frozen=True)
class Scan:
    """Everything that lies in a source, sorted by name."""

    samples: tuple[Sample, ...]
    skipped: tuple[Skipped, ...]

    def by_reason(self) -> dict[str, list[str]]:
        """Names of the files that are no samples, by the kind of reason."""
        return _by_reason(self.skipped)


@dataclass(frozen=True)
class Survey:
    """What a scan finds, and everything that keeps it from being learned from, one line each."""

    scan: Scan
    problems: tuple[str, ...]


def _list(folder: Path, caption_extension: str, caption_column: str | None, follow_links: bool) -> Listing:
    """What lies directly in a folder, with what its metadata.jsonl says."""
    listing = Listing()
    root = folder.resolve()
    try:
        paths = sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}.") from error
    for path in paths:
        why = _reason_by_kind(path) or reason(path.name, caption_extension)
        if why is not None:
            listing.skipped.append(Skipped(path, why))
        elif follow_links or _inside(path, root):
            listing.add(path, caption_extension)
        else:
            why = "link out of the folder: copy the file in, or pass --follow-links"
            is_picture = path.suffix.lower() in (*READABLE, *FOREIGN) and not path.stem.lower().endswith(".mask")
            if not is_picture:
                raise UserError(f"{path}: {why}.")
            listing.broken.append(Skipped(path, why))
    names = {normal(path.name) for path in (*listing.pictures, *(item.path for item in listing.broken))}
    for metadata in listing.metadata:
        listing.notes.update(_read_metadata(metadata, names, caption_column))
    return listing


def _inside(path: Path, root: Path) -> bool:
    try:
        return path.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # a link to itself
        return False


def _reason_by_kind(path: Path) -> str | None:
    """Why this is no file to be read at all; None if it is one."""
    if path.name.startswith("."):
        return "hidden file"
    if path.is_dir():
        return "folder: only pictures directly in the folder are read"
    if path.exists() and not path.is_file():
        return "special file"
    return None


def _read_metadata(file: File, names: set[str], caption_column: str | None) -> dict[str, Note]:
    """Notes by file name. Every line must name a picture of the folder, and none twice."""
    notes: dict[str, Note] = {}
    columns: set[str] = set()
    for number, line in enumerate(text_of(file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        row = json_of(line, where)
        name = _file_name(row, where)
        if name not in names:
            raise UserError(f"{where}: no picture is named {name!r} beside it. Mend or remove the line.")
        if name in notes:
            raise UserError(f"{where}: {name!r} has a line already. Remove one of them.")
        notes[name] = note_of(row, where, METADATA, caption_column)
        columns |= row.keys()
    if notes and caption_column is not None and caption_column not in columns:
        hint = did_you_mean(caption_column, columns)
        raise UserError(f"`caption_column` must be in some line of {file}, got {caption_column!r}.{hint}")
    return notes


def _file_name(row: Any, where: str) -> str:
    """The picture that a line of metadata.jsonl speaks of."""
    name = row.get("file_name") if isinstance(row, dict) else None
    if not isinstance(name, str) or not name:
        raise UserError(f'{where} must hold a "file_name", got {str(row)[:60]!r}.')
    # Windows rules see both kinds of slash and drive letters.
    path = PureWindowsPath(name)
    if path.anchor or ".." in path.parts:
        raise UserError(f'{where}: "file_name" must stay inside the folder, got {name!r}.')
    if len(path.parts) != 1:
        raise UserError(
            f'{where}: "file_name" must lie directly in the folder, got {name!r}. '
            "Move it up, or name the folder as imagefolder:FOLDER."
        )
    return normal(path.name)


def _inspect(path: File, mask: File | None, max_pixels: int) -> tuple[int, int, str, bool]:
    """Width, height, digest, transparency of a picture that decodes completely, as does its mask, which matches."""
    if path.suffix.lower() in FOREIGN:
        raise UserError(f"cannot be decoded: {path.suffix.lower()} is not read here, convert it to PNG or JPEG")
    try:
        with path.open("rb") as file:
            data = file.read()
            if not data:
                raise UserError("empty file: 0 bytes")
            file.seek(0)
            decoded = decode(file, max_pixels=max_pixels)
            picture, clear = on_matte(decoded), clear_share(decoded) > 0
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from error
    if mask is not None:
        try:
            masked = open_mask(mask, max_pixels=max_pixels)
        except UserError as error:
            raise UserError(f"mask cannot be used: {error}") from error
        if abs(masked.width * picture.height / (masked.height * picture.width) - 1) > 0.01:
            raise UserError(
                f"mask does not match: {mask.name} must have the picture's shape {picture.width} x "
                f"{picture.height}, got {masked.width} x {masked.height}"
            )
    return picture.width, picture.height, hashlib.sha256(data).hexdigest(), clear


def _find_note(path: File, listing: Listing, shared: str) -> Note | None:
    """The caption of a picture, where it is from, and the picture's repeats; None where it has no caption."""
    sidecar = listing.sidecars.get(normal(path.stem))
    note = listing.notes.get(normal(path.name), Note("", ""))
    if sidecar is not None and (caption := words(text_of(sidecar))):
        return Note(caption, "sidecar", note.repeats)
    if note.caption:
        return note
    return Note(shared, "shared prompt", note.repeats) if shared else None


def _named(names: Sequence[str], separator: str = ", ") -> str:
    """The first few, and how many more."""
    rest = len(names) - _NAMED_AT_MOST
    return separator.join(names[:_NAMED_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")


def _told_broken(broken: Sequence[Skipped]) -> str:
    told = _named([f"{item.path.name} ({item.reason})" for item in broken], "; ")
    return f"{len(broken)} of the pictures cannot be used: {told}. Mend them, or pass --skip-broken."


def _told_uncaptioned(paths: Sequence[File], extension: str, skipped: Sequence[Skipped], columns: Sequence[str]) -> str:
    unused = [item.path.name for item in skipped if item.reason.startswith("caption file not used")]
    place = f"into {paths[0].stem}{extension} beside the picture"
    if columns:
        place = f"into a column {' or '.join(columns)}, for imagefolder: in {METADATA} (no {extension} is read there)"
    return (
        f"{len(paths)} of the pictures have no caption, or an empty one: {_named([p.name for p in paths])}. "
        f"Write it {place}, or pass --caption, one for all."
        + (f" Not used: {_named(unused)}; see --caption-extension." if unused else "")
    )


def _told_empty(place: str, skipped: Sequence[Skipped]) -> str:
    counts = {kind: len(names) for kind, names in _by_reason(skipped).items()}
    told = ", ".join(f"{count} x {kind}" for kind, count in sorted(counts.items())) or "it is empty"
    advice = {
        "folder": "to read one of the folders inside, name it as --data, for all of them imagefolder:FOLDER",
        "too large": "raise --max-pixels for the too large ones",
        "cannot be decoded": "leave --skip-broken away to see what is wrong with each",
        "link out of the folder": "pass --follow-links to follow the links",
    }
    hints = "; ".join(hint for kind, hint in advice.items() if kind in counts)
    return f"No picture to learn from in {place}: {told}. Put in pictures ({' '.join(READABLE)})" + (
        f"; {hints}." if hints else "."
    )


def _by_reason(skipped: Sequence[Skipped]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for item in skipped:
        found.setdefault(item.reason.split(":")[0], []).append(item.path.name)
    return found


def _check_settings(caption: str | None, caption_extension: str, max_pixels: int) -> None:
    if caption is not None and not caption.strip():
        raise UserError(f"`caption` must hold words, got {caption!r}. Leave it away to use caption files only.")
    known = (*READABLE, *FOREIGN, ".json", ".jsonl")
    if caption_extension[:1] != "." or len(caption_extension) < 2 or caption_extension in known:
        raise UserError(
            "`caption_extension` must be a dot and letters, like .txt, and no picture's, "
            f"got {caption_extension!r}. Check --caption-extension."
        )
    if max_pixels < 1:
        raise UserError(f"`max_pixels` must be at least 1, got {max_pixels}.")


def scan(source: str | Path, **how: Any) -> Scan:
    """Decode every picture of a source once and find its caption; `how` are the keywords of `survey`.

    Raises UserError on the first of its problems.
    """
    found = survey(source, **how)
    if found.problems:
        raise UserError(found.problems[0])
    return found.scan


def survey(
    source: str | Path,
    *,
    caption: str | None = None,
    caption_extension: str | None = None,
    caption_column: str | None = None,
    skip_broken: bool = False,
    follow_links: bool = False,
    max_pixels: int | None = None,
) -> Survey:
    """Decode every picture of a source once and find its caption: sidecar, metadata, or `caption`.

    A source is a folder of pictures, WebDataset shards (a .tar or a folder of them), or a data set: a folder that
    `datasets` has saved, .parquet, imagefolder:FOLDER, hub:OWNER/NAME. Captions lie in `.txt` files, or those of
    `caption_extension`; in a line of metadata or a table's row under `text`, `caption` or `prompt`, or under
    `caption_column`. Problems are files that claim to be pictures and can't be decoded or have more than `max_pixels`
    (width * height, 100 million) or a caption that can't be read (all become skipped with `skip_broken`), pictures
    without a caption, and that no sample is left. Raises UserError where the source itself can't be made out: bad
    metadata, bad names of masks, links out of the folder unless `follow_links`.
    """
    extension = ".txt" if caption_extension is None else caption_extension.lower()
    most = MAX_PIXELS if max_pixels is None else max_pixels
    _check_settings(caption, extension, most)
    listing = _listing(source, extension, caption_column, follow_links)
    broken, samples, uncaptioned, problems = list(listing.broken), [], [], []
    for path in listing.pictures:
        mask = listing.masks.get(normal(path.stem))
        try:
            width, height, digest, clear = _inspect(path, mask, most)
        except UserError as error:
            broken.append(Skipped(path, str(error)))
            continue
        try:
            note = _find_note(path, listing, words(caption or ""))
        except UserError as error:
            broken.append(Skipped(path, f"caption cannot be read: {error}"))
            continue
        if note is None:
            uncaptioned.append(path)
        else:
            samples.append(Sample(path, note.caption, note.source, mask, width, height, digest, clear, note.repeats))
    skipped = [*listing.skipped, *broken, *_companions(listing)]
    if broken and not skip_broken:
        problems.append(_told_broken(sorted(broken, key=lambda item: item.path.name)))
    if uncaptioned:
        columns = ((caption_column,) if caption_column else CAPTIONS) if tables.is_table(source) else ()
        problems.append(_told_uncaptioned(uncaptioned, extension, skipped, columns))
    problems += _shared_companions(listing)
    if not samples and not problems:
        problems.append(_told_empty(str(source), skipped))
    return Survey(Scan(tuple(samples), tuple(sorted(skipped, key=lambda item: item.path.name))), tuple(problems))


def check_there(source: str | Path) -> None:
    """Raises UserError where there is no folder; data sets of other kinds are looked at when they are read."""
    place = Path(source)
    if not (tables.is_table(source) or place.is_dir() or (place.is_file() and place.suffix.lower() == ".tar")):
        found = "a file" if place.exists() else "nothing there"
        raise UserError(f"`data` must be a folder of pictures, got {place}: {found}. Check --data.")


def _listing(source: str | Path, extension: str, caption_column: str | None, follow_links: bool) -> Listing:
    """What lies in a source, by what kind of source it is."""
    if tables.is_table(source):
        return tables.listing(source, caption_column)
    place = Path(source)
    if place.is_file() and place.suffix.lower() == ".tar":
        return shards.listing([place], extension, caption_column)
    check_there(place)
    listing = _list(place, extension, caption_column, follow_links)
    tars = [item.path for item in listing.skipped if item.path.suffix.lower() == ".tar" and isinstance(item.path, Path)]
    if tars and not listing.pictures and not listing.broken:
        return shards.listing(tars, extension, caption_column)
    return listing


def _shared_companions(listing: Listing) -> list[str]:
    """Captions and masks that more than one picture would take, for its name but for the ending."""
    names: dict[str, list[str]] = {}
    for path in listing.pictures:
        names.setdefault(normal(path.stem), []).append(path.name)
    return [
        f"{path.name} is beside {len(own)} pictures, {_named(own)}. Give each a name of its own."
        for files in (listing.sidecars, listing.masks)
        for stem, path in files.items()
        if len(own := names.get(stem, [])) > 1
    ]


def _companions(listing: Listing) -> list[Skipped]:
    """The files that go with pictures, each with the picture it goes with: one without is worth a look."""
    pictures = {normal(path.stem): path.name for path in listing.pictures}
    found = [Skipped(path, "captions of several pictures") for path in listing.metadata]
    for what, files in (("caption", listing.sidecars), ("mask", listing.masks)):
        for stem, path in files.items():
            name = pictures.get(stem)
            found.append(
                Skipped(path, f"{what}: of {name}" if name else f"{what} without a picture: none is named {stem}")
            )
    return found
