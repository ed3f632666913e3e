"""A folder of pictures and captions, scanned once: each file is a sample, or skipped for a reason."""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Final, Literal

from atomtune.data.picture import MAX_PIXELS, decode, on_matte, open_mask
from atomtune.errors import UserError

CaptionSource = Literal["sidecar", "metadata.jsonl", "shared prompt"]

METADATA: Final = "metadata.jsonl"
_READABLE = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
# Pictures to their owner, so they may not be passed over quietly, but Pillow has no reader for them.
_FOREIGN = (".heic", ".heif", ".jxl", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf")
_OTHER_CAPTIONS = (".txt", ".caption", ".captions", ".cap", ".tags")
_NAMED_AT_MOST = 3


@dataclass(frozen=True)
class Sample:
    """One picture to learn from; width and height in pixels as seen upright, digest of the file's bytes."""

    path: Path
    caption: str
    caption_source: CaptionSource
    mask: Path | None
    width: int
    height: int
    digest: str


@dataclass(frozen=True)
class Skipped:
    """One thing in the folder that is no sample; `reason` is its kind, then perhaps a colon and details."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Scan:
    """Everything that lies in a folder, sorted by name."""

    samples: tuple[Sample, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class _Listing:
    """The folder's files by what their names claim; nothing is opened yet."""

    pictures: list[Path] = field(default_factory=list)
    masks: dict[str, Path] = field(default_factory=dict)
    sidecars: dict[str, Path] = field(default_factory=dict)
    metadata: list[Path] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    broken: list[Skipped] = field(default_factory=list)


def _normal(name: str) -> str:
    """One spelling for names that look alike: macOS stores accents apart from their letters."""
    return unicodedata.normalize("NFC", name)


def _reason_by_name(path: Path, caption_extension: str) -> str | None:
    """Why this is no picture, mask or caption, going by name and type alone; None if it is one."""
    extension = path.suffix.lower()
    if path.name.startswith("."):
        return "hidden file"
    if path.is_dir():
        return "folder: only pictures directly in the folder are read"
    if path.exists() and not path.is_file():
        return "special file"
    if path.name == METADATA or extension in (caption_extension, *_READABLE, *_FOREIGN):
        return None
    if extension in _OTHER_CAPTIONS:
        return (
            f"caption file not used: captions are read from {caption_extension}, "
            f"pass --caption-extension {extension} to read these"
        )
    if path.stem.lower() == "metadata":
        return f"caption file not used: only {METADATA} is read"
    return f"not a picture: {extension or 'no extension'}"


def _list(folder: Path, caption_extension: str, follow_links: bool) -> _Listing:
    listing = _Listing()
    root = folder.resolve()
    try:
        paths = sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}.") from error
    for path in paths:
        reason = _reason_by_name(path, caption_extension)
        if reason is not None:
            listing.skipped.append(Skipped(path, reason))
            continue
        extension, stem = path.suffix.lower(), _normal(path.stem)
        is_picture = extension in (*_READABLE, *_FOREIGN) and not stem.lower().endswith(".mask")
        if not follow_links and not path.resolve().is_relative_to(root):
            reason = "link out of the folder: copy the file in, or pass --follow-links"
            if not is_picture:
                raise UserError(f"{path}: {reason}.")
            listing.broken.append(Skipped(path, reason))
        elif path.name == METADATA:
            listing.metadata.append(path)
        elif extension == caption_extension:
            _add_once(listing.sidecars, stem, path, "captions")
        elif is_picture:
            listing.pictures.append(path)
        elif extension != ".png":
            raise UserError(f"{path}: a mask must be a .png file, got {extension}. Save it as {stem}.png.")
        else:
            _add_once(listing.masks, stem[: -len(".mask")], path, "masks")
    return listing


def _add_once(found: dict[str, Path], stem: str, path: Path, what: str) -> None:
    if stem in found:
        raise UserError(f"Two {what} for {stem}: {found[stem].name} and {path.name}. Remove one of them.")
    found[stem] = path


def _words(text: str) -> str:
    """A caption on one line."""
    return " ".join(text.split())


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} must be UTF-8 text, byte {error.start} is not. Save it again as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if "\0" in text:
        raise UserError(f"{path} must be UTF-8 text, it holds zero bytes. Save it again as UTF-8.")
    return text


def _metadata_line(line: str, where: str) -> tuple[str, str]:
    """The file name and the caption (may be empty) of one line of metadata.jsonl."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} must be one JSON object, got {line.strip()[:60]!r}: {error}.") from error
    name = row.get("file_name") if isinstance(row, dict) else None
    if not isinstance(name, str) or not name:
        raise UserError(f'{where} must hold a "file_name", got {line.strip()[:60]!r}.')
    caption = row.get("text") or row.get("caption") or ""
    if not isinstance(caption, str):
        raise UserError(f'{where}: "text" must be a string, got {caption!r}.')
    # Windows rules see both kinds of slash and drive letters.
    path = PureWindowsPath(name)
    if path.anchor or ".." in path.parts:
        raise UserError(f'{where}: "file_name" must stay inside the folder, got {name!r}.')
    if len(path.parts) != 1:
        raise UserError(f'{where}: "file_name" must lie directly in the folder, got {name!r}. Move it up.')
    return _normal(path.name), _words(caption)


def _read_metadata(path: Path, pictures: Sequence[Path]) -> dict[str, str]:
    """Captions by file name. Every line must name a picture of the folder, and none twice."""
    names = {_normal(picture.name) for picture in pictures}
    captions: dict[str, str] = {}
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        name, caption = _metadata_line(line, where)
        if name not in names:
            raise UserError(f"{where}: no picture is named {name!r} in {path.parent}. Mend or remove the line.")
        if name in captions:
            raise UserError(f"{where}: {name!r} has a line already. Remove one of them.")
        captions[name] = caption
    return captions


def _inspect(path: Path, mask: Path | None, max_pixels: int) -> tuple[int, int, str]:
    """Width, height and digest of a picture that decodes completely, as does its mask, which matches."""
    if path.suffix.lower() in _FOREIGN:
        raise UserError(f"cannot be decoded: {path.suffix.lower()} is not read here, convert it to PNG or JPEG")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if not file.tell():
                raise UserError("empty file: 0 bytes")
            file.seek(0)
            picture = on_matte(decode(file, max_pixels=max_pixels))
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
    return picture.width, picture.height, digest


def _find_caption(
    path: Path, sidecars: dict[str, Path], metadata: dict[str, str], shared: str
) -> tuple[str, CaptionSource] | None:
    sidecar = sidecars.get(_normal(path.stem))
    if sidecar is not None and (words := _words(_text(sidecar))):
        return words, "sidecar"
    if words := metadata.get(_normal(path.name), ""):
        return words, METADATA
    return (shared, "shared prompt") if shared else None


def _named(names: Sequence[str], separator: str = ", ") -> str:
    """The first few, and how many more."""
    rest = len(names) - _NAMED_AT_MOST
    return separator.join(names[:_NAMED_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")


def _refuse_broken(broken: Sequence[Skipped]) -> None:
    told = _named([f"{item.path.name} ({item.reason})" for item in broken], "; ")
    raise UserError(f"{len(broken)} of the pictures cannot be used: {told}. Mend them, or pass --skip-broken.")


def _refuse_uncaptioned(paths: Sequence[Path], extension: str, skipped: Sequence[Skipped]) -> None:
    unused = [item.path.name for item in skipped if item.reason.startswith("caption file not used")]
    raise UserError(
        f"{len(paths)} of the pictures have no caption, or an empty one: {_named([p.name for p in paths])}. "
        f"Write it into {paths[0].stem}{extension} beside the picture, or pass --caption, one for all."
        + (f" Not used: {_named(unused)}; see --caption-extension." if unused else "")
    )


def _refuse_empty(folder: Path, skipped: Sequence[Skipped]) -> None:
    counts = Counter(item.reason.split(":")[0] for item in skipped)
    told = ", ".join(f"{count} x {kind}" for kind, count in sorted(counts.items())) or "it is empty"
    advice = {
        "folder": "to read one of the folders inside, name it as --data",
        "too large": "raise --max-pixels for the too large ones",
        "cannot be decoded": "leave --skip-broken away to see what is wrong with each",
        "link out of the folder": "pass --follow-links to follow the links",
    }
    hints = "; ".join(hint for kind, hint in advice.items() if kind in counts)
    raise UserError(
        f"No picture to learn from in {folder}: {told}. Put in pictures ({' '.join(_READABLE)})"
        + (f"; {hints}." if hints else ".")
    )


def _check_settings(folder: Path, caption: str | None, caption_extension: str, max_pixels: int) -> None:
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing there"
        raise UserError(f"`data` must be a folder of pictures, got {folder}: {found}. Check --data.")
    if caption is not None and not caption.strip():
        raise UserError(f"`caption` must hold words, got {caption!r}. Leave it away to use caption files only.")
    known = (*_READABLE, *_FOREIGN)
    if caption_extension[:1] != "." or len(caption_extension) < 2 or caption_extension in known:
        raise UserError(
            "`caption_extension` must be a dot and letters, like .txt, and no picture's, "
            f"got {caption_extension!r}. Check --caption-extension."
        )
    if max_pixels < 1:
        raise UserError(f"`max_pixels` must be at least 1, got {max_pixels}.")


def scan(
    folder: str | Path,
    *,
    caption: str | None = None,
    caption_extension: str = ".txt",
    skip_broken: bool = False,
    follow_links: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Scan:
    """Decode every picture of a folder once and find its caption: sidecar, metadata.jsonl, or `caption`.

    Raises UserError for a file that claims to be a picture and can't be decoded or has more than `max_pixels`
    (width * height; both become skipped with `skip_broken`), for a picture without a caption, for bad
    metadata, for links out of the folder unless `follow_links`, and when no sample is left.
    """
    folder, caption_extension = Path(folder), caption_extension.lower()
    _check_settings(folder, caption, caption_extension, max_pixels)
    listing = _list(folder, caption_extension, follow_links)
    all_pictures = [*listing.pictures, *(item.path for item in listing.broken)]
    metadata = _read_metadata(listing.metadata[0], all_pictures) if listing.metadata else {}
    broken, samples, uncaptioned = list(listing.broken), [], []
    for path in listing.pictures:
        mask = listing.masks.get(_normal(path.stem))
        try:
            width, height, digest = _inspect(path, mask, max_pixels)
        except UserError as error:
            broken.append(Skipped(path, str(error)))
            continue
        found = _find_caption(path, listing.sidecars, metadata, _words(caption or ""))
        if found is None:
            uncaptioned.append(path)
        else:
            samples.append(Sample(path, *found, mask, width, height, digest))
    if broken and not skip_broken:
        _refuse_broken(sorted(broken, key=lambda item: item.path.name))
    skipped = [*listing.skipped, *broken, *_companions(listing)]
    if uncaptioned:
        _refuse_uncaptioned(uncaptioned, caption_extension, skipped)
    if not samples:
        _refuse_empty(folder, skipped)
    return Scan(tuple(samples), tuple(sorted(skipped, key=lambda item: item.path.name)))


def _companions(listing: _Listing) -> list[Skipped]:
    """The files that go with pictures, each with the picture it goes with: one without is worth a look."""
    pictures = {_normal(path.stem): path.name for path in listing.pictures}
    found = [Skipped(path, "captions of several pictures") for path in listing.metadata]
    for what, files in (("caption", listing.sidecars), ("mask", listing.masks)):
        for stem, path in files.items():
            name = pictures.get(stem)
            found.append(
                Skipped(path, f"{what}: of {name}" if name else f"{what} without a picture: none is named {stem}")
            )
    return found
