"""What every room that keeps files does with them: a checksum, and bytes that are on the disk."""

from __future__ import annotations

import hashlib
import os
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
