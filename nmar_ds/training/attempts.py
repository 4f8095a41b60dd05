"""The attempts of a job, noted in the run folder, so that a job that gets nowhere ends. No torch.

`<output>/attempts.jsonl` has a line per start, and one per end that was no failure: a stop that was
asked for. Whoever holds the run folder's lock writes it. A requeued job keeps its id; a job that a
person submits anew has another and is counted afresh.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nmar_ds.errors import FolderError, NoProgressError
from nmar_ds.files import about

ATTEMPTS = "attempts.jsonl"
MAX_WITHOUT_PROGRESS = 3


def job_identity(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """The job that starts this attempt, and how often it was restarted.

    torchrun's run id counts only where it restarts ranks (`--max-restarts`): without, its default
    id is the same for everyone.
    """
    if environ.get("SLURM_JOB_ID"):
        return f"slurm {environ['SLURM_JOB_ID']}", _count(environ, "SLURM_RESTART_COUNT")
    if environ.get("TORCHELASTIC_RUN_ID") and _count(environ, "TORCHELASTIC_MAX_RESTARTS"):
        # The agent's pid too: "none" and fixed ids are used again and again.
        job = f"torchrun {environ['TORCHELASTIC_RUN_ID']} {socket.gethostname()} {os.getppid()}"
        return job, _count(environ, "TORCHELASTIC_RESTART_COUNT")
    return None


def _count(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    return int(text) if text.isascii() and text.isdecimal() else 0


def begin(output: Path, first_step: int, environ: Mapping[str, str]) -> None:
    """Note this attempt, unless its job has had its attempts. By the holder of the folder's lock.

    Args:
        output: the run folder; exists.
        first_step: steps done before this attempt.
        environ: of this process.

    Raises:
        NoProgressError: the job's latest attempts all began at this step and failed.
        FolderError: the file cannot be read or written.
    """
    identity = job_identity(environ)
    if identity is not None:
        failed = failed_in_a_row(_read(output / ATTEMPTS), identity[0], first_step)
        if failed >= MAX_WITHOUT_PROGRESS:
            raise NoProgressError(
                f"{output / ATTEMPTS}: {failed} attempts in a row of job {identity[0]} began at "
                f"step {first_step} and failed, expected a new checkpoint in one of "
                f"{MAX_WITHOUT_PROGRESS}; their messages are in the job's log; mend the cause and "
                "submit again"
            )
    job, restart = identity or (None, 0)
    _append(output / ATTEMPTS, {"event": "begin", "job": job, "restart": restart,
                                "first_step": first_step, "pid": os.getpid()})  # fmt: skip


def end(output: Path, first_step: int, environ: Mapping[str, str]) -> None:
    """Note that this attempt did not fail: it is complete, or was asked to stop."""
    identity = job_identity(environ)
    job, restart = identity or (None, 0)
    _append(output / ATTEMPTS, {"event": "end", "job": job, "restart": restart,
                                "first_step": first_step, "pid": os.getpid()})  # fmt: skip


def failed_in_a_row(events: list[dict[str, Any]], job: str, first_step: int) -> int:
    """Latest attempts of a job that began at a step and never ended well.

    One that was asked to stop is passed over: it is no failure, and no progress either.
    """
    failed = 0
    pending_end = False
    for event in reversed([event for event in events if event.get("job") == job]):
        if event.get("event") == "end":
            pending_end = True
        elif event.get("first_step") != first_step:
            break
        else:
            failed += not pending_end
            pending_end = False
    return failed


def _read(path: Path) -> list[dict[str, Any]]:
    """The events; a line that a crash cut short is passed over."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise FolderError(about(error, path)) from None
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def _append(path: Path, event: dict[str, Any]) -> None:
    facts = {**event, "host": socket.gethostname(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    try:
        with path.open("a+b") as file:
            # After a line cut short, begin a new one.
            cut = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            file.write(b"\n" * cut + json.dumps(facts).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise FolderError(about(error, path)) from None
