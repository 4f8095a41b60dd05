"""Checkpoints that never lie: written aside, checksummed, renamed, announced last.

The order is the contract. Every arrow may be where the machine dies, and the previous checkpoint
is still the newest valid one until the rename is on disk:

    ranks write step-N.partial/ -> each rank syncs and hashes its files, and reads them back from
    the disk -> barrier -> manifest.json (rank 0) -> rename to step-N/ -> `latest` -> barrier ->
    retention

`latest` is a hint for people; what counts as a checkpoint is decided in `verifying`. DeepSpeed
alone may write `latest` before the other ranks' files exist.

Nothing here imports torch: what ranks tell each other goes through `Peers`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from nmar_ds.errors import CheckpointError, SaveError, shared
from nmar_ds.files import about, drop_cached, sha256_file, sync
from nmar_ds.training.verifying import (
    FORMAT_VERSION,
    MANIFEST,
    Found,
    Peers,
    check_same_run,
    find_newest,
    folder_name,
    seal,
    step_folders,
    verify,
)

__all__ = [
    "FORMAT_VERSION", "LATEST", "MANIFEST", "Found", "Peers", "check_same_run", "find_newest",
    "folder_name", "publish", "retain", "seal", "step_folders", "verify", "write_atomically",
]  # fmt: skip
LATEST = "latest"
MIN_VERIFIED = 2  # retention leaves at least so many whose bytes this run has read
KEPT_INVALID = 2  # damaged ones that were moved aside
INVALID_FOLDER = re.compile(r"step-(\d{8})\.invalid-(\d+)")


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content so that a reader sees the old or the new text, never a part.

    Nothing is written through a link that stands in the way: the link itself is replaced.
    """
    aside = path.with_name(path.name + ".tmp")
    aside.unlink(missing_ok=True)
    with aside.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    reached(f"written_aside:{path.name}")
    aside.replace(path)
    sync(path.parent)


def reached(point: str) -> None:
    """Named places of a save and of retention; tests replace this to die at one of them.

    In order: cleared, before_write, [DeepSpeed's files], after_write, after_hash, read_back,
    before_manifest, written_aside:manifest.json, after_manifest, [moved_aside, if a damaged one
    stood in the way], after_rename, written_aside:latest, after_latest, committed, unmarked
    (retention, per folder), retained.
    """


def publish(
    save: Callable[[Path, str], None],
    folder: Path,
    *,
    step: int,
    facts: dict[str, Any],
    peers: Peers,
    keep: int,
    verified: set[str],
) -> Path:
    """Write and announce one checkpoint. Collective.

    Args:
        save: writes this rank's files into `folder/tag` when called as save(folder, tag).
        folder: the run's checkpoint folder.
        step: optimizer steps done.
        facts: JSON content of the manifest: cursor, fingerprints, versions.
        peers: the ranks.
        keep: whole checkpoints to keep.
        verified: names of checkpoints whose bytes this run has read; gets this one's.

    Raises:
        SaveError: a rank could not write; the previous checkpoint stays as it was.
    """
    partial = partial_folder(folder, step)
    problem = prepare(folder, step=step, peers=peers)
    if problem is None:  # the folder is ready: the gather above was the barrier
        problem = attempt(peers, partial, lambda: write(save, folder, partial.name))
    table: dict[str, Any] = {}
    if problem is None:  # every rank's files are complete: the gather above was the barrier
        problem = attempt(peers, partial, lambda: table.update(own_files(partial, peers.rank)))
    final = announce(folder, table, problem, step=step, facts=facts, peers=peers)
    verified.add(final.name)
    if peers.rank == 0:
        retain(folder, keep=keep, verified=verified)
    return final


def partial_folder(folder: Path, step: int) -> Path:
    """Where a checkpoint is written before it is announced."""
    return folder / (folder_name(step) + ".partial")


def prepare(folder: Path, *, step: int, peers: Peers) -> str | None:
    """Rank 0 makes room for a save. Collective; returns the problem, known to all, or None."""
    partial = partial_folder(folder, step)
    return attempt(peers, partial, lambda: _clear(folder, partial) if peers.rank == 0 else None)


def announce(
    folder: Path,
    table: dict[str, Any],
    problem: str | None,
    *,
    step: int,
    facts: dict[str, Any],
    peers: Peers,
) -> Path:
    """Publish what the ranks have written, or clear it away. Collective.

    Args:
        folder: the run's checkpoint folder.
        table: this rank's files, from `own_files`.
        problem: of the save so far, the same on all ranks.
        step: optimizer steps done.
        facts: JSON content of the manifest.
        peers: the ranks.

    Raises:
        SaveError: there was a problem, or there is one now.
    """
    final, partial = folder / folder_name(step), partial_folder(folder, step)
    files: dict[str, Any] = {}
    if problem is None:
        files = {name: entry for part in peers.gather(table) for name, entry in part.items()}
    if peers.rank == 0:
        if problem is None:
            problem = _commit(partial, final, step, facts, files)
        if problem is not None:
            shutil.rmtree(partial, ignore_errors=True)
    problem = peers.broadcast(problem)
    if problem is not None:
        raise shared(SaveError(problem))
    reached("committed")
    return final


def _clear(folder: Path, partial: Path) -> None:
    """Make the folders and remove what saves that died have left there."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("step-*.partial"):
        _remove(path)
    partial.mkdir()
    reached("cleared")


def _remove(path: Path) -> None:
    """A tree, or whatever else stands there; what a link leads to stays."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def write(save: Callable[[Path, str], None], folder: Path, tag: str) -> None:
    """Let this rank write its files."""
    reached("before_write")
    save(folder, tag)
    reached("after_write")


def attempt(peers: Peers, place: Path, action: Callable[[], None]) -> str | None:
    """Run an action on every rank; the first rank's problem, known to all, or None."""
    problem = None
    try:
        action()
    except (OSError, SaveError) as error:
        what = about(error, place) if isinstance(error, OSError) else error
        problem = f"rank {peers.rank} could not write its part of the checkpoint: {what}"
    return next((p for p in peers.gather(problem) if p is not None), None)


def own_files(partial: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Sync, hash and read back what this rank wrote; rank 0 also answers for the shared files.

    The hash is of the bytes as the kernel was given them; then they are dropped from its memory
    and read again, so that a disk or server that stored others is found out before the checkpoint
    counts for anything. That costs one more reading and hashing of the files.

    Returns:
        Size and sha256 by name, for the manifest.

    Raises:
        SaveError: there is no file, or one reads back differently.
    """
    table = {}
    for path in sorted(partial.iterdir()):
        owner = re.search(r"zero_pp_rank_(\d+)_", path.name)
        if (int(owner.group(1)) if owner else 0) == rank:
            sync(path)
            table[path.name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    if not table:
        raise SaveError(f"{partial}: it left no file there")
    reached("after_hash")
    for name, entry in table.items():
        drop_cached(partial / name)
        if sha256_file(partial / name) != entry["sha256"]:
            raise SaveError(f"{partial / name}: reads back other than it was written")
    reached("read_back")
    return table


def _commit(
    partial: Path, final: Path, step: int, facts: dict[str, Any], files: dict[str, Any]
) -> str | None:
    """Rank 0: manifest, rename, `latest`. Returns the problem, or None."""
    try:
        found = {path.name for path in partial.iterdir()}
        if found != set(files):
            return f"{partial}: {sorted(found ^ set(files))} appeared or vanished during the save"
        reached("before_manifest")
        manifest = {"format_version": FORMAT_VERSION, "step": step, **facts, "files": files}
        write_atomically(partial / MANIFEST, seal(manifest))
        reached("after_manifest")
        if final.exists():
            # Only a damaged one can stand here: a valid one would have been resumed from.
            final.rename(_free_name(final.with_name(final.name + ".invalid")))
            reached("moved_aside")
        partial.rename(final)
        sync(final.parent)
        reached("after_rename")
        write_atomically(final.parent / LATEST, final.name + "\n")
        reached("after_latest")
    except OSError as error:
        return f"could not publish the checkpoint: {about(error, partial)}"
    return None


def _free_name(path: Path) -> Path:
    number = 0
    while (candidate := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return candidate


def retain(folder: Path, *, keep: int, verified: Collection[str]) -> None:
    """Delete old checkpoints, but none that could still be needed.

    One goes only when `keep` newer ones have their files in full and `MIN_VERIFIED` of these were
    read, byte by byte, by this run: what merely has the right names and sizes may be damaged.

    Args:
        folder: the run's checkpoint folder.
        keep: whole checkpoints to keep.
        verified: names of those that this run has read.
    """
    whole = sure = 0
    for candidate in step_folders(folder):
        if whole >= keep and sure >= MIN_VERIFIED:
            # The marker goes first: a half-deleted folder must not pass for a checkpoint.
            (candidate / MANIFEST).unlink(missing_ok=True)
            reached("unmarked")
            shutil.rmtree(candidate, ignore_errors=True)
            continue
        try:
            verify(candidate, checksums=False)
        except CheckpointError:
            continue
        whole += 1
        sure += candidate.name in verified
    _forget_invalid(folder)
    reached("retained")


def _forget_invalid(folder: Path) -> None:
    """Leave the newest damaged ones for who wants to know what happened to them."""
    found = [match for path in folder.iterdir() if (match := INVALID_FOLDER.fullmatch(path.name))]
    found.sort(key=lambda match: (int(match[1]), int(match[2])), reverse=True)
    for match in found[KEPT_INVALID:]:
        with contextlib.suppress(OSError):
            _remove(folder / match[0])
