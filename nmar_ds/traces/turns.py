"""Records to turns: each reference encoded once and whole, cuts snapped to tokens (SPEC 2.5)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nmar_ds.errors import TraceError, VocabularyError
from nmar_ds.traces.assembly import Deviation, Turn
from nmar_ds.traces.chat import ChatTemplate, TemplateError
from nmar_ds.traces.encoding import Tokenizer, common_length
from nmar_ds.traces.records import Record
from nmar_ds.traces.schema import IdArray, Role, Trace


class Encoded(NamedTuple):
    """The turns of a text record.

    Attributes:
        turns: with their deviations, where the record gives any.
        num_snaps: cuts that were moved left to a token boundary.
    """

    turns: tuple[Turn, ...]
    num_snaps: int


def encode_record(
    record: Record, tokenizer: Tokenizer, chat: ChatTemplate | None = None
) -> Encoded:
    """Encode a text record (forms 1 and 2).

    BOS, where the tokenizer sets one, opens the first prompt; every reference ends with the stop
    token.

    Args:
        record: as read.
        tokenizer: has the undo token.
        chat: put around the prompts, which are then a user's messages; BOS is the template's
            affair then.

    Raises:
        TraceError: a text that the tokenizer cannot give back exactly, or a deviation in which
            nothing is wrong.
    """
    assert record.turns, "records of ids go through trace_of_ids"
    if record.is_chat and chat is None:
        raise TraceError(
            record.path, record.line, "messages", "no chat template is put around them",
            "data.chat in the configuration (`chat: {}` takes the tokenizer's)",
        )  # fmt: skip
    turns: list[Turn] = []
    num_snaps = 0
    stop = np.array([tokenizer.eos_id], dtype=np.int32)
    prompts = _chat_prompts(record, chat) if chat is not None else None
    for number, turn in enumerate(record.turns):
        prefix = f"turn {number}: " if len(record.turns) > 1 else ""
        given = None if prompts is None else prompts[number]
        encoder = _TurnEncoder(record, number, tokenizer, prefix, given)
        deviations = [encoder.deviation(place) for place in range(len(turn.deviations))]
        num_snaps += encoder.num_snaps
        turns.append(
            Turn(
                prompt_ids=encoder.prompt_ids,
                reference_ids=np.concatenate([encoder.reference_ids, stop]),
                deviations=tuple(deviations),
            )
        )
    return Encoded(tuple(turns), num_snaps)


def _chat_prompts(record: Record, chat: ChatTemplate) -> list[IdArray]:
    if not record.turns[0].prompt:
        raise TraceError(
            record.path, record.line, "prompt", "empty, but a chat template is put around it",
            "a user's message",
        )  # fmt: skip
    try:
        pairs = [(turn.prompt, turn.reference) for turn in record.turns]
        return chat.prompts(pairs, system=record.system)
    except TemplateError as error:
        problem, expected = f"the chat template {error}", "a conversation it leaves as it is"
    except VocabularyError as error:
        problem, expected = str(error), "a text the tokenizer gives back exactly"
    raise TraceError(record.path, record.line, "prompt", problem, expected)


class _TurnEncoder:
    """Encodes one turn; holds what its deviations share."""

    def __init__(
        self,
        record: Record,
        number: int,
        tokenizer: Tokenizer,
        prefix: str,
        prompt_ids: IdArray | None,
    ) -> None:
        self.record, self.tokenizer, self.prefix = record, tokenizer, prefix
        self.turn = turn = record.turns[number]
        self.num_snaps = 0
        # Only the very start of a trace may get the tokenizer's prefix space.
        self.continues = number > 0 or bool(turn.prompt)
        if prompt_ids is not None:
            self.prompt_ids = prompt_ids
        else:
            self.prompt_ids = self._encode(turn.prompt, number > 0, "prompt")
        if prompt_ids is None and number == 0 and tokenizer.add_bos:
            assert tokenizer.bos_id is not None, "add_bos without bos_id"
            self.prompt_ids = np.concatenate(
                [np.array([tokenizer.bos_id], dtype=np.int32), self.prompt_ids]
            )
        self.reference_ids = self._encode(turn.reference, self.continues, "reference")
        if turn.deviations:
            self.starts = tokenizer.starts_of(
                self.reference_ids, turn.reference, continuation=self.continues
            )

    def deviation(self, place: int) -> Deviation:
        at, text = self.turn.deviations[place]
        field = f"deviations[{place}]"
        reference, tokenizer = self.turn.reference, self.tokenizer
        cut, cut_character = len(self.reference_ids), len(reference)
        if at < len(reference):
            cut = int(np.flatnonzero((self.starts >= 0) & (self.starts <= at))[-1])
            cut_character = int(self.starts[cut])
        self.num_snaps += cut_character != at
        deviation_text = reference[cut_character:at] + text
        num_right = common_length(deviation_text, reference[cut_character:])
        if num_right == len(deviation_text):
            raise self._error(field, "says what the reference says", "something wrong in it")
        # What comes before this place is encoded as it was in the reference.
        begin = tokenizer.cut_before(reference, cut_character)
        known = int(np.flatnonzero(self.starts == begin)[0]) if begin else 0
        text_from_there = reference[begin:cut_character] + deviation_text
        whole = self._encode(text_from_there, self.continues or begin > 0, field)
        if np.array_equal(whole[: cut - known], self.reference_ids[known:cut]):
            ids = whole[cut - known :]
        else:
            # The deviation would change the tokens before it, so it gets its own.
            ids = self._encode(deviation_text, True, field)
        continues = self.continues or cut > 0
        if not len(ids) or tokenizer.decode(ids, continuation=continues) != deviation_text:
            raise self._error(field, "its tokens do not spell its text", "tokens that do")
        num_bytes = len(deviation_text[:num_right].encode("utf-8"))
        num_bytes += len(tokenizer.decode_bytes(ids)) - len(deviation_text.encode("utf-8"))
        return Deviation(cut, ids, tokenizer.token_at(ids, num_bytes))

    def _encode(self, text: str, continuation: bool, field: str) -> IdArray:
        try:
            return self.tokenizer.encode_exactly(text, continuation=continuation)
        except VocabularyError as error:
            raise self._error(field, str(error), error.expected) from None

    def _error(self, field: str, problem: str, expected: str) -> TraceError:
        return TraceError(
            self.record.path, self.record.line, self.prefix + field, problem, expected
        )


def trace_of_ids(record: Record, *, source: int) -> Trace:
    """Join a record of ids and roles (form 3) to a trace; `assembly.check` has to judge it.

    Raises:
        TraceError: a deviation whose ids are those of the reference after it.
    """
    segments = record.segments
    assert segments, "records of text go through encode_record"
    onsets: list[int] = []
    start = 0
    for number, segment in enumerate(segments):
        if segment.role == Role.DEVIATION:
            right: list[int] = []
            for later in segments[number + 1 :]:
                if later.role == Role.PROMPT or len(right) > len(segment.ids):
                    break
                if later.role == Role.CORRECTION:
                    right.extend(later.ids.tolist())
            onset = common_length(segment.ids.tolist(), right)
            if onset == len(segment.ids):
                raise TraceError(
                    record.path, record.line, f"segments[{number}]",
                    "a deviation that says what the correction says", "something wrong in it",
                )  # fmt: skip
            onsets.append(start + onset)
        start += len(segment.ids)
    return Trace(
        ids=np.concatenate([segment.ids for segment in segments]),
        roles=np.repeat(
            np.array([segment.role for segment in segments], dtype=np.uint8),
            [len(segment.ids) for segment in segments],
        ),
        onsets=tuple(onsets),
        line=record.line,
        source=source,
    )
