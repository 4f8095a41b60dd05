"""Checkpoint files are data: what names code, or has another format, is refused unopened.

`torch.load(weights_only=True)`, which every load of these processes is (engine.py), refuses code
too, but on the one rank that opens the file, in the middle of a collective, and some formats with
an error of no type of its own. The look here reads the small pickle of each file and runs nothing.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch

from nmar_ds.errors import CheckpointError


def check_plain_data(checkpoint: Path) -> None:
    """Look at every file of a verified checkpoint that torch would open.

    Args:
        checkpoint: its folder.

    Raises:
        CheckpointError: names the first file that is no plain data.
    """
    for file in sorted(checkpoint.glob("*.pt")):
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
        except Exception as error:  # a hostile file may fail in any way
            raise CheckpointError(not_plain_data(file, error)) from None
        if names:
            raise CheckpointError(_refusal(file, f"asks for {sorted(names)[0]}"))


def not_plain_data(place: Path, error: Exception) -> str:
    """One line on a file, or a checkpoint, that the safe loader refuses."""
    if not isinstance(error, pickle.UnpicklingError):
        return _refusal(place, " ".join(str(error).split())[:160] or type(error).__name__)
    reason = " ".join(str(error).split())
    found = re.search(r"GLOBAL ([\w.]+) was not|Unsupported (?:global|class)[:,]? ([\w.]+)", reason)
    named = next((name for name in found.groups() if name), "") if found else ""
    return _refusal(place, f"asks for {named}" if named else reason[:160])


def _refusal(place: Path, what: str) -> str:
    return f"{place}: holds pickled code or is damaged, expected tensors and plain values ({what})"
