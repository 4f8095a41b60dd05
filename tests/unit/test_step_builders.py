"""Builders whose deviations are texts of the record: pairs, retry, weak_retry."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from invariants import assert_invariants

from nmar_ds.errors import TraceError
from nmar_ds.traces.building import BuilderSettings, TraceBuilder
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.records import Record, parse_line
from nmar_ds.traces.reduction import Machine
from nmar_ds.traces.schema import Role, Trace
from nmar_ds.traces.text_builders import MAX_REPEATS, pair, retry

# Step 2 needs both before it, step 3 only the first: before step 1, step 3 could be taken.
STEPS = [
    {"text": " a = 3."},
    {"text": " e = 14.", "depends_on": [0]},
    {"text": " i = 17.", "depends_on": [0, 1]},
    {"text": " o = 5.", "depends_on": [0]},
]


def record_of(fields: dict[str, object], line: int = 3) -> Record:
    return parse_line(json.dumps(fields).encode(), path="r.jsonl", line=line)


def in_steps(line: int = 3) -> Record:
    return record_of({"prompt": "o?", "steps": STEPS, "answer": "5"}, line)


def builder_of(name: str, tokenizer: Tokenizer, **settings: object) -> TraceBuilder:
    asked = BuilderSettings(name=name, **settings)  # type: ignore[arg-type]
    return TraceBuilder(asked, tokenizer, Machine(tokenizer.undo_id))


def texts(trace: Trace, tokenizer: Tokenizer) -> list[tuple[str, object]]:
    return [
        (s.role.label, len(s.ids) if s.role == Role.UNDO
         else tokenizer.decode(s.ids, continuation=True)) for s in trace.segments()
    ]  # fmt: skip


def replaced(record: Record) -> list[tuple[int, str]]:
    """For each deviation the number of the step it stands before, and the step it says."""
    ends = np.cumsum([len(step.text) for step in record.steps])
    found = []
    for at, text in record.turns[0].deviations:
        number = int(np.searchsorted(ends, at, side="right"))
        begin = int(ends[number]) - len(record.steps[number].text)
        found.append((number, record.turns[0].reference[begin:at] + text))
    return found


def test_a_weak_retry_is_any_later_step_and_a_retry_one_that_cannot_be_taken_yet() -> None:
    seen: dict[bool, set[tuple[int, str]]] = {True: set(), False: set()}
    for weak in (True, False):
        for seed in range(300):
            rng = np.random.default_rng(seed)
            seen[weak].update(replaced(retry(in_steps(), rng, rate=0.5, weak=weak)))
    by_text = [step["text"] for step in STEPS]
    assert seen[True] == {(i, by_text[j]) for i in range(4) for j in range(i + 1, 4)}
    # Before step 1: step 2 waits for it, step 3 does not; before steps 2 and 3 nothing waits.
    assert seen[False] == {(0, by_text[1]), (0, by_text[2]), (0, by_text[3]), (1, by_text[2])}


def test_retries_come_at_the_rate_asked_for_and_repeat_geometrically() -> None:
    rate, num = 0.3, 4000
    before_first = Counter(
        sum(number == 0 for number, _ in replaced(retry(in_steps(), np.random.default_rng(seed),
                                                        rate=rate, weak=True)))
        for seed in range(num)
    )  # fmt: skip
    for repeats in range(4):
        expected = num * rate**repeats * (1 - rate)
        assert abs(before_first[repeats] - expected) < 4.5 * expected**0.5, before_first


def test_a_rate_of_one_ends() -> None:
    written = retry(in_steps(), np.random.default_rng(0), rate=1.0, weak=True)
    assert len(written.turns[0].deviations) == 3 * MAX_REPEATS  # the last step has no later one


def test_steps_that_say_what_is_due_are_no_retries() -> None:
    same = record_of({"prompt": "?", "steps": [{"text": " x"}, {"text": " xy"}, {"text": " x"}]})
    rng = np.random.default_rng(0)
    for _ in range(50):
        found = retry(same, rng, rate=0.5, weak=True).turns[0].deviations
        assert {text for _, text in found} <= {"y"}  # " x" is how the reference goes on anyway


def test_pairs_depart_where_the_rejected_response_does(sp_tokenizer: Tokenizer) -> None:
    record = record_of({"prompt": "1+2?", "chosen": " so 3.", "rejected": " so 4, yes."})
    assert pair(record).turns[0].deviations == ((4, "4, yes."),)
    builder = builder_of("pairs", sp_tokenizer)
    (trace,) = builder.traces(record, 0)
    roles = [role for role, _ in texts(trace, sp_tokenizer)]
    assert roles == ["prompt", "prefix", "deviation", "undo", "correction"]
    said = "".join(str(t) for r, t in texts(trace, sp_tokenizer) if r in ("prefix", "deviation"))
    assert said == " so 4, yes."
    # A rejected response that only stops too early has nothing wrong in it.
    short = record_of({"prompt": "1+2?", "chosen": " so 3.", "rejected": " so"})
    (trace,) = builder.traces(short, 0)
    assert [role for role, _ in texts(trace, sp_tokenizer)] == ["prompt", "prefix"]
    assert builder.counts["without_error"] == 1


@pytest.mark.parametrize("name", ["pairs", "retry", "weak_retry"])
@pytest.mark.parametrize("delay", [None, (0, 0), (1, 3)])
def test_invariants(name: str, delay: tuple[int, int] | None, any_tokenizer: Tokenizer) -> None:
    builder = builder_of(name, any_tokenizer, retry_rate=0.5, traces_per_record=4, delay=delay)
    shapes: Counter[str] = Counter()
    for line in range(1, 30):
        record = in_steps(line)
        if name == "pairs":
            record = record_of({"prompt": "o?", "chosen": f" a = 3. e = {line}.",
                                "rejected": f" a = 3. o = {line + 1}, so the answer is yes."})  # fmt: skip
        for trace in builder.traces(record, 0):
            turns = [type("T", (), {"prompt_ids": trace.ids[trace.roles == Role.PROMPT],
                     "reference_ids": trace.ids[np.isin(trace.roles, [Role.PREFIX, Role.CORRECTION])]})]  # fmt: skip
            assert_invariants(trace, turns, any_tokenizer)  # type: ignore[arg-type]
            shapes["".join("xpebc"[s.role] for s in trace.segments())] += 1
            starts = [s.start for s in trace.segments() if s.role == Role.DEVIATION]
            lengths = [len(s.ids) for s in trace.segments() if s.role == Role.DEVIATION]
            for start, length, onset in zip(starts, lengths, trace.onsets, strict=True):
                if delay is not None:
                    assert length <= onset - start + 1 + delay[1]
    assert any("e" in shape for shape in shapes)
    if name == "weak_retry":
        assert any("ebeb" in shape for shape in shapes), "no repeat at one place"


def test_delay_is_uniform(sp_tokenizer: Tokenizer) -> None:
    builder = builder_of("pairs", sp_tokenizer, delay=(1, 3), traces_per_record=300)
    record = record_of({"prompt": "?", "chosen": "7", "rejected": "so the answer is yes and no."})
    lengths = Counter(int((t.roles == Role.DEVIATION).sum()) for t in builder.traces(record, 0))
    assert set(lengths) == {2, 3, 4} and min(lengths.values()) > 70


def test_what_a_builder_needs_is_asked_for(sp_tokenizer: Tokenizer) -> None:
    plain = record_of({"prompt": "1+1?", "reference": "2"})
    for name, field in (("pairs", "rejected"), ("retry", "steps"), ("weak_retry", "steps"),
                        ("on_policy", "samples")):  # fmt: skip
        with pytest.raises(TraceError, match=rf"r\.jsonl:3: {field}: missing, expected .*{name}"):
            builder_of(name, sp_tokenizer).traces(plain, 0)


def test_records_in_steps_serve_the_other_builders_too(sp_tokenizer: Tokenizer) -> None:
    (trace,) = builder_of("random", sp_tokenizer).traces(in_steps(), 0)
    assert Role.DEVIATION in trace.roles
