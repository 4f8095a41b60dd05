"""The stack machine: what a trace says once its undos are carried out (SPEC section 2).

One walk over the ids serves every question; the three semantics differ only in how far one
undo pops. `token` is that of N-MARS and SequenceMatch (arXiv 2306.05426), `span` that of
Physics of Language Models 2.2 (2408.16293) and Self-Backtracking (2502.04404), `reset` that of
Backtracking for safety (2409.14586). Cost: O(T) for T tokens, since each is popped once at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nmar_ds.errors import ConfigError
from nmar_ds.traces.schema import IdArray, Role, RoleArray

# T tokens in a trace

SEMANTICS = ("token", "span", "reset")


@dataclass(frozen=True, slots=True)
class Machine:
    """The rules of the stack machine: what one undo pops (the table of SPEC section 2).

    Attributes:
        undo_id: the id of `<UNDO>`.
        semantics: "token", "span" or "reset".
        boundary_ids: ids at which a `span` undo stops, and which stay; empty under the others.

    Raises:
        ConfigError: unknown semantics, `span` without boundaries, or boundaries without `span`.
    """

    undo_id: int
    semantics: str = "token"
    boundary_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.semantics not in SEMANTICS:
            raise ConfigError(
                f"undo.semantics: {self.semantics!r}, expected one of {', '.join(SEMANTICS)}"
            )
        if bool(self.boundary_ids) != (self.semantics == "span"):
            raise ConfigError(
                f"undo.boundaries: {len(self.boundary_ids)} boundary ids under semantics "
                f"{self.semantics!r}, expected some under 'span' and none under the others"
            )


class Walk(NamedTuple):
    """What the machine did.

    Attributes:
        kept: indices of the surviving tokens, ascending.
        heights: the stack height after each token.
        num_strays: undos that found the stack at its base.
    """

    kept: list[int]
    heights: list[int]
    num_strays: int


def walk(ids: Sequence[int] | IdArray, machine: Machine, bases: Iterable[int] = ()) -> Walk:
    """Run the machine; arguments as for `reduce`."""
    undo_id, semantics, boundary_ids = machine.undo_id, machine.semantics, machine.boundary_ids
    tokens: list[int] = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
    stack: list[int] = []
    heights: list[int] = []
    num_strays = 0
    edges = [0, *sorted({index for index in bases if 0 < index < len(tokens)}), len(tokens)]
    for start, end in pairwise(edges):
        base = len(stack)
        for index in range(start, end):
            if tokens[index] != undo_id:
                stack.append(index)
            elif len(stack) == base:
                num_strays += 1
            elif semantics == "reset":
                del stack[base:]
            else:
                stack.pop()
                if semantics == "span":
                    while len(stack) > base and tokens[stack[-1]] not in boundary_ids:
                        stack.pop()
            heights.append(len(stack))
    return Walk(stack, heights, num_strays)


def reduce(ids: Sequence[int] | IdArray, machine: Machine, bases: Iterable[int] = ()) -> IdArray:
    """Carry out the undos.

    Args:
        ids: int[T] token ids.
        machine: what one undo pops.
        bases: indices into `ids`; before `ids[i]` is read the present stack height becomes the
            base, below which nothing is popped. They are the ends of the prompt segments.

    Returns:
        int32[<= T], the ids left on the stack.
    """
    return np.asarray(ids, dtype=np.int32)[walk(ids, machine, bases).kept]


def depths(ids: Sequence[int] | IdArray, machine: Machine, bases: Iterable[int] = ()) -> IdArray:
    """Return int32[T], the stack height after each token."""
    return np.array(walk(ids, machine, bases).heights, dtype=np.int32)


def survivors(
    ids: Sequence[int] | IdArray, machine: Machine, bases: Iterable[int] = ()
) -> npt.NDArray[np.bool_]:
    """Return bool[T]: true for ordinary tokens that no undo popped, false for every undo."""
    survives = np.zeros(len(ids), dtype=np.bool_)
    survives[walk(ids, machine, bases).kept] = True
    return survives


def strays(ids: Sequence[int] | IdArray, machine: Machine, bases: Iterable[int] = ()) -> int:
    """Count the undos that found nothing to pop: no-ops in decoding, errors in stored data."""
    return walk(ids, machine, bases).num_strays


def num_undos(deviation_ids: Sequence[int] | IdArray, machine: Machine) -> int:
    """Derive how many undos take a deviation back whole (the table of SPEC section 2).

    Args:
        deviation_ids: int[n], n >= 1, ordinary tokens. Under `span` it starts at base or right
            after a boundary, under `reset` at base.
        machine: what one undo pops.
    """
    assert len(deviation_ids) > 0, "a deviation has at least one token"
    if machine.semantics == "token":
        return len(deviation_ids)
    if machine.semantics == "reset":
        return 1
    return 1 + sum(int(token) in machine.boundary_ids for token in deviation_ids[:-1])


def start_of(reference_ids: IdArray, cut: int, machine: Machine) -> int:
    """Where a deviation after `cut` right tokens has to start, so that undos take back it alone.

    Args:
        reference_ids: int[m] the right tokens above the base; at `cut` the stack holds the first
            `cut` of them, whatever was undone before.
        cut: 0 to m.
        machine: what one undo pops.

    Returns:
        0 to `cut`: under `token` the cut itself, under `span` the nearest place left of it that
        follows a boundary or is the base, under `reset` the base.
    """
    if machine.semantics == "reset":
        return 0
    if machine.semantics == "span":
        while cut > 0 and int(reference_ids[cut - 1]) not in machine.boundary_ids:
            cut -= 1
    return cut


def bases_of(roles: RoleArray) -> list[int]:
    """Return the ends of the prompt segments, as `bases` for the functions above.

    Args:
        roles: uint8[T] role per token.
    """
    prompt = roles == Role.PROMPT
    ends = (np.flatnonzero(prompt[:-1] & ~prompt[1:]) + 1).tolist()
    return [*ends, len(roles)] if len(roles) and prompt[-1] else ends
