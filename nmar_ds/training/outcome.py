"""How the latest attempt ended, in one line for people and for the script that started it.

Its first word is one of ENDS. Whoever fails first says why: a rank that only lost its connection to
that one comes later, and changes nothing. No torch here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from nmar_ds.errors import DivergenceError, HangError, NmarError

OUTCOME = "outcome"
PASS_ON_SECONDS = 1.0  # for srun to pass on a failing rank's last lines
ENDS = ("complete", "interrupted", "stopped", "diverged", "hang", "refused", "failed")


def write(output: Path, line: str) -> None:
    """Replace `<output>/outcome`; a reader sees the old line, none, or the new one."""
    aside = output / f"{OUTCOME}.tmp"
    with aside.open("w", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(output / OUTCOME)


def leave(output: Path, line: str) -> None:
    """Say why this attempt failed, unless somebody has said so already."""
    try:
        with (output / OUTCOME).open("x", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError:  # it is there, or the disk is what failed: the error itself goes to the log
        pass


def of_error(error: Exception) -> str:
    """The line for an attempt that an error ended."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, DivergenceError):
        return f"diverged: {text}"
    if isinstance(error, HangError):
        return f"hang: {text}"
    if not isinstance(error, NmarError):
        return f"failed: {type(error).__name__}: {text}"
    return f"{'failed' if error.exit_code == 1 else 'refused'}: {text}"


def leave_exit_code(code: int, environ: Mapping[str, str]) -> None:
    """Leave this rank's code where slurm/lib.sh looks.

    srun reports the highest code of all ranks, and ranks it kills after the first failure have
    higher ones. It ends a step at the first failure, and on a busy node before it has passed on
    what the ranks wrote last: a failing rank gives it a second for that.
    """
    if code and environ.get("NMAR_EXIT_CODES"):
        Path(environ["NMAR_EXIT_CODES"], str(code)).touch()
        time.sleep(PASS_ON_SECONDS)


def clear(output: Path) -> None:
    """An attempt begins: what the one before said is no longer so."""
    (output / OUTCOME).unlink(missing_ok=True)
