"""Checkpoints that never lie: written aside, checksummed, renamed, announced last.

The order is the contract. Every arrow may be where the machine dies, and the previous checkpoint
is still the newest valid one until the rename is on disk:

    ranks write step-N.partial/ -> each rank syncs and hashes its files -> barrier -> manifest.json
    (rank 0) -> rename to step-N/ -> `latest` -> barrier -> retention

`latest` is a hint for people; what counts as a checkpoint is decided in `verifying`. DeepSpeed
alone may write `latest` before the other ranks' files exist.

Nothing here imports torch: what ranks tell each other goes through `Peers`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nmar_ds.errors import CheckpointError, SaveError, shared
from nmar_ds.files import about, sha256_file, sync
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

    In order: cleared, before_write, [DeepSpeed's files], after_write, after_hash, before_manifest,
    written_aside:manifest.json, after_manifest, [moved_aside, if a damaged one stood in the way],
    after_rename, written_aside:latest, after_latest, committed, unmarked (retention, per folder),
    retained.
    """


def publish(
    save: Callable[[Path, str], None],
    folder: Path,
    *,
    step: int,
    facts: dict[str, Any],
    peers: Peers,
    keep: int,
) -> Path:
    """Write and announce one checkpoint. Collective.

    Args:
        save: writes this rank's files into `folder/tag` when called as save(folder, tag).
        folder: the run's checkpoint folder.
        step: optimizer steps done.
        facts: JSON content of the manifest: cursor, fingerprints, versions.
        peers: the ranks.
        keep: verified checkpoints to keep.

    Raises:
        SaveError: a rank could not write; the previous checkpoint stays as it was.
    """
    final, partial = folder / folder_name(step), folder / (folder_name(step) + ".partial")
    problem = _attempt(peers, partial, lambda: _clear(folder, partial) if peers.rank == 0 else None)
    if problem is None:  # the folder is ready: the gather above was the barrier
        problem = _attempt(peers, partial, lambda: _write(save, folder, partial.name))
    files: dict[str, Any] = {}
    if problem is None:  # every rank's files are complete: the gather above was the barrier
        table: dict[str, Any] = {}
        problem = _attempt(peers, partial, lambda: table.update(_own_files(partial, peers.rank)))
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
    if peers.rank == 0:
        retain(folder, keep=keep)
        reached("retained")
    return final


def _clear(folder: Path, partial: Path) -> None:
    """Make the folders and remove what saves that died have left there."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("step-*.partial"):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)
    partial.mkdir()
    reached("cleared")


def _write(save: Callable[[Path, str], None], folder: Path, tag: str) -> None:
    reached("before_write")
    save(folder, tag)
    reached("after_write")


def _attempt(peers: Peers, place: Path, action: Callable[[], None]) -> str | None:
    """Run an action on every rank; the first rank's problem, known to all, or None."""
    problem = None
    try:
        action()
    except (OSError, SaveError) as error:
        what = about(error, place) if isinstance(error, OSError) else error
        problem = f"rank {peers.rank} could not write its part of the checkpoint: {what}"
    return next((p for p in peers.gather(problem) if p is not None), None)


def _own_files(partial: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Sync and hash the files this rank wrote; rank 0 also answers for the shared ones."""
    table = {}
    for path in sorted(partial.iterdir()):
        owner = re.search(r"zero_pp_rank_(\d+)_", path.name)
        if (int(owner.group(1)) if owner else 0) == rank:
            sync(path)
            table[path.name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    if not table:
        raise SaveError(f"{partial}: it left no file there")
    reached("after_hash")
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


def retain(folder: Path, *, keep: int) -> None:
    """Delete old checkpoints, but none before `keep` newer ones have their files in full."""
    whole = 0
    for candidate in step_folders(folder):
        if whole >= keep:
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
