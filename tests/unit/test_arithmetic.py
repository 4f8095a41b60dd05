"""Dependency arithmetic, solved a second time from the prompt's text alone."""

from __future__ import annotations

import json
import operator
import re
from collections import Counter
from typing import Any

import pytest

from nmar_ds.traces.answers import answered
from nmar_ds.traces.arithmetic import MAX_OPERATIONS, problem
from nmar_ds.traces.records import parse_line

CALCULATE = {"+": operator.add, "-": operator.sub, "*": operator.mul}
NAME = r"[A-Z][a-z]+ [a-z]+"


def read(prompt: str) -> tuple[dict[str, list[str]], str]:
    """Definitions by name, as words of the right side; and what is asked for."""
    body, asked = re.fullmatch(rf"(.*\.) ({NAME})\?\n", prompt).groups()  # type: ignore[union-attr]
    definitions = {}
    for sentence in re.findall(rf"{NAME}: [^.]*\.", body):
        name, right = sentence[:-1].split(": ")
        assert name not in definitions, "defined twice"
        definitions[name] = re.findall(rf"{NAME}|\d+|[-+*]", right)
    assert " ".join(f"{n}: {' '.join(r)}." for n, r in definitions.items()) == body
    return definitions, asked


def value(name: str, definitions: dict[str, list[str]]) -> int:
    if name.isdigit():
        return int(name)
    words = definitions[name]
    if len(words) == 1:
        return int(words[0])
    left, sign, right = words
    return int(CALCULATE[sign](value(left, definitions), value(right, definitions)) % 23)


def needed_by(name: str, definitions: dict[str, list[str]]) -> set[str]:
    found = {name}
    for word in definitions[name]:
        if word in definitions:
            found |= needed_by(word, definitions)
    return found


def require_solved(record: dict[str, Any], num_operations: int) -> None:
    definitions, asked = read(record["prompt"])
    needed = needed_by(asked, definitions)
    assert sum(len(definitions[name]) == 3 for name in needed) == num_operations
    done: list[str] = []
    for step in record["steps"]:
        name, *middle, end = re.split(r" = ", step["text"].strip().rstrip(";"))
        words = definitions[name]
        assert int(end) == value(name, definitions)
        if len(words) == 3:
            numbers = [str(value(word, definitions)) for word in (words[0], words[2])]
            assert middle == [f"{numbers[0]} {words[1]} {numbers[1]}"]
        else:
            assert middle == []
        uses = {word for word in words if word in definitions}
        assert {done[n] for n in step["depends_on"]} == uses
        assert uses <= set(done), "a step before what it needs"
        done.append(name)
    assert done[-1] == asked and set(done) == needed and len(done) == len(needed)
    assert record["answer"] == str(value(asked, definitions))


@pytest.mark.parametrize("num", [1, 2, 5, 12, MAX_OPERATIONS])
def test_every_problem_is_solved_as_its_prompt_defines_it(num: int) -> None:
    for number in range(60):
        require_solved(problem(4, number, operations=(num, num), distractors=(0, 6)), num)


def test_a_problem_is_a_record_whose_answer_ends_it() -> None:
    for number in range(50):
        fields = problem(0, number, operations=(1, 8))
        record = parse_line(json.dumps(fields).encode(), path="f", line=1)
        text = record.turns[0].reference
        assert answered(text, stopped=True, reference=text, answer=record.answer)
        assert len(record.steps) == len(fields["steps"])


def test_problems_depend_on_seed_and_number_alone() -> None:
    one = [problem(1, number, operations=(2, 6)) for number in range(40)]
    assert [problem(1, number, operations=(2, 6)) for number in reversed(range(40))] == one[::-1]
    assert problem(2, 0, operations=(2, 6)) != one[0]
    assert len({record["prompt"] for record in one}) == 40


def test_difficulty_distractors_and_order_are_spread() -> None:
    records = [problem(3, n, operations=(2, 5), distractors=(1, 3)) for n in range(400)]
    groups = Counter(record["group"] for record in records)
    assert set(groups) == {f"operations-{n}" for n in (2, 3, 4, 5)} and min(groups.values()) > 60
    extra = Counter(len(read(r["prompt"])[0]) - len(r["steps"]) for r in records)
    assert set(extra) == {1, 2, 3} and min(extra.values()) > 90
    # The order of the definitions says nothing about the order of the steps.
    first = Counter(
        list(read(r["prompt"])[0]).index(re.split(" = ", r["steps"][0]["text"])[0]) for r in records
    )
    assert len(first) > 5
    # Some step can be begun too early in nearly every problem, or `retry` would have no errors.
    waiting = sum(any(s["depends_on"] for s in r["steps"][1:]) for r in records)
    assert waiting > 380
    answers = Counter(record["answer"] for record in records)
    assert len(answers) == 23 and max(answers.values()) < 60


def test_only_the_operators_that_are_asked_for_are_drawn() -> None:
    for asked in (["+"], ["-", "*"]):
        records = [problem(6, n, operations=(2, 5), distractors=(1, 3), operators=asked)
                   for n in range(80)]  # fmt: skip
        for record in records:
            require_solved(record, int(record["group"].removeprefix("operations-")))
        assert set(re.findall(r"[-+*]", " ".join(r["prompt"] for r in records))) == set(asked)
