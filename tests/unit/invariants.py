"""SPEC 2's invariants under `token`, written down a second time without the code under test."""

from __future__ import annotations

from collections.abc import Sequence

from nmar_ds.traces.assembly import Turn
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.schema import Trace


def naive_reduction(trace: Trace, undo_id: int) -> list[int]:
    """Strike out, from the left, each undo with the nearest token left of it."""
    ids = trace.ids.tolist()
    while undo_id in ids:
        place = ids.index(undo_id)
        assert place > 0
        del ids[place - 1 : place + 1]
    return ids


def assert_invariants(trace: Trace, turns: Sequence[Turn], tokenizer: Tokenizer) -> None:
    """SPEC 2, written down a second time without the code under test."""
    said = [
        int(i) for turn in turns for part in (turn.prompt_ids, turn.reference_ids) for i in part
    ]
    assert naive_reduction(trace, tokenizer.undo_id) == said
    letters = "".join("xpebc"[role] for role in trace.roles)
    runs = [letters[0]]
    for letter in letters[1:]:
        if letter != runs[-1][0]:
            runs.append(letter)
        else:
            runs[-1] += letter
    assert "".join(runs) == letters
    onsets = iter(trace.onsets)
    start, responses = 0, 0
    for place, run in enumerate(runs):
        end = start + len(run)
        ids = trace.ids[start:end]
        following = runs[place + 1] if place + 1 < len(runs) else ""
        assert (ids == tokenizer.undo_id).all() == (run[0] == "b")
        if run[0] == "e":
            assert len(following) == len(run) and following[0] == "b"
            assert not {tokenizer.undo_id, tokenizer.eos_id} & set(ids.tolist())
            assert start <= next(onsets) < end
        if run[0] == "x":
            assert place == 0 or responses > 0
            assert following and following[0] in "pe"
            responses = 0
        if run[0] in "pc":
            responses += 1
        if run[0] == "c":
            assert runs[place - 1][0] == "b"
        start = end
    assert responses > 0 and next(onsets, None) is None
