"""How the latest attempt ended, in one line for the script that started it. No torch here."""

from __future__ import annotations

import os
from pathlib import Path

OUTCOME = "outcome"


def write(output: Path, line: str) -> None:
    """Replace `<output>/outcome`; a reader sees the old line, none, or the new one."""
    aside = output / f"{OUTCOME}.tmp"
    with aside.open("w", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(output / OUTCOME)


def clear(output: Path) -> None:
    """An attempt begins: what the one before said is no longer so."""
    (output / OUTCOME).unlink(missing_ok=True)
