"""The stack machine: what a trace says once its undos are carried out (SPEC section 2).

One walk over the ids serves every question; the three semantics differ only in how far one
undo pops. `token` is that of N-MARS and SequenceMatch (arXiv 2306.05426), `span` that of
Physics of Language Models 2.2 (2408.16293) and Self-Backtracking (2502.04404), `reset` that of
Backtracking for safety (2409.14586). Cost: O(T) for T tokens, since each is popped once at most.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nmar_ds.errors import ConfigError
from nmar_ds.traces.schema import IdArray, Role, RoleArray

# T tokens in a trace

SEMANTICS = ("token", "span", "reset")


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


def walk(
    ids: Sequence[int] | IdArray,
    *,
    undo_id: int,
    bases: Iterable[int] = (),
    semantics: str = "token",
    boundary_ids: Collection[int] = (),
) -> Walk:
    """Run the machine; arguments as for `reduce`."""
    _require_semantics(semantics)
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


def reduce(
    ids: Sequence[int] | IdArray,
    *,
    undo_id: int,
    bases: Iterable[int] = (),
    semantics: str = "token",
    boundary_ids: Collection[int] = (),
) -> IdArray:
    """Carry out the undos.

    Args:
        ids: int[T] token ids.
        undo_id: the id of `<UNDO>`.
        bases: indices into `ids`; before `ids[i]` is read the present stack height becomes the
            base, below which nothing is popped. They are the ends of the prompt segments.
        semantics: "token", "span" or "reset".
        boundary_ids: ids at which a `span` undo stops; they stay.

    Returns:
        int32[<= T], the ids left on the stack.
    """
    kept = walk(
        ids, undo_id=undo_id, bases=bases, semantics=semantics, boundary_ids=boundary_ids
    ).kept
    return np.asarray(ids, dtype=np.int32)[kept]


def depths(
    ids: Sequence[int] | IdArray,
    *,
    undo_id: int,
    bases: Iterable[int] = (),
    semantics: str = "token",
    boundary_ids: Collection[int] = (),
) -> IdArray:
    """Return int32[T], the stack height after each token."""
    heights = walk(
        ids, undo_id=undo_id, bases=bases, semantics=semantics, boundary_ids=boundary_ids
    ).heights
    return np.array(heights, dtype=np.int32)


def survivors(
    ids: Sequence[int] | IdArray,
    *,
    undo_id: int,
    bases: Iterable[int] = (),
    semantics: str = "token",
    boundary_ids: Collection[int] = (),
) -> npt.NDArray[np.bool_]:
    """Return bool[T]: true for ordinary tokens that no undo popped, false for every undo."""
    kept = walk(
        ids, undo_id=undo_id, bases=bases, semantics=semantics, boundary_ids=boundary_ids
    ).kept
    survives = np.zeros(len(ids), dtype=np.bool_)
    survives[kept] = True
    return survives


def strays(
    ids: Sequence[int] | IdArray,
    *,
    undo_id: int,
    bases: Iterable[int] = (),
    semantics: str = "token",
    boundary_ids: Collection[int] = (),
) -> int:
    """Count the undos that found nothing to pop: no-ops in decoding, errors in stored data."""
    return walk(
        ids, undo_id=undo_id, bases=bases, semantics=semantics, boundary_ids=boundary_ids
    ).num_strays


def num_undos(
    deviation_ids: Sequence[int] | IdArray,
    *,
    semantics: str = "token",
    boundary_ids: Collection[int] = (),
) -> int:
    """Derive how many undos take a deviation back whole (the table of SPEC section 2).

    Args:
        deviation_ids: int[n], n >= 1, ordinary tokens. Under `span` it starts at base or right
            after a boundary, under `reset` at base.
        semantics: "token", "span" or "reset".
        boundary_ids: ids at which a `span` undo stops.
    """
    _require_semantics(semantics)
    assert len(deviation_ids) > 0, "a deviation has at least one token"
    if semantics == "token":
        return len(deviation_ids)
    if semantics == "reset":
        return 1
    return 1 + sum(int(token) in boundary_ids for token in deviation_ids[:-1])


def bases_of(roles: RoleArray) -> list[int]:
    """Return the ends of the prompt segments, as `bases` for the functions above.

    Args:
        roles: uint8[T] role per token.
    """
    prompt = roles == Role.PROMPT
    ends = (np.flatnonzero(prompt[:-1] & ~prompt[1:]) + 1).tolist()
    return [*ends, len(roles)] if len(roles) and prompt[-1] else ends


def _require_semantics(semantics: str) -> None:
    if semantics not in SEMANTICS:
        raise ConfigError(f"undo.semantics: {semantics!r}, expected one of {', '.join(SEMANTICS)}")
