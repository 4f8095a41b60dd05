"""Who prepares together: one process, some that it starts, ranks of mpirun, tasks of srun.

What they share is the work folder (`work.py`). Beyond it they need to know how many they are, one
message at the start, and at the end how the others fared; mpi4py serves for that under mpirun,
and is imported nowhere else. Tasks of srun need no MPI: Slurm says how many they are, and the
message is a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nmar_ds.data.work import write_aside
from nmar_ds.errors import LaunchError, WorkerLostError, shared
from nmar_ds.training.schedulers import launcher_of, number

HANDED_DOWN = "NMAR_PREPARE_WORKER"  # what a started process is told
END_SECONDS = 60.0  # for workers that have nothing left to do


class Crew:
    """One process alone; the others change what differs.

    Attributes:
        rank: 0 leads.
        size: processes in all.
    """

    rank, size = 0, 1

    def share(self, value: Any) -> Any:
        """What rank 0 gives, to all; None from rank 0 tells the others that it failed."""
        return value

    def check(self) -> None:
        """Raise if the leading process is gone."""

    def fate(self, pid: int) -> str | None:
        """How a process that this one started ended."""
        return None

    def end(self, code: int, *, known: bool) -> int:
        """All have ended, or are ended; the exit code of this process.

        Args:
            code: of what this process did.
            known: whether the others find out about it in the work folder.
        """
        return code


class Started(Crew):
    """The process that starts the others once the work is laid out.

    Args:
        size: processes in all, this one among them.
        command: what starts this program with the same arguments.
    """

    def __init__(self, size: int, command: Sequence[str]) -> None:
        self.size, self._command = size, list(command)
        self._others: list[subprocess.Popen[bytes]] = []

    def share(self, value: Any) -> Any:
        """Start the others."""
        for rank in range(1, self.size if value is not None else 1):
            told = {"rank": rank, "size": self.size, "parent": os.getpid(), "value": value}
            environ = {**os.environ, HANDED_DOWN: json.dumps(told)}
            self._others.append(
                subprocess.Popen(self._command, env=environ, stdin=subprocess.DEVNULL)
            )
        return value

    def fate(self, pid: int) -> str | None:
        """By exit code or signal."""
        for process in self._others:
            if process.pid == pid and (code := process.poll()) is not None:
                return f"ended with {_said(code)}"
        return None

    def end(self, code: int, *, known: bool) -> int:
        """Wait for the others, or end them where this process failed."""
        for process in self._others:
            if code:
                process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            if process.poll() is None:
                process.kill()
                process.wait()
        return code


class HandedDown(Crew):
    """A process that another one started."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        self.rank, self.size = told["rank"], told["size"]
        self._parent, self._value = told["parent"], told["value"]

    def share(self, value: Any) -> Any:
        """It was told at its start."""
        return self._value

    def check(self) -> None:
        """Nobody would use what is done after the parent's end."""
        if os.getppid() != self._parent:
            raise shared(WorkerLostError("the process that started this one is gone"))


class Ranks(Crew):
    """Ranks of mpirun.

    Args:
        expected: size that the launcher says, where it says one.

    Raises:
        LaunchError: no mpi4py, or one that does not belong to this mpirun.
    """

    def __init__(self, expected: int | None) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise LaunchError(
                f"mpi4py cannot be imported ({reason}); install it for this mpirun, or use "
                "--workers N on one machine"
            ) from None
        self._comm = MPI.COMM_WORLD
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()
        if expected is not None and expected != self.size:
            raise LaunchError(
                f"the launcher started {expected} processes, mpi4py sees {self.size}: it belongs "
                "to another MPI; install mpi4py for this one, or use --workers N"
            )

    def share(self, value: Any) -> Any:
        """By one broadcast."""
        return self._comm.bcast(value, root=0)

    def end(self, code: int, *, known: bool) -> int:
        """One gather; a failure that the others do not know of ends them all."""
        if not known or code == WorkerLostError.exit_code:
            sys.stderr.flush()
            self._comm.Abort(code)
        codes: list[int] = self._comm.allgather(code)
        return max(codes)


class Tasks(Crew):
    """Tasks of srun, without MPI.

    Args:
        rank: this task.
        size: of the step.
        meeting: file through which rank 0 speaks to the others; its name belongs to one step.
    """

    def __init__(self, rank: int, size: int, meeting: Path) -> None:
        self.rank, self.size, self._meeting = rank, size, meeting

    def share(self, value: Any) -> Any:
        """Through a file on the file system that they share."""
        if self.rank == 0:
            self._meeting.parent.mkdir(parents=True, exist_ok=True)
            if value is not None:  # the stores are ours: no other step is at work here
                for old in self._meeting.parent.glob("srun-*.json"):
                    old.unlink(missing_ok=True)
            write_aside(self._meeting, json.dumps(value).encode("ascii"))
            return value
        while True:
            with contextlib.suppress(FileNotFoundError):
                return json.loads(self._meeting.read_bytes())
            time.sleep(0.1)


def crew_of(
    *,
    workers: int | None,
    mpi: bool,
    meeting: Path,
    command: Sequence[str],
    environ: Mapping[str, str] = os.environ,
) -> Crew:
    """The crew that this process belongs to.

    Args:
        workers: processes asked for on the command line.
        mpi: whether MPI is asked for there.
        meeting: folder for the message of tasks of srun.
        command: what starts this program with the same arguments.
        environ: of this process.

    Raises:
        LaunchError: what is asked for contradicts how this process was started.
    """
    if HANDED_DOWN in environ:
        return HandedDown(json.loads(environ[HANDED_DOWN]))
    launcher = launcher_of(environ)
    if workers is not None and (mpi or launcher is not None):
        raise LaunchError(
            f"--workers {workers}: with {'--mpi' if mpi else launcher}, which starts the processes "
            "itself, expected one of both"
        )
    if workers is not None and workers < 1:
        raise LaunchError(f"--workers: {workers}, expected at least 1")
    if mpi or launcher == "mpirun":
        names = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
        known = next((name for name in names if environ.get(name)), None)
        return Ranks(None if known is None else number(environ, known))
    if launcher == "srun":
        return _tasks(environ, meeting)
    return Crew() if workers in (None, 1) else Started(workers, command)


def _tasks(environ: Mapping[str, str], meeting: Path) -> Crew:
    needed = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID", "SLURM_STEP_ID")
    missing = [name for name in needed if not environ.get(name)]
    if missing:
        raise LaunchError(f"environment: {', '.join(missing)}: not set, but srun sets all of them")
    rank, size = number(environ, "SLURM_PROCID"), number(environ, "SLURM_STEP_NUM_TASKS")
    if not rank < size:
        raise LaunchError(f"environment: SLURM_PROCID: is {rank}, expected less than {size}")
    if size == 1:
        return Crew()
    step = "-".join(
        environ.get(name) or "0"
        for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    )
    return Tasks(rank, size, meeting / f"srun-{step}.json")


def _said(code: int) -> str:
    return f"code {code}" if code >= 0 else f"signal {-code} ({signal.Signals(-code).name})"
