"""A hang becomes an end: no progress for too long, stacks of all threads, exit code 5.

Each rank watches itself. The loop says which phase begins; a phase that outlasts its limit is a
hang of this rank, or its wait for one that hangs. The rank then writes the stacks of its threads to
the run folder and to stderr, leaves a mark that makes the others do the same, gives them some
seconds, and ends. A stopped rank (SIGSTOP) cannot do any of this: one on the same machine is
continued, so that its stacks show where it was, and killed if that does not help. The launchers end
those elsewhere.

What hangs may be the disk or stderr itself, so the thread that keeps the time touches neither. No
torch here.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from nmar_ds.errors import HangError
from nmar_ds.training import outcome

SLOW_PHASES = ("start", "first step", "evaluation", "save", "end")
FOLDER, MARK = "stacks", "hang"
SECONDS_FOR_OTHERS = 3.0  # to leave their stacks
SECONDS_ONCE_CONTINUED = 2.0  # for those that were stopped
SECONDS_TO_REPORT = 8.0  # in all; then the process ends, whatever the disk does


@dataclass(frozen=True)
class Member:
    """One rank, as the others may have to find it.

    Attributes:
        rank: its number.
        host: its machine, for people.
        place: where its pid means something: machine and pid namespace.
        pid: of its process.
        started: seconds since the epoch, so that a pid that was given away is told apart.
    """

    rank: int
    host: str
    place: str
    pid: int
    started: float

    def process(self, place: str) -> psutil.Process | None:
        """Its process, if it lives and can be reached from this place."""
        if self.place != place:
            return None
        try:
            found = psutil.Process(self.pid)
            return found if abs(found.create_time() - self.started) < 2 else None
        except psutil.Error:
            return None


def myself(rank: int) -> Member:
    """This process."""
    host, place = socket.gethostname(), ""
    with contextlib.suppress(OSError):
        place = os.readlink("/proc/self/ns/pid")
    started = psutil.Process().create_time()
    return Member(rank, host, f"{host} {place}", os.getpid(), started)


class Watchdog:
    """Ends this process when its main thread makes no progress. `enter` costs a microsecond.

    Args:
        rank: of this process.
        output: the run folder.
        timeout_seconds: limit of a phase.
        slow_timeout_seconds: limit of those in SLOW_PHASES.
        clock: seconds, monotonic.
        leave: ends the process.
    """

    def __init__(
        self,
        rank: int,
        output: Path,
        *,
        timeout_seconds: float,
        slow_timeout_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        self.me, self.output = myself(rank), output
        self.stacks: Path | None = None
        self._members: Sequence[Member] = ()
        self._limits = timeout_seconds, slow_timeout_seconds
        self._clock, self._leave = clock, leave
        self._phase, self._since = "start", clock()
        self._seconds_between_looks = min(1.0, timeout_seconds / 20)
        # Others' marks are looked for on a shared disk, and a rank that waits will know by itself.
        self._seconds_between_asks = min(15.0, max(0.5, timeout_seconds / 20))
        self._closed, self._ask_now = threading.Event(), threading.Event()
        self._told = False
        self._ending = threading.Lock()
        self._ended_by: int | None = None  # a thread

    def __enter__(self) -> Watchdog:
        """Begin to watch."""
        for thread in (self._watch, self._listen):
            threading.Thread(target=thread, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """The work is done: nothing is late any more."""
        self._hold_still()
        self._closed.set()
        self._ask_now.set()

    def enter(self, phase: str) -> None:
        """This rank begins something."""
        self._hold_still()
        self._phase, self._since = phase, self._clock()

    def _hold_still(self) -> None:
        """What has been declared over does not go on.

        A stopped rank is continued so that it leaves its stacks, and all that waited for it could
        run on, and even complete, until this process ends.
        """
        if self._ending.locked() and self._ended_by != threading.get_ident():
            time.sleep(2 * SECONDS_TO_REPORT)

    def meet(self, attempt: str, members: Sequence[Member]) -> None:
        """The ranks know each other, and the run folder is theirs.

        Args:
            attempt: names a folder for this attempt's stacks, the same on all ranks.
            members: all ranks.
        """
        self._members = members
        self.stacks = self.output / FOLDER / attempt

    def late(self) -> str | None:
        """What has taken too long, if anything."""
        phase, seconds = self._phase, self._clock() - self._since
        slow = phase in SLOW_PHASES
        limit = self._limits[slow]
        if seconds <= limit:
            return None
        key = "slow_timeout_seconds" if slow else "timeout_seconds"
        return f"no progress in phase {phase!r} for {seconds:.0f} s (training.{key}: {limit:g})"

    def end_if_told(self) -> None:
        """On a connection that was lost: if a peer ended because of a hang, so does this rank."""
        if self._marked():
            self._end("another rank saw a hang")

    # -- two threads -------------------------------------------------------------------------

    def _watch(self) -> None:
        """Keep the time; nothing here may wait for a disk."""
        before = self._clock()
        while not self._closed.wait(self._seconds_between_looks):
            self.look(self._clock() - before)
            before = self._clock()

    def look(self, seconds_since: float) -> None:
        """One look at the time, so long after the one before; ends the process if it is late."""
        if seconds_since > 5 + 5 * self._seconds_between_looks:
            # This whole process stood still: with its job (a suspended one is not late), or alone,
            # and then the others have left a mark.
            self._since += seconds_since
            self._ask_now.set()
        problem = self.late()
        if problem is None and self._told:
            problem = "another rank saw a hang"
        if problem is not None and not self._closed.is_set():
            self._end(problem)

    def _listen(self) -> None:
        while not self._closed.is_set():
            self._told = self._told or self._marked()
            self._ask_now.wait(self._seconds_between_asks)
            if not self._closed.is_set():
                self._ask_now.clear()

    def _marked(self) -> bool:
        return self.stacks is not None and (self.stacks / MARK).exists()

    # -- the end -----------------------------------------------------------------------------

    def _end(self, problem: str) -> None:
        """Report for some seconds at most, then leave."""
        if not self._ending.acquire(blocking=False):
            time.sleep(2 * SECONDS_TO_REPORT)  # the other thread of this process is at it
        self._ended_by = threading.get_ident()
        report = threading.Thread(target=self._report, args=(problem,), daemon=True)
        report.start()
        report.join(SECONDS_TO_REPORT)
        self._leave(HangError.exit_code)

    def _report(self, problem: str) -> None:
        phase = f"{self._phase}, for {self._clock() - self._since:.1f} s"
        said = (
            f"rank {self.me.rank} on {self.me.host}, pid {self.me.pid}: {problem}\n"
            f"in phase {phase}, {time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n"
        )
        silent: dict[Member, str] = {}
        if self.stacks is not None:
            with contextlib.suppress(OSError):
                self.stacks.mkdir(parents=True, exist_ok=True)
                with self._file_of(self.me).open("w", encoding="utf-8") as file:
                    file.write(said)
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
                (self.stacks / MARK).touch()
            silent = {m: self._what_of(m) for m in self._missing(SECONDS_FOR_OTHERS)}
        who = "".join(f"; rank {m.rank} (pid {m.pid} on {m.host}) {silent[m]}" for m in silent)
        where = f"; stacks in {self.stacks}" if self.stacks is not None else ""
        error = HangError(f"rank {self.me.rank}: {problem}{who}{where}")
        if self.stacks is not None:
            outcome.leave(self.output, outcome.of_error(error))
        outcome.leave_exit_code(error.exit_code, os.environ)
        if silent:
            self._wake_and_kill(list(silent))
        print(f"error: {error}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(2, all_threads=True)  # last: it may wait for its reader

    def _file_of(self, member: Member) -> Path:
        assert self.stacks is not None
        return self.stacks / f"rank-{member.rank}.txt"

    def _missing(self, seconds: float) -> list[Member]:
        """Ranks without stacks after so many seconds at most."""
        end = time.monotonic() + seconds
        while True:
            missing = [m for m in self._members if not self._file_of(m).exists()]
            if not missing or time.monotonic() > end:
                return missing
            time.sleep(0.1)

    def _what_of(self, member: Member) -> str:
        process = member.process(self.me.place)
        with contextlib.suppress(psutil.Error):
            if process is not None and process.status() == psutil.STATUS_STOPPED:
                return "had been stopped"
        return "did not answer"

    def _wake_and_kill(self, members: Sequence[Member]) -> None:
        """Continue those within reach, so that they end by themselves; kill those that do not."""
        for send, seconds in ((signal.SIGCONT, SECONDS_ONCE_CONTINUED), (signal.SIGKILL, 0)):
            for member in members:
                process = member.process(self.me.place)
                with contextlib.suppress(psutil.Error):
                    if process is not None:
                        process.send_signal(send)
            members = self._missing(seconds)
