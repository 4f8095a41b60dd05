"""Prepared traces on disk: memory-mapped arrays in shards, and a manifest that vouches for them.

A store is a folder. Each shard holds little-endian arrays without headers, so that a row is a view
and no file is read whole; `manifest.json` has size and sha256 of every file, and its own. One
flipped bit would load silently, so each file is hashed once before its first use (about 1 s per
GB). A store is written beside its place and renamed into it: a crash leaves the previous store or
nothing under the final name.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nmar_ds.data.shards import (
    ARRAYS,
    ShardWriter,
    add_counts,
    counts_of,
    ids_dtype,
    loose_arrays,
    shard_file,
)
from nmar_ds.errors import NmarError, StoreError
from nmar_ds.files import free_bytes, sha256_file, sync
from nmar_ds.traces.encoding import Tokenizer, load_tokenizer
from nmar_ds.traces.reduction import Machine
from nmar_ds.traces.schema import NUM_ROLES, IdArray, RoleArray, Trace

# N traces in a store, T tokens in a trace

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
SHARD_TOKENS = 2**27
FLUSH_TOKENS = 2**20
PLAIN_NAME = re.compile(rf"({TOKENIZER_FOLDER}/)?[A-Za-z0-9_][A-Za-z0-9._-]*")
AGAIN = "prepare it again with launcher/prepare.py"


def write_store(
    folder: str | Path,
    traces: Iterable[Trace],
    *,
    tokenizer: Tokenizer,
    machine: Machine | None = None,
    boundaries: Iterable[str] = (),
    context: str = "linear",
    sources: Iterable[Mapping[str, Any]] = (),
    builder: Mapping[str, Any] | None = None,
    seed: int = 0,
    counts: Mapping[str, Any] | None = None,
    notes: Mapping[str, Iterable[Mapping[str, Any]]] | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Write a store, and put it in the place of an older one at the very end.

    Args:
        folder: final place; something there that is not a store is never overwritten.
        traces: checked already.
        tokenizer: copied into the store.
        machine: what one undo pops; by default one token.
        boundaries: the texts its boundary ids were found by.
        context: what a token may see.
        sources: path and sha256 of each source file.
        builder: settings the traces were built with.
        seed: of the builder.
        counts: further counts; read after the last trace, so the caller may still be counting.
        notes: tables of JSON lines by name (what was dropped, say), read after the last trace.
        shard_tokens: a shard is closed once it has this many.

    Returns:
        The manifest.

    Raises:
        StoreError: something else is at `folder`, or nothing can be written there.
    """

    def fill(partial: Path) -> Content:
        writer = _Writer(partial, tokenizer.size, shard_tokens)
        for trace in traces:
            writer.add(trace)
        writer.close_shard()
        add_counts(writer.content.counts, counts_of(loose_arrays([], "<u2")))  # where none came
        writer.content.counts = {**(counts or {}), **writer.content.counts}
        writer.content.notes = dict(notes or {})
        return writer.content

    return publish_store(
        folder, fill, tokenizer=tokenizer, machine=machine, boundaries=boundaries,
        context=context, sources=sources, builder=builder, seed=seed,
    )  # fmt: skip


@dataclass(slots=True)
class Content:
    """What fills a store.

    Attributes:
        ids_dtype: of the ids.
        shards: their counts, in order.
        files: size and sha256 of each file written.
        counts: those of the traces, and any others.
        notes: tables of JSON lines by name.
    """

    ids_dtype: str
    shards: list[dict[str, int]] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Iterable[Mapping[str, Any]]] = field(default_factory=dict)


def publish_store(
    folder: str | Path,
    fill: Callable[[Path], Content],
    *,
    tokenizer: Tokenizer,
    machine: Machine | None = None,
    boundaries: Iterable[str] = (),
    context: str = "linear",
    sources: Iterable[Mapping[str, Any]] = (),
    builder: Mapping[str, Any] | None = None,
    seed: int = 0,
    inspect: Callable[[Store], object] | None = None,
) -> dict[str, Any]:
    """Write a store beside its place, and put it in the place of an older one at the very end.

    Args:
        folder: final place; something there that is not a store is never overwritten.
        fill: writes the shards into the folder it is given, and says what they are.
        tokenizer: copied into the store.
        machine: what one undo pops; by default one token.
        boundaries: the texts its boundary ids were found by.
        context: what a token may see.
        sources: path and sha256 of each source file.
        builder: settings the traces were built with.
        seed: of the builder.
        inspect: given the whole store before it is put in its place; may refuse it.

    Returns:
        The manifest.

    Raises:
        StoreError: something else is at `folder`, or nothing can be written there.
    """
    folder = Path(folder)
    machine = machine or Machine(tokenizer.undo_id)
    assert machine.undo_id == tokenizer.undo_id, "the machine of another tokenizer"
    require_replaceable(folder)
    partial = folder.with_name(folder.name + ".partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        content = fill(partial)
        _write_notes(partial, content)
        tokenizer.save(partial / TOKENIZER_FOLDER)
        for file in sorted((partial / TOKENIZER_FOLDER).iterdir()):
            content.files[f"{TOKENIZER_FOLDER}/{file.name}"] = _described(file)
        manifest = {
            "format_version": FORMAT_VERSION,
            "tokenizer": describe_tokenizer(tokenizer),
            "semantics": machine.semantics,
            "boundaries": list(boundaries),
            "boundary_ids": sorted(machine.boundary_ids),
            "context": context,
            "counts": content.counts,
            "sources": [dict(source) for source in sources],
            "builder": dict(builder or {}),
            "seed": seed,
            "ids_dtype": content.ids_dtype,
            "shards": content.shards,
            "files": content.files,
        }
        manifest["checksum"] = manifest_checksum(manifest)
        text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=True) + "\n"
        (partial / MANIFEST).write_text(text, encoding="ascii")
        for file in partial.rglob("*"):
            sync(file)
        if inspect is not None:
            inspect(Store(partial))
        _put_in_place(partial, folder)
    except OSError as error:
        written = _size_of(partial)
        shutil.rmtree(partial, ignore_errors=True)
        raise StoreError(
            f"{folder}: {error.strerror or error} after {written:,} bytes, of which "
            f"{free_bytes(folder):,} are free again; expected a writable place with room"
        ) from error
    except NmarError:  # a bad trace: nothing half-written stays
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def _write_notes(partial: Path, content: Content) -> None:
    for name, rows in content.notes.items():
        lines = [json.dumps(row, sort_keys=True, ensure_ascii=True) for row in rows]
        text = "".join(line + "\n" for line in lines).encode("ascii")
        (partial / f"{name}.jsonl").write_bytes(text)
        digest = hashlib.sha256(text).hexdigest()
        content.files[f"{name}.jsonl"] = {"size": len(text), "sha256": digest}


class _Writer:
    """Collects traces and writes them shard by shard."""

    def __init__(self, folder: Path, vocabulary_size: int, shard_tokens: int) -> None:
        self.content = Content(ids_dtype=ids_dtype(vocabulary_size))
        self._folder, self._shard_tokens = folder, shard_tokens
        self._pending: list[Trace] = []
        self._num_pending = 0
        self._shard: ShardWriter | None = None

    def add(self, trace: Trace) -> None:
        self._pending.append(trace)
        self._num_pending += len(trace)
        if self._num_pending >= FLUSH_TOKENS:
            self._flush()
        written = 0 if self._shard is None else self._shard.entry["num_tokens"]
        if written + self._num_pending >= self._shard_tokens:
            self.close_shard()

    def _flush(self) -> None:
        traces, self._pending, self._num_pending = self._pending, [], 0
        if not traces:
            return
        dtype = self.content.ids_dtype
        if self._shard is None:
            self._shard = ShardWriter(self._folder, len(self.content.shards), dtype)
        arrays = loose_arrays(traces, dtype)
        self._shard.add(arrays)
        add_counts(self.content.counts, counts_of(arrays))

    def close_shard(self) -> None:
        self._flush()
        if self._shard is not None:
            self.content.files |= self._shard.close()
            self.content.shards.append(self._shard.entry)
            self._shard = None


class Store:
    """A store opened for reading; cheap to open, safe to share between forked workers.

    Attributes:
        folder: where it is.
        manifest: as written.
        num_traces: N.

    Raises:
        StoreError: no store there, another format version, or files that do not fit the manifest.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        shards = self.manifest["shards"]
        self._first = np.cumsum([0, *(shard["num_traces"] for shard in shards)])
        self.num_traces = int(self._first[-1])
        for name, entry in self.manifest["files"].items():
            if PLAIN_NAME.fullmatch(name) is None:
                raise StoreError(
                    f"{self.folder / MANIFEST}: files: {name!r}, expected names inside the store"
                )
            file = self.folder / name
            size = file.stat().st_size if file.is_file() else None
            if size != entry["size"]:
                found = "missing" if size is None else f"{size} bytes"
                raise StoreError(f"{file}: {found}, expected {entry['size']} bytes; {AGAIN}")

    def __len__(self) -> int:
        return self.num_traces

    @property
    def machine(self) -> Machine:
        """What one undo pops in these traces."""
        undo_id, boundary_ids = (
            self.manifest["tokenizer"]["undo_id"],
            boundary_ids_of(self.manifest),
        )
        return Machine(undo_id, self.manifest["semantics"], frozenset(boundary_ids))

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """int32[N] tokens per trace."""
        parts = [np.diff(self._array(shard, "offsets")) for shard in self._shards()]
        return np.concatenate([np.empty(0, dtype=np.int64), *parts]).astype(np.int32)

    @property
    def role_counts(self) -> npt.NDArray[np.int32]:
        """int32[N, 5] targets by role; the first token of a trace is nobody's target."""
        parts = [self._array(shard, "role_counts") for shard in self._shards()]
        joined = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int32), *parts])
        return joined.reshape(-1, NUM_ROLES)

    def ids(self, index: int) -> IdArray | npt.NDArray[np.uint16]:
        """Return the ids of a trace: a view, int32[T] or uint16[T]."""
        return self._slice(index, "ids", "offsets")

    def roles(self, index: int) -> RoleArray:
        """Return the roles of a trace: a view, uint8[T]."""
        return self._slice(index, "roles", "offsets")

    def onsets(self, index: int) -> IdArray:
        """Return int32[number of deviations], the index of each one's first wrong token."""
        return self._slice(index, "onsets", "onset_offsets")

    def line(self, index: int) -> int:
        """Return the 1-based line of the record a trace was made of."""
        shard, row = self._place(index)
        return int(self._array(shard, "lines")[row])

    def source(self, index: int) -> int:
        """Return the index of a trace's source file in `manifest["sources"]`."""
        shard, row = self._place(index)
        return int(self._array(shard, "sources")[row])

    def trace(self, index: int) -> Trace:
        """Return a trace as it was given to `write_store`."""
        return Trace(
            ids=self.ids(index).astype(np.int32),
            roles=np.array(self.roles(index)),
            onsets=tuple(self.onsets(index).tolist()),
            line=self.line(index),
            source=self.source(index),
        )

    def tokenizer(self) -> Tokenizer:
        """Load the store's own copy of the tokenizer.

        Raises:
            StoreError: it is not the one the traces were encoded with.
        """
        folder = self.tokenizer_folder()
        described = self.manifest["tokenizer"]
        tokenizer = load_tokenizer(folder, undo_token=described["undo_token"])
        if tokenizer.fingerprint != described["fingerprint"]:
            raise StoreError(f"{folder}: another tokenizer than the manifest's; {AGAIN}")
        return tokenizer

    def tokenizer_folder(self) -> Path:
        """Return the folder of the store's own copy of the tokenizer, its files hashed.

        Raises:
            StoreError: names the first file that differs from the manifest.
        """
        for name in self.manifest["files"]:
            if name.startswith(f"{TOKENIZER_FOLDER}/"):
                self._verify(name)
        return self.folder / TOKENIZER_FOLDER

    def verify(self) -> None:
        """Hash every file.

        Raises:
            StoreError: names the first file that differs from the manifest.
        """
        for name in self.manifest["files"]:
            self._verify(name)

    def _verify(self, name: str) -> None:
        file = self.folder / name
        if _described(file)["sha256"] != self.manifest["files"][name]["sha256"]:
            raise StoreError(
                f"{file}: damaged, its sha256 differs from {MANIFEST}; restore it or {AGAIN}"
            )

    def shards(self) -> Iterator[tuple[int, dict[str, npt.NDArray[Any]]]]:
        """Each shard: the index of its first trace, and its arrays (`ARRAYS`), mapped."""
        for shard in self._shards():
            yield int(self._first[shard]), {name: self._array(shard, name) for name in ARRAYS}

    def _shards(self) -> Iterator[int]:
        return iter(range(len(self.manifest["shards"])))

    def _array(self, shard: int, array: str) -> npt.NDArray[Any]:
        name = shard_file(shard, array)
        if name not in self._arrays:
            self._verify(name)
            dtype = ARRAYS[array] or self.manifest["ids_dtype"]
            empty = self.manifest["files"][name]["size"] == 0  # cannot be mapped
            self._arrays[name] = (
                np.empty(0, dtype=dtype)
                if empty
                else np.memmap(self.folder / name, dtype=dtype, mode="r")
            )
        return self._arrays[name]

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self.num_traces:
            raise IndexError(f"trace {index} of {self.num_traces}")
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        return shard, index - int(self._first[shard])

    def _slice(self, index: int, array: str, offsets: str) -> npt.NDArray[Any]:
        shard, row = self._place(index)
        start, end = self._array(shard, offsets)[row : row + 2].tolist()
        return self._array(shard, array)[start:end]


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read and check `manifest.json`.

    Raises:
        StoreError: it is missing, damaged or of another version.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        aside = Path(folder).with_name(Path(folder).name + ".previous")
        hint = f"rename {aside} back" if aside.is_dir() else AGAIN
        raise StoreError(f"{file}: missing, expected a trace store at {folder}; {hint}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version, checksum = manifest["format_version"], manifest["checksum"]
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(f"{file}: damaged ({error!r}), expected a manifest; {AGAIN}") from None
    if version != FORMAT_VERSION:
        raise StoreError(f"{file}: format version {version}, expected {FORMAT_VERSION}; {AGAIN}")
    if checksum != manifest_checksum(manifest):
        raise StoreError(f"{file}: damaged, its checksum differs; restore it or {AGAIN}")
    return dict(manifest)


def boundary_ids_of(manifest: Mapping[str, Any]) -> list[int]:
    """Return the sorted boundary ids in a store's or checkpoint's manifest; old ones have none."""
    return list(manifest.get("boundary_ids", []))


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what has to agree between a store, a model and a decoder."""
    names = ("fingerprint", "size", "undo_token", "undo_id", "bos_id", "eos_id", "pad_id")
    return {name: getattr(tokenizer, name) for name in names}


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) of a manifest without its own checksum."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _described(file: Path) -> dict[str, Any]:
    try:
        digest = sha256_file(file)
    except OSError as error:
        raise StoreError(f"{file}: {error.strerror}, expected a readable file") from error
    return {"size": file.stat().st_size, "sha256": digest}


def _size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def require_replaceable(folder: Path) -> None:
    """Refuse a place that holds something other than a store."""
    if folder.is_dir() and any(folder.iterdir()) and not _is_store(folder):
        raise StoreError(f"{folder}: holds something else, expected a store or no such folder")
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder}: is a file, expected a store or no such folder")


def _is_store(folder: Path) -> bool:
    """Whether a manifest of ours lies there: others have files of that name too."""
    try:
        return "shards" in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _put_in_place(partial: Path, folder: Path) -> None:
    previous = folder.with_name(folder.name + ".previous")
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)
