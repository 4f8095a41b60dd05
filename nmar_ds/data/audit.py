"""A store looked at as a whole, from its files: every stack replayed, roles tiled, all counted.

Traces are checked one by one when they are built. This is another pair of eyes on what was written
in the end: array operations over blocks of traces, and a compiled stack, that share no code with
the builders. Tens of millions of tokens a second; memory is that of a block.
"""

# N traces, T tokens of a block, S segments (runs of one role) of a block

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from nmar_ds.data.packing import pack
from nmar_ds.data.store import Store
from nmar_ds.errors import StoreError
from nmar_ds.traces.grammar import NEXT_ROLES, RESET_NEXT_ROLES
from nmar_ds.traces.reduction import SEMANTICS
from nmar_ds.traces.schema import NUM_ROLES, Role

IntArray = npt.NDArray[np.int64]
MOST = 65  # lengths of deviations, runs of undos and numbers of them are told apart below this
START = NUM_ROLES  # stands before the first segment of a trace, and after the last
BLOCK_TOKENS = 2**20


@dataclass(slots=True)
class Statistics:
    """What a store holds.

    Attributes:
        num_traces, num_tokens: N, and all their tokens.
        tokens: int64[NUM_ROLES] by role.
        lengths: int32[N] tokens of each trace.
        deviations: int64[MOST] traces by number of deviations; the last place is "or more".
        deviation_lengths: int64[MOST] deviations by tokens.
        undo_runs: int64[MOST] deviations by undos.
        delays: int64[MOST] deviations by tokens after the first wrong one.
        num_without_target: traces in which masked SFT trains nothing.
        num_rows_without_target: rows that hold such traces alone.
        capacity: tokens of a row, and
        num_rows: the rows the traces are packed into.
        counts: of the manifest.
    """

    capacity: int
    counts: dict[str, Any] = field(default_factory=dict)
    num_traces: int = 0
    num_tokens: int = 0
    tokens: IntArray = field(default_factory=lambda: np.zeros(NUM_ROLES, np.int64))
    lengths: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    deviations: IntArray = field(default_factory=lambda: np.zeros(MOST, np.int64))
    deviation_lengths: IntArray = field(default_factory=lambda: np.zeros(MOST, np.int64))
    undo_runs: IntArray = field(default_factory=lambda: np.zeros(MOST, np.int64))
    delays: IntArray = field(default_factory=lambda: np.zeros(MOST, np.int64))
    num_without_target: int = 0
    num_rows_without_target: int = 0
    num_rows: int = 0

    @property
    def packing_use(self) -> float:
        """Share of the rows' places that hold a token."""
        return self.num_tokens / (self.num_rows * self.capacity) if self.num_rows else 0.0


def audit(store: Store, *, capacity: int | None = None) -> Statistics:
    """Replay and count a whole store.

    Args:
        store: its files are checksummed as they are first read.
        capacity: tokens of a row; by default the one it was prepared for.

    Raises:
        StoreError: names the first bad trace of a block (its source and line) and what is wrong
            with it, or a count of the manifest that its traces do not bear out.
    """
    found = Statistics(
        capacity=capacity or store.manifest["builder"].get("max_length") or max(store.lengths),
        counts=dict(store.manifest["counts"]),
    )
    rules = _Rules(store)
    for block in _blocks(store):
        fault = rules.first_fault(block)
        if fault is not None:
            raise StoreError(f"{place_of(store, fault[0])}: {fault[1]}")
        _count(block, found)
    found.lengths = store.lengths
    found.num_traces, found.num_tokens = len(store), int(found.lengths.sum(dtype=np.int64))
    plan = pack(found.lengths, found.capacity)
    found.num_rows = plan.num_rows
    trained = store.role_counts[:, [Role.PREFIX, Role.UNDO, Role.CORRECTION]].sum(axis=1)
    found.num_without_target = int((trained == 0).sum())
    found.num_rows_without_target = int((plan.row_sums(trained) == 0).sum())
    _compare_counts(store, found)
    return found


def place_of(store: Store, index: int) -> str:
    """A trace, named by its store and the record it was made of."""
    sources, number = store.manifest["sources"], store.source(index)
    path = sources[number]["path"] if number < len(sources) else f"source {number}"
    return f"{store.folder}: trace {index} ({path}:{store.line(index)})"


class _Block:
    """Consecutive traces, and the segments they fall into.

    Attributes:
        first: index of the first trace in the store.
        ids, roles: [T].
        starts: int64[N + 1], where each trace begins; T at the end.
        onsets: int64[D] places of first wrong tokens, in order.
        num_onsets: int64[N] by trace.
        role_counts: int32[N, NUM_ROLES] targets by role, as they are stored.
        edges: int64[S + 1], where each segment begins; T at the end.
        runs: int64[S] role of each segment.
        opens: bool[S] whether a segment is the first of its trace.
    """

    def __init__(
        self, first: int, arrays: dict[str, npt.NDArray[Any]], low: int, high: int
    ) -> None:
        self.first = first + low
        offsets = arrays["offsets"][low : high + 1].astype(np.int64)
        places = arrays["onset_offsets"][low : high + 1].astype(np.int64)
        self.ids = arrays["ids"][offsets[0] : offsets[-1]]
        self.roles = arrays["roles"][offsets[0] : offsets[-1]]
        self.starts = offsets - offsets[0]
        self.num_onsets = np.diff(places)
        self.role_counts = arrays["role_counts"].reshape(-1, NUM_ROLES)[low:high]
        within = arrays["onsets"][places[0] : places[-1]].astype(np.int64)
        self.onsets = within + np.repeat(self.starts[:-1], self.num_onsets)
        begins = np.zeros(len(self.roles), np.bool_)
        begins[self.starts[:-1][np.diff(self.starts) > 0]] = True
        changes = begins.copy()
        changes[1:] |= self.roles[1:] != self.roles[:-1]
        self.edges = np.append(np.flatnonzero(changes), len(self.roles))
        self.runs = self.roles[self.edges[:-1]].astype(np.int64)
        self.opens = begins[self.edges[:-1]]

    def trace_at(self, token: int) -> int:
        """Index in the store of the trace that holds a token."""
        return self.first + int(np.searchsorted(self.starts, token, side="right")) - 1

    @property
    def deviations(self) -> IntArray:
        """int64[D] numbers of the segments that are deviations."""
        return np.flatnonzero(self.runs == Role.DEVIATION)


def _blocks(store: Store) -> Iterator[_Block]:
    """All traces, some `BLOCK_TOKENS` at a time."""
    for first, arrays in store.shards():
        offsets = arrays["offsets"]
        low, num = 0, len(offsets) - 1
        while low < num:
            reach = np.searchsorted(offsets, offsets[low] + BLOCK_TOKENS, side="right")
            high = min(max(int(reach) - 1, low + 1), num)
            yield _Block(first, arrays, low=low, high=high)
            low = high


class _Rules:
    """What every trace of a store has to keep to."""

    def __init__(self, store: Store) -> None:
        machine = store.machine
        self._undo_id, self._semantics = machine.undo_id, SEMANTICS.index(machine.semantics)
        self._is_boundary = np.zeros(store.manifest["tokenizer"]["size"], np.bool_)
        self._is_boundary[sorted(machine.boundary_ids)] = True
        rules = RESET_NEXT_ROLES if machine.semantics == "reset" else NEXT_ROLES
        self._may_follow = np.zeros((START + 1, START + 1), np.bool_)
        for before, after in rules.items():
            for role in after:
                self._may_follow[START if before is None else before,
                                 START if role is None else role] = True  # fmt: skip

    def first_fault(self, block: _Block) -> tuple[int, str] | None:
        """A trace and what is wrong with it; checks build on each other, so one at a time."""
        for check in (self._tiles, self._segments, self._targets, self._onsets, self._stack):
            fault = check(block)
            if fault is not None:
                return fault
        return None

    def _tiles(self, block: _Block) -> tuple[int, str] | None:
        """Every token has a role, every trace a token, and undos stand where they belong."""
        empty = np.flatnonzero(np.diff(block.starts) == 0)
        if len(empty):
            return block.first + int(empty[0]), "has no token"
        for wrong, what in (
            (block.roles >= NUM_ROLES, "holds a role that does not exist"),
            (block.ids >= len(self._is_boundary), "holds an id the tokenizer lacks"),
            (
                (block.ids == self._undo_id) != (block.roles == Role.UNDO),
                "holds an undo token outside the undo segments, or another token in them",
            ),
        ):
            places = np.flatnonzero(wrong)
            if len(places):
                return block.trace_at(int(places[0])), what
        return None

    def _segments(self, block: _Block) -> tuple[int, str] | None:
        """Segments follow each other as the grammar says."""
        before = np.where(block.opens, START, np.roll(block.runs, 1))
        closes = np.roll(block.opens, -1)
        bad = ~self._may_follow[before, block.runs]
        bad |= closes & ~self._may_follow[block.runs, START]
        places = np.flatnonzero(bad)
        if not len(places):
            return None
        at = int(places[0])
        role = Role(int(block.runs[at])).label
        return block.trace_at(int(block.edges[at])), f"has a {role} segment out of place"

    def _targets(self, block: _Block) -> tuple[int, str] | None:
        """The stored counts by role, which denominators are made of, are those of the roles."""
        of_trace = np.searchsorted(block.starts, block.edges[:-1], side="right") - 1
        targets = np.diff(block.edges) - block.opens  # nobody predicts a trace's first token
        counted = np.bincount(
            of_trace * NUM_ROLES + block.runs, weights=targets, minlength=block.role_counts.size
        ).reshape(-1, NUM_ROLES)
        wrong = np.flatnonzero((counted != block.role_counts).any(axis=1))
        if len(wrong):
            return block.first + int(wrong[0]), "has stored counts by role other than its roles'"
        return None

    def _onsets(self, block: _Block) -> tuple[int, str] | None:
        """As many onsets as deviations, each inside its own."""
        deviations = block.deviations
        of_trace = np.searchsorted(block.starts, block.edges[deviations], side="right") - 1
        counted = np.bincount(of_trace, minlength=len(block.starts) - 1)
        wrong = np.flatnonzero(counted != block.num_onsets)
        if len(wrong):
            return block.first + int(wrong[0]), "has more or fewer onsets than deviations"
        outside = np.flatnonzero(
            (block.onsets < block.edges[deviations]) | (block.onsets >= block.edges[deviations + 1])
        )
        if len(outside):
            return block.first + int(of_trace[outside[0]]), "has an onset outside its deviation"
        return None

    def _stack(self, block: _Block) -> tuple[int, str] | None:
        """Carrying the undos out leaves prompt, prefix and correction, deviation by deviation."""
        heights, survives, stray = _compiled()(
            block.ids, block.roles, block.starts, self._undo_id, self._semantics, self._is_boundary
        )
        if stray >= 0:
            return block.first + int(stray), "has an undo with nothing to undo"
        deviations = block.deviations
        entered = heights[block.edges[deviations]] - 1  # before the deviation's first token
        left = heights[block.edges[deviations + 2] - 1]  # after the last of its undos
        wrong = np.flatnonzero(entered != left)
        if len(wrong):
            place = int(block.edges[deviations[wrong[0]]])
            return block.trace_at(place), "has undos that do not take their deviation back whole"
        said = (block.roles != Role.DEVIATION) & (block.roles != Role.UNDO)
        places = np.flatnonzero(survives != said)
        if len(places):
            what = "reduces to other tokens than prompt, prefix and correction"
            return block.trace_at(int(places[0])), what
        return None


def _count(block: _Block, found: Statistics) -> None:
    """Add a block, whose rules hold, to the statistics."""
    deviations = block.deviations
    sizes = np.diff(block.edges)
    found.tokens += np.bincount(block.roles, minlength=NUM_ROLES)
    for counter, values in (
        (found.deviations, block.num_onsets),
        (found.deviation_lengths, sizes[deviations]),
        (found.undo_runs, sizes[deviations + 1]),
        (found.delays, block.edges[deviations + 1] - 1 - block.onsets),
    ):
        counter[:] += np.bincount(np.minimum(values, MOST - 1), minlength=MOST)


def _compare_counts(store: Store, found: Statistics) -> None:
    """What the manifest says its traces are, against what was counted."""
    for name, counted in (
        ("stored", found.num_traces),
        ("tokens", {role.label: int(found.tokens[role]) for role in Role}),
        ("deviations", int(found.deviation_lengths.sum())),
        ("clean", int(found.deviations[0])),
    ):
        if found.counts.get(name) != counted:
            said = found.counts.get(name)
            raise StoreError(f"{store.folder}: counts.{name}: {said!r}, expected {counted!r}")


def _replay(  # noqa: PLR0917 (compiled functions take no keywords)
    ids: Any, roles: Any, starts: Any, undo_id: int, semantics: int, is_boundary: Any
) -> tuple[Any, Any, int]:
    """Stack height after each token, whether it survives, and the first trace with a stray undo."""
    heights = np.empty(len(ids), np.int32)
    survives = np.zeros(len(ids), np.bool_)
    stack = np.empty(np.diff(starts).max(), np.int64)
    for trace in range(len(starts) - 1):
        height = base = 0
        for at in range(starts[trace], starts[trace + 1]):
            if at > starts[trace] and roles[at - 1] == 0 and roles[at] != 0:
                base = height  # a prompt has ended: nothing below is popped
            if ids[at] != undo_id:
                stack[height] = at
                height += 1
            elif height == base:
                return heights, survives, trace
            elif semantics == 2:
                height = base
            else:
                height -= 1
                if semantics == 1:
                    while height > base and not is_boundary[ids[stack[height - 1]]]:
                        height -= 1
            heights[at] = height
        for place in range(height):
            survives[stack[place]] = True
    return heights, survives, -1


@functools.cache
def _compiled() -> Callable[..., tuple[Any, Any, int]]:
    """Numba is imported late, as in `packing`."""
    import numba

    compiled: Callable[..., tuple[Any, Any, int]] = numba.njit(cache=True)(_replay)
    return compiled
