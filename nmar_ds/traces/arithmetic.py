"""Dependency arithmetic: quantities defined by each other in any order, worked out step by step.

    prompt  Rome cups: Oslo pens + 7. Oslo pens: 5. Bonn maps: Rome cups * Oslo pens. Bonn maps?
    steps   Oslo pens = 5; | Rome cups = 5 + 7 = 12; | Bonn maps = 12 * 5 = 14

All arithmetic is modulo 23. A record knows what each step takes from which other, so that a step
begun too early can be told from one that is due (`retry`, `weak_retry`). Its difficulty is the
number of operations that the answer needs; quantities that it does not need stand in the prompt as
well.

Source: the design follows iGSM (Physics of Language Models 2.1, arXiv 2407.20311): a random graph
of quantities, arithmetic modulo 23, one step a sentence, difficulty counted in operations. The
texts, names and the way graphs are drawn are our own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MODULUS = 23
VERSION = 1  # of what a seed gives
PLACES = ("Bern", "Bonn", "Brno", "Cork", "Gent", "Graz", "Kiel", "Lund", "Metz", "Oslo", "Pisa",
          "Rome", "Riga", "Sion", "Troy", "Turin")  # fmt: skip
THINGS = ("bags", "beds", "cars", "cups", "dogs", "hats", "jars", "keys", "maps", "nets", "pans",
          "pens", "pots", "rugs", "saws", "toys")  # fmt: skip
OPERATORS = ("+", "-", "*")
MAX_OPERATIONS = 60  # with as many leaves, and distractors: names for all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class _Quantity:
    """A number, or an operation on two operands; an operand is a quantity's index or a constant.

    Attributes:
        operator: "" for a number.
        left: index of a quantity; the number itself where there is no operator.
        right: index of a quantity, or a constant.
        right_is_constant: which of both.
    """

    operator: str = ""
    left: int = 0
    right: int = 0
    right_is_constant: bool = True

    @property
    def needs(self) -> tuple[int, ...]:
        """Indices of the quantities it takes."""
        if not self.operator:
            return ()
        pair = (self.left,) if self.right_is_constant else (self.left, self.right)
        return tuple(sorted(set(pair)))


def problem(
    seed: int,
    number: int,
    *,
    operations: tuple[int, int],
    distractors: tuple[int, int] = (0, 2),
    operators: Sequence[str] = OPERATORS,
) -> dict[str, Any]:
    """Record `number` of a corpus: deterministic in all arguments.

    Args:
        seed: of the corpus.
        number: 0-based; any record can be made without the others.
        operations: least and greatest number of operations, uniform; 1 to `MAX_OPERATIONS`.
        distractors: least and greatest number of quantities that the answer does not need.
        operators: which are drawn, of `OPERATORS` and equally likely; one at least.

    Returns:
        A record with `prompt`, `steps`, `answer`, `id` and `group` (by number of operations).
    """
    key = hashlib.sha256(f"dependency arithmetic {VERSION} {seed} {number}".encode()).digest()
    rng = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
    num = int(rng.integers(operations[0], operations[1] + 1))
    needed = _needed(rng, num, operators)
    num_extra = int(rng.integers(distractors[0], distractors[1] + 1))
    extra = _distractors(rng, needed, num_extra, operators)
    quantities = [*needed, *extra]
    names = _names(rng, len(quantities))
    values = _values(quantities)
    definitions = [f"{names[i]}: {_right_side(q, names)}." for i, q in enumerate(quantities)]
    rng.shuffle(definitions)
    asked = len(needed) - 1
    order = _topological(rng, needed)
    place = {quantity: step for step, quantity in enumerate(order)}
    return {
        "id": f"dependency-arithmetic-{seed}-{number}",
        "group": f"operations-{num}",
        "prompt": f"{' '.join(definitions)} {names[asked]}?\n",
        "steps": [
            {
                "text": f"{' ' if step else ''}{_solved(quantities[i], i, names, values)}"
                f"{'' if i == asked else ';'}",
                "depends_on": sorted(place[other] for other in quantities[i].needs),
            }
            for step, i in enumerate(order)
        ],
        "answer": str(values[asked]),
    }


def _needed(
    rng: np.random.Generator, num_operations: int, operators: Sequence[str]
) -> list[_Quantity]:
    """A random graph with so many operations whose last quantity needs all the others."""
    found = [_number(rng)]
    unused = [0]  # nobody takes these yet; in the end only the last may be one
    for left_over in range(num_operations - 1, -1, -1):
        may_open = len(unused) <= left_over  # one more loose end can still be tied up
        kinds = ["constant", "leaf"] + ["pair"] * (len(unused) > 1) + ["fresh"] * may_open
        kinds += ["used"] * (len(found) > len(unused))
        # As many loose ends as operations left over, and one: each of these has to tie one up.
        kind = "pair" if len(unused) - 1 > left_over else str(rng.choice(kinds))
        operator = str(rng.choice(list(operators)))
        if kind == "fresh":
            found.append(_number(rng))
            left = len(found) - 1
        else:
            left = unused.pop(int(rng.integers(len(unused))))
        constant, right = False, 0
        if kind == "pair":
            right = unused.pop(int(rng.integers(len(unused))))
        elif kind == "used":
            others = [i for i in range(len(found)) if i not in unused and i != left]
            right = int(rng.choice(others)) if others else left
        elif kind == "leaf":
            found.append(_number(rng))
            right = len(found) - 1
        else:
            constant, right = True, int(rng.integers(1, MODULUS))
        if not constant and rng.random() < 0.5:
            left, right = right, left
        found.append(
            _Quantity(operator=operator, left=left, right=right, right_is_constant=constant)
        )
        unused.append(len(found) - 1)
    assert unused == [len(found) - 1], "a loose end"
    return found


def _number(rng: np.random.Generator) -> _Quantity:
    return _Quantity(left=int(rng.integers(MODULUS)))


def _distractors(
    rng: np.random.Generator, needed: list[_Quantity], num: int, operators: Sequence[str]
) -> list[_Quantity]:
    """Quantities that nothing needed takes; they may take what is needed."""
    found: list[_Quantity] = []
    for _ in range(num):
        if rng.random() < 0.5:
            found.append(_number(rng))
            continue
        left, right = (int(n) for n in rng.integers(len(needed) + len(found), size=2))
        found.append(
            _Quantity(
                operator=str(rng.choice(list(operators))),
                left=left,
                right=right,
                right_is_constant=False,
            )
        )
    return found


def _names(rng: np.random.Generator, num: int) -> list[str]:
    chosen = rng.choice(len(PLACES) * len(THINGS), size=num, replace=False)
    return [f"{PLACES[i // len(THINGS)]} {THINGS[i % len(THINGS)]}" for i in chosen.tolist()]


def _values(quantities: list[_Quantity]) -> list[int]:
    """Each quantity's number; operands come before what takes them."""
    values: list[int] = []
    for q in quantities:
        if not q.operator:
            values.append(q.left)
            continue
        a, b = values[q.left], q.right if q.right_is_constant else values[q.right]
        values.append({"+": a + b, "-": a - b, "*": a * b}[q.operator] % MODULUS)
    return values


def _right_side(q: _Quantity, names: list[str]) -> str:
    if not q.operator:
        return str(q.left)
    return f"{names[q.left]} {q.operator} {q.right if q.right_is_constant else names[q.right]}"


def _solved(q: _Quantity, index: int, names: list[str], values: list[int]) -> str:
    if not q.operator:
        return f"{names[index]} = {q.left}"
    right = q.right if q.right_is_constant else values[q.right]
    return f"{names[index]} = {values[q.left]} {q.operator} {right} = {values[index]}"


def _topological(rng: np.random.Generator, quantities: list[_Quantity]) -> list[int]:
    """A random order in which every quantity comes after those it needs."""
    waiting = [set(q.needs) for q in quantities]
    order: list[int] = []
    ready = [i for i, needs in enumerate(waiting) if not needs]
    while ready:
        done = ready.pop(int(rng.integers(len(ready))))
        order.append(done)
        for i, needs in enumerate(waiting):
            if done in needs:
                needs.discard(done)
                if not needs:
                    ready.append(i)
    return order
