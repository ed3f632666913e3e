"""Data sets of the `datasets` library: saved folders, parquet, image folders and, when asked for, the hub's."""

from functools import partial
from pathlib import Path
from typing import Any

from atomtune.data.listing import CAPTIONS, READABLE, Listing, Skipped, normal, note_of
from atomtune.data.packed import File, Packed
from atomtune.errors import UserError

_HUB, _FOLDER = "hub:", "imagefolder:"
_SAVED = ("dataset_info.json", "dataset_dict.json")


def is_table(source: str | Path) -> bool:
    """Whether a source is one of these, by its prefix or by what lies there."""
    place = Path(source)
    return (
        str(source).startswith((_HUB, _FOLDER))
        or (place.suffix.lower() == ".parquet" and place.is_file())
        or any((place / name).is_file() for name in _SAVED)
        or (place.is_dir() and _only_parquet(place))
    )


def _only_parquet(folder: Path) -> bool:
    try:
        kinds = {path.suffix.lower() for path in folder.iterdir()}
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}.") from error
    return ".parquet" in kinds and not kinds & set(READABLE)


def listing(source: str | Path, caption_column: str | None) -> Listing:
    """Each row's picture, mask (a second column of pictures, named `mask`) and caption.

    Raises UserError where no column, or more than one, could be the pictures'.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{source} needs the `datasets` library: pip install 'atomtune[datasets]', or name a folder of pictures."
        ) from None
    table = _open(datasets, source)
    pictures = [name for name, kind in table.features.items() if _holds_pictures(datasets, kind)]
    masks = [name for name in pictures if name == "mask"]
    pictures = [name for name in pictures if name not in masks]
    if len(pictures) != 1:
        raise UserError(f"{source} must have one column of pictures, got {pictures or table.column_names}.")
    caption = _caption_column(source, table.column_names, caption_column)
    for name in (*pictures, *masks):
        if isinstance(table.features[name], datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    found = Listing()
    label = Path(str(source).removeprefix(_HUB).removeprefix(_FOLDER)).name
    said = {name: table[name] for name in (caption, "repeats") if name in table.column_names}
    for number in range(len(table)):
        stem = f"{label}/{number:06d}"
        file = _cell(table[pictures[0]], number, stem)
        if file is None:
            found.broken.append(Skipped(Packed("", stem, bytes), "cannot be read: its row holds no picture"))
            continue
        found.pictures.append(file)
        for name in masks:
            if (mask := _cell(table[name], number, f"{stem}.mask")) is not None:
                found.masks[normal(file.stem)] = mask
        row = {name: column[number] for name, column in said.items()}
        found.notes[normal(file.name)] = note_of(row, stem, f"column {caption}", caption)
    return found


def _open(datasets: Any, source: str | Path) -> Any:
    """The data set; of several splits, `train` or the only one."""
    text = str(source)
    try:
        if text.startswith(_HUB):
            table = datasets.load_dataset(text.removeprefix(_HUB))
        elif text.startswith(_FOLDER):
            table = datasets.load_dataset("imagefolder", data_dir=text.removeprefix(_FOLDER), drop_labels=True)
        elif any((Path(text) / name).is_file() for name in _SAVED):
            table = datasets.load_from_disk(text)
        else:
            files = sorted(map(str, Path(text).glob("*.parquet"))) if Path(text).is_dir() else [text]
            table = datasets.load_dataset("parquet", data_files=files)
    except Exception as error:  # whatever a reader raises, the file is the user's
        raise UserError(
            f"{source} cannot be read as a data set: {(str(error) or type(error).__name__).splitlines()[0]}."
        ) from error
    if isinstance(table, datasets.Dataset):
        return table
    splits = list(table)
    if "train" not in splits and len(splits) != 1:
        raise UserError(f"{source} must have a split named train, got {', '.join(splits)}.")
    return table["train" if "train" in splits else splits[0]]


def _holds_pictures(datasets: Any, kind: Any) -> bool:
    """A column of pictures, or of what is left of one where its kind was lost on the way."""
    return isinstance(kind, datasets.Image) or (isinstance(kind, dict) and set(kind) == {"bytes", "path"})


def _caption_column(source: str | Path, columns: list[str], asked: str | None) -> str | None:
    if asked is not None and asked not in columns:
        raise UserError(f"`caption_column` must be a column of {source}: {', '.join(columns)}; got {asked!r}.")
    return asked or next((name for name in CAPTIONS if name in columns), None)


def _cell(column: Any, number: int, stem: str) -> File | None:
    """The picture in a cell: its bytes, or the file that it names."""
    cell = column[number]
    inside = cell and cell["bytes"]
    if not inside and not (cell and cell["path"]):
        return None
    # Rows may name files alike, in different folders: the row's number keeps them apart.
    name = f"{stem}/{Path(cell['path']).name}" if cell["path"] else stem
    return Packed("", name, partial(_bytes, column, number) if inside else Path(cell["path"]).read_bytes)


def _bytes(column: Any, number: int) -> bytes:
    data: bytes = column[number]["bytes"]
    return data
