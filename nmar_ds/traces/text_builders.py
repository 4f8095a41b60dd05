"""Deviations that are texts of the record itself: its rejected response, its own later steps.

They are written into the record as if it had come with them, so that what encodes given
deviations encodes these: cuts snap to tokens, right tokens at the head are known as such.

Source of `retry` and `weak_retry`: Physics of Language Models 2.2 (arXiv 2408.16293), whose
`retry` is a step that cannot be taken yet and whose `retry_weak` any later step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from nmar_ds.traces.encoding import common_length
from nmar_ds.traces.records import Record, Step, TextTurn

MAX_REPEATS = 16  # at one place; a rate of 1 would never go on


def pair(record: Record) -> Record:
    """The record with its rejected response as one deviation, from where it departs on.

    Without one where the rejected response is a beginning of the chosen one: nothing in it is
    wrong but its end, and an end is not undone.
    """
    turn, rejected = record.turns[0], record.rejected
    assert rejected is not None, "prepare has seen to it"
    at = common_length(turn.reference, rejected)
    return _with(record, [(at, rejected[at:])] if at < len(rejected) else [])


def retry(record: Record, rng: np.random.Generator, *, rate: float, weak: bool) -> Record:
    """The record with steps begun too early: at each step, with probability `rate`, another first.

    After each one the next is drawn with the same probability, at the same place: a geometric
    number of repeats.

    Args:
        record: with steps.
        rng: of this trace.
        rate: the retry rate r, in (0, 1].
        weak: any later step will do; otherwise one that depends on a step not taken yet.
    """
    deviations: list[tuple[int, str]] = []
    begin = 0
    for number, step in enumerate(record.steps):
        others = _too_early(record.steps, number, weak=weak)
        for _ in range(MAX_REPEATS):
            if rng.random() >= rate:
                break
            if others:
                text = others[int(rng.integers(len(others)))]
                num_right = common_length(text, record.turns[0].reference[begin:])
                deviations.append((begin + num_right, text[num_right:]))
        begin += len(step.text)
    # Those of one step depart from the reference at several places: in order, as they are written.
    return _with(record, sorted(deviations, key=lambda item: item[0]))


def _too_early(steps: Sequence[Step], number: int, *, weak: bool) -> list[str]:
    """Texts of later steps that may stand in for one, each really another from some letter on."""
    rest = "".join(step.text for step in steps[number:])
    return [
        later.text
        for later in steps[number + 1 :]
        if (weak or any(needed >= number for needed in later.depends_on))
        and not rest.startswith(later.text)
    ]


def _with(record: Record, deviations: list[tuple[int, str]]) -> Record:
    turn = TextTurn(
        prompt=record.turns[0].prompt,
        reference=record.turns[0].reference,
        deviations=tuple(deviations),
    )
    return replace(record, turns=(turn,))
