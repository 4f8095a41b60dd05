"""Which checkpoint is whole: manifest, file list, sizes and checksums, read by all ranks together.

Discovery walks the folders, newest first, and takes the first that holds in full: one flipped bit
loads silently in torch's and safetensors' formats, so a checksum is not optional. Rank 0 lists the
folders, reads the manifests and looks at names and sizes; the files' bytes are shared out by size.
Nothing is taken before all ranks have reported, and all come to the same answer.

Nothing here imports torch: what ranks tell each other goes through `Peers`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nmar_ds.errors import CheckpointError, FolderError, shared
from nmar_ds.files import about, sha256_file

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
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


class Alone:
    """The only rank there is."""

    rank, world_size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        """Its own value."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Its own value."""
        return value


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


def seal(manifest: dict[str, Any]) -> str:
    """The manifest as text that holds its own sha256, taken with zeros in the digest's place."""
    text = json.dumps({**manifest, "manifest_sha256": _UNSEALED}, indent=1, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return text.replace(f'"manifest_sha256": "{_UNSEALED}"', f'"manifest_sha256": "{digest}"')


def verify(folder: Path, *, checksums: bool = True) -> dict[str, Any]:
    """Check a checkpoint folder and return its manifest.

    Args:
        folder: a published checkpoint.
        checksums: read every file; without, names and sizes only.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    try:
        manifest = _read_manifest(folder)
        _check_files(folder, manifest["files"])
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from None
    damage = first_damage(folder, manifest["files"], manifest["files"]) if checksums else None
    if damage is not None:
        raise CheckpointError(damage[1])
    return manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if folder.is_symlink() or path.is_symlink():
        raise CheckpointError(f"{path}: is reached through a link, expected a plain file")
    try:
        text = path.read_bytes().decode("utf-8")
        manifest: dict[str, Any] = json.loads(text)
        digest = manifest["manifest_sha256"]
        unsealed = text.replace(digest, _UNSEALED).encode()
        version, files, step = manifest["format_version"], manifest["files"], manifest["step"]
        _ = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
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
    if not files:
        raise CheckpointError(f"{path}: lists no files")
    return manifest


def _check_files(folder: Path, files: Mapping[str, Any]) -> None:
    """Names, kinds and sizes: all that need not be read."""
    present = {item.name for item in folder.iterdir()} - {MANIFEST}
    for name in sorted(present ^ set(files)):
        what = "is not in the manifest" if name in present else "is missing"
        shown = name if name.isprintable() else repr(name)  # a message stays on its line
        raise CheckpointError(f"{folder}: {shown} {what}")
    for name, entry in files.items():
        file = folder / name
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{file}: is not a plain file")
        size = file.stat().st_size
        if type(entry["size"]) is not int or size != entry["size"]:
            raise CheckpointError(f"{file}: has {size} bytes, expected {entry['size']}")


def first_damage(
    folder: Path, files: Mapping[str, Any], mine: Sequence[str] | Mapping[str, Any]
) -> tuple[int, str] | None:
    """Read files and compare their checksums.

    Args:
        folder: that holds them.
        files: the manifest's table.
        mine: names of those to read.

    Returns:
        Place in the table and description of the first that is damaged, or None.
    """
    for place, name in enumerate(files):
        if name in mine:
            try:
                digest = sha256_file(folder / name)
            except OSError as error:
                return place, f"{folder}: cannot be read: {error}"
            if digest != files[name]["sha256"]:
                return place, f"{folder / name}: its sha256 differs from the manifest's"
    return None


def share_out(sizes: Mapping[str, int], num_shares: int) -> list[list[str]]:
    """Deal files out so that the largest share is small: the largest first, to who has least.

    The saved ranks may have been more or fewer than the running ones; a file is never split.
    """
    shares: list[list[str]] = [[] for _ in range(num_shares)]
    loads = [0] * num_shares
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += sizes[name]
    return shares


def step_folders(folder: Path) -> list[Path]:
    """Published checkpoint folders, newest first, whether valid or not."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def find_newest(
    folder: Path, report: Callable[[str], None], peers: Peers | None = None
) -> Found | None:
    """The newest valid checkpoint. Collective where there are peers.

    Args:
        folder: of the run's checkpoints.
        report: told, on rank 0, about every newer one that is refused.
        peers: share the reading; without, this process reads everything.

    Raises:
        CheckpointError: there are checkpoints, and none of them is valid. Starting afresh would
            look like a resume, so it is left to the user.
        FolderError: the folder cannot be listed.
    """
    peers = peers or Alone()
    names, problem = peers.broadcast(_list(folder) if peers.rank == 0 else None)
    if problem is not None:
        raise shared(FolderError(problem))
    refused = []
    for name in names:
        manifest, problem = _verify_together(folder / name, peers)
        if problem is None:
            return Found(folder=folder / name, manifest=manifest)
        refused.append(problem)
        if peers.rank == 0:
            report(f"refused {name}: {problem}")
    if refused:
        raise shared(
            CheckpointError(
                f"{folder}: none of its {len(refused)} checkpoints is valid; the newest: "
                f"{refused[0]}; restore one, or move the folder away to start afresh"
            )
        )
    return None


def _list(folder: Path) -> tuple[list[str], str | None]:
    try:
        return [path.name for path in step_folders(folder)], None
    except OSError as error:
        return [], about(error, folder)


def _verify_together(folder: Path, peers: Peers) -> tuple[dict[str, Any], str | None]:
    """Manifest and first problem of one checkpoint, the same on all ranks. Collective."""
    outcome: tuple[dict[str, Any], str | None] = ({}, None)
    if peers.rank == 0:
        try:
            outcome = verify(folder, checksums=False), None
        except CheckpointError as error:
            outcome = {}, str(error)
    manifest, problem = peers.broadcast(outcome)
    if problem is not None:
        return {}, problem
    files = manifest["files"]
    shares = share_out({name: files[name]["size"] for name in files}, peers.world_size)
    damages = peers.gather(first_damage(folder, files, shares[peers.rank]))
    first = min((tuple(damage) for damage in damages if damage is not None), default=None)
    return manifest, None if first is None else first[1]


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
