"""Records in: JSON lines, read strictly, one clear error per bad line.

Three forms, told apart by their fields (`id`, `group`, `answer` are optional in all of them):

1. `{"prompt": str, "reference": str, "deviations": [{"at": int, "text": str}]}`; `at` counts the
   characters of the reference before the deviation.
2. `{"segments": [{"role": "prompt|prefix|deviation|correction", "text": str}]}`; several turns
   allowed; undos are derived, never written.
3. `{"segments": [{"role": any role, "ids": [int]}]}`; undos are written, and counted later.

Python's json accepts duplicate keys, NaN, lone surrogates and very deep nesting; each of these
has reached training data somewhere, so each is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nmar_ds.errors import TraceError
from nmar_ds.traces.grammar import require_grammar
from nmar_ds.traces.schema import ROLE_BY_LABEL, IdArray, Role
from nmar_ds.traces.strict_json import (
    Flaw,
    as_filled_text,
    as_integer,
    as_list,
    as_object,
    as_text,
    kind_of,
    load_object,
    nearest,
    require_known,
    shown,
)

MAX_LINE_BYTES = 16 * 2**20
MAX_ID = 2**31 - 1
LABELS = ("id", "group", "answer")
TEXT_ROLES = tuple(label for label, role in ROLE_BY_LABEL.items() if role != Role.UNDO)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTurn:
    """A prompt and its response, as text.

    Attributes:
        prompt: may be empty for the first turn only.
        reference: the right response, whole; never empty.
        deviations: (characters of the reference before it, its text), in order of place.
    """

    prompt: str
    reference: str
    deviations: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class IdSegment:
    """A segment given as ids: int32[n], n >= 1."""

    role: Role
    ids: IdArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One line of a source file; exactly one of `turns` and `segments` is not empty.

    Attributes:
        path: the source file, for messages.
        line: 1-based.
        id: free label.
        group: `hard` deviations are taken from other records of the same group.
        answer: the checkable answer, for evaluation; not trained on.
        turns: text records.
        segments: records given as ids and roles.
        marked: whether the record itself says where deviations are (forms 2 and 3, or form 1
            with `deviations`); only the `given` builder takes such records.
    """

    path: str
    line: int
    id: str | None = None
    group: str = ""
    answer: str | None = None
    turns: tuple[TextTurn, ...] = ()
    segments: tuple[IdSegment, ...] = ()
    marked: bool = False


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
    try:
        with path.open("rb") as file:
            line = 0
            while raw := file.readline(max_bytes + 1):
                line += 1
                try:
                    if len(raw) > max_bytes and not raw.endswith(b"\n"):
                        _skip_line(file.readline, max_bytes)
                        problem = f"line longer than {max_bytes} bytes"
                        raise TraceError(path, line, "record", problem, "a shorter line")
                    record = parse_line(raw, path=path, line=line)
                except TraceError as error:
                    if on_error is None:
                        raise
                    on_error(error)
                else:
                    yield record
    except OSError as error:
        reason = error.strerror or str(error)
        raise TraceError(path, None, "file", reason, "a readable file") from error


def parse_line(raw: bytes, *, path: str | Path, line: int) -> Record:
    """Turn one line into a record.

    Raises:
        TraceError: anything that is not a record; no other exception leaves this function.
    """
    try:
        return _record(load_object(raw), str(path), line)
    except Flaw as flaw:
        raise TraceError(path, line, flaw.field, flaw.problem, flaw.expected) from None


def _skip_line(readline: Callable[[int], bytes], max_bytes: int) -> None:
    while (chunk := readline(max_bytes)) and not chunk.endswith(b"\n"):
        pass


def _record(fields: dict[str, Any], path: str, line: int) -> Record:
    labels: dict[str, Any] = {
        name: as_text(fields[name], name) for name in LABELS if name in fields
    }
    if "segments" in fields:
        require_known(fields, ("segments", *LABELS), "")
        turns, segments = _segments(as_list(fields["segments"], "segments"))
        return Record(path=path, line=line, turns=turns, segments=segments, marked=True, **labels)
    require_known(fields, ("prompt", "reference", "deviations", *LABELS), "")
    if "reference" not in fields:
        raise Flaw("reference", "missing", "`reference` (with `prompt`) or `segments`")
    reference = as_text(fields["reference"], "reference")
    if not reference:
        raise Flaw("reference", "empty", "the right response")
    deviations = _deviations(as_list(fields.get("deviations", []), "deviations"), len(reference))
    prompt = as_text(fields.get("prompt", ""), "prompt")
    turn = TextTurn(prompt=prompt, reference=reference, deviations=deviations)
    return Record(path=path, line=line, turns=(turn,), marked=bool(deviations), **labels)


def _deviations(items: list[Any], num_characters: int) -> tuple[tuple[int, str], ...]:
    deviations: list[tuple[int, str]] = []
    last = 0
    for number, value in enumerate(items):
        field = f"deviations[{number}]"
        item = as_object(value, field)
        require_known(item, ("at", "text"), f"{field}.")
        for name in ("at", "text"):
            if name not in item:
                raise Flaw(f"{field}.{name}", "missing", "`at` and `text`")
        at = as_integer(item["at"], f"{field}.at", num_characters)
        if at < last:
            raise Flaw(f"{field}.at", f"{at} comes after {last}", "deviations in order of place")
        last = at
        deviations.append((at, as_filled_text(item["text"], f"{field}.text")))
    return tuple(deviations)


def _segments(items: list[Any]) -> tuple[tuple[TextTurn, ...], tuple[IdSegment, ...]]:
    if not items:
        raise Flaw("segments", "empty", "at least one segment")
    as_ids = isinstance(items[0], dict) and "ids" in items[0]
    content = "ids" if as_ids else "text"
    pieces: list[tuple[Role, Any]] = []
    for number, entry in enumerate(items):
        field = f"segments[{number}]"
        item = as_object(entry, field)
        if ("text" if as_ids else "ids") in item:
            raise Flaw(field, "mixes `text` and `ids`", f"`{content}` as in the first segment")
        require_known(item, ("role", content), f"{field}.")
        for name in ("role", content):
            if name not in item:
                raise Flaw(f"{field}.{name}", "missing", f"`role` and `{content}`")
        role = _role(item["role"], f"{field}.role", as_ids)
        value = item[content]
        read = _ids(value, f"{field}.ids") if as_ids else as_filled_text(value, f"{field}.text")
        pieces.append((role, read))
    require_grammar([role for role, _ in pieces], as_ids, Flaw)
    if as_ids:
        return (), tuple(IdSegment(role=role, ids=ids) for role, ids in pieces)
    return _text_turns(pieces), ()


def _text_turns(pieces: list[tuple[Role, str]]) -> tuple[TextTurn, ...]:
    turns: list[TextTurn] = []
    prompt, reference = "", ""
    deviations: list[tuple[int, str]] = []
    for role, text in pieces:
        if role == Role.PROMPT:
            if reference:
                turns.append(
                    TextTurn(prompt=prompt, reference=reference, deviations=tuple(deviations))
                )
            prompt, reference, deviations = text, "", []
        elif role == Role.DEVIATION:
            deviations.append((len(reference), text))
        else:
            reference += text
    turns.append(TextTurn(prompt=prompt, reference=reference, deviations=tuple(deviations)))
    return tuple(turns)


def _role(value: Any, field: str, with_undos: bool) -> Role:
    labels = tuple(ROLE_BY_LABEL) if with_undos else TEXT_ROLES
    if not isinstance(value, str):
        raise Flaw(field, f"is {kind_of(value)}", " or ".join(labels))
    if value == Role.UNDO.label and not with_undos:
        raise Flaw(field, "undo in a record of text, where undos are derived", " or ".join(labels))
    if value not in labels:
        raise Flaw(field, f"unknown role {shown(value)}{nearest(value, labels)}", "a role's name")
    return ROLE_BY_LABEL[value]


def _ids(value: Any, field: str) -> IdArray:
    items = as_list(value, field)
    if not items:
        raise Flaw(field, "empty", "at least one id")
    if not all(type(item) is int and 0 <= item <= MAX_ID for item in items):
        for number, item in enumerate(items):
            as_integer(item, f"{field}[{number}]", MAX_ID)
    return np.array(items, dtype=np.int32)
