"""When checkpoints are written: while training waits, or behind its back.

In the background only what concerns one rank is done: writing, syncing, hashing and reading back
its own files. Everything that ranks agree on, from the first barrier to the rename, happens on the
training thread at the end of a step, in the same order on all ranks whatever each one's disk does:

    save due -> folder ready -> barrier -> each rank copies its state -> training goes on
    end of each later step -> are all done? -> manifest, rename, `latest`, retention as in
    `checkpoints`

At most one save is under way: the next one, a stop and the end of training wait for it. No torch
here; the ranks talk through `Peers`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nmar_ds.errors import SaveError, shared
from nmar_ds.training import checkpoints
from nmar_ds.training.checkpoints import Peers


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """Where a run's checkpoints go.

    Attributes:
        folder: that holds them.
        peers: the ranks.
        facts: content of their manifests beside step and files.
        keep: whole checkpoints to keep.
        verified: names of those whose bytes this run has read.
    """

    folder: Path
    peers: Peers
    facts: dict[str, Any]
    keep: int
    verified: set[str] = field(default_factory=set)


class Saver(Protocol):
    """What the loop asks of saving. Every call is collective, `pending` the same on all ranks."""

    @property
    def pending(self) -> bool:
        """Whether a save has begun and is not yet announced."""

    def save(self, step: int) -> None:
        """A checkpoint is due after this many steps."""

    def settle(self) -> None:
        """At the end of a step without a save: announce what has been written meanwhile."""

    def finish(self) -> None:
        """The loop ends: the latest save must be announced now."""


class BlockingSaver:
    """Training waits until a checkpoint is announced.

    Args:
        shelf: where it goes.
        write: writes this rank's files into `folder/tag`. Collective.
    """

    def __init__(self, shelf: Shelf, write: Callable[[Path, str], None]) -> None:
        self._shelf, self._write = shelf, write
        self.pending = False

    def save(self, step: int) -> None:
        """Publish.

        Raises:
            SaveError: it could not be written.
        """
        shelf = self._shelf
        checkpoints.publish(
            self._write, shelf.folder, step=step, facts=shelf.facts, peers=shelf.peers,
            keep=shelf.keep, verified=shelf.verified,
        )  # fmt: skip

    def settle(self) -> None:
        """Nothing is ever pending."""

    def finish(self) -> None:
        """Nothing is ever pending."""


class Work:
    """A call in a thread of its own, which does not keep the process from ending.

    Args:
        call: what to do; its result, or what it raises, is kept.
        name: of the thread.
    """

    def __init__(self, call: Callable[[], Any], name: str) -> None:
        self._call: Callable[[], Any] | None = call
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        assert self._call is not None
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error
        self._call = None  # and with it what it held on to

    def done(self) -> bool:
        """Whether it has come to an end, good or bad."""
        return not self._thread.is_alive()

    def result(self) -> Any:
        """Wait; what it returned.

        Raises:
            BaseException: what it raised.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result


class BackgroundSaver:
    """Training goes on while a copy of its state is written.

    Args:
        shelf: where checkpoints go.
        snapshot: copies this rank's files of `folder/tag` and returns what writes the copy.
            Collective; the returned call is not, and runs in a thread.
        max_failed: so many failed saves in a row end the run.
        report: told on every rank of a failed save: step, failures so far, one line.
    """

    def __init__(
        self,
        shelf: Shelf,
        snapshot: Callable[[Path, str], Callable[[], None]],
        *,
        max_failed: int,
        report: Callable[[int, int, str], None],
    ) -> None:
        self._shelf, self._snapshot = shelf, snapshot
        self._max_failed, self._report = max_failed, report
        self._work: tuple[int, Work] | None = None
        self._problem: str | None = None  # of the latest save
        self.failed_total = 0
        self.failed_in_a_row = 0

    @property
    def pending(self) -> bool:
        """Whether a save has begun and is not yet announced."""
        return self._work is not None

    def save(self, step: int) -> None:
        """Copy the state and begin to write it; the save before is awaited and announced first.

        Raises:
            SaveError: too many saves in a row have failed.
        """
        self._announce()
        shelf = self._shelf
        partial = checkpoints.partial_folder(shelf.folder, step)
        problem = checkpoints.prepare(shelf.folder, step=step, peers=shelf.peers)
        writers: list[Callable[[], None]] = []
        if problem is None:  # the folder is ready: the gather in `prepare` was the barrier
            problem = checkpoints.attempt(
                shelf.peers, partial,
                lambda: writers.append(self._snapshot(shelf.folder, partial.name)),
            )  # fmt: skip
        if problem is not None:
            self._failed(step, problem)
            return
        writer, rank = writers.pop(), shelf.peers.rank

        def write_and_hash() -> dict[str, Any]:
            checkpoints.write(lambda folder, tag: writer(), shelf.folder, partial.name)
            return checkpoints.own_files(partial, rank)

        self._problem = None
        self._work = step, Work(write_and_hash, f"checkpoint writer of rank {rank}")

    def settle(self) -> None:
        """Announce the pending save if all ranks have written it.

        Raises:
            SaveError: too many saves in a row have failed.
        """
        if self._work is not None and all(self._shelf.peers.gather(self._work[1].done())):
            self._announce()

    def finish(self) -> None:
        """Await and announce the pending save.

        Raises:
            SaveError: the latest save failed, be it the only one.
        """
        self._announce()
        if self._problem is not None:
            raise shared(SaveError(self._problem))

    def _announce(self) -> None:
        """Await the pending save, if any, and announce it or count it as failed."""
        if self._work is None:
            return
        (step, work), self._work = self._work, None
        shelf, table = self._shelf, {}
        partial = checkpoints.partial_folder(shelf.folder, step)
        problem = checkpoints.attempt(shelf.peers, partial, lambda: table.update(work.result()))
        try:
            final = checkpoints.announce(
                shelf.folder, table, problem, step=step, facts=shelf.facts, peers=shelf.peers
            )
        except SaveError as error:
            self._failed(step, str(error))
            return
        self.failed_in_a_row = 0
        shelf.verified.add(final.name)
        if shelf.peers.rank == 0:
            checkpoints.retain(shelf.folder, keep=shelf.keep, verified=shelf.verified)

    def _failed(self, step: int, problem: str) -> None:
        """Count it; all ranks come here together."""
        self._problem = problem
        self.failed_total += 1
        self.failed_in_a_row += 1
        self._report(
            step, self.failed_total,
            f"save      of step {step} failed ({self.failed_in_a_row} in a row, {self._max_failed} "
            f"end the run); the checkpoint before is untouched: {problem}",
        )  # fmt: skip
        if self.failed_in_a_row >= self._max_failed:
            raise shared(SaveError(
                f"{problem}; {self.failed_in_a_row} saves in a row failed "
                "(checkpoint.max_failed_saves)"
            ))  # fmt: skip
