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
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nmar_ds.errors import NmarError, StoreError
from nmar_ds.files import free_bytes, sha256_file, sync
from nmar_ds.traces.encoding import Tokenizer, load_tokenizer
from nmar_ds.traces.reduction import Machine
from nmar_ds.traces.schema import NUM_ROLES, IdArray, Role, RoleArray, Trace

# N traces in a store, T tokens in a trace

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
SHARD_TOKENS = 2**27
FLUSH_TOKENS = 2**20
PLAIN_NAME = re.compile(rf"({TOKENIZER_FOLDER}/)?[A-Za-z0-9_][A-Za-z0-9._-]*")
AGAIN = "prepare it again with launcher/prepare.py"

# What a shard of n traces and t tokens consists of: type, and number of entries. `onsets` holds
# the onsets of all traces on end, `onset_offsets` where each trace's begin.
ARRAYS = {
    "ids": "", "roles": "|u1", "offsets": "<i8", "onsets": "<i4", "onset_offsets": "<i8",
    "lines": "<i8", "sources": "<i4", "role_counts": "<i4",
}  # fmt: skip


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
    folder = Path(folder)
    machine = machine or Machine(tokenizer.undo_id)
    assert machine.undo_id == tokenizer.undo_id, "the machine of another tokenizer"
    _require_replaceable(folder)
    partial = folder.with_name(folder.name + ".partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        writer = _Writer(partial, tokenizer.size, shard_tokens)
        for trace in traces:
            writer.add(trace)
        writer.close_shard()
        for name, rows in (notes or {}).items():
            lines = [json.dumps(row, sort_keys=True, ensure_ascii=True) for row in rows]
            writer.write(f"{name}.jsonl", "".join(line + "\n" for line in lines).encode("ascii"))
        tokenizer.save(partial / TOKENIZER_FOLDER)
        for file in sorted((partial / TOKENIZER_FOLDER).iterdir()):
            writer.files[f"{TOKENIZER_FOLDER}/{file.name}"] = _described(file)
        manifest = {
            "format_version": FORMAT_VERSION,
            "tokenizer": describe_tokenizer(tokenizer),
            "semantics": machine.semantics,
            "boundaries": list(boundaries),
            "boundary_ids": sorted(machine.boundary_ids),
            "context": context,
            "counts": {**(counts or {}), **writer.counts()},
            "sources": [dict(source) for source in sources],
            "builder": dict(builder or {}),
            "seed": seed,
            "ids_dtype": writer.ids_dtype,
            "shards": writer.shards,
            "files": writer.files,
        }
        manifest["checksum"] = manifest_checksum(manifest)
        text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=True) + "\n"
        (partial / MANIFEST).write_text(text, encoding="ascii")
        for file in partial.rglob("*"):
            sync(file)
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


class _Writer:
    """Collects traces, writes them shard by shard, hashes as it writes."""

    def __init__(self, folder: Path, vocabulary_size: int, shard_tokens: int) -> None:
        self.folder, self.shard_tokens = folder, shard_tokens
        self.ids_dtype = "<u2" if vocabulary_size <= 2**16 else "<i4"
        self.files: dict[str, dict[str, Any]] = {}
        self.shards: list[dict[str, int]] = []
        self.num_tokens_by_role = np.zeros(NUM_ROLES, dtype=np.int64)
        self.num_traces = self.num_clean = self.num_deviations = 0
        self._pending: list[Trace] = []
        self._num_pending = 0
        self._open: dict[str, Any] = {}

    def add(self, trace: Trace) -> None:
        self._pending.append(trace)
        self._num_pending += len(trace)
        if self._num_pending >= FLUSH_TOKENS:
            self._flush()
        if self._open and self.shards[-1]["num_tokens"] + self._num_pending >= self.shard_tokens:
            self.close_shard()
        elif self._num_pending >= self.shard_tokens:
            self.close_shard()

    def _flush(self) -> None:
        """Turn the pending traces into bytes: a handful of large array operations."""
        traces, self._pending, self._num_pending = self._pending, [], 0
        if not traces:
            return
        if not self._open:
            self._open_shard()
        shard = self.shards[-1]
        lengths = np.array([len(trace) for trace in traces], dtype=np.int64)
        num_onsets = np.array([len(trace.onsets) for trace in traces], dtype=np.int64)
        roles = np.concatenate([trace.roles for trace in traces])
        counts = role_counts(roles, lengths)
        ends = np.cumsum(lengths)
        self._put("ids", np.concatenate([trace.ids for trace in traces]))
        self._put("roles", roles)
        self._put("offsets", shard["num_tokens"] + ends)
        self._put("onsets", np.array([n for trace in traces for n in trace.onsets], dtype=np.int32))
        self._put("onset_offsets", shard["num_onsets"] + np.cumsum(num_onsets))
        self._put("lines", np.array([trace.line for trace in traces], dtype=np.int64))
        self._put("sources", np.array([trace.source for trace in traces], dtype=np.int32))
        self._put("role_counts", counts)
        shard["num_traces"] += len(traces)
        shard["num_tokens"] += int(lengths.sum())
        shard["num_onsets"] += int(num_onsets.sum())
        self.num_traces += len(traces)
        self.num_clean += int((num_onsets == 0).sum())
        self.num_deviations += int(num_onsets.sum())
        self.num_tokens_by_role += np.bincount(roles, minlength=NUM_ROLES)

    def _open_shard(self) -> None:
        number = len(self.shards)
        self.shards.append({"num_traces": 0, "num_tokens": 0, "num_onsets": 0})
        for array in ARRAYS:
            file = (self.folder / shard_file(number, array)).open("wb")
            self._open[array] = (file, hashlib.sha256())
        self._put("offsets", np.zeros(1, dtype=np.int64))
        self._put("onset_offsets", np.zeros(1, dtype=np.int64))

    def _put(self, array: str, values: npt.NDArray[Any]) -> None:
        content = values.astype(ARRAYS[array] or self.ids_dtype).tobytes()
        file, digest = self._open[array]
        file.write(content)
        digest.update(content)

    def close_shard(self) -> None:
        self._flush()
        for array, (file, digest) in self._open.items():
            size = file.tell()
            file.close()
            name = shard_file(len(self.shards) - 1, array)
            self.files[name] = {"size": size, "sha256": digest.hexdigest()}
        self._open = {}

    def write(self, name: str, content: bytes) -> None:
        (self.folder / name).write_bytes(content)
        self.files[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def counts(self) -> dict[str, Any]:
        return {
            "stored": self.num_traces,
            "clean": self.num_clean,
            "deviations": self.num_deviations,
            "tokens": {role.label: int(self.num_tokens_by_role[role]) for role in Role},
        }


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
    def role_counts(self) -> npt.NDArray[np.int64]:
        """int64[N, 5] targets by role; the first token of a trace is nobody's target."""
        parts = [self._array(shard, "role_counts") for shard in self._shards()]
        joined = np.concatenate([np.empty(0, dtype=np.int32), *parts])
        return joined.astype(np.int64).reshape(-1, NUM_ROLES)

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


def role_counts(roles: RoleArray, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Count targets by role.

    Args:
        roles: uint8[sum of lengths], traces on end.
        lengths: int64[N], none of them 0.

    Returns:
        int64[N, 5]; the first token of each trace is left out.
    """
    starts = np.cumsum(lengths) - lengths
    counts = np.empty((len(lengths), NUM_ROLES), dtype=np.int64)
    for role in range(NUM_ROLES):
        is_role = roles == role
        counts[:, role] = np.add.reduceat(is_role, starts, dtype=np.int64) - is_role[starts]
    return counts


def shard_file(number: int, array: str) -> str:
    """Return the name of a shard's file."""
    return f"shard-{number:05d}.{array}.bin"


def _described(file: Path) -> dict[str, Any]:
    try:
        digest = sha256_file(file)
    except OSError as error:
        raise StoreError(f"{file}: {error.strerror}, expected a readable file") from error
    return {"size": file.stat().st_size, "sha256": digest}


def _size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _require_replaceable(folder: Path) -> None:
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
