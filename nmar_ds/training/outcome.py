"""How the latest attempt ended, in one line for people and for the script that started it.

Its first word is one of ENDS. Whoever fails first says why: a rank that only lost its connection to
that one comes later, and changes nothing. No torch here.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

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
    higher ones.
    """
    if code and environ.get("NMAR_EXIT_CODES"):
        Path(environ["NMAR_EXIT_CODES"], str(code)).touch()


def end_process(code: int) -> NoReturn:
    """End a rank whose work is saved and closed, with what it has said on its way.

    The interpreter is not shut down: native threads of the communication libraries have been seen
    to abort it while it is, which would turn a finished run into a failed job. srun ends a step at
    its first failure, and on a busy node before it has passed on what the ranks wrote last: a
    failing rank gives it a second for that.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if code and "SLURM_STEP_ID" in os.environ:
        time.sleep(PASS_ON_SECONDS)
    os._exit(code)


def clear(output: Path) -> None:
    """An attempt begins: what the one before said is no longer so."""
    (output / OUTCOME).unlink(missing_ok=True)
