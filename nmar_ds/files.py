"""What every room that keeps files does with them: a checksum, and bytes that are on the disk."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

EXPORT_SETTINGS = "nmar.json"  # in an exported model folder: what `<UNDO>` means to the model


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def drop_cached(path: Path) -> None:
    """Let the kernel forget a synced file's bytes, so that the next reading is from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def about(error: OSError, path: Path) -> str:
    """One line on an error of the operating system: the file it names, or `path`, and why."""
    where = error.filename if isinstance(error.filename, str | os.PathLike) else path
    return f"{where}: {error.strerror or error}"


def no_room(error: BaseException, path: Path, size: int) -> str:
    """One line on a file that could not be written, with the bytes it wants and what is free.

    Torch's zip writer hides the operating system's error (ENOSPC, EROFS) behind its own.

    Args:
        error: what writing raised.
        path: the file.
        size: bytes of its content.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    why = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error)
    return f"{path}: {why.splitlines()[0]}; it needs {size:,} bytes, {free_bytes(path):,} are free"


def why_no_file(path: Path) -> str | None:
    """What keeps a file from being written at a place, None where nothing does."""
    parent = path.absolute().parent
    if not os.path.isdir(parent):
        return f"no folder {path.parent}, expected an existing one"
    if os.path.isdir(path):
        return f"{path} is a folder, expected a file"
    return _why_not_writable(parent)


def why_no_folder(path: Path) -> str | None:
    """What keeps a folder from being made at a place, or written to; None where nothing does."""
    whole = path.absolute()
    nearest = next(place for place in (whole, *whole.parents) if os.path.lexists(place))
    if not os.path.isdir(nearest):
        return f"{nearest} is no folder, expected one"
    return _why_not_writable(nearest)


def _why_not_writable(folder: Path) -> str | None:
    if os.access(folder, os.W_OK | os.X_OK):
        return None
    return f"no permission to write in {folder}, expected a writable folder"


def free_bytes(path: Path) -> int:
    """What the file system has left where a file is, or is going to be."""
    place = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(place).free
