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
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from nmar_ds.errors import VocabularyError
from nmar_ds.traces.assembly import Deviation, Turn, assemble, check, move_starts, said_by
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.pool import Pool
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
