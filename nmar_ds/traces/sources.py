"""Where records come from: files of several kinds, folders that `datasets` saved, generators.

A source is a list of chunks that can be read in any order, by any process: chunks depend on the
source alone, never on who reads them. Everything a source yields has passed the same strict
reading, whatever it was stored as, and is named by its file and 1-based line (or row).
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from nmar_ds.errors import ConfigError, TraceError
from nmar_ds.files import sha256_file
from nmar_ds.traces.record_forms import Record, record_of
from nmar_ds.traces.records import read_lines
from nmar_ds.traces.strict_json import Flaw

CHUNK_BYTES = 2**18
MAX_CHUNKS = 1024  # of a file: larger files have larger chunks
CHUNK_ROWS = 500
LINES = (".jsonl", ".ndjson", ".json")
PACKED = (".gz", ".zst")
OnError = Callable[[TraceError], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A stretch of a source.

    Attributes:
        first_line: 1-based line, row or number of its first record.
        num_lines: lines in it, good or bad.
        place: where it begins, in the source's own terms (a byte, a batch's number ...).
        size: bytes, where lines have any.
    """

    first_line: int
    num_lines: int
    place: tuple[int, ...]
    size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSettings:
    """One entry of `data.train` or `data.heldout`; see the configuration's reference.

    Attributes:
        path: a file or folder, or None for a generator.
        columns: record field -> column; empty takes all columns under their own names.
        weight: how often each record is taken.
        max_records: the first so many lines or rows alone.
        generator: settings of a generator, `name` among them.
        asked: how the configuration writes it; kept in the manifest.
    """

    path: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0
    max_records: int | None = None
    generator: Mapping[str, Any] | None = None
    asked: Any = None


class Source(ABC):
    """Records, in chunks.

    Attributes:
        label: what messages and manifests call it.
        settings: as asked for.
    """

    def __init__(self, label: str, settings: SourceSettings) -> None:
        self.label, self.settings = label, settings

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 (hex) of its content; reads all of it."""

    @abstractmethod
    def _chunks(self) -> Iterator[Chunk]:
        """All chunks, in order."""

    @abstractmethod
    def _fields(self, chunk: Chunk, on_error: OnError) -> Iterator[tuple[int, dict[str, Any]]]:
        """(line, parsed fields) of a chunk; bad lines go to `on_error`."""

    def chunks(self) -> list[Chunk]:
        """The chunks, up to `max_records`.

        Raises:
            TraceError: it cannot be read.
        """
        found: list[Chunk] = []
        left = self.settings.max_records
        with self._named_errors():
            for chunk in self._chunks():
                num = chunk.num_lines if left is None else min(left, chunk.num_lines)
                if num == 0:
                    break
                found.append(Chunk(first_line=chunk.first_line, num_lines=num, place=chunk.place,
                                   size=chunk.size))  # fmt: skip
                left = None if left is None else left - num
        return found

    def records(self, chunk: Chunk, on_error: OnError) -> Iterator[Record]:
        """The records of one chunk.

        Args:
            chunk: from `chunks`.
            on_error: called with each bad line's error, in its place.

        Raises:
            TraceError: the source itself cannot be read.
        """
        end = chunk.first_line + chunk.num_lines
        with self._named_errors():
            for line, fields in self._fields(chunk, on_error):
                if line >= end:
                    break
                try:
                    record = record_of(self._mapped(fields), self.label, line)
                except Flaw as flaw:
                    on_error(self._error(line, flaw, fields))
                else:
                    yield record

    def all_records(self, on_error: OnError | None = None) -> Iterator[Record]:
        """The records of all chunks, in order; by default the first bad line is raised."""
        for chunk in self.chunks():
            yield from self.records(chunk, on_error or _raise)

    def _mapped(self, fields: dict[str, Any]) -> dict[str, Any]:
        if not self.settings.columns:
            return fields
        mapped = {}
        for name, column in self.settings.columns.items():
            if column in fields:  # what a record cannot do without is missed when it is read
                mapped[name] = fields[column]
        return mapped

    def _error(self, line: int, flaw: Flaw, fields: dict[str, Any]) -> TraceError:
        """A flaw with its place; a field that a missing column was to fill says so."""
        column = self.settings.columns.get(flaw.field)
        expected = flaw.expected
        if column is not None and column not in fields:
            found = ", ".join(sorted(map(str, fields))) or "none"
            expected = f"column {column!r} (there are: {found})"
        return TraceError(self.label, line, flaw.field, flaw.problem, expected)

    def _named_errors(self) -> _NamedErrors:
        return _NamedErrors(self.label)


class _NamedErrors:
    """Turns what a library or the disk says of a source into one line with its name."""

    def __init__(self, label: str) -> None:
        self._label = label

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        problem = None
        if isinstance(error, OSError):
            problem = error.strerror or " ".join(str(error).split())[:160]
        elif error is not None and type(error).__module__.partition(".")[0] in (
            "pyarrow", "zstandard", "zlib", "gzip",
        ):  # fmt: skip
            problem = " ".join(str(error).split())[:160]
        if problem is not None:
            raise TraceError(
                self._label, None, "file", problem, "a readable, whole file"
            ) from error


def _raise(error: TraceError) -> None:
    raise error


class LineFile(Source):
    """JSON lines, plain or packed.

    Args:
        settings: with a path.
        unpacked: folder for the content of a packed file, which is unpacked when it is first read.
    """

    def __init__(self, settings: SourceSettings, unpacked: Path | None) -> None:
        assert settings.path is not None, "lines are in a file"
        super().__init__(str(settings.path), settings)
        self._given, self._unpacked = settings.path, unpacked

    @functools.cached_property
    def path(self) -> Path:
        """The plain file."""
        if self._given.suffix not in PACKED:
            return self._given
        assert self._unpacked is not None, "packed files need a folder"
        return unpack(self._given, self._unpacked)

    def fingerprint(self) -> str:
        """sha256 of the file as it was given."""
        with self._named_errors():
            return sha256_file(self._given)

    def _chunks(self) -> Iterator[Chunk]:
        with self.path.open("rb") as file:
            start, first = 0, 1
            chunk_bytes = max(CHUNK_BYTES, self.path.stat().st_size // MAX_CHUNKS)
            while block := file.read(chunk_bytes):
                num, size = block.count(b"\n"), len(block)
                # On to the end of the line that the block cuts, however long it is.
                while block and not block.endswith(b"\n"):
                    block = file.readline(CHUNK_BYTES)
                    size += len(block)
                    num += block.endswith(b"\n") or not block
                yield Chunk(first_line=first, num_lines=num, place=(start,), size=size)
                start, first = start + size, first + num

    def _fields(self, chunk: Chunk, on_error: OnError) -> Iterator[tuple[int, dict[str, Any]]]:
        with self.path.open("rb") as file:
            file.seek(chunk.place[0])
            part = _Part(file, chunk.size)
            yield from read_lines(
                part.readline, self.label, first=chunk.first_line, on_error=on_error
            )


class _Part:
    """The lines of a stretch of a file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size

    def readline(self, limit: int) -> bytes:
        line = self._file.readline(min(limit, self._left))
        self._left -= len(line)
        return line


@contextlib.contextmanager
def opened(settings: Sequence[SourceSettings], folder: Path) -> Iterator[list[Source]]:
    """Open sources; what packed files hold lies below `folder` meanwhile.

    Raises:
        TraceError, ConfigError: as `open_source`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=folder) as unpacked:
        found = []
        for number, each in enumerate(settings):
            place = Path(unpacked) / str(number)  # two files may have one name
            place.mkdir()
            found.append(open_source(each, place))
        yield found


def unpack(path: Path, folder: Path) -> Path:
    """Write what a `.gz` or `.zst` file holds into a folder, so that chunks can be found in it.

    What lies there from before is taken as it is.

    Raises:
        TraceError: the file is damaged or cut off.
        ConfigError: the library for `.zst` is missing.
    """
    target = folder / path.stem
    if target.exists():
        return target
    partial = target.with_name(target.name + ".partial")
    with _NamedErrors(str(path)):
        try:
            with partial.open("wb") as plain:
                for block in _gunzip(path) if path.suffix == ".gz" else _unzstd(path):
                    plain.write(block)
        except EOFError as error:
            raise TraceError(path, None, "file", "is cut off", "a whole file") from error
    partial.rename(target)
    return target


def _gunzip(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") as packed:
        while block := packed.read(CHUNK_BYTES):
            yield block


def _unzstd(path: Path) -> Iterator[bytes]:
    """Frame by frame: the library's own file object takes a frame that is cut off for its end."""
    try:
        import zstandard
    except ImportError:
        raise ConfigError(f"{path}: needs zstandard; pip install 'nmar_ds[data]'") from None
    frame = None
    with path.open("rb") as packed:
        while block := packed.read(CHUNK_BYTES):
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(block)
                block = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = None
    if frame is not None:
        raise EOFError


class Table(Source):
    """Rows in columns: a Parquet file, or a folder that `datasets` saved."""

    def __init__(self, path: Path, settings: SourceSettings) -> None:
        super().__init__(str(path), settings)
        self.path = path
        self._open: tuple[int, Any] | None = None
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise ConfigError(f"{path}: needs pyarrow; pip install 'nmar_ds[data]'") from None

    def fingerprint(self) -> str:
        """sha256 of the file, or of the folder's files in order."""
        with self._named_errors():
            if self.path.is_file():
                return sha256_file(self.path)
            hashes = "".join(sha256_file(file) for file in self._arrow_files())
            return hashlib.sha256(hashes.encode()).hexdigest()

    def _arrow_files(self) -> list[Path]:
        """In the order that `state.json` gives them."""
        state = self.path / "state.json"
        try:
            entries = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
            return [self.path / Path(entry["filename"]).name for entry in entries]
        except (ValueError, KeyError, TypeError) as error:
            raise TraceError(
                state, None, "_data_files", f"unusable ({error!r})",
                "a folder that save_to_disk of `datasets` wrote",
            ) from None  # fmt: skip

    def _batches(self, part: int) -> tuple[int, Callable[[int], Any]]:
        """Number of batches in a part, and how to read one."""
        import pyarrow
        from pyarrow import parquet

        if self.path.is_file():
            file = parquet.ParquetFile(self.path)
            return file.num_row_groups, file.read_row_group
        source = pyarrow.memory_map(str(self._arrow_files()[part]))
        table = pyarrow.ipc.open_stream(source).read_all()
        batches = table.to_batches()
        return len(batches), batches.__getitem__

    def _chunks(self) -> Iterator[Chunk]:
        first = 1
        for part in range(1 if self.path.is_file() else len(self._arrow_files())):
            num, read = self._batches(part)
            for number in range(num):
                rows = self._num_rows(number, read)
                for start in range(0, rows, CHUNK_ROWS):
                    size = min(CHUNK_ROWS, rows - start)
                    yield Chunk(first_line=first, num_lines=size, place=(part, number, start))
                    first += size

    def _num_rows(self, number: int, read: Callable[[int], Any]) -> int:
        if self.path.is_file():
            from pyarrow import parquet

            return int(parquet.ParquetFile(self.path).metadata.row_group(number).num_rows)
        return int(read(number).num_rows)

    def _fields(self, chunk: Chunk, on_error: OnError) -> Iterator[tuple[int, dict[str, Any]]]:
        part, number, start = chunk.place
        key = hash((part, number))
        if self._open is None or self._open[0] != key:  # a batch's chunks come one after another
            self._open = (key, self._batches(part)[1](number))
        rows = self._open[1].slice(start, chunk.num_lines).to_pylist()
        for line, row in enumerate(rows, start=chunk.first_line):
            yield line, _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """An empty cell, and a field that a struct has only in other rows, is a field not given."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


class Generated(Source):
    """Records that a generator makes: no file, the same from the same settings."""

    def __init__(self, settings: SourceSettings, label: str, num: int, version: str,
                 make: Callable[[int], dict[str, Any]]) -> None:  # fmt: skip
        super().__init__(label, settings)
        self._num, self._make, self._version = num, make, version

    def fingerprint(self) -> str:
        """sha256 of the settings and the generator's version."""
        assert self.settings.generator is not None
        text = json.dumps([self._version, dict(self.settings.generator)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _chunks(self) -> Iterator[Chunk]:
        for start in range(0, self._num, CHUNK_ROWS):
            size = min(CHUNK_ROWS, self._num - start)
            yield Chunk(first_line=start + 1, num_lines=size, place=(start,))

    def _fields(self, chunk: Chunk, on_error: OnError) -> Iterator[tuple[int, dict[str, Any]]]:
        for number in range(chunk.place[0], chunk.place[0] + chunk.num_lines):
            yield number + 1, self._make(number)


def open_source(settings: SourceSettings, unpacked: Path | None = None) -> Source:
    """The source that an entry of the configuration means.

    Args:
        settings: exactly one of path and generator.
        unpacked: folder for the content of packed files.

    Raises:
        TraceError: nothing usable is there.
        ConfigError: a library it needs is missing, or a generator cannot be set so.
    """
    if settings.generator is not None:
        return _generated(settings)
    path = settings.path
    assert path is not None, "a path or a generator"
    if not path.exists():
        raise TraceError(path, None, "file", "No such file or directory", "a readable file")
    if path.is_dir() or path.suffix == ".parquet":
        return Table(path, settings)
    if path.suffix in PACKED and path.with_suffix("").suffix in LINES:
        return LineFile(settings, unpacked)
    if path.suffix not in LINES:
        raise TraceError(
            path, None, "file", f"unknown kind {path.suffix!r}",
            "a .jsonl (also .gz, .zst) or .parquet file, or a folder saved by `datasets`",
        )  # fmt: skip
    return LineFile(settings, None)


def _generated(settings: SourceSettings) -> Source:
    asked = dict(settings.generator or {})
    name, num, seed = asked["name"], asked["num"], asked["seed"]
    label = f"{name}(num={num}, seed={seed})"
    if name == "dependency_arithmetic":
        from nmar_ds.traces import arithmetic

        low, high = asked["operations"]
        fewest, most = asked["distractors"]
        if not 1 <= low <= high <= arithmetic.MAX_OPERATIONS or not 0 <= fewest <= most <= 60:
            raise ConfigError(
                f"{label}: operations {[low, high]} and distractors {[fewest, most]}, expected "
                f"1 to {arithmetic.MAX_OPERATIONS} and 0 to 60"
            )
        operators = tuple(asked["operators"])
        return Generated(
            settings, label, num, str(arithmetic.VERSION),
            lambda number: arithmetic.problem(
                seed, number, operations=(low, high), distractors=(fewest, most),
                operators=operators,
            ),
        )  # fmt: skip
    from nmar_ds.traces import gym

    family = asked["family"]
    version, make = gym.family(family, num=num, seed=seed, settings=asked["settings"])
    return Generated(settings, f"{family}(num={num}, seed={seed})", num, version, make)
