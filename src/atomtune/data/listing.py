"""What lies in a place, by what the names claim: nothing is opened yet."""

import json
import unicodedata
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Final

from atomtune.data.packed import File
from atomtune.errors import UserError

METADATA: Final = "metadata.jsonl"
READABLE = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
# Pictures to their owner, so they may not be passed over quietly, but Pillow has no reader for them.
FOREIGN = (".heic", ".heif", ".jxl", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf")
CAPTIONS = ("text", "caption", "prompt")
"""Where a caption is looked for in a line of metadata or a table's columns, unless it is named."""
MOST_REPEATS: Final = 10_000
_OTHER_CAPTIONS = (".txt", ".caption", ".captions", ".cap", ".tags")


@dataclass(frozen=True)
class Skipped:
    """One file that is no sample; `reason` is its kind, then perhaps a colon and details."""

    path: File
    reason: str


@dataclass(frozen=True)
class Note:
    """What is written of a picture elsewhere than beside it, and where; the caption may be empty."""

    caption: str
    source: str
    repeats: int = 1


@dataclass(frozen=True)
class Listing:
    """Files by what their names claim. Masks and sidecars by stem, notes by name, both `normal`."""

    pictures: list[File] = field(default_factory=list)
    masks: dict[str, File] = field(default_factory=dict)
    sidecars: dict[str, File] = field(default_factory=dict)
    metadata: list[File] = field(default_factory=list)
    notes: dict[str, Note] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    broken: list[Skipped] = field(default_factory=list)

    def add(self, file: File, caption_extension: str) -> None:
        """A picture, a mask, a caption or metadata; `reason` has found that it is one of them."""
        extension, stem = file.suffix.lower(), normal(file.stem)
        if file.name == METADATA:
            self.metadata.append(file)
        elif extension == caption_extension:
            _add_once(self.sidecars, stem, file, "captions")
        elif not stem.lower().endswith(".mask"):
            self.pictures.append(file)
        elif extension != ".png":
            raise UserError(f"{file}: a mask must be a .png file, got {extension}. Save it as {stem}.png.")
        else:
            _add_once(self.masks, stem[: -len(".mask")], file, "masks")


def _add_once(found: dict[str, File], stem: str, file: File, what: str) -> None:
    if stem in found:
        raise UserError(f"Two {what} for {stem}: {found[stem].name} and {file.name}. Remove one of them.")
    found[stem] = file


def reason(name: str, caption_extension: str) -> str | None:
    """Why this is no picture, mask or caption, going by its name alone; None if it is one."""
    path = PurePosixPath(name)
    extension = path.suffix.lower()
    if path.name == METADATA or extension in (caption_extension, *READABLE, *FOREIGN):
        return None
    if extension in _OTHER_CAPTIONS:
        return (
            f"caption file not used: captions are read from {caption_extension}, "
            f"pass --caption-extension {extension} to read these"
        )
    if path.stem.lower() == "metadata":
        return f"caption file not used: only {METADATA} is read, or name the folder as imagefolder:FOLDER"
    return f"not a picture: {extension or 'no extension'}"


def normal(name: str) -> str:
    """One spelling for names that look alike: macOS stores accents apart from their letters."""
    return unicodedata.normalize("NFC", name)


def words(text: str) -> str:
    """A caption on one line."""
    return " ".join(text.split())


def text_of(file: File) -> str:
    """A UTF-8 text file. Raises UserError where it is none."""
    try:
        with file.open("rb") as opened:
            text = opened.read().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} must be UTF-8 text, byte {error.start} is not. Save it again as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    if "\0" in text:
        raise UserError(f"{file} must be UTF-8 text, it holds zero bytes. Save it again as UTF-8.")
    return text


def json_of(text: str, where: str) -> Any:
    """What a piece of JSON says. Raises UserError, naming the place."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} must be one JSON object, got {text.strip()[:60]!r}: {error}.") from error


def note_of(row: Any, where: str, source: str, caption_column: str | None) -> Note:
    """The caption and the repeats in a line of metadata or of a table."""
    if not isinstance(row, dict):
        raise UserError(f"{where} must be one JSON object, got {str(row)[:60]!r}.")
    columns = CAPTIONS if caption_column is None else (caption_column,)
    caption = next((row[column] for column in columns if row.get(column)), "")
    if not isinstance(caption, str):
        raise UserError(f'{where}: "{columns[0]}" must be a string, got {caption!r}.')
    if any(0xD800 <= ord(letter) < 0xE000 for letter in caption):  # JSON can escape what is no letter
        raise UserError(f'{where}: "{columns[0]}" must be text, got {caption!r}.')
    repeats = row.get("repeats", 1)
    repeats = 1 if repeats is None else repeats
    if type(repeats) is not int or not 1 <= repeats <= MOST_REPEATS:
        raise UserError(f'{where}: "repeats" must be a whole number from 1 to {MOST_REPEATS}, got {repeats!r}.')
    return Note(words(caption), source, repeats)
