"""Where deviations come from: given with the record, random, or hard (SPEC 2 and 8).

`random` draws uniform vocabulary tokens: the weakest errors, nobody's favourites. `hard` copies
a stretch of another record's reference of the same group, so that a deviation is a plausible wrong
value; its first piece has the class of the correct one, or a model could tell the deviation by
its first piece alone (SPEC 2.5). Both are deterministic in (seed, source, line, copy) and know no
semantics: `assembly.move_starts` moves what they draw to where undos can stop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nmar_ds.errors import VocabularyError
from nmar_ds.traces.assembly import Deviation, Turn, assemble, check, move_starts, said_by
from nmar_ds.traces.encoding import PIECE_CLASSES, Tokenizer
from nmar_ds.traces.schema import IdArray
from nmar_ds.traces.turns import Encoded, encode_record, trace_of_ids

__all__ = [
    "Built", "Deviation", "Encoded", "Pool", "Turn", "assemble", "check", "encode_record", "hard",
    "move_starts", "random", "rng_of", "said_by", "trace_of_ids",
]  # fmt: skip

REPEAT_SHARE = 0.1  # of the deviations after the first: a repeated error at the same place
NUM_DONORS_TRIED = 16
NUM_WHOLE_DONORS_TRIED = 12  # of them: donors that end too early are passed over
NUM_CUTS_TRIED = 4

Draw = Callable[[Turn, int], Deviation | None]


class Built(NamedTuple):
    """Turns with deviations.

    Attributes:
        turns: as given, deviations added.
        num_missing: deviations that were drawn but found nothing fitting.
    """

    turns: tuple[Turn, ...]
    num_missing: int


def rng_of(seed: int, source: int, line: int, copy: int) -> np.random.Generator:
    """Return the generator of one trace, whatever process builds it."""
    key = hashlib.sha256(f"nmar_ds traces {seed} {source} {line} {copy}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))


def random(
    turns: Sequence[Turn],
    rng: np.random.Generator,
    *,
    tokenizer: Tokenizer,
    max_deviations: int,
    max_deviation_length: int,
) -> Built:
    """Add 1 to `max_deviations` deviations of uniform ordinary tokens.

    The first token is never right: what it spells is not what the reference goes on with.

    Args:
        turns: without deviations.
        rng: of this trace.
        tokenizer: gives the ordinary tokens.
        max_deviations: numbers are uniform from 1 to this.
        max_deviation_length: in tokens; uniform from 1 to this.
    """
    ordinary = tokenizer.ordinary_ids()

    def draw(turn: Turn, cut: int) -> Deviation | None:
        length = int(rng.integers(1, max_deviation_length + 1))
        for _ in range(NUM_DONORS_TRIED):
            ids = ordinary[rng.integers(len(ordinary), size=length)]
            if _starts_wrong(ids, turn.reference_ids[cut:], tokenizer):
                return Deviation(cut, ids, 0)
        return None

    return _scatter(turns, rng, draw, tokenizer, max_deviations)


def hard(
    turns: Sequence[Turn],
    rng: np.random.Generator,
    *,
    pool: Pool,
    group: str,
    record: tuple[int, int],
    tokenizer: Tokenizer,
    max_deviations: int,
    max_deviation_length: int,
) -> Built:
    """Add 1 to `max_deviations` deviations taken from other references of the same group.

    Args:
        turns: without deviations.
        rng: of this trace.
        pool: the references of all records.
        group: the record's group; "" where it has none.
        record: (source, line); no deviation comes from the record itself, nor from a reference
            that reads the same.
        tokenizer: that of the pool.
        max_deviations: numbers are uniform from 1 to this.
        max_deviation_length: in tokens; uniform from 1 to this, shorter where a few draws find
            no donor that long.
    """

    def draw(turn: Turn, cut: int) -> Deviation | None:
        length = int(rng.integers(1, max_deviation_length + 1))
        right = turn.reference_ids[cut:]
        wanted = tokenizer.class_of[right[0]]
        continues = len(turns[0].prompt_ids) > int(tokenizer.add_bos) or turn is not turns[0]
        own = pool.number_of(turn.reference_ids)
        for tried in range(NUM_DONORS_TRIED):
            taken = pool.draw(
                group=group, right_id=int(right[0]), rng=rng, length=length, own=own, record=record
            )
            if taken is None:
                return None
            if not len(taken) or not _starts_wrong(taken, right, tokenizer):
                continue
            if len(taken) < length and tried < NUM_WHOLE_DONORS_TRIED:
                continue  # taking what donors' ends leave would make long deviations rare
            ids = _as_encoded(turn.reference_ids[:cut], taken, tokenizer, continues)
            if (
                ids is not None
                and len(ids) <= max_deviation_length
                and tokenizer.class_of[ids[0]] == wanted
                and _starts_wrong(ids, right, tokenizer)
            ):
                return Deviation(cut, ids, 0)
        return None

    return _scatter(turns, rng, draw, tokenizer, max_deviations)


def _scatter(
    turns: Sequence[Turn],
    rng: np.random.Generator,
    draw: Draw,
    tokenizer: Tokenizer,
    max_deviations: int,
) -> Built:
    """Draw places and fill them.

    A place is any token of a reference but its stop token: before that no piece has a class to
    match, and running on is what `given` deviations are for.
    """
    places = [
        (number, cut)
        for number, turn in enumerate(turns)
        for cut in np.flatnonzero(tokenizer.starts_character(turn.reference_ids[:-1])).tolist()
    ]
    found: list[tuple[int, Deviation]] = []
    num_missing = 0
    for _ in range(int(rng.integers(1, max_deviations + 1))):
        deviation = None
        for _ in range(NUM_CUTS_TRIED):
            if found and rng.random() < REPEAT_SHARE:
                number, cut = found[-1][0], found[-1][1].cut
            else:
                number, cut = places[int(rng.integers(len(places)))]
            deviation = draw(turns[number], cut)
            if deviation is not None:
                found.append((number, deviation))
                break
        num_missing += deviation is None
    found.sort(key=lambda item: (item[0], item[1].cut))  # stable: repeats stay in drawn order
    filled = tuple(
        replace(turn, deviations=tuple(d for owner, d in found if owner == number))
        for number, turn in enumerate(turns)
    )
    return Built(filled, num_missing)


def _starts_wrong(ids: IdArray, right: IdArray, tokenizer: Tokenizer) -> bool:
    """Whether the first token spells something else than the reference goes on with."""
    first = tokenizer.decode_bytes(ids[:1])
    # Ordinary tokens have a byte at least, so this many cover the first token's bytes.
    return not tokenizer.decode_bytes(right[: len(first)]).startswith(first)


def _as_encoded(
    before: IdArray, taken: IdArray, tokenizer: Tokenizer, continues: bool
) -> IdArray | None:
    """Return the ids that follow `before` where the text of both is encoded, None if none do."""
    spelled = tokenizer.decode_bytes(np.concatenate([before, taken]))
    try:
        text = spelled.decode("utf-8")
        if not continues and tokenizer.has_prefix_space and text.startswith(" "):
            text = text[1:]
        whole = tokenizer.encode(text, continuation=continues)
    except (UnicodeDecodeError, VocabularyError):
        return None
    if not np.array_equal(whole[: len(before)], before) or len(whole) <= len(before):
        return None
    return whole[len(before) :] if tokenizer.decode_bytes(whole) == spelled else None


@dataclass(slots=True)
class _Group:
    """The references of one group, joined; filled while reading, indexed once afterwards."""

    parts: list[IdArray] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)
    records: list[tuple[int, int]] = field(default_factory=list)
    ids: IdArray = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    ends: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    places: dict[int, npt.NDArray[np.int64]] = field(default_factory=dict)
    firsts: dict[int, IdArray] = field(default_factory=dict)
    has_choice: bool = False


class Pool:
    """All references by group and piece class: about 20 bytes a token in memory."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._groups: dict[str, _Group] = {}
        self._numbers: dict[bytes, int] = {}

    def add(self, group: str, reference_ids: IdArray, record: tuple[int, int]) -> None:
        """Add a reference (with its stop token, which is left out)."""
        key = hashlib.sha256(reference_ids.tobytes()).digest()
        number = self._numbers.setdefault(key, len(self._numbers))
        entry = self._groups.setdefault(group, _Group())
        entry.parts.append(reference_ids[:-1])
        entry.texts.append(number)
        entry.records.append(record)

    def finish(self) -> None:
        """Index what was added."""
        for group in self._groups.values():
            group.ids = np.concatenate(group.parts)
            group.ends = np.cumsum([len(part) for part in group.parts])
            group.has_choice = len(set(group.texts)) > 1
            group.parts.clear()
            classes = self._tokenizer.class_of[group.ids]
            for number in range(len(PIECE_CLASSES)):
                places = np.flatnonzero(classes == number)
                firsts = group.ids[places]
                order = np.argsort(firsts, kind="stable")
                group.places[number] = places[order]
                group.firsts[number] = firsts[order]

    def number_of(self, reference_ids: IdArray) -> int:
        """Return the number under which references that read the same are known, -1 if none."""
        return self._numbers.get(hashlib.sha256(reference_ids.tobytes()).digest(), -1)

    def draw(
        self,
        *,
        group: str,
        right_id: int,
        rng: np.random.Generator,
        length: int,
        own: int,
        record: tuple[int, int],
    ) -> IdArray | None:
        """Take a stretch whose first piece has the class of the right one but is another.

        Uniform over all such places of the group.

        Returns:
            int32[0 to length], empty where the draw fell on the record itself or on a reference
            that reads the same; None where the group has nothing to offer.
        """
        entry = self._groups.get(group)
        if entry is None or not entry.has_choice:
            return None
        piece_class = int(self._tokenizer.class_of[right_id])
        places, firsts = entry.places[piece_class], entry.firsts[piece_class]
        # Places are sorted by their first piece, so those of the right piece are one stretch.
        # Asked in their own dtype: another would copy all of them for each question.
        asked = np.array([right_id, right_id + 1], dtype=firsts.dtype)
        left, end = firsts.searchsorted(asked).tolist()
        num_others = len(places) - (end - left)
        if num_others == 0:
            return None
        drawn = int(rng.integers(num_others))
        start = int(places[drawn if drawn < left else drawn + end - left])
        donor = int(entry.ends.searchsorted(start, side="right"))
        if entry.texts[donor] == own or entry.records[donor] == record:
            return entry.ids[:0]
        return entry.ids[start : min(start + length, int(entry.ends[donor]))]
