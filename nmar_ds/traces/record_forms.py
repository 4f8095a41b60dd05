"""The forms a record can have, field by field: parsed JSON in, a `Record` out (docs/records.md).

1. `{"prompt": str, "reference": str}`, with what a builder may need beside it: `deviations`, where
   the errors are known (`at` counts the characters of the reference before one), or `samples`, a
   model's own responses as ids.
2. `{"prompt": str, "steps": [{"text": str, "depends_on": [int]}]}`; the reference is the steps
   on end.
3. `{"prompt": str, "chosen": str, "rejected": str}`; the reference is `chosen`.
4. `{"messages": [{"role": "system|user|assistant", "content": str}]}`; one turn per user message.
5. `{"segments": [{"role": "prompt|prefix|deviation|correction", "text": str}]}`; several turns
   allowed; undos are derived, never written.
6. `{"segments": [{"role": any role, "ids": [int]}]}`; undos are written, and counted later.

`id`, `group` and `answer` are optional in all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

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
    nearest,
    require_known,
    shown,
)

MAX_ID = 2**31 - 1
LABELS = ("id", "group", "answer")
TEXT_ROLES = tuple(label for label, role in ROLE_BY_LABEL.items() if role != Role.UNDO)
SAMPLED_WITH = "sampled_with"


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
class Step:
    """A step of a reference.

    Attributes:
        text: never empty; the steps on end are the reference.
        depends_on: numbers of the earlier steps that this one takes something from.
    """

    text: str
    depends_on: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A model's response.

    Attributes:
        ids: int32[n], n >= 0, without its stop token.
        stopped: false where it was cut off.
    """

    ids: IdArray
    stopped: bool = True


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
        marked: whether the record itself says where deviations are (segments, or `deviations`);
            only the `given` builder takes such records.
        steps: of the one turn's reference; for `retry` and `weak_retry`.
        is_chat: from `messages`, which a chat template has to be put around.
        system: the record's own system message.
        rejected: a worse response to the one turn's prompt; for `pairs`.
        samples: a model's own responses to the one turn's prompt; for `on_policy`.
        sampled_with: fingerprint of the tokenizer whose ids the samples are.
    """

    path: str
    line: int
    id: str | None = None
    group: str = ""
    answer: str | None = None
    turns: tuple[TextTurn, ...] = ()
    segments: tuple[IdSegment, ...] = ()
    marked: bool = False
    is_chat: bool = False
    system: str | None = None
    steps: tuple[Step, ...] = ()
    rejected: str | None = None
    samples: tuple[Sample, ...] = ()
    sampled_with: str | None = None


def record_of(fields: dict[str, Any], path: str, line: int) -> Record:
    """Turn one parsed object into a record.

    Raises:
        Flaw: names the field at fault.
    """
    labels: dict[str, Any] = {
        name: as_text(fields[name], name) for name in LABELS if name in fields
    }
    place = {"path": path, "line": line, **labels}
    if "segments" in fields:
        require_known(fields, ("segments", *LABELS), "")
        turns, segments = _segments(as_list(fields["segments"], "segments"))
        return Record(**place, turns=turns, segments=segments, marked=True)
    if "messages" in fields:
        require_known(fields, ("messages", *LABELS), "")
        system, turns = _messages(as_list(fields["messages"], "messages"))
        return Record(**place, turns=turns, system=system, is_chat=True)
    if "steps" in fields:
        require_known(fields, ("prompt", "steps", *LABELS), "")
        steps = _steps(as_list(fields["steps"], "steps"))
        turn = TextTurn(prompt=_prompt(fields), reference="".join(step.text for step in steps))
        return Record(**place, turns=(turn,), steps=steps)
    if "chosen" in fields or "rejected" in fields:
        require_known(fields, ("prompt", "chosen", "rejected", *LABELS), "")
        chosen, rejected = (_filled(fields, name, "`chosen` and `rejected`")
                            for name in ("chosen", "rejected"))  # fmt: skip
        if chosen == rejected:
            raise Flaw("rejected", "says what `chosen` says", "a worse response")
        turn = TextTurn(prompt=_prompt(fields), reference=chosen)
        return Record(**place, turns=(turn,), rejected=rejected)
    return _with_reference(fields, place)


def _with_reference(fields: dict[str, Any], place: dict[str, Any]) -> Record:
    known = ("prompt", "reference", "deviations", "samples", SAMPLED_WITH, *LABELS)
    require_known(fields, known, "")
    expected = (
        "`reference` (with `prompt`), `steps`, `chosen` and `rejected`, `messages`, or `segments`"
    )
    reference = _filled(fields, "reference", expected)
    deviations = _deviations(as_list(fields.get("deviations", []), "deviations"), len(reference))
    turn = TextTurn(prompt=_prompt(fields), reference=reference, deviations=deviations)
    samples: tuple[Sample, ...] = ()
    sampled_with = None
    if "samples" in fields or SAMPLED_WITH in fields:
        if deviations:
            raise Flaw("samples", "beside `deviations`", "one of both")
        sampled_with = _filled(fields, SAMPLED_WITH, "`samples` and the tokenizer's fingerprint")
        if "samples" not in fields:
            raise Flaw("samples", "missing", f"`samples` with `{SAMPLED_WITH}`")
        items = as_list(fields["samples"], "samples")
        samples = tuple(_sample(item, f"samples[{number}]") for number, item in enumerate(items))
        if not samples:
            raise Flaw("samples", "empty", "at least one sample")
    return Record(**place, turns=(turn,), marked=bool(deviations), samples=samples,
                  sampled_with=sampled_with)  # fmt: skip


def _messages(items: list[Any]) -> tuple[str | None, tuple[TextTurn, ...]]:
    """System message and turns: user and assistant by turns, assistant last."""
    read: list[tuple[str, str]] = []
    for number, value in enumerate(items):
        field = f"messages[{number}]"
        item = as_object(value, field)
        require_known(item, ("role", "content"), f"{field}.")
        role = as_text(item.get("role", ""), f"{field}.role")
        due = ("system", "user") if number == 0 else (
            ("assistant",) if read[-1][0] == "user" else ("user",)
        )  # fmt: skip
        if role not in due:
            raise Flaw(f"{field}.role", f"is {shown(role)}", " or ".join(due))
        if "content" not in item:
            raise Flaw(f"{field}.content", "missing", "the message's text")
        read.append((role, as_filled_text(item["content"], f"{field}.content")))
    if not read or read[-1][0] != "assistant":
        raise Flaw("messages", "no answer at the end", "a user's message and the assistant's")
    system = read.pop(0)[1] if read[0][0] == "system" else None
    texts = [content for _, content in read]
    return system, tuple(
        TextTurn(prompt=prompt, reference=reference)
        for prompt, reference in zip(texts[::2], texts[1::2], strict=True)
    )


def _sample(value: Any, field: str) -> Sample:
    item = as_object(value, field)
    require_known(item, ("ids", "stopped"), f"{field}.")
    if "ids" not in item:
        raise Flaw(f"{field}.ids", "missing", "`ids`, and `stopped`")
    stopped = item.get("stopped", True)
    if not isinstance(stopped, bool):
        raise Flaw(f"{field}.stopped", f"is {kind_of(stopped)}", "true or false")
    return Sample(ids=_ids(item["ids"], f"{field}.ids", may_be_empty=True), stopped=stopped)


def _prompt(fields: dict[str, Any]) -> str:
    return as_text(fields.get("prompt", ""), "prompt")


def _filled(fields: dict[str, Any], name: str, expected: str) -> str:
    if name not in fields:
        raise Flaw(name, "missing", expected)
    if not as_text(fields[name], name):
        raise Flaw(name, "empty", "the right response" if name == "reference" else "some text")
    return str(fields[name])


def _steps(items: list[Any]) -> tuple[Step, ...]:
    if not items:
        raise Flaw("steps", "empty", "at least one step")
    steps: list[Step] = []
    for number, value in enumerate(items):
        field = f"steps[{number}]"
        item = as_object(value, field)
        require_known(item, ("text", "depends_on"), f"{field}.")
        if "text" not in item:
            raise Flaw(f"{field}.text", "missing", "`text`, and `depends_on` where it has any")
        needed = as_list(item.get("depends_on", []), f"{field}.depends_on")
        for place, other in enumerate(needed):
            name = f"{field}.depends_on[{place}]"
            if as_integer(other, name, len(items) - 1) >= number:
                raise Flaw(name, f"{other} is no earlier step", f"0 to {number - 1}"
                           if number else "none for the first step")  # fmt: skip
        text = as_filled_text(item["text"], f"{field}.text")
        steps.append(Step(text=text, depends_on=tuple(needed)))
    return tuple(steps)


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


def _ids(value: Any, field: str, *, may_be_empty: bool = False) -> IdArray:
    items = as_list(value, field)
    if not items and not may_be_empty:
        raise Flaw(field, "empty", "at least one id")
    if not all(type(item) is int and 0 <= item <= MAX_ID for item in items):
        for number, item in enumerate(items):
            as_integer(item, f"{field}[{number}]", MAX_ID)
    return np.array(items, dtype=np.int32)
