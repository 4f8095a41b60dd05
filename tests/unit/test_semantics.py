"""Traces under `token`, `span` and `reset`: every builder against a reducer written here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_builders import deviating, ids_record, record_of, records_and_pool, text_turns
from tiny_stores import prepare_store
from tiny_tokenizers import sums

from nmar_ds.data.store import Store
from nmar_ds.errors import ConfigError, TraceError
from nmar_ds.traces.assembly import Deviation, Turn, assemble, check, move_starts, said_by
from nmar_ds.traces.boundaries import boundary_ids, machine_of
from nmar_ds.traces.builders import encode_record, trace_of_ids
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.reduction import Machine
from nmar_ds.traces.schema import Role, Trace

PLAIN = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
SEMANTICS = ["token", "span", "reset"]
GRAMMAR = {
    "token": r"x?p?(ebc?)*(xp?(ebc?)*)*",
    "span": r"x?p?(ebc?)*(xp?(ebc?)*)*",
    "reset": r"x?(p|(eb)+c)(x(p|(eb)+c))*",
}
Write = Callable[..., Path]


def say(trace: Trace, machine: Machine) -> tuple[list[int], int]:
    """What a trace says, from SPEC 2's table: one response at a time, rewritten at each undo.

    Returns:
        The ids that are left, and the number of undos that found nothing to take back.
    """
    said: list[int] = []
    response: list[int] = []
    num_strays = 0
    for token, role in zip(trace.ids.tolist(), trace.roles.tolist(), strict=True):
        if role == Role.PROMPT:
            said, response = [*said, *response, token], []
        elif token != machine.undo_id:
            response = [*response, token]
        elif not response:
            num_strays += 1
        elif machine.semantics == "token":
            response = response[:-1]
        elif machine.semantics == "reset":
            response = []
        else:
            places = [n for n, t in enumerate(response[:-1]) if t in machine.boundary_ids]
            response = response[: places[-1] + 1] if places else []
    return said + response, num_strays


def cut_short(trace: Trace, place: int) -> Trace:
    return replace(trace, ids=trace.ids[:place], roles=trace.roles[:place])


def assert_right(trace: Trace, turns: Sequence[Turn], machine: Machine) -> None:
    """SPEC 1 and 2 for any semantics, without the code under test.

    Args:
        trace: assembled.
        turns: as drawn, before anything was moved.
        machine: its semantics.
    """
    said = [
        int(i) for turn in turns for part in (turn.prompt_ids, turn.reference_ids) for i in part
    ]
    assert say(trace, machine) == (said, 0)
    segments = list(trace.segments())
    letters = "".join("xpebc"[segment.role] for segment in segments)
    assert re.fullmatch(GRAMMAR[machine.semantics], letters), letters
    drawn = [(turn, deviation) for turn in turns for deviation in turn.deviations]
    deviations = [segment for segment in segments if segment.role == Role.DEVIATION]
    assert len(deviations) == len(trace.onsets) == len(drawn)
    for segment, onset, (turn, deviation) in zip(deviations, trace.onsets, drawn, strict=True):
        start, end = segment.start, segment.start + len(segment.ids)
        before, _ = say(cut_short(trace, start), machine)
        prompts = np.flatnonzero(trace.roles[:start] == Role.PROMPT)
        floor = len(say(cut_short(trace, prompts[-1] + 1), machine)[0]) if len(prompts) else 0
        # Where it may start: at base, or right after a boundary.
        assert {
            "token": True,
            "span": len(before) == floor or before[-1] in machine.boundary_ids,
            "reset": len(before) == floor,
        }[machine.semantics]
        # What was drawn ends it; what was moved is right, and no longer than it has to be.
        num_moved = end - start - len(deviation.ids)
        assert len(before) - floor == deviation.cut - num_moved
        assert segment.ids[num_moved:].tolist() == deviation.ids.tolist()
        moved = turn.reference_ids[deviation.cut - num_moved : deviation.cut].tolist()
        assert segment.ids[:num_moved].tolist() == moved
        assert machine.semantics != "token" or not moved
        assert not set(moved) & set(machine.boundary_ids)
        assert onset == start + num_moved + deviation.onset
        # As many undos as take it back whole: one fewer leaves something, one more is too many.
        undone = end
        while trace.ids[undone] == machine.undo_id:
            undone += 1
        assert say(cut_short(trace, undone), machine) == (before, 0)
        assert len(say(cut_short(trace, undone - 1), machine)[0]) > len(before)
        inside = sum(int(t) in machine.boundary_ids for t in segment.ids[:-1])
        expected = {"token": end - start, "span": 1 + inside, "reset": 1}[machine.semantics]
        assert undone - end == expected


def assembled(turns: Sequence[Turn], machine: Machine, tokenizer: Tokenizer) -> Trace:
    moved = [move_starts(turn, machine) for turn in turns]
    trace = assemble(moved, machine=machine, line=3, source=0)
    check(trace, tokenizer=tokenizer, machine=machine, path="r.jsonl", said=said_by(turns))
    return trace


ALPHABET = list(range(300, 306))


@st.composite
def some_turns(draw: st.DrawFn, eos_id: int) -> list[Turn]:
    """Turns over six ids: places coincide, deviations start rightly, repeat and end anywhere."""
    tokens = st.sampled_from(ALPHABET)
    turns = []
    for number in range(draw(st.integers(1, 3))):
        prompt = draw(st.lists(tokens, min_size=min(number, 1), max_size=3))
        reference = [*draw(st.lists(tokens, max_size=9)), eos_id]
        cuts = sorted(draw(st.lists(st.integers(0, len(reference) - 1), max_size=4)))
        deviations = []
        for cut in cuts:
            right = reference[cut : cut + draw(st.integers(0, 2))]
            right = right[:-1] if right[-1:] == [eos_id] else right
            wrong = reference[cut + len(right)]
            first = draw(st.sampled_from([token for token in ALPHABET if token != wrong]))
            ids = [*right, first, *draw(st.lists(tokens, max_size=4))]
            deviations.append(Deviation(cut, np.array(ids, np.int32), len(right)))
        turns.append(
            Turn(
                prompt_ids=np.array(prompt, np.int32),
                reference_ids=np.array(reference, np.int32),
                deviations=tuple(deviations),
            )
        )
    return turns


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_random_turns_reduce_to_what_they_say(semantics: str, sp_tokenizer: Tokenizer) -> None:
    seen: Counter[str] = Counter()

    @PLAIN
    @given(
        turns=some_turns(sp_tokenizer.eos_id),
        boundaries=st.sets(st.sampled_from(ALPHABET), min_size=1, max_size=4),
    )
    def run(turns: list[Turn], boundaries: Collection[int]) -> None:
        ids = frozenset(boundaries) if semantics == "span" else frozenset()
        machine = Machine(sp_tokenizer.undo_id, semantics, ids)
        trace = assembled(turns, machine, sp_tokenizer)
        assert_right(trace, turns, machine)
        segments = list(trace.segments())
        letters = "".join("xpebc"[segment.role] for segment in segments)
        deviations = [segment.ids.tolist() for segment in segments if segment.role == 2]
        seen["several turns"] += letters.count("x") > 1
        seen["no correction between"] += "ebeb" in letters
        seen["correction between"] += "ebceb" in letters
        seen["ends in a boundary"] += any(d[-1] in boundaries for d in deviations)
        seen["boundary inside"] += any(set(d[:-1]) & set(boundaries) for d in deviations)
        seen["moved"] += sum(map(len, deviations)) > sum(
            len(d.ids) for turn in turns for d in turn.deviations
        )

    run()
    expected = {"several turns", "no correction between", "ends in a boundary", "boundary inside"}
    expected |= {"correction between"} if semantics != "reset" else set()
    expected |= {"moved"} if semantics != "token" else set()
    assert {name for name in seen if seen[name] > 5} == expected, seen


def test_by_hand(sp_tokenizer: Tokenizer) -> None:
    """a b . c d . with a wrong token at d, and then another one at c."""
    a, b, c, d, dot, w = ALPHABET
    undo, stop = sp_tokenizer.undo_id, sp_tokenizer.eos_id
    wrongs = ([w], [w, dot, w], [w, dot])
    for wrong, num_span in zip(wrongs, (1, 2, 1), strict=True):
        turn = Turn(
            prompt_ids=np.array([a], np.int32),
            reference_ids=np.array([a, b, dot, c, d, dot, stop], np.int32),
            deviations=(Deviation(4, np.array(wrong, np.int32), 0),),
        )
        token = assembled([turn], Machine(undo), sp_tokenizer)
        assert token.ids.tolist() == [
            a, a, b, dot, c, *wrong, *[undo] * len(wrong), d, dot, stop
        ]  # fmt: skip
        span = assembled([turn], Machine(undo, "span", frozenset([dot])), sp_tokenizer)
        assert span.ids.tolist() == [
            a, a, b, dot, c, *wrong, *[undo] * num_span, c, d, dot, stop
        ]  # fmt: skip
        assert "".join("xpebc"[s.role] for s in span.segments()) == "xpebc"
        assert span.onsets == (5,) and span.roles[4] == Role.DEVIATION
        reset = assembled([turn], Machine(undo, "reset"), sp_tokenizer)
        assert reset.ids.tolist() == [
            a, a, b, dot, c, *wrong, undo, a, b, dot, c, d, dot, stop
        ]  # fmt: skip
        assert "".join("xpebc"[s.role] for s in reset.segments()) == "xebc"
        assert reset.onsets == (5,)


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("name", ["sp", "bpe", "bpe_prefix"])
def test_records_of_text(name: str, semantics: str, request: pytest.FixtureRequest) -> None:
    """`given` records over several turns, whose cuts fall anywhere in words."""
    tokenizer: Tokenizer = request.getfixturevalue(f"{name}_tokenizer")
    machine = machine_of(tokenizer, semantics, ["o", "1", ","] if semantics == "span" else ())
    built = 0

    @settings(PLAIN, max_examples=60)
    @given(text_turns())
    def run(pieces: list[dict[str, object]]) -> None:
        nonlocal built
        try:
            turns = encode_record(record_of({"segments": pieces}), tokenizer).turns
        except TraceError:  # nothing wrong in it, or an ambiguous space: not of interest here
            return
        built += 1
        assert_right(assembled(turns, machine, tokenizer), turns, machine)

    run()
    assert built > 20


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("builder", ["random", "hard"])
def test_made_traces(builder: str, semantics: str, any_tokenizer: Tokenizer) -> None:
    records, pool = records_and_pool(any_tokenizer, 60)
    machine = machine_of(any_tokenizer, semantics, [" ", ":", ","] if semantics == "span" else ())
    shapes: Counter[str] = Counter()
    for record in records:
        turns = deviating(builder, record, any_tokenizer, pool)
        trace = assembled(turns, machine, any_tokenizer)
        assert_right(trace, turns, machine)
        shapes["".join("xpebc"[s.role] for s in trace.segments())] += 1
    assert any("ebeb" in shape for shape in shapes)
    assert any("ebceb" in shape for shape in shapes) == (semantics != "reset")


# --- boundary texts ---


def test_a_boundary_is_a_token_whose_text_ends_with_one_of_the_texts(
    any_tokenizer: Tokenizer,
) -> None:
    found = boundary_ids(any_tokenizer, ["1", "so", "1"])
    spelled = {
        token: any_tokenizer.decode([token], continuation=True)
        for token in range(any_tokenizer.size)
        if not any_tokenizer.is_special[token]
    }
    assert found == {t for t, text in spelled.items() if text.endswith(("1", "so"))}
    assert len({spelled[token] for token in found}) > 1
    with pytest.raises(ConfigError) as caught:
        boundary_ids(any_tokenizer, ["1", "1\n\n1"])
    assert "undo.boundaries: '1\\n\\n1': no token of" in str(caught.value)
    with pytest.raises(ConfigError, match="'<UNDO>': no token"):  # specials have no text
        boundary_ids(any_tokenizer, ["<UNDO>"])


# --- records of ids ---


def test_records_of_ids_carry_starts_and_counts(sp_tokenizer: Tokenizer) -> None:
    undo, stop = sp_tokenizer.undo_id, sp_tokenizer.eos_id
    a, b, c, d, dot, w = ALPHABET
    span, reset = Machine(undo, "span", frozenset([dot])), Machine(undo, "reset")

    def refusal(machine: Machine, *pieces: tuple[str, list[int]]) -> str | tuple[int, ...]:
        trace = trace_of_ids(ids_record(*pieces), source=0)
        try:
            check(trace, tokenizer=sp_tokenizer, machine=machine, path="r.jsonl")
        except TraceError as error:
            return str(error)
        return trace.onsets

    good_span = [
        ("prompt", [a]), ("prefix", [a, dot]), ("deviation", [b, w, dot, dot]), ("undo", [undo] * 2),
        ("deviation", [b, c, w]), ("undo", [undo]), ("correction", [b, c, dot]),
        ("deviation", [w]), ("undo", [undo]), ("correction", [d, stop]),
        ("prompt", [d]), ("deviation", [w]), ("undo", [undo]), ("correction", [a, stop]),
    ]  # fmt: skip
    assert refusal(span, *good_span) == (4, 11, 16, 21)
    wrong_start = refusal(
        span, ("prompt", [a]), ("prefix", [a, dot, b]), ("deviation", [w]), ("undo", [undo]),
        ("correction", [b, stop]),
    )  # fmt: skip
    piece = sp_tokenizer.piece(b)
    assert wrong_start == (
        f"r.jsonl:3: segments[2]: a deviation right after {piece!r} (id {b}), expected it at the "
        "start of the response or right after a boundary under 'span'"
    )
    for position, found in ((3, 1), (3, 3), (5, 2), (12, 2)):
        pieces = list(good_span)
        pieces[position] = ("undo", [undo] * found)
        length = len(pieces[position - 1][1])
        derived = 2 if position == 3 else 1
        assert refusal(span, *pieces) == (
            f"r.jsonl:3: segments[{position}]: {found} undos after a deviation of {length} tokens, "
            f"expected {derived} under 'span'"
        )
    good_reset = [
        ("prompt", [a]), ("deviation", [a, w, dot, w]), ("undo", [undo]), ("deviation", [w]),
        ("undo", [undo]), ("correction", [a, b, stop]), ("prompt", [a]), ("prefix", [a, stop]),
    ]  # fmt: skip
    assert refusal(reset, *good_reset) == (2, 6)
    stray = [*good_reset[:2], ("undo", [undo] * 2), *good_reset[3:]]
    assert "segments[2]: 2 undos after a deviation of 4 tokens, expected 1" in str(
        refusal(reset, *stray)
    )
    assert refusal(
        reset, ("prompt", [a]), ("prefix", [a]), ("deviation", [w]), ("undo", [undo]),
        ("correction", [a, stop]),
    ) == (
        "r.jsonl:3: segments[2].role: deviation after prefix, expected prompt or the end under "
        "'reset'"
    )  # fmt: skip
    assert refusal(
        reset, ("deviation", [w]), ("undo", [undo]), ("correction", [a]), ("deviation", [w]),
        ("undo", [undo]), ("correction", [a, stop]),
    ) == (
        "r.jsonl:3: segments[3].role: deviation after correction, expected prompt or the end under "
        "'reset'"
    )  # fmt: skip


# --- the store ---


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_the_store_keeps_the_machine_and_counts_what_was_moved(
    semantics: str, write_jsonl: Write, sp_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    boundaries = [",", ":"] if semantics == "span" else []
    asked: dict[str, Any] = {
        "builder": "hard", "max_length": 400, "max_deviations": 2, "max_deviation_length": 3,
        "semantics": semantics, "boundaries": boundaries,
    }  # fmt: skip
    manifest = prepare_store([write_jsonl(sums(40, seed=3))], tmp_path / "s", sp_tokenizer, **asked)
    store = Store(tmp_path / "s")
    machine = store.machine
    assert machine == machine_of(sp_tokenizer, semantics, boundaries)
    assert manifest["semantics"] == semantics and manifest["boundaries"] == boundaries
    assert manifest["boundary_ids"] == sorted(boundary_ids(sp_tokenizer, boundaries))
    num_moved = num_deviations = 0
    for index in range(len(store)):
        trace = store.trace(index)
        check(trace, tokenizer=sp_tokenizer, machine=machine, path="s")
        onsets = iter(trace.onsets)
        for segment in trace.segments():
            if segment.role == Role.DEVIATION:
                onset = next(onsets)
                num_moved += onset - segment.start
                num_deviations += 1
                # The bound is that of the wrong part.
                assert 1 <= segment.start + len(segment.ids) - onset <= 3
    assert num_deviations == manifest["counts"]["deviations"] > 40
    assert manifest["counts"]["moved_tokens"] == num_moved
    assert (num_moved > 0) == (semantics != "token")


def test_given_records_are_moved_too(
    write_jsonl: Write, sp_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    record = {"prompt": "1+1?", "reference": "so, 12", "deviations": [{"at": 5, "text": "3"}]}
    source = write_jsonl([record])
    shapes = {}
    for semantics, boundaries in (("token", []), ("span", [" "]), ("reset", [])):
        manifest = prepare_store(
            [source], tmp_path / semantics, sp_tokenizer, builder="given", max_length=99,
            semantics=semantics, boundaries=boundaries,
        )  # fmt: skip
        trace = Store(tmp_path / semantics).trace(0)
        shapes[semantics] = {
            s.role.label: sp_tokenizer.decode(s.ids, continuation=True) for s in trace.segments()
        }
        assert manifest["counts"]["moved_tokens"] == trace.onsets[0] - int(
            np.flatnonzero(trace.roles == Role.DEVIATION)[0]
        )
        assert int((trace.roles == Role.UNDO).sum()) == 1
    assert shapes["token"] == {
        "prompt": "1+1?", "prefix": "so, 1", "deviation": "3", "undo": "", "correction": "2"
    }  # fmt: skip
    assert shapes["span"] == {
        "prompt": "1+1?", "prefix": "so, ", "deviation": "13", "undo": "", "correction": "12"
    }  # fmt: skip
    assert shapes["reset"] == {
        "prompt": "1+1?", "deviation": "so, 13", "undo": "", "correction": "so, 12"
    }  # fmt: skip
