"""Deviations that a model wrote itself: its samples, aligned to the reference.

The ids are kept as they were sampled: decoding and encoding them again could change them, and with
them the number of undos. What a sample merely spells with other tokens is no deviation.

Source: N-MARS trains on such traces ("on-policy"); it aligns by difflib, see `alignment`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nmar_ds.traces.alignment import align
from nmar_ds.traces.answers import answered
from nmar_ds.traces.assembly import Deviation
from nmar_ds.traces.encoding import Tokenizer, common_length
from nmar_ds.traces.records import Record, Sample
from nmar_ds.traces.schema import IdArray


class Departures(NamedTuple):
    """What one sample has instead of the reference.

    Attributes:
        deviations: in order of place.
        num_respelt: stretches that say what the reference says, in other tokens.
        num_left_out: stretches of the reference for which the sample has nothing: no token to undo.
    """

    deviations: tuple[Deviation, ...]
    num_respelt: int
    num_left_out: int


def departures(sample: IdArray, reference_ids: IdArray, tokenizer: Tokenizer) -> Departures:
    """Align a sample; its stretches of other tokens become deviations.

    Args:
        sample: int32[n], without stop token; ordinary tokens.
        reference_ids: int32[m], with its stop token.
        tokenizer: of both.

    Raises:
        alignment.TooFarApartError: a sample too long and too different.
    """
    found: list[Deviation] = []
    num_respelt = num_left_out = 0
    for gap in align(sample, reference_ids[:-1]):
        ids = sample[gap.start : gap.end]
        if not len(ids):
            num_left_out += 1
            continue
        said = tokenizer.decode_bytes(ids)
        # Every ordinary token has a byte at least, so this many tokens cover as many bytes.
        right = tokenizer.decode_bytes(reference_ids[gap.cut : -1][: len(said)])
        num_right = common_length(said, right)
        if num_right == len(said):
            num_respelt += 1
            continue
        found.append(Deviation(gap.cut, ids, tokenizer.token_at(ids, num_right)))
    return Departures(tuple(found), num_respelt, num_left_out)


def wrong_samples(record: Record, tokenizer: Tokenizer, *, verify: bool) -> list[Sample]:
    """The samples that may be learnt from as errors.

    Args:
        record: with samples, and an answer where `verify` is set.
        tokenizer: of the samples.
        verify: leave out what the record's answer does not prove wrong: a right response that
            differs from the reference is no error.
    """
    if not verify:
        return list(record.samples)
    turn = record.turns[0]
    return [
        sample
        for sample in record.samples
        if sample.stopped  # one that was cut off might have got there
        and not answered(
            tokenizer.decode(sample.ids, continuation=bool(turn.prompt)),
            stopped=True,
            reference=turn.reference,
            answer=record.answer,
        )
    ]


def choose(
    deviations: Sequence[Deviation], rng: np.random.Generator, *, max_deviations: int
) -> tuple[Deviation, ...]:
    """At most so many of them, each as likely as the others, in order of place."""
    if len(deviations) <= max_deviations:
        return tuple(deviations)
    kept = np.sort(rng.choice(len(deviations), size=max_deviations, replace=False))
    return tuple(deviations[number] for number in kept.tolist())
