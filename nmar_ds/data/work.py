"""A preparation's work folder: units of work that any process can take, and what came of them.

Results are written aside and renamed, so that each is whole or absent, and are kept for the next
attempt. Work is claimed by creating a file that must not exist, which every shared file system
settles: processes of one machine, ranks of mpirun and tasks of srun need nothing else in common.
Claims belong to one attempt: a new one takes the folder of the old away, and a process that the
old one left behind finds nothing to claim there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import psutil

from nmar_ds import errors
from nmar_ds.errors import NmarError, StoreError, TraceError, WorkerLostError, shared
from nmar_ds.files import sync

FACTS = "facts.json"
STOP = "stop"  # in an attempt's folder: a unit failed, so that nobody takes another
SHORTEST_NAP, LONGEST_NAP = 0.01, 0.3  # seconds between two looks
EMPTY_CLAIM_SECONDS = 10.0  # a claim that says nothing after so long was made by the dead
Arrays = Mapping[str, npt.NDArray[Any]]


class AttemptOverError(Exception):
    """The folder of this attempt is gone: all is done, or a newer attempt goes on."""


class Workers(Protocol):
    """What waiting needs to know of the others."""

    rank: int

    def check(self) -> None:
        """Raise if there is no point in going on."""

    def fate(self, pid: int) -> str | None:
        """How a process that we started ended, where that is known."""


class Work:
    """The folder, seen from one attempt.

    Results of other facts have another folder: a process that an attempt with other settings left
    behind, in the middle of a unit, cannot put its result among ours.

    Attributes:
        base: where everything is.
        attempt: name of the attempt, which begins with the digest of its facts.
        folder: results and what else is kept from attempt to attempt.
        place: the attempt's own folder.
    """

    def __init__(self, base: Path, attempt: str) -> None:
        self.base, self.attempt = base, attempt
        self.folder = base / attempt.partition("-")[0]
        self.place = self.folder / f"attempt-{attempt}"

    @classmethod
    def begin(cls, base: Path, facts: Mapping[str, Any]) -> Work:
        """Begin an attempt; for one process of all.

        Args:
            base: where earlier attempts may have left results.
            facts: what results depend on; those of other facts are dropped.
        """
        text = json.dumps(facts, indent=1, sort_keys=True) + "\n"
        digest = hashlib.sha256(text.encode("ascii")).hexdigest()[:16]
        work = cls(base, f"{digest}-{uuid.uuid4().hex}")
        for left in base.parent.glob(f"{base.name}.dropped-*"):
            shutil.rmtree(left, ignore_errors=True)
        for other in base.glob("*"):
            if other != work.folder:
                drop(other)
        for old in work.folder.glob("attempt-*"):
            drop(old)
        folder = work.folder
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(folder / FACTS, text.encode("ascii"))
        for left in folder.glob("*.aside-*"):
            left.unlink()
        for file in folder.glob("*.result"):
            phase, _, number = file.stem.rpartition("-")
            try:
                work.result(phase, int(number))
            except StoreError:
                file.unlink()
        work.place.mkdir()
        return work

    def unpacked(self, number: int) -> Path:
        """Folder for what a packed source holds."""
        place = self.folder / "unpacked" / str(number)
        place.mkdir(parents=True, exist_ok=True)
        return place

    # -- results

    def finished(self, phase: str) -> set[int]:
        """The units of a phase that have results."""
        return self._numbers(self.folder, phase, "result")

    def put(
        self, phase: str, number: int, facts: Mapping[str, Any], arrays: Arrays | None = None
    ) -> None:
        """Keep a result.

        Args:
            phase: kind of unit.
            number: of the unit.
            facts: as JSON has them.
            arrays: one-dimensional, or reshaped by whoever reads them.

        Raises:
            AttemptOverError: a newer attempt has begun, which does the unit itself.
        """
        if not self.place.exists():
            raise AttemptOverError
        given = arrays or {}
        table = {name: [values.dtype.str, len(values.ravel())] for name, values in given.items()}
        head = json.dumps({"facts": facts, "arrays": table}).encode("ascii") + b"\n"
        parts = [head, *(np.ascontiguousarray(values).tobytes() for values in given.values())]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        write_aside(
            self.folder / _name(phase, number, "result"),
            digest.hexdigest().encode("ascii") + b"\n", *parts,
        )  # fmt: skip

    def result(self, phase: str, number: int) -> tuple[dict[str, Any], Arrays]:
        """The facts and arrays of a result.

        Raises:
            StoreError: its bytes are not those that were written.
        """
        file = self.folder / _name(phase, number, "result")
        content = file.read_bytes()
        digest, _, rest = content.partition(b"\n")
        if hashlib.sha256(rest).hexdigest().encode("ascii") != digest:
            raise StoreError(f"{file}: damaged, its sha256 differs; run the same command again")
        place = len(digest) + 1 + rest.index(b"\n") + 1
        head = json.loads(rest[: place - len(digest) - 1])
        arrays = {}
        for name, (dtype, length) in head["arrays"].items():
            arrays[name] = np.frombuffer(content, dtype=dtype, count=length, offset=place)
            place += arrays[name].nbytes
        return head["facts"], arrays

    def facts_of(self, phase: str, number: int) -> dict[str, Any]:
        """The facts of a result alone; its arrays are not read."""
        with (self.folder / _name(phase, number, "result")).open("rb") as file:
            file.readline()
            return dict(json.loads(file.readline())["facts"])

    def forget(self, phase: str, number: int) -> None:
        """Drop a result: its unit is done again."""
        (self.folder / _name(phase, number, "result")).unlink()

    # -- units

    def take(self, phase: str, num: int) -> Iterator[int]:
        """Claim the units of a phase that nobody has, one by one, in order."""
        done = self.finished(phase)
        for number in range(num):
            if (self.place / STOP).exists():
                return
            if number not in done and self._claim(phase, number):
                yield number

    def _claim(self, phase: str, number: int) -> bool:
        file = self.place / _name(phase, number, "claim")
        try:
            descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        except FileNotFoundError:
            raise AttemptOverError from None
        with os.fdopen(descriptor, "w") as claim:
            claim.write(json.dumps([_machine(), os.getpid(), _started(os.getpid())]))
        return True

    def fail(self, phase: str, number: int, error: NmarError) -> None:
        """Keep what went wrong in a unit, and let nobody take another."""
        if isinstance(error, TraceError):
            said: dict[str, Any] = {"trace": error.__reduce__()[1]}
        else:
            said = {"kind": type(error).__name__, "message": str(error)}
        write_aside(self.place / _name(phase, number, "error"), json.dumps(said).encode("ascii"))
        self.stop()

    def stop(self) -> None:
        """Let nobody take another unit of this attempt."""
        with contextlib.suppress(FileNotFoundError):
            (self.place / STOP).touch()

    def wait(self, phase: str, num: int, workers: Workers, look: Callable[[], None]) -> None:
        """Wait until every unit of a phase has its result; for the process that leads.

        Args:
            phase: kind of unit.
            num: units.
            workers: the others.
            look: called between looks.

        Raises:
            NmarError: what the first unit in order that failed met, whoever met it first.
            WorkerLostError: a unit's process is gone.
        """
        nap = SHORTEST_NAP
        while True:
            failed = self._numbers(self.place, phase, "error")
            # Units are claimed in order: all before the first failure are done or being done.
            missing = set(range(min(failed, default=num))) - self.finished(phase)
            if not missing:
                break
            for number in sorted(missing):
                self._require_alive(phase, number, workers)
            look()
            time.sleep(nap)
            nap = min(nap * 1.5, LONGEST_NAP)
        look()
        if failed:
            raise self._error(phase, min(failed))

    def _require_alive(self, phase: str, number: int, workers: Workers) -> None:
        claim = self.place / _name(phase, number, "claim")
        text = claim.read_text(encoding="ascii")
        if text:
            machine, pid, started = json.loads(text)
            # Another machine's processes are its launcher's to watch.
            if machine != _machine() or _started(pid) == started:
                return
            fate = workers.fate(pid) or "is gone"
        elif time.time() - claim.stat().st_mtime < EMPTY_CLAIM_SECONDS:
            return
        else:
            pid, fate = "unknown", "is gone"
        if (self.folder / _name(phase, number, "result")).exists():
            return  # it ended well after we had looked
        if (self.place / _name(phase, number, "error")).exists():
            return
        self.stop()
        raise WorkerLostError(
            f"{self.folder}: a worker (process {pid}) {fate} in the middle of {phase} {number}; "
            "all other results are kept: run the same command again"
        )

    def _error(self, phase: str, number: int) -> NmarError:
        said = json.loads((self.place / _name(phase, number, "error")).read_bytes())
        if "trace" in said:
            return TraceError(*said["trace"])
        kind = getattr(errors, said["kind"], NmarError)
        error: NmarError = kind(said["message"])
        return error

    # -- what the leading process says

    def say(self, name: str, value: Any) -> None:
        """Say something to all processes of this attempt, once."""
        write_aside(self.place / f"{name}.json", json.dumps(value).encode("ascii"))

    def heard(self, name: str, workers: Workers) -> Any:
        """What `say` said under a name, as soon as it is said.

        Raises:
            AttemptOverError: it never will be.
            NmarError: (shared) a unit failed; the leading process reports it.
        """
        nap = SHORTEST_NAP
        while True:
            with contextlib.suppress(FileNotFoundError):
                return json.loads((self.place / f"{name}.json").read_bytes())
            if (self.place / STOP).exists():
                raise shared(StoreError(f"{self.folder}: another process met an error"))
            if not self.place.exists():
                raise AttemptOverError
            workers.check()
            time.sleep(nap)
            nap = min(nap * 1.5, LONGEST_NAP)

    @staticmethod
    def _numbers(folder: Path, phase: str, kind: str) -> set[int]:
        try:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in entries]
        except FileNotFoundError:
            raise AttemptOverError from None
        start, end = f"{phase}-", f".{kind}"
        return {
            int(name[len(start) : -len(end)])
            for name in names
            if name.startswith(start) and name.endswith(end)
        }


def write_aside(file: Path, *parts: bytes) -> None:
    """Write a file under another name, wait until it is on the disk, and rename it.

    Raises:
        AttemptOverError: its folder is gone.
    """
    aside = file.with_name(f"{file.name}.aside-{uuid.uuid4().hex}")
    try:
        with aside.open("wb") as out:
            for part in parts:
                out.write(part)
        sync(aside)
        aside.rename(file)
    except FileNotFoundError:
        raise AttemptOverError from None
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def drop(folder: Path) -> None:
    """Remove a folder that others may still be writing into: they miss it at once."""
    aside = folder.with_name(f"{folder.name}.dropped-{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _name(phase: str, number: int, kind: str) -> str:
    return f"{phase}-{number:06d}.{kind}"


@functools.cache
def _machine() -> str:
    """Names the machine, and the part of it in which a process id means the same."""
    try:
        ids = os.readlink("/proc/self/ns/pid")
    except OSError:
        ids = ""
    return f"{socket.gethostname()} {ids}"


def _started(pid: int) -> float | None:
    """When a living process began; ids are used again."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None
