"""Packed rows in training order: (plan, seed, epoch, cursor) -> one `Batch` per rank.

*Order* is the set of rows of each optimizer step. It depends on the plan, the seed and the epoch
only, never on the number of ranks (SPEC section 6): a step takes the next `global_batch_rows`
rows of the epoch's permutation, and ranks and micro-batches merely share them out, evenly (see
`dealing`). The last step
of an epoch is filled up with empty rows that carry no weight, and so is every step whose rows do
not divide among the ranks: every rank always runs the same number of micro-batches.

The whole state is a cursor: the number of steps taken. Resuming is arithmetic, not replay.
"""

# B rows per micro-batch, T tokens per row, S segments, N = B * T flattened tokens

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from nmar_ds.data.dealing import deal
from nmar_ds.data.packing import Plan
from nmar_ds.traces.schema import NO_ROLE, NUM_ROLES, Role

FILLER_ROW = -1


class TraceSource(Protocol):
    """What the loader needs of a store."""

    def ids(self, index: int) -> npt.NDArray[np.integer]:
        """Token ids of a trace, int[T]."""

    def roles(self, index: int) -> npt.NDArray[np.uint8]:
        """Roles of a trace, uint8[T]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Packed rows of one micro-batch on one rank.

    Attributes:
        input_ids: int64[B, T]; padding holds `pad_id`.
        position_ids: int64[B, T]; each trace, and the padding of each row, starts at 0.
        roles: uint8[B, T]; NO_ROLE for padding.
        targets: int64[N]; the next token of the same trace, -1 where there is none.
        target_roles: uint8[N]; the role of that next token, NO_ROLE where there is none. The role
            of a loss term is the role of its target (SPEC section 3).
        cu_seqlens: int32[S + 1] over the N flattened tokens; the padding of a row is one segment.
        trace_ids: int64[S]; store index of each segment's trace, -1 for padding.
    """

    input_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    roles: npt.NDArray[np.uint8]
    targets: npt.NDArray[np.int64]
    target_roles: npt.NDArray[np.uint8]
    cu_seqlens: npt.NDArray[np.int32]
    trace_ids: npt.NDArray[np.int64]

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.roles != NO_ROLE).sum())


def make_batch(
    source: TraceSource, rows: list[npt.NDArray[np.int64]], *, length: int, pad_id: int
) -> Batch:
    """Lay traces out in rows.

    Args:
        source: where ids and roles are read from.
        rows: for each row the traces in it; an empty array is a filler row.
        length: T.
        pad_id: id written into padding; it is seen by no trace and is nobody's target.
    """
    num = len(rows) * length
    ids = np.full(num, pad_id, dtype=np.int64)
    roles = np.full(num, NO_ROLE, dtype=np.uint8)
    positions = np.empty(num, dtype=np.int64)
    starts: list[int] = []
    trace_ids: list[int] = []
    for row_index, traces in enumerate(rows):
        at = row_index * length
        row_end = at + length
        for trace in traces:
            trace_tokens = source.ids(int(trace))
            end = at + len(trace_tokens)
            assert end <= row_end, "the plan overfills a row"
            ids[at:end] = trace_tokens
            roles[at:end] = source.roles(int(trace))
            starts.append(at)
            trace_ids.append(int(trace))
            at = end
        if at < row_end:
            starts.append(at)
            trace_ids.append(-1)
    cu_seqlens = np.array([*starts, num], dtype=np.int32)
    sizes = np.diff(cu_seqlens)
    positions[:] = np.arange(num) - np.repeat(cu_seqlens[:-1], sizes)

    targets = np.full(num, -1, dtype=np.int64)
    target_roles = np.full(num, NO_ROLE, dtype=np.uint8)
    # Position t predicts t + 1 unless t + 1 opens a segment (position 0) or is padding.
    has_target = np.zeros(num, dtype=bool)
    has_target[:-1] = (positions[1:] != 0) & (roles[1:] != NO_ROLE)
    at_target = np.flatnonzero(has_target) + 1
    targets[at_target - 1] = ids[at_target]
    target_roles[at_target - 1] = roles[at_target]
    shape = (len(rows), length)
    return Batch(
        input_ids=ids.reshape(shape),
        position_ids=positions.reshape(shape),
        roles=roles.reshape(shape),
        targets=targets,
        target_roles=target_roles,
        cu_seqlens=cu_seqlens,
        trace_ids=np.array(trace_ids, dtype=np.int64),
    )


def _permutation(num_rows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    key = hashlib.sha256(f"rows {seed} {epoch}".encode()).digest()[:16]
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return generator.permutation(num_rows).astype(np.int64, copy=False)


class RowLoader:
    """Rows of a plan in training order, for one rank.

    Args:
        source: trace store.
        plan: rows of traces.
        role_counts: int64[num_traces, NUM_ROLES], targets of each role in each trace.
        seed: of the row order.
        global_batch_rows: rows per optimizer step, over all ranks.
        micro_batch_rows: rows per rank and forward.
        rank, world_size: this rank's share.
        pad_id: id for padding.
        trained_roles: whose targets go through the head; ranks get about as many.

    Attributes:
        steps_per_epoch: optimizer steps in one pass over the plan.
        accumulation_steps: micro-batches per step on every rank.
    """

    def __init__(
        self,
        source: TraceSource,
        plan: Plan,
        role_counts: npt.NDArray[np.integer],
        *,
        seed: int,
        global_batch_rows: int,
        micro_batch_rows: int,
        rank: int,
        world_size: int,
        pad_id: int,
        trained_roles: Sequence[int] = (Role.PREFIX, Role.UNDO, Role.CORRECTION),
    ) -> None:
        assert -(-global_batch_rows // micro_batch_rows) >= world_size, "checked by RunConfig"
        self.source = source
        self.plan = plan
        self.seed = seed
        self.global_batch_rows = global_batch_rows
        self.micro_batch_rows = micro_batch_rows
        self.rank = rank
        self.world_size = world_size
        self.pad_id = pad_id
        self.accumulation_steps = -(-global_batch_rows // (micro_batch_rows * world_size))
        self.steps_per_epoch = -(-plan.num_rows // global_batch_rows)
        self._row_counts = plan.row_sums(role_counts)
        self._row_traces = np.diff(plan.row_offsets)
        self._row_costs = self._costs(role_counts, trained_roles)
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def _costs(
        self, role_counts: npt.NDArray[np.integer], trained_roles: Sequence[int]
    ) -> npt.NDArray[np.float64]:
        """float64[R, 2]: attention and trained targets of each row, in mean rows."""
        # A trace has as many tokens as targets, and one.
        lengths = role_counts.sum(axis=1, dtype=np.int64) + 1
        attention = self.plan.row_sums(lengths * lengths)
        trained = self._row_counts[:, list(trained_roles)].sum(axis=1)
        costs = np.stack([attention, trained], axis=1).astype(np.float64)
        return costs / np.maximum(costs.mean(axis=0), 1) if len(costs) else costs

    def rows_of_step(self, step: int) -> npt.NDArray[np.int64]:
        """int64[global_batch_rows]: rows of the 0-based optimizer step; FILLER_ROW fills up."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = _permutation(self.plan.num_rows, self.seed, epoch)
            self._epoch = epoch
        rows = np.full(self.global_batch_rows, FILLER_ROW, dtype=np.int64)
        taken = self._order[within * self.global_batch_rows : (within + 1) * self.global_batch_rows]
        rows[: len(taken)] = taken
        return rows

    def counts_of_step(self, step: int) -> tuple[npt.NDArray[np.int64], int]:
        """Targets per role, int64[NUM_ROLES], and traces of the whole global batch of a step.

        They come from the plan, so the denominator is known to every rank before the first
        forward, without a collective.
        """
        rows = self.rows_of_step(step)
        rows = rows[rows != FILLER_ROW]
        return self._row_counts[rows].sum(axis=0), int(self._row_traces[rows].sum())

    def batches_of_step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, always `accumulation_steps` of them."""
        mine = self.shares_of_step(step)[:, :, self.rank]
        return [self.batch(mine[micro]) for micro in range(self.accumulation_steps)]

    def shares_of_step(self, step: int) -> npt.NDArray[np.int64]:
        """int64[accumulation_steps, micro_batch_rows, world_size]: who gets which row of a step."""
        shape = (self.accumulation_steps, self.micro_batch_rows, self.world_size)
        rows = np.full(math.prod(shape), FILLER_ROW, dtype=np.int64)
        rows[: self.global_batch_rows] = self.rows_of_step(step)
        costs = np.where((rows == FILLER_ROW)[:, None], 0.0, self._row_costs[rows])
        return rows[deal(costs, self.world_size)].reshape(shape)

    def batch(self, rows: npt.NDArray[np.int64]) -> Batch:
        """Materialise the given rows (FILLER_ROW gives an empty one)."""
        empty = np.empty(0, dtype=np.int64)
        traces = [empty if row == FILLER_ROW else self.plan.row(int(row)) for row in rows]
        return make_batch(self.source, traces, length=self.plan.capacity, pad_id=self.pad_id)


def count_targets(
    num_traces: int, roles: Callable[[int], npt.NDArray[np.uint8]]
) -> npt.NDArray[np.int64]:
    """Targets of each role in each trace, int64[num_traces, NUM_ROLES].

    The first token of a trace is nobody's target, so it is not counted.
    """
    counts = np.zeros((num_traces, NUM_ROLES), dtype=np.int64)
    for index in range(num_traces):
        counts[index] = np.bincount(roles(index)[1:], minlength=NUM_ROLES)
    return counts
