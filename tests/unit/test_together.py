"""Traces looked at together: the verdict of `assembly.check` on each, and the same store."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import sums

from nmar_ds.errors import TraceError
from nmar_ds.traces import units
from nmar_ds.traces.assembly import Deviation, Turn, assemble, check, move_starts, said_by
from nmar_ds.traces.building import BuilderSettings
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.reduction import Machine
from nmar_ds.traces.schema import IdArray, Role, Trace
from nmar_ds.traces.sources import SourceSettings, open_source
from nmar_ds.traces.together import all_hold
from nmar_ds.traces.units import Recipe, build, units_of

BOUNDARY = 9
SEMANTICS = ("token", "span", "reset")
Case = tuple[Trace, IdArray | None]
Write = Callable[..., Path]


def machine_of(tokenizer: Tokenizer, semantics: str) -> Machine:
    stops = frozenset({BOUNDARY} if semantics == "span" else ())
    return Machine(tokenizer.undo_id, semantics, stops)


@st.composite
def turns(draw: st.DrawFn, eos_id: int) -> list[Turn]:
    token = st.integers(7, 11)  # the boundary among them
    found = []
    for number in range(draw(st.integers(1, 2))):
        right = [*draw(st.lists(token, min_size=1, max_size=5)), eos_id]
        deviations = [
            Deviation(draw(st.integers(0, len(right) - 1)),
                      np.array(draw(st.lists(token, min_size=1, max_size=4)), np.int32), 0)
            for _ in range(draw(st.integers(0, 3)))
        ]  # fmt: skip
        found.append(Turn(
            prompt_ids=np.array(draw(st.lists(token, min_size=number, max_size=3)), np.int32),
            reference_ids=np.array(right, np.int32),
            deviations=tuple(sorted(deviations, key=lambda d: d.cut)),
        ))  # fmt: skip
    return found


@st.composite
def cases(draw: st.DrawFn, tokenizer: Tokenizer, machine: Machine) -> Case:
    """A trace that is right, or right but for one or two things."""
    plain = draw(turns(tokenizer.eos_id))
    moved = [move_starts(turn, machine) for turn in plain] if draw(st.booleans()) else plain
    trace = assemble(moved, machine=machine, line=1, source=0)
    said: IdArray | None = said_by(plain) if draw(st.booleans()) else None
    ids, roles, onsets = trace.ids.tolist(), trace.roles.tolist(), list(trace.onsets)
    odd = st.sampled_from([-1, tokenizer.undo_id, tokenizer.eos_id, BOUNDARY, 8, tokenizer.size])
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(ids) - 1))
        what = draw(st.sampled_from(["id", "role", "drop", "twice", "swap", "onset", "said"]))
        if what == "id":
            ids[at] = draw(odd)
        elif what == "role":
            roles[at] = draw(st.integers(0, 5))
        elif what == "drop" and len(ids) > 1:
            del ids[at], roles[at]
        elif what == "twice":
            ids.insert(at, ids[at])
            roles.insert(at, roles[at])
        elif what == "swap" and at:
            ids[at - 1 : at + 1] = ids[at], ids[at - 1]
            roles[at - 1 : at + 1] = roles[at], roles[at - 1]
        elif what == "onset":
            onsets = [onset + draw(st.integers(-2, 2)) for onset in onsets]
            onsets += draw(st.lists(st.integers(0, 20), max_size=1))
        elif what == "said" and said is not None:
            said = draw(st.sampled_from([said[:-1], np.append(said, np.int32(8)), said[::-1]]))
    return replace(
        trace, ids=np.array(ids, np.int32), roles=np.array(roles, np.uint8), onsets=tuple(onsets)
    ), said


def passes(case: Case, tokenizer: Tokenizer, machine: Machine) -> bool:
    try:
        check(case[0], tokenizer=tokenizer, machine=machine, path="r.jsonl", said=case[1])
    except TraceError:
        return False
    except ValueError:
        return False  # a role that does not exist
    return True


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_the_verdict_is_that_of_each_alone(semantics: str, small_tokenizer: Tokenizer) -> None:
    machine = machine_of(small_tokenizer, semantics)
    seen: Counter[bool] = Counter()

    @settings(max_examples=1500, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.lists(cases(small_tokenizer, machine), min_size=1, max_size=3))
    def run(found: list[Case]) -> None:
        expected = [passes(case, small_tokenizer, machine) for case in found]
        seen.update(expected)
        for case, good in zip(found, expected, strict=True):
            assert all_hold([case[0]], [case[1]], tokenizer=small_tokenizer,
                            machine=machine) == good, case  # fmt: skip
        together = all_hold(
            [trace for trace, _ in found], [said for _, said in found],
            tokenizer=small_tokenizer, machine=machine,
        )  # fmt: skip
        assert together == all(expected)

    run()
    assert min(seen[True], seen[False]) > 300, seen


X, P, E, B, C = Role
WRONG = {
    "too few, then too many": [(P, 8, 8), (E, 9, 9), (B, 1), (E, 9), (B, 2), (C, 8)],
    "too many at the end": [(P, 8), (E, 9, 9), (B, 1), (E, 9), (B, 2)],
    "a turn that says nothing": [(X, 8), (E, 9), (B, 1), (X, 8), (P, 8)],
    "the last turn says nothing": [(X, 8), (P, 8), (X, 8), (E, 9), (B, 1)],
    "into the prompt": [(X, 8, 8), (E, 9), (B, 2), (C, 8)],
}


@pytest.mark.parametrize("name", WRONG)
def test_what_leaves_the_right_tokens_and_is_wrong(name: str, small_tokenizer: Tokenizer) -> None:
    machine = machine_of(small_tokenizer, "token")
    ids, roles, onsets = list[int](), list[int](), list[int]()
    for role, *tokens in WRONG[name]:
        if role == E:
            onsets.append(len(ids))
        given_ids = [machine.undo_id] * tokens[0] if role == B else tokens
        ids, roles = ids + given_ids, roles + [role] * len(given_ids)
    trace = Trace(
        ids=np.array(ids, np.int32), roles=np.array(roles, np.uint8), onsets=tuple(onsets)
    )
    assert not passes((trace, None), small_tokenizer, machine)
    assert not all_hold([trace], [None], tokenizer=small_tokenizer, machine=machine)


def test_none_and_empty_ones(small_tokenizer: Tokenizer) -> None:
    machine = machine_of(small_tokenizer, "token")
    assert all_hold([], [], tokenizer=small_tokenizer, machine=machine)
    nothing = Trace(ids=np.empty(0, np.int32), roles=np.empty(0, np.uint8))
    assert not all_hold([nothing], [None], tokenizer=small_tokenizer, machine=machine)


def recipe_of(tokenizer: Tokenizer, refused: str, overlong: str = "error") -> Recipe:
    return Recipe(
        builder=BuilderSettings(name="given"), tokenizer=tokenizer,
        machine=Machine(tokenizer.undo_id), chat=None, max_length=60,
        overlong=overlong, refused=refused,  # type: ignore[arg-type]
    )  # fmt: skip


def written_ids(undo_id: int, num_undos: int, long: int = 1) -> dict[str, object]:
    return {"segments": [
        {"role": "prompt", "ids": [8]}, {"role": "prefix", "ids": [8] * long},
        {"role": "deviation", "ids": [9, 9]}, {"role": "undo", "ids": [undo_id] * num_undos},
        {"role": "correction", "ids": [10]},
    ]}  # fmt: skip


@pytest.mark.parametrize("refused", ["error", "drop"])
@pytest.mark.parametrize("long", [1, 100])
def test_a_bad_trace_among_good_ones_is_named_and_counted(
    refused: str, long: int, small_tokenizer: Tokenizer, write_jsonl: Write
) -> None:
    """Also one that would be left out for its length; and a bad record after it changes nothing."""
    undo_id = small_tokenizer.undo_id
    good = [written_ids(undo_id, 2) for _ in range(5)]
    path = write_jsonl([*good, written_ids(undo_id, 1, long), *good, {"reference": ""}])
    sources = [open_source(SourceSettings(path=path))]
    (unit,) = units_of(sources)
    recipe = recipe_of(small_tokenizer, refused, "drop")
    if refused == "error":
        with pytest.raises(TraceError, match=r":6: segments\[3\]: 1 undos after a deviation of 2"):
            build(recipe, sources, unit, None)
        return
    facts, arrays = build(recipe, sources, unit, None)
    assert facts["counts"]["stored"] == 10 == len(arrays["lengths"])
    assert [row["line"] for row in facts["refused"]] == [6, 12]
    assert facts["counts"]["dropped"] == 0 and facts["counts"]["refused"] == 2


@pytest.mark.parametrize("builder", ["random", "hard"])
def test_together_and_one_by_one_build_the_same(
    builder: str, sp_tokenizer: Tokenizer, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [open_source(SourceSettings(path=write_jsonl(sums(60))))]
    recipe = replace(
        recipe_of(sp_tokenizer, "error"), max_length=400,
        builder=BuilderSettings(name=builder, max_deviations=3, clean_share=0.2),  # type: ignore[arg-type]
    )  # fmt: skip
    (unit,) = units_of(sources)
    pool = units.pool_of(sp_tokenizer, [units.references(recipe, sources, unit)])
    first = build(recipe, sources, unit, pool)
    asked: list[int] = []

    def never(traces: list[Trace], *_: object, **__: object) -> bool:
        asked.append(len(traces))
        return not traces

    monkeypatch.setattr(units, "all_hold", never)
    again = build(recipe, sources, unit, pool)
    assert asked == [60, 0], "all at once, then each by itself"
    assert json.dumps(first[0]) == json.dumps(again[0])
    assert all(np.array_equal(first[1][name], again[1][name]) for name in first[1])
    assert Role.UNDO in first[1]["roles"]
