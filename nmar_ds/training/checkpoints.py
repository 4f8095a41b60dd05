"""Checkpoints that never lie: written aside, checksummed, renamed, announced last.

The order is the contract. Every arrow may be where the machine dies, and the previous checkpoint
is still the newest valid one until the rename is on disk:

    ranks write step-N.partial/ -> each rank syncs and hashes its files -> barrier -> manifest.json
    (rank 0) -> rename to step-N/ -> `latest` -> barrier -> retention

`latest` is a hint for people. Discovery walks the folders themselves, newest first, and takes
the first whose manifest, file list, sizes and checksums all hold: one flipped bit loads silently
in torch's and safetensors' formats, so a checksum is not optional. DeepSpeed alone may write
`latest` before the other ranks' files exist.

Nothing here imports torch: what ranks tell each other goes through `Peers`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nmar_ds.errors import CheckpointError, SaveError
from nmar_ds.files import about, sha256_file, sync

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
STEP_FOLDER = re.compile(r"step-(\d{8})")
_UNSEALED = "0" * 64


class Peers(Protocol):
    """What the ranks of a run can tell each other."""

    rank: int
    world_size: int

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, in order of rank; waits for all."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A verified checkpoint.

    Attributes:
        folder: of the checkpoint.
        manifest: its parsed manifest.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return int(self.manifest["step"])


def folder_name(step: int) -> str:
    """Name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


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
        error = SaveError(problem)
        error.shared = True
        raise error
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
        write_atomically(partial / MANIFEST, _seal(manifest))
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


def _seal(manifest: dict[str, Any]) -> str:
    """The manifest as text that holds its own sha256, taken with zeros in the digest's place."""
    text = json.dumps({**manifest, "manifest_sha256": _UNSEALED}, indent=1, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return text.replace(f'"manifest_sha256": "{_UNSEALED}"', f'"manifest_sha256": "{digest}"')


def _free_name(path: Path) -> Path:
    number = 0
    while (candidate := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return candidate


def verify(folder: Path, *, checksums: bool = True) -> dict[str, Any]:
    """Check a checkpoint folder and return its manifest.

    Args:
        folder: a published checkpoint.
        checksums: read every file; without, names and sizes only.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    try:
        return _verify(folder, checksums=checksums)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from None


def _verify(folder: Path, *, checksums: bool) -> dict[str, Any]:
    path = folder / MANIFEST
    if folder.is_symlink() or path.is_symlink():
        raise CheckpointError(f"{path}: is reached through a link, expected a plain file")
    try:
        text = path.read_bytes().decode("utf-8")
        manifest = json.loads(text)
        digest = manifest["manifest_sha256"]
        unsealed = text.replace(digest, _UNSEALED).encode()
        version, files, step = manifest["format_version"], manifest["files"], manifest["step"]
        entries = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged: {error!r}") from None
    if hashlib.sha256(unsealed).hexdigest() != digest:
        raise CheckpointError(f"{path}: its text differs from the sha256 it holds")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version is {version!r}, expected {FORMAT_VERSION}")
    if type(step) is not int or folder.name != folder_name(step):
        raise CheckpointError(f"{path}: is of step {step!r}, but the folder is {folder.name}")
    if not entries:
        raise CheckpointError(f"{path}: lists no files")
    present = {item.name for item in folder.iterdir()} - {MANIFEST}
    for name in sorted(present ^ set(entries)):
        what = "is not in the manifest" if name in present else "is missing"
        raise CheckpointError(f"{folder}: {name} {what}")
    for name, (size, digest) in entries.items():
        file = folder / name
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{file}: is not a plain file")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file}: has {file.stat().st_size} bytes, expected {size}")
        if checksums and sha256_file(file) != digest:
            raise CheckpointError(f"{file}: its sha256 differs from the manifest's")
    result: dict[str, Any] = manifest
    return result


def step_folders(folder: Path) -> list[Path]:
    """Published checkpoint folders, newest first, whether valid or not."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def find_newest(folder: Path, report: Callable[[str], None]) -> Found | None:
    """The newest valid checkpoint; `report` is told about every newer one that is refused.

    Raises:
        CheckpointError: there are checkpoints, and none of them is valid. Starting afresh would
            look like a resume, so it is left to the user.
    """
    refused = []
    for candidate in step_folders(folder):
        try:
            return Found(folder=candidate, manifest=verify(candidate))
        except CheckpointError as error:
            refused.append(str(error))
            report(f"refused {candidate.name}: {error}")
    if refused:
        raise CheckpointError(
            f"{folder}: none of its {len(refused)} checkpoints is valid; the newest: {refused[0]}; "
            "restore one, or move the folder away to start afresh"
        )
    return None


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


def check_same_run(saved: dict[str, Any], current: dict[str, Any], folder: Path) -> None:
    """Refuse to continue a run with other data, tokenizer or settings.

    Args:
        saved: flat facts that decide what is trained, by dotted name, from the checkpoint.
        current: the same of the run that is about to start.
        folder: the checkpoint, for the message.

    Raises:
        CheckpointError: names each fact that differs, before and now.
    """
    differing = [
        f"{name} was {saved.get(name)!r}, is {current.get(name)!r}"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
    if differing:
        raise CheckpointError(
            f"{folder}: belongs to another run: {'; '.join(differing)}; restore these, or choose "
            "another `output`"
        )
