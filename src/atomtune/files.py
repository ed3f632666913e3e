"""Files that are whole or not there, and what tells a file of tensors from a damaged one."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from atomtune.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def key(*parts: bytes | str) -> str:
    """The sha256 of all that something depends on; parts don't run together."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(f"{type(part).__name__} {len(data)} ".encode())
        digest.update(data)
    return digest.hexdigest()


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of tensors on the CPU: names, dtypes, shapes and every bit."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(key(name, str(tensor.dtype), str(tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """One process at a time inside, for a folder or a file, which is made; a killed one lets go."""
    import fcntl  # not on Windows

    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write beside the place, sync, rename: a reader sees the whole file or none, after a power loss too.

    Folders are made. Raises UserError where it can't be written; what stood there stands there still.
    """
    fresh = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("xb") as file:
            # Names of files may hold bytes that are no text: as an escape JSON reads them back.
            file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException as error:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(
                f"Could not write {path}: {error.strerror or error}. Free space or name another folder, "
                "and give the same command again; what was finished before is kept."
            ) from error
        raise
    return path


def is_unfinished(name: str) -> bool:
    """Whether a file of that name is what `write_whole` left where it was cut off."""
    return name.startswith(".") and name.endswith(".tmp")
