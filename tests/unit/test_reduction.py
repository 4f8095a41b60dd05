"""The stack machine against an independent naive one, and the table of SPEC 2."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmar_ds.errors import ConfigError
from nmar_ds.traces import reduction
from nmar_ds.traces.reduction import Machine
from nmar_ds.traces.schema import Role

UNDO = 9
BOUNDARIES = frozenset({5, 6})
SEMANTICS = ["token", "span", "reset"]
MACHINES = {
    name: Machine(UNDO, name, BOUNDARIES if name == "span" else frozenset()) for name in SEMANTICS
}
token_lists = st.lists(st.integers(1, UNDO), max_size=40)


def naive(ids: list[int], bases: list[int], semantics: str) -> tuple[list[int], list[int], int]:
    """Rewrite the sequence from the left, one undo at a time, keeping no stack.

    Returns:
        Surviving indices, heights, strays.
    """
    heights, strays = [], 0
    alive: list[int] = []
    for end in range(1, len(ids) + 1):
        alive, strays, floor = [], 0, 0
        for index in range(end):
            if index in bases:
                floor = len(alive)
            body, head = alive[floor:], alive[:floor]
            if ids[index] != UNDO:
                alive = [*alive, index]
            elif not body:
                strays += 1
            elif semantics == "token":
                alive = head + body[:-1]
            elif semantics == "reset":
                alive = head
            else:
                body = body[:-1]
                kept = [n for n, i in enumerate(body) if ids[i] in BOUNDARIES]
                alive = head + body[: kept[-1] + 1 if kept else 0]
        heights.append(len(alive))
    return alive, heights, strays


@pytest.mark.parametrize("semantics", SEMANTICS)
@settings(max_examples=300, deadline=None)
@given(ids=token_lists, bases=st.lists(st.integers(0, 40), max_size=4))
def test_reduction_equals_naive(semantics: str, ids: list[int], bases: list[int]) -> None:
    kept, heights, num_strays = naive(ids, bases, semantics)
    asked = {"machine": MACHINES[semantics], "bases": bases}
    array = np.array(ids, dtype=np.int32)
    assert reduction.reduce(array, **asked).tolist() == [ids[i] for i in kept]
    assert reduction.reduce(ids, **asked).tolist() == [ids[i] for i in kept]
    assert reduction.depths(array, **asked).tolist() == heights
    assert reduction.survivors(array, **asked).tolist() == [i in kept for i in range(len(ids))]
    assert reduction.strays(array, **asked) == num_strays


@settings(max_examples=200, deadline=None)
@given(ids=token_lists, bases=st.lists(st.integers(0, 40), max_size=3))
def test_survives_iff_no_later_height_is_lower(ids: list[int], bases: list[int]) -> None:
    asked = {"machine": Machine(UNDO), "bases": bases}
    heights = reduction.depths(ids, **asked)
    expected = [
        token != UNDO and bool((heights[place:] >= heights[place]).all())
        for place, token in enumerate(ids)
    ]
    assert reduction.survivors(ids, **asked).tolist() == expected


@pytest.mark.parametrize("semantics", SEMANTICS)
@settings(max_examples=200, deadline=None)
@given(
    prompt=st.lists(st.integers(1, 8), max_size=5),
    prefix=st.lists(st.integers(1, 8), max_size=5),
    deviation=st.lists(st.integers(1, 8), min_size=1, max_size=8),
)
def test_derived_undos_take_a_deviation_back_whole(
    semantics: str, prompt: list[int], prefix: list[int], deviation: list[int]
) -> None:
    if semantics == "span":
        prefix = [*prefix, 5] if prefix else []  # it starts at base or right after a boundary
    if semantics == "reset":
        prefix = []
    count = reduction.num_undos(deviation, MACHINES[semantics])
    asked = {"machine": MACHINES[semantics], "bases": [len(prompt)]}
    trace = prompt + prefix + deviation + [UNDO] * count
    assert reduction.reduce(trace, **asked).tolist() == prompt + prefix
    assert reduction.strays(trace, **asked) == 0
    # One fewer leaves something standing, or there would be a shorter answer.
    assert reduction.reduce(trace[:-1], **asked).tolist() != prompt + prefix


def test_table_of_semantics() -> None:
    ids = [1, 2, 5, 3, 5, 4, UNDO]
    token, span, reset = MACHINES.values()
    assert reduction.reduce(ids, token, [1]).tolist() == [1, 2, 5, 3, 5]
    assert reduction.reduce(ids, span, [1]).tolist() == [1, 2, 5, 3, 5]
    assert reduction.reduce([*ids, UNDO], span, [1]).tolist() == [1, 2, 5]
    assert reduction.reduce(ids, reset, [1]).tolist() == [1]
    assert reduction.num_undos([3, 5, 4], token) == 3
    assert reduction.num_undos([3, 5, 4], span) == 2
    assert reduction.num_undos([3, 4, 5], span) == 1
    assert reduction.num_undos([3, 5, 4], reset) == 1


def test_never_pops_into_a_prompt() -> None:
    ids = [1, 2, UNDO, 3, 4, UNDO, UNDO]
    asked = {"machine": Machine(UNDO), "bases": [2, 4]}
    assert reduction.reduce(ids, **asked).tolist() == [1, 2, 3]
    assert reduction.strays(ids, **asked) == 2


def test_bases_are_the_ends_of_prompts() -> None:
    roles = np.array([0, 0, 1, 1, 0, 1, 0], dtype=np.uint8)
    assert reduction.bases_of(roles) == [2, 5, 7]
    assert reduction.bases_of(roles[2:4]) == []
    assert reduction.bases_of(roles[:0]) == []
    assert Role.PROMPT == 0


def test_unknown_semantics_is_named() -> None:
    with pytest.raises(ConfigError, match="'spam', expected one of token, span, reset"):
        Machine(UNDO, "spam")


def test_boundaries_belong_to_span_alone() -> None:
    with pytest.raises(ConfigError, match="0 boundary ids under semantics 'span', expected some"):
        Machine(UNDO, "span")
    for name in ("token", "reset"):
        with pytest.raises(ConfigError, match=f"2 boundary ids under semantics '{name}'"):
            Machine(UNDO, name, BOUNDARIES)
