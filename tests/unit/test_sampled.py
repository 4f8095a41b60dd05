"""On-policy deviations: what a model's sample has instead of the reference."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from invariants import assert_invariants

from nmar_ds.errors import TraceError
from nmar_ds.traces import alignment, sampled
from nmar_ds.traces.building import BuilderSettings, TraceBuilder
from nmar_ds.traces.encoding import PIECE_CLASSES, Tokenizer
from nmar_ds.traces.records import Record, parse_line
from nmar_ds.traces.reduction import Machine
from nmar_ds.traces.schema import Role
from nmar_ds.traces.turns import encode_record

REFERENCE = " so 12 + 30 = 42, the answer is 42."


def record_of(samples: list[object], tokenizer: Tokenizer, **more: object) -> Record:
    fields = {"prompt": "12+30?", "reference": REFERENCE, "samples": samples,
              "sampled_with": tokenizer.fingerprint, **more}  # fmt: skip
    return parse_line(json.dumps(fields).encode(), path="r.jsonl", line=3)


def sample_of(text: str, tokenizer: Tokenizer, *, stopped: bool = True) -> dict[str, object]:
    return {"ids": tokenizer.encode(text, continuation=True).tolist(), "stopped": stopped}


def builder_of(tokenizer: Tokenizer, **settings: object) -> TraceBuilder:
    asked = BuilderSettings(name="on_policy", **{"max_deviations": 9, **settings})  # type: ignore[arg-type]
    return TraceBuilder(asked, tokenizer, Machine(tokenizer.undo_id))


def test_five_thousand_edited_samples_keep_every_invariant(any_tokenizer: Tokenizer) -> None:
    """SPEC 2.1; published alignments break it in 1,803 of 5,000 random edits."""
    rng = np.random.default_rng(7)
    reference = any_tokenizer.encode(REFERENCE, continuation=True)
    ordinary = any_tokenizer.ordinary_ids()
    builder = builder_of(any_tokenizer)
    num_deviations = 0
    for _ in range(1250):  # four tokenizers
        ids = reference.tolist()
        for _ in range(int(rng.integers(0, 5))):
            place = int(rng.integers(0, len(ids) + 1))
            drawn = rng.choice(ordinary, size=int(rng.integers(0, 4))).tolist()
            ids[place : place + int(rng.integers(0, 4))] = drawn
        if rng.random() < 0.1:
            ids = ids[: int(rng.integers(0, len(ids) + 1))]
        record = record_of([{"ids": ids}], any_tokenizer)
        (trace,) = builder.traces(record, 0)
        turns = encode_record(record, any_tokenizer).turns
        assert_invariants(trace, turns, any_tokenizer)
        num_deviations += len(trace.onsets)
    assert num_deviations > 1000


def test_samples_by_hand(bpe_tokenizer: Tokenizer) -> None:
    tokenizer = bpe_tokenizer
    reference = encode_record(record_of([{"ids": []}], tokenizer), tokenizer).turns[0].reference_ids
    right = reference[:-1]

    def found(ids: list[int]) -> sampled.Departures:
        return sampled.departures(np.array(ids, dtype=np.int32), reference, tokenizer)

    assert found([]) == ((), 0, 1)  # nothing written: nothing to undo
    assert found(right.tolist()) == ((), 0, 0)
    assert found(right[:5].tolist()) == ((), 0, 1)  # stopped too early
    wrong = int(tokenizer.encode(" carry", continuation=True)[0])
    on = found([*right.tolist(), wrong])  # ran on: the deviation stands before the stop token
    assert [(d.cut, d.ids.tolist(), d.onset) for d in on.deviations] == [(len(right), [wrong], 0)]
    instead = found([*right[:3].tolist(), wrong, wrong, *right[4:].tolist()])
    assert [(d.cut, d.ids.tolist()) for d in instead.deviations] == [(3, [wrong, wrong])]
    left_out = found([*right[:3].tolist(), *right[4:].tolist()])
    assert (left_out.deviations, left_out.num_left_out) == ((), 1)


def test_other_tokens_for_the_same_text_are_no_deviation(bpe_tokenizer: Tokenizer) -> None:
    tokenizer = bpe_tokenizer
    reference = np.append(tokenizer.encode(REFERENCE, continuation=True), tokenizer.eos_id)
    letters = [int(i) for letter in " so" for i in tokenizer.encode(letter, continuation=True)]
    assert len(letters) == 3 and letters[0] != reference[0]
    ids = np.array([*letters, *reference[1:-1]], dtype=np.int32)
    assert sampled.departures(ids, reference.astype(np.int32), tokenizer) == ((), 1, 0)
    # The same letters and then something wrong: its onset is where the text departs.
    wrong = tokenizer.encode("x", continuation=True)
    ids = np.concatenate([np.array(letters[:2], dtype=np.int32), wrong, reference[1:-1]])
    (deviation,) = sampled.departures(ids, reference.astype(np.int32), tokenizer).deviations
    assert deviation.cut == 0 and deviation.onset == 2 and deviation.ids[2] == wrong[0]


def test_only_what_the_answer_proves_wrong(sp_tokenizer: Tokenizer) -> None:
    right_otherwise = sample_of(" yes: 30 + 12 = 42", sp_tokenizer)
    wrong = sample_of(" so 12 + 30 = 41", sp_tokenizer)
    cut_off = sample_of(" so 12 + 30 = 4", sp_tokenizer, stopped=False)
    record = record_of([right_otherwise, cut_off, wrong], sp_tokenizer, answer="42")
    kept = sampled.wrong_samples(record, sp_tokenizer, verify=True)
    assert [sample.ids.tolist() for sample in kept] == [wrong["ids"]]
    assert len(sampled.wrong_samples(record, sp_tokenizer, verify=False)) == 3
    builder = builder_of(sp_tokenizer, verify=True, traces_per_record=2)
    assert all(len(trace.onsets) for trace in builder.traces(record, 0))
    none_wrong = record_of([right_otherwise], sp_tokenizer, answer="42")
    assert not any(len(trace.onsets) for trace in builder.traces(none_wrong, 0))
    assert builder.counts["without_error"] == 2
    with pytest.raises(TraceError, match=r"answer: missing, expected one where `verify` is set"):
        builder.traces(record_of([wrong], sp_tokenizer), 0)


def test_copies_take_the_samples_in_turn(sp_tokenizer: Tokenizer) -> None:
    samples = [sample_of(f" so {number}", sp_tokenizer) for number in (7, 8, 9)]
    builder = builder_of(sp_tokenizer, traces_per_record=4)
    traces = builder.traces(record_of(samples, sp_tokenizer), 0)
    said = [tuple(t.ids[t.roles == Role.DEVIATION].tolist()) for t in traces]
    assert len(set(said[:3])) == 3 and said[3] == said[0]


def test_at_most_so_many_deviations_each_as_likely() -> None:
    gaps = [sampled.Deviation(cut, np.array([1]), 0) for cut in range(5)]
    rng = np.random.default_rng(0)
    drawn: Counter[int] = Counter()
    for _ in range(2000):
        chosen = sampled.choose(gaps, rng, max_deviations=2)
        assert len(chosen) == 2 and chosen[0].cut < chosen[1].cut
        drawn.update(d.cut for d in chosen)
    assert all(700 < number < 900 for number in drawn.values())


def test_the_first_piece_tells_nothing_about_a_sample_deviation(any_tokenizer: Tokenizer) -> None:
    """SPEC 2.5: alignment adds no mark; wrong tokens of the right class stay of that class."""
    rng = np.random.default_rng(3)
    reference = any_tokenizer.encode(REFERENCE, continuation=True)
    by_class = {
        kind: np.flatnonzero((any_tokenizer.class_of == kind) & ~any_tokenizer.is_special)
        for kind in range(len(PIECE_CLASSES))
    }
    builder = builder_of(any_tokenizer)
    drawn, due = Counter[int](), Counter[int]()
    for _ in range(400):
        ids = reference.copy()
        place = int(rng.integers(len(ids)))
        ids[place] = rng.choice(by_class[int(any_tokenizer.class_of[ids[place]])])
        (trace,) = builder.traces(record_of([{"ids": ids.tolist()}], any_tokenizer), 0)
        for segment in trace.segments():
            if segment.role == Role.DEVIATION:
                drawn[int(any_tokenizer.class_of[segment.ids[0]])] += 1
                correction = trace.ids[segment.start + 2 * len(segment.ids)]
                due[int(any_tokenizer.class_of[correction])] += 1
    assert drawn == due and drawn.total() > 150


@pytest.mark.parametrize("special", ["undo", "eos", "none"])
def test_samples_hold_ordinary_tokens_only(special: str, sp_tokenizer: Tokenizer) -> None:
    token = {"undo": sp_tokenizer.undo_id, "eos": sp_tokenizer.eos_id,
             "none": sp_tokenizer.size}[special]  # fmt: skip
    record = record_of([{"ids": [9]}, {"ids": [9, token]}], sp_tokenizer)
    with pytest.raises(TraceError, match=rf"r\.jsonl:3: samples\[1\]\.ids\[1\]: id {token} is"):
        builder_of(sp_tokenizer).traces(record, 0)


def test_samples_of_another_tokenizer(sp_tokenizer: Tokenizer, bpe_tokenizer: Tokenizer) -> None:
    with pytest.raises(TraceError, match=r"sampled_with: the samples are ids of another"):
        builder_of(sp_tokenizer).traces(record_of([{"ids": [9]}], bpe_tokenizer), 0)


def test_a_sample_too_far_away(sp_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "MAX_CELLS", 10)
    record = record_of([sample_of("no no no no", sp_tokenizer)], sp_tokenizer)
    with pytest.raises(TraceError, match=r"samples: .* cells, expected at most 10, expected short"):
        builder_of(sp_tokenizer).traces(record, 0)
