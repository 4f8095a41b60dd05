"""The invariants of many traces at once, compiled: yes or no (SPEC 1 and 2).

`assembly.check` says what is wrong with a trace, in Python, and takes as long as building it. Here
a unit's traces go through one compiled loop that asks the same; only if something is wrong, the
unit is built again with each trace looked at by itself.
"""

# T tokens of all traces on end, N traces, D deviations of all traces

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.grammar import NEXT_ROLES, RESET_NEXT_ROLES
from nmar_ds.traces.reduction import SEMANTICS, Machine
from nmar_ds.traces.schema import NUM_ROLES, IdArray, Role, Trace

EDGE = NUM_ROLES  # stands before the first segment of a trace, and after the last
OWN = -1  # no reference apart from the trace: it says what its roles say
PROMPT, PREFIX, DEVIATION, UNDO, CORRECTION = (int(role) for role in Role)


def all_hold(
    traces: Sequence[Trace],
    said: Sequence[IdArray | None],
    *,
    tokenizer: Tokenizer,
    machine: Machine,
) -> bool:
    """Whether `assembly.check` would let every trace pass.

    Args:
        traces: N of them.
        said: as `assembly.check` takes it, one for each trace.
        tokenizer: gives the special ids.
        machine: what one undo pops.
    """
    if not all(len(trace) == len(trace.roles) > 0 for trace in traces):
        return False
    if not traces:
        return True
    own = [OWN if ids is None else len(ids) for ids in said]
    is_boundary = np.zeros(tokenizer.size, np.bool_)
    is_boundary[sorted(machine.boundary_ids)] = True
    holds: bool = _compiled()(
        np.concatenate([trace.ids for trace in traces]),
        np.concatenate([trace.roles for trace in traces]),
        np.array([len(trace) for trace in traces]),
        np.array([onset for trace in traces for onset in trace.onsets], np.int64),
        np.array([len(trace.onsets) for trace in traces]),
        np.concatenate([np.empty(0, np.int32), *(ids for ids in said if ids is not None)]),
        np.array(own),
        _may_follow(machine.semantics),
        tokenizer.is_special,
        is_boundary,
        machine.undo_id,
        SEMANTICS.index(machine.semantics),
    )
    return holds


def _may_follow(semantics: str) -> npt.NDArray[np.bool_]:
    """bool[EDGE + 1, EDGE + 1]: whether a segment may come after another."""
    table = np.zeros((EDGE + 1, EDGE + 1), np.bool_)
    rules = RESET_NEXT_ROLES if semantics == "reset" else NEXT_ROLES
    for before, after in rules.items():
        for role in after:
            table[EDGE if before is None else before, EDGE if role is None else role] = True
    return table


def _walk(  # noqa: PLR0911, PLR0912, PLR0915, PLR0917 (compiled: one loop, no keywords)
    ids: Any, roles: Any, lengths: Any, onsets: Any, num_onsets: Any, said: Any, said_lengths: Any,
    may_follow: Any, is_special: Any, is_boundary: Any, undo_id: int, semantics: int,
) -> bool:  # fmt: skip
    """One walk over all tokens; False at the first thing that is wrong."""
    stack = np.empty(lengths.max(), np.int32)
    at = onset = told = 0  # of all tokens, deviations and tokens of `said`
    for trace in range(len(lengths)):
        start, end = at, at + lengths[trace]
        last_onset = onset + num_onsets[trace]
        height = base = 0
        before = EDGE
        says_something = True
        entered = first = due = 0  # of the deviation: height before it, its start, undos it needs
        while at < end:
            token, role = ids[at], roles[at]
            if token < 0 or token >= len(is_special) or role >= EDGE:
                return False
            if (token == undo_id) != (role == UNDO):
                return False
            if role != before:
                if before == DEVIATION:
                    if onset == last_onset or not first <= start + onsets[onset] < at:
                        return False
                    onset += 1
                if before == UNDO and (due != 0 or height != entered):
                    return False
                if not may_follow[before, role] or (role == PROMPT and not says_something):
                    return False
                if role == PROMPT or before == EDGE:
                    says_something = False
                if role in (PREFIX, CORRECTION):
                    says_something = True
                if before == PROMPT:
                    base = height
                if role == DEVIATION:
                    entered, first, due = height, at, 0
            if role == UNDO:
                if height == base:
                    return False
                due -= 1
                if semantics == 2:
                    height = base
                else:
                    height -= 1
                    while semantics == 1 and height > base and not is_boundary[stack[height - 1]]:
                        height -= 1
            else:
                if role == DEVIATION:
                    if is_special[token]:
                        return False
                    if semantics == 0 or at == first:
                        due += 1
                    elif semantics == 1 and is_boundary[stack[height - 1]]:
                        due += 1
                stack[height] = token
                height += 1
            before = role
            at += 1
        if before == UNDO and (due != 0 or height != entered):
            return False
        if not may_follow[before, EDGE] or not says_something or onset != last_onset:
            return False
        if said_lengths[trace] == OWN:
            place = 0
            for token in range(start, end):
                if roles[token] != DEVIATION and roles[token] != UNDO:
                    if place == height or stack[place] != ids[token]:
                        return False
                    place += 1
            if place != height:
                return False
        else:
            if height != said_lengths[trace]:
                return False
            for place in range(height):
                if stack[place] != said[told + place]:
                    return False
            told += height
    return True


@functools.cache
def _compiled() -> Callable[..., Any]:
    """Numba is imported late: it takes longer than all that a launcher does before."""
    import numba

    return numba.njit(cache=True)(_walk)  # type: ignore[no-any-return]
