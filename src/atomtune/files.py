"""Files that are whole or not there."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from atomtune.errors import UserError


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write beside the place, sync, rename: a reader sees the whole file or none, after a power loss too.

    Folders are made. Raises UserError where it can't be written; what stood there stands there still.
    """
    fresh = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
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
