"""Turns to traces, and the check that every trace passes before it is stored (SPEC 1 and 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nmar_ds.errors import TraceError
from nmar_ds.traces import reduction
from nmar_ds.traces.encoding import Tokenizer, common_length
from nmar_ds.traces.grammar import require_grammar
from nmar_ds.traces.reduction import Machine
from nmar_ds.traces.schema import IdArray, Role, Trace

# T tokens in a trace


class Deviation(NamedTuple):
    """Wrong tokens at a place of a reference.

    Attributes:
        cut: number of reference tokens before it.
        ids: int32[n], n >= 1.
        onset: index in `ids` of the first wrong token.
    """

    cut: int
    ids: IdArray
    onset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A prompt and its reference, as ids.

    Attributes:
        prompt_ids: int32[n]; the first turn's holds BOS where the tokenizer sets one, and may
            be empty otherwise.
        reference_ids: int32[m], m >= 1, the right response with its stop token.
        deviations: ordered by `cut`; cuts are at most m - 1, so the last correction says
            something.
    """

    prompt_ids: IdArray
    reference_ids: IdArray
    deviations: tuple[Deviation, ...] = ()


def move_starts(turn: Turn, machine: Machine) -> Turn:
    """Move each deviation's start back to where undos of this machine can stop.

    The right tokens in between become the head of the deviation (its onset stays at the same
    token), and the correction repeats them. A deviation is drawn where the stack holds a
    beginning of the reference, whatever was undone before, so the reference alone says where its
    start has to be; places stay in order, but may coincide: then nothing is corrected between.

    Args:
        turn: deviations start at their first token that was drawn or given.
        machine: under `token` the turn stays as it is.
    """
    if machine.semantics == "token" or not turn.deviations:
        return turn

    def moved(deviation: Deviation) -> Deviation:
        start = reduction.start_of(turn.reference_ids, deviation.cut, machine)
        head = turn.reference_ids[start : deviation.cut]
        ids = np.concatenate([head, deviation.ids])
        return Deviation(start, ids, len(head) + deviation.onset)

    return replace(turn, deviations=tuple(moved(deviation) for deviation in turn.deviations))


def assemble(turns: Sequence[Turn], *, machine: Machine, line: int, source: int) -> Trace:
    """Weave deviations, undos and corrections into one trace.

    Args:
        turns: at least one; their deviations start where `move_starts` puts them.
        machine: what one undo pops.
        line: 1-based line of the record.
        source: index of its file.

    Returns:
        The trace, not checked yet.
    """
    parts: list[IdArray] = []
    roles: list[Role] = []
    onsets: list[int] = []
    length = 0
    for turn in turns:
        pieces: list[tuple[Role, IdArray]] = [(Role.PROMPT, turn.prompt_ids)]
        start, role = 0, Role.PREFIX
        for deviation in turn.deviations:
            pieces.append((role, turn.reference_ids[start : deviation.cut]))
            pieces.append((Role.DEVIATION, deviation.ids))
            count = reduction.num_undos(deviation.ids, machine)
            pieces.append((Role.UNDO, np.full(count, machine.undo_id, dtype=np.int32)))
            start, role = deviation.cut, Role.CORRECTION
        pieces.append((role, turn.reference_ids[start:]))
        deviations = iter(turn.deviations)
        for role, ids in pieces:
            if role == Role.DEVIATION:
                onsets.append(length + next(deviations).onset)
            if len(ids):
                parts.append(ids)
                roles.append(role)
                length += len(ids)
    return Trace(
        ids=np.concatenate(parts),
        roles=np.repeat(np.array(roles, dtype=np.uint8), [len(part) for part in parts]),
        onsets=tuple(onsets),
        line=line,
        source=source,
    )


def said_by(turns: Sequence[Turn]) -> IdArray:
    """Return int32[n], what the turns say without their deviations."""
    return np.concatenate(
        [part for turn in turns for part in (turn.prompt_ids, turn.reference_ids)]
    )


def check(
    trace: Trace,
    *,
    tokenizer: Tokenizer,
    machine: Machine,
    path: str | Path,
    said: IdArray | None = None,
) -> None:
    """Check SPEC 2's invariants on ids and roles.

    Args:
        trace: what is about to be stored.
        tokenizer: gives the special ids.
        machine: what one undo pops, and its id.
        path: source file, for the message.
        said: int32[n], prompts and references joined, where the trace was assembled from them;
            by default the trace's own prompt, prefix and correction tokens.

    Raises:
        TraceError: the first invariant broken.
    """

    def error(field: str, problem: str, expected: str) -> TraceError:
        return TraceError(path, trace.line, field, problem, expected)

    ids, roles = trace.ids, trace.roles
    if len(ids) == 0 or len(ids) != len(roles):
        raise error("trace", f"{len(ids)} ids and {len(roles)} roles", "as many of both, not none")
    if int(ids.min()) < 0 or int(ids.max()) >= tokenizer.size:
        worst = int(ids.max()) if int(ids.min()) >= 0 else int(ids.min())
        raise error("ids", f"id {worst} is not in the tokenizer", f"0 to {tokenizer.size - 1}")
    changes = roles[1:] != roles[:-1]
    edges = [0, *(np.flatnonzero(changes) + 1).tolist(), len(ids)]
    runs = roles[edges[:-1]].tolist()
    require_grammar(runs, True, error, semantics=machine.semantics)
    if not np.array_equal(ids == machine.undo_id, roles == Role.UNDO):
        raise error(
            "trace", "the undo token outside undo segments, or others in them", "it there only"
        )
    if (tokenizer.is_special[ids] & (roles == Role.DEVIATION)).any():
        raise error("trace", "a special or stop token in a deviation", "ordinary tokens only")
    _check_deviations(trace, edges, runs, tokenizer=tokenizer, machine=machine, error=error)
    carried = reduction.walk(ids, machine, reduction.bases_of(roles))
    if carried.num_strays:
        raise error("trace", "an undo with nothing to undo", "none in stored data")
    if said is None:
        said = ids[(roles != Role.DEVIATION) & (roles != Role.UNDO)]
    reduced = ids[carried.kept]
    if not np.array_equal(reduced, said):
        place = common_length(reduced.tolist(), said.tolist())
        problem = f"reduces to something else from token {place} on"
        raise error("trace", problem, "prompt and reference exactly")


def _check_deviations(
    trace: Trace,
    edges: Sequence[int],
    runs: Sequence[int],
    *,
    tokenizer: Tokenizer,
    machine: Machine,
    error: Callable[[str, str, str], TraceError],
) -> None:
    """Check where deviations start, how many undos follow them, and their onsets.

    Args:
        trace: roles follow the grammar.
        edges: segment n is `ids[edges[n] : edges[n + 1]]`.
        runs: the role of each segment.
        tokenizer: for the message.
        machine: what one undo pops.
        error: makes the exception from (field, problem, expected).
    """
    ids = trace.ids
    onsets = iter(trace.onsets)
    below: int | None = None  # top of the stack above base: earlier deviations are undone whole
    for number in range(len(runs)):
        start, end = edges[number : number + 2]
        if runs[number] != Role.DEVIATION:
            if runs[number] != Role.UNDO:
                below = None if runs[number] == Role.PROMPT else int(ids[end - 1])
            continue
        if machine.semantics == "span" and below is not None and below not in machine.boundary_ids:
            problem = f"a deviation right after {tokenizer.piece(below)!r} (id {below})"
            expected = "it at the start of the response or right after a boundary under 'span'"
            raise error(f"segments[{number}]", problem, expected)
        derived = reduction.num_undos(ids[start:end], machine)
        num_found = edges[number + 2] - end
        if num_found != derived:
            problem = f"{num_found} undos after a deviation of {end - start} tokens"
            raise error(
                f"segments[{number + 1}]", problem, f"{derived} under {machine.semantics!r}"
            )
        onset = next(onsets, -1)
        if not start <= onset < end:
            raise error(f"segments[{number}]", f"its onset {onset} lies outside it", "one inside")
    if next(onsets, None) is not None:
        raise error("onsets", "more onsets than deviations", "one each")
