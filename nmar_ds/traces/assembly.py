"""Turns to traces, and the check that every trace passes before it is stored (SPEC 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nmar_ds.errors import ConfigError, TraceError
from nmar_ds.traces import reduction
from nmar_ds.traces.encoding import Tokenizer, common_length
from nmar_ds.traces.grammar import require_grammar
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


def assemble(
    turns: Sequence[Turn], *, undo_id: int, semantics: str, line: int, source: int
) -> Trace:
    """Weave deviations, undos and corrections into one trace.

    Args:
        turns: at least one.
        undo_id: the id of `<UNDO>`.
        semantics: what one undo pops; only "token" is built so far.
        line: 1-based line of the record.
        source: index of its file.

    Returns:
        The trace, not checked yet.

    Raises:
        ConfigError: semantics other than "token".
    """
    require_token_semantics(semantics)
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
            count = reduction.num_undos(deviation.ids, semantics=semantics)
            pieces.append((Role.UNDO, np.full(count, undo_id, dtype=np.int32)))
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
    path: str | Path,
    said: IdArray | None = None,
    semantics: str = "token",
) -> None:
    """Check SPEC 2's invariants on ids and roles.

    Args:
        trace: what is about to be stored.
        tokenizer: gives the undo id and the special ids.
        path: source file, for the message.
        said: int32[n], prompts and references joined, where the trace was assembled from them;
            by default the trace's own prompt, prefix and correction tokens.
        semantics: what one undo pops.

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
    require_grammar(runs, True, error)
    if not np.array_equal(ids == tokenizer.undo_id, roles == Role.UNDO):
        raise error(
            "trace", "the undo token outside undo segments, or others in them", "it there only"
        )
    if (tokenizer.is_special[ids] & (roles == Role.DEVIATION)).any():
        raise error("trace", "a special or stop token in a deviation", "ordinary tokens only")
    onsets = iter(trace.onsets)
    for number in range(len(runs)):
        if runs[number] != Role.DEVIATION:
            continue
        start, end, undone = edges[number : number + 3]
        derived = reduction.num_undos(ids[start:end], semantics=semantics)
        if undone - end != derived:
            problem = f"{undone - end} undos after a deviation of {end - start} tokens"
            raise error(f"segments[{number + 1}]", problem, f"{derived} under {semantics!r}")
        onset = next(onsets, -1)
        if not start <= onset < end:
            raise error(f"segments[{number}]", f"its onset {onset} lies outside it", "one inside")
    if next(onsets, None) is not None:
        raise error("onsets", "more onsets than deviations", "one each")
    carried = reduction.walk(
        ids, undo_id=tokenizer.undo_id, bases=reduction.bases_of(roles), semantics=semantics
    )
    if carried.num_strays:
        raise error("trace", "an undo with nothing to undo", "none in stored data")
    if said is None:
        said = ids[(roles != Role.DEVIATION) & (roles != Role.UNDO)]
    reduced = ids[carried.kept]
    if not np.array_equal(reduced, said):
        place = common_length(reduced.tolist(), said.tolist())
        problem = f"reduces to something else from token {place} on"
        raise error("trace", problem, "prompt and reference exactly")


def require_token_semantics(semantics: str) -> None:
    """Refuse what the builders cannot make yet.

    Raises:
        ConfigError: anything but "token".
    """
    if semantics != "token":
        raise ConfigError(f"undo.semantics: {semantics!r} is not built yet, expected 'token'")
