"""The run folder: one job at a time, and room for its checkpoints. No torch here.

The lock is a POSIX record lock on `<output>/run.lock`: rank r holds byte r, and a job may begin
once no byte is held. The kernel drops a lock with its process, so a job that was killed leaves no
stale lock behind, and one whose rank 0 alone was killed keeps the folder until its last rank is
gone. Over NFS the server keeps the locks, so it works between machines too (after a machine's
death the server frees them when its lease runs out, 90 s by default). File systems without locks
(Lustre mounted without `-o flock`) are named in a line, and nothing is then held.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import IO, Any

from nmar_ds.errors import FolderError, LockedError
from nmar_ds.files import about

LOCK = "run.lock"
# What a run writes there. Through a link of that name it would write into others' files.
WRITTEN = (
    "attempts.jsonl", "checkpoints", "config.yaml", "outcome", "outcome.tmp", "preflight.json",
    "slurm", "stacks", "tensorboard", "tokenizer",
)  # fmt: skip
JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class RunLock:
    """This rank's share of the lock on a run folder.

    `claim` by rank 0, then `join` by every other rank; `release` at the end, or the end of the
    process. The process must open `run.lock` nowhere else: closing any descriptor of a file drops
    all record locks that the process has on it.

    Args:
        output: the run folder; made if it is missing.
        key: the configuration's name for it.
    """

    def __init__(self, output: Path, key: str = "output") -> None:
        self.path, self._key = output / LOCK, key
        self._file: IO[str] | None = None
        self._held = False

    def claim(self) -> str | None:
        """Rank 0: take the folder for this job.

        Returns:
            None, or a line that says why nothing can be locked here.

        Raises:
            LockedError: a rank of another job is alive; names it.
            FolderError: the folder cannot be made or written, or a link stands in it where the
                run would write.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _refuse_links(self.path.parent)
            # Not truncated: until the lock is ours the text is the holder's.
            # Nor through a link, whose target would be overwritten.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            self._file = os.fdopen(os.open(self.path, flags, 0o644), "r+")
        except OSError as error:
            raise FolderError(about(error, self.path.parent)) from None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # every byte there could be
        except OSError as error:
            if error.errno in _NO_LOCKS:
                self._held = True
                return f"none: {about(error, self.path)}; nothing keeps a second job out"
            raise LockedError(
                f"{self.path.parent}: is in use by {self._holder()}; wait for it, stop it, or "
                f"choose another `{self._key}`"
            ) from None
        fcntl.lockf(self._file, fcntl.LOCK_UN, 0, 1)  # the other ranks' bytes are theirs
        self._held = True
        self._describe()
        return None

    def join(self, rank: int) -> None:
        """Any other rank, once rank 0 has the folder: hold it as long as this process lives."""
        try:
            self._file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_NOFOLLOW), "r+")
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise FolderError(about(error, self.path)) from None
        self._held = True

    @property
    def held(self) -> bool:
        """Whether this rank has its share, or may go on without where nothing can be locked."""
        return self._held

    def release(self) -> None:
        """Give this rank's share back."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _describe(self) -> None:
        """Say in the file who holds it, for people and for the job that is refused."""
        assert self._file is not None
        job = next((f"{n}={os.environ[n]}" for n in JOB_VARIABLES if os.environ.get(n)), None)
        since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        facts = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "job": job}
        try:
            self._file.truncate(0)
            self._file.write(json.dumps(facts) + "\n")
            self._file.flush()
        except OSError as error:
            raise FolderError(about(error, self.path)) from None

    def _holder(self) -> str:
        assert self._file is not None
        try:
            facts: dict[str, Any] = json.loads(self._file.read())
            job = f", {facts['job']}" if facts["job"] else ""
            return f"pid {facts['pid']} on {facts['host']} since {facts['since']}{job}"
        except (ValueError, KeyError, TypeError, OSError):  # it is only just starting
            return f"another job that holds {LOCK}"


def _refuse_links(folder: Path) -> None:
    """The folder itself may be reached through links; what a run writes in it may not."""
    for name in WRITTEN:
        if (folder / name).is_symlink():
            raise FolderError(
                f"{folder / name}: is a link, expected a plain file or folder, or nothing; remove "
                "it, or let `output` itself lead elsewhere"
            )


def checkpoint_bytes(num_weights: int, optimizer: str) -> int:
    """Size of one checkpoint: fp32 master weights, and AdamW's two fp32 moments.

    What else is in its files (shapes, random-number state, padding) is some kilobytes per rank.
    ZeRO-3 does not store the weights again in the model's dtype.
    """
    return num_weights * {"adamw": 12, "sgd": 4}[optimizer]


def check_space(folder: Path, size: int) -> str | None:
    """See before the first step that the run's checkpoints will fit.

    Args:
        folder: where checkpoints go; exists.
        size: bytes of one.

    Returns:
        None, or a warning: there is room for one, but not for a second beside it. An old one is
        only deleted after a new one is whole.

    Raises:
        FolderError: not even one fits, so every step would be lost.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise FolderError(
            f"{folder}: a checkpoint needs {size:,} bytes and {free:,} are free; make room, or "
            "choose another `output`"
        )
    if free < 2 * size:
        return f"{folder}: a checkpoint needs {size:,} bytes and {free:,} are free: room for one"
    return None
