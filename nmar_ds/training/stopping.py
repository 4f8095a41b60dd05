"""What makes a run stop and save: a signal to any rank, the death of its launcher, a STOP file.

DeepSpeed's launcher runs `deepspeed` -> `deepspeed.launcher.launch` -> ranks. TERM, USR1 or KILL to
the first, USR1 or KILL to the second leave the ranks running with nobody to stop or await them, and
holding the run folder. So a rank that started below them takes the end of either as a request to
stop. The same holds for torchrun's agent. Other parents (a shell, srun, mpirun) are not watched:
they end ranks themselves, or are meant to be left (`nohup`, `setsid`).

The kill switch is a file named STOP in the run folder. It stays where it is: no start goes on, a
requeued job's neither, until a person has removed it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil

from nmar_ds.errors import FolderError

STOP_FILE = "STOP"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
LAUNCHER_MODULES = ("deepspeed.launcher.launch", "deepspeed.launcher.runner",
                    "torch.distributed.run", "torch.distributed.launch")  # fmt: skip
LAUNCHER_COMMANDS = ("deepspeed", "ds", "torchrun")
SECONDS_BETWEEN_LOOKS = 1.0  # a look at both ancestors costs some 20 microseconds


class Gathers(Protocol):
    """The ranks, as far as stopping needs them."""

    rank: int

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, in order of rank; waits for all."""


def is_launcher(words: Sequence[str]) -> bool:
    """Whether a command line is that of a launcher whose end leaves its ranks running."""
    # python [-u] (-m MODULE | /path/to/COMMAND) ...
    if not words or not Path(words[0]).name.startswith(("python", *LAUNCHER_COMMANDS)):
        return False
    rest = [word for word in words if word != "-u"][:3]
    if len(rest) == 3 and rest[1] == "-m":
        return rest[2] in LAUNCHER_MODULES
    return any(Path(word).name in LAUNCHER_COMMANDS for word in rest[:2])


class Launcher:
    """The chain of launchers above this process, nearest first, as it was at the start."""

    def __init__(self) -> None:
        self._chain: list[tuple[psutil.Process, int]] = []
        self.names: list[str] = []
        child = psutil.Process()
        try:
            while (parent := child.parent()) is not None and is_launcher(parent.cmdline()):
                self._chain.append((child, parent.pid))
                self.names.append(f"{_name(parent.cmdline())} (pid {parent.pid})")
                child = parent
        except psutil.Error:  # another user's process is no launcher of ours
            pass

    def lost(self) -> str | None:
        """The first launcher that is gone, or None. Orphans are given another parent at once."""
        for (child, parent), name in zip(self._chain, self.names, strict=True):
            try:
                if child.ppid() != parent:
                    return name
            except psutil.Error:  # it vanished since the look at its own child
                return name
        return None


def _name(words: Sequence[str]) -> str:
    found = [w for w in words if w in LAUNCHER_MODULES or Path(w).name in LAUNCHER_COMMANDS]
    return Path(found[0]).name


class StopSignal:
    """Remembers that this rank was told to stop; the loop asks after each step.

    A second signal changes nothing: the save that the first one asked for goes on.

    Args:
        launcher: looked up at the very start of the process: a launcher that is gone by the time
            the ranks have met has to be missed too.
        stop_file: the kill switch, for the one rank that looks for it; None for the others.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        launcher: Launcher,
        stop_file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.reason: str | None = None
        self._launcher, self._stop_file = launcher, stop_file
        self._clock, self._last_look = clock, -SECONDS_BETWEEN_LOOKS
        for number in STOP_SIGNALS:
            # `nohup` starts a run with HUP ignored, and means it.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._remember)

    def _remember(self, number: int, frame: object) -> None:
        self.reason = self.reason or f"a signal ({signal.Signals(number).name})"

    def __call__(self) -> bool:
        """Whether a signal or the kill switch has come, or the launcher has gone."""
        now = self._clock()
        if now - self._last_look >= SECONDS_BETWEEN_LOOKS:
            self._last_look = now
            return self.look()
        return self.reason is not None

    def look(self) -> bool:
        """The same, and not an answer of up to a second ago."""
        if self.reason is None:
            lost = self._launcher.lost()
            if self._stop_file is not None and self._stop_file.exists():
                self.reason = STOP_FILE
            elif lost is not None:
                self.reason = f"the end of {lost}"
        return self.reason is not None


def refuse_stopped(output: Path) -> None:
    """At a start: a kill switch that nobody has taken back.

    Raises:
        FolderError: there is a STOP file.
    """
    if (output / STOP_FILE).exists():
        raise FolderError(
            f"{output / STOP_FILE}: the kill switch is set, expected no such file; remove it to "
            "train on"
        )


def end_at_once_on_interrupt() -> None:
    """Before the ranks have met there is nothing to save: Ctrl-C ends them without a traceback."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop_reason(stop: StopSignal, peers: Gathers) -> str:
    """What the first rank that was told to stop was told by; a STOP file goes first. Collective."""
    reasons = peers.gather(stop.reason)
    if STOP_FILE in reasons:  # else the job would be requeued for a signal of the same moment
        return STOP_FILE
    return next(f"{why} on rank {rank}" for rank, why in enumerate(reasons) if why is not None)


def told_to_stop(stop: StopSignal, peers: Gathers, first_step: int) -> bool:
    """Whether any rank was, before its first step: there is nothing new to save. Collective."""
    if not any(peers.gather(stop.look())):
        return False
    reason = stop_reason(stop, peers)
    if peers.rank == 0:
        print(f"stopped by {reason} before step {first_step + 1}: nothing new to save", flush=True)
    return True
