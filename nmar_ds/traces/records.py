"""Records in: JSON lines, read strictly, one clear error per bad line.

Python's json accepts duplicate keys, NaN, lone surrogates and very deep nesting; each of these
has reached training data somewhere, so each is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nmar_ds.errors import TraceError
from nmar_ds.traces.record_forms import IdSegment, Record, Sample, Step, TextTurn, record_of
from nmar_ds.traces.strict_json import Flaw, load_object

__all__ = ["IdSegment", "Record", "Sample", "Step", "TextTurn", "parse_line", "read_records"]

MAX_LINE_BYTES = 16 * 2**20


def read_records(
    path: str | Path,
    *,
    max_bytes: int = MAX_LINE_BYTES,
    on_error: Callable[[TraceError], None] | None = None,
) -> Iterator[Record]:
    """Read a JSON-lines file.

    Args:
        path: the file, UTF-8 without byte order mark.
        max_bytes: longest line accepted; memory stays near this for any file.
        on_error: called with each bad line's error, which is then skipped; by default the first
            bad line is raised.

    Yields:
        The records in order.

    Raises:
        TraceError: a bad line, or a file that cannot be read or is not JSON lines.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".ndjson", ".json"):
        raise TraceError(path, None, "file", f"unknown kind {path.suffix!r}", "a .jsonl file")

    def refuse(error: TraceError) -> None:
        if on_error is None:
            raise error
        on_error(error)

    try:
        with path.open("rb") as file:
            lines = read_lines(file.readline, str(path), on_error=refuse, max_bytes=max_bytes)
            for line, fields in lines:
                try:
                    record = record_of(fields, str(path), line)
                except Flaw as flaw:
                    refuse(TraceError(path, line, flaw.field, flaw.problem, flaw.expected))
                else:
                    yield record
    except OSError as error:
        reason = error.strerror or str(error)
        raise TraceError(path, None, "file", reason, "a readable file") from error


def read_lines(
    readline: Callable[[int], bytes],
    label: str,
    *,
    first: int = 1,
    on_error: Callable[[TraceError], None],
    max_bytes: int = MAX_LINE_BYTES,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Parse JSON lines, each to an object.

    Args:
        readline: of a binary file; its argument is the most bytes to return.
        label: the file's name in messages.
        first: number of the first line.
        on_error: called with each bad line's error, in its place.
        max_bytes: longest line accepted.

    Yields:
        (line, fields), in order.
    """
    line = first - 1
    while raw := readline(max_bytes + 1):
        line += 1
        try:
            if len(raw) > max_bytes and not raw.endswith(b"\n"):
                _skip_line(readline, max_bytes)
                raise Flaw("record", f"line longer than {max_bytes} bytes", "a shorter line")
            fields = load_object(raw)
        except Flaw as flaw:
            on_error(TraceError(label, line, flaw.field, flaw.problem, flaw.expected))
        else:
            yield line, fields


def parse_line(raw: bytes, *, path: str | Path, line: int) -> Record:
    """Turn one line into a record.

    Raises:
        TraceError: anything that is not a record; no other exception leaves this function.
    """
    try:
        return record_of(load_object(raw), str(path), line)
    except Flaw as flaw:
        raise TraceError(path, line, flaw.field, flaw.problem, flaw.expected) from None


def _skip_line(readline: Callable[[int], bytes], max_bytes: int) -> None:
    while (chunk := readline(max_bytes)) and not chunk.endswith(b"\n"):
        pass
