"""Files inside other files, read as files on disk are."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, TypeAlias


@dataclass(frozen=True)
class Packed:
    """A file inside another; its name begins with the other's, so that it is one file's alone."""

    place: str
    """Folder of the file that holds it."""
    name: str
    read: Callable[[], bytes] = field(compare=False, repr=False)
    """Its bytes, fetched anew. Raises OSError."""

    def __str__(self) -> str:
        return f"{self.place}/{self.name}" if self.place else self.name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        """The whole name without its suffix."""
        return self.name.removesuffix(self.suffix)

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        return io.BytesIO(self.read())


File: TypeAlias = Path | Packed
