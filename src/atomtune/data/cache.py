"""A folder of tensors found by what made them, never by position; safe to delete at any time."""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from atomtune.errors import UserError
from atomtune.files import checksum, key

__all__ = ["Cache", "key"]

log = logging.getLogger(__name__)


def _pack(entry: str, tensors: dict[str, Tensor]) -> bytes:
    if not tensors:
        raise ValueError("`make` must return at least one tensor, got none.")
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(plain, metadata={"key": entry, "sha256": checksum(plain)})


def _unpack(entry: str, data: bytes) -> dict[str, Tensor]:
    """The tensors of a packed entry; ValueError or SafetensorError if it isn't whole, or is another's."""
    tensors = load(data)
    stamp = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    if stamp.get("key") != entry:
        raise ValueError("it belongs to another key")
    if stamp.get("sha256") != checksum(tensors):
        raise ValueError("its checksum is wrong")
    return tensors


@dataclass(frozen=True)
class Cache:
    """A folder with one safetensors file an entry. Any number of processes may share it."""

    folder: Path

    def __post_init__(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"The cache must be a folder, got the file {self.folder}. Name another folder.")

    def path(self, entry: str) -> Path:
        """Where the entry lies, or would lie."""
        return self.folder / entry[:2] / f"{entry}.safetensors"

    def read(self, entry: str) -> dict[str, Tensor] | None:
        """The entry's tensors on the CPU; None if it is not there, or (said in the log) not whole."""
        try:
            # Into memory, not mapped: the file may be deleted or replaced while its tensors are in use.
            return _unpack(entry, self.path(entry).read_bytes())
        except FileNotFoundError:
            return None
        except (SafetensorError, ValueError, KeyError, OSError) as error:
            log.warning("cache entry %s is damaged (%s): it is made again", self.path(entry), error)
            return None

    def missing(self, entries: Iterable[str]) -> tuple[str, ...]:
        """Those of the entries that are not there or not whole: to be empty before step 1."""
        return tuple(entry for entry in entries if self.read(entry) is None)

    def get(self, entry: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The entry's tensors, read, or made and written; on the CPU either way. Errors of `make` go up."""
        tensors = self.read(entry)
        if tensors is not None:
            return tensors
        data = _pack(entry, make())
        self._write(entry, data)
        return _unpack(entry, data)

    def _write(self, entry: str, data: bytes) -> None:
        """Beside its place, then renamed: a reader sees the whole entry or none.

        No fsync: an entry cut short by a power loss fails its checksum and is made again. Raises UserError where it
        can't be written.
        """
        path = self.path(entry)
        for attempts_left in (2, 1, 0):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                handle, temporary = tempfile.mkstemp(prefix=path.stem[:16], suffix=".tmp", dir=path.parent)
                try:
                    with os.fdopen(handle, "wb") as file:
                        file.write(data)
                    os.replace(temporary, path)
                except BaseException:
                    Path(temporary).unlink(missing_ok=True)
                    raise
                return
            except FileNotFoundError as error:  # someone is deleting the cache under us
                if not attempts_left:
                    raise _unwritten(path, error) from error
            except OSError as error:
                raise _unwritten(path, error) from error


def _unwritten(path: Path, error: OSError) -> UserError:
    return UserError(
        f"Could not write the cache entry {path}: {error.strerror or error}. Free space, and give the same "
        "command again; entries that are there are kept."
    )
