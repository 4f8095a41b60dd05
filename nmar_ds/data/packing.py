"""Which traces share a row: best-fit decreasing over lengths alone (no tokens are moved).

Every trace goes, longest first, into the fullest row that still has room for it; where none
has, it opens a row. Rows with equal room are kept in one stack per amount of room, and a bitmap
of the amounts in use finds the fullest fitting row in O(capacity / 64) at worst, so the plan
costs O(traces) for a fixed row length.
"""

# N traces, R rows

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Rows of traces.

    Attributes:
        order: int64[N], trace indices in row order; every trace exactly once.
        row_offsets: int64[R + 1]; row r holds order[row_offsets[r]:row_offsets[r + 1]].
        capacity: tokens per row.
    """

    order: IntArray
    row_offsets: IntArray
    capacity: int

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.row_offsets) - 1

    def row(self, index: int) -> IntArray:
        """int64[n]: the traces of one row."""
        return self.order[self.row_offsets[index] : self.row_offsets[index + 1]]

    def row_sums(self, values_N: npt.NDArray[np.integer]) -> IntArray:
        """Sum of a per-trace quantity over each row: int64[R] (or [R, K] for [N, K] values)."""
        values = np.asarray(values_N, dtype=np.int64)[self.order]
        total = np.zeros((len(values) + 1, *values.shape[1:]), dtype=np.int64)
        np.cumsum(values, axis=0, out=total[1:])
        return total[self.row_offsets[1:]] - total[self.row_offsets[:-1]]

    def fingerprint(self) -> str:
        """sha256 over rows and capacity; a resumed run must find the same."""
        digest = hashlib.sha256(f"plan 1 {self.capacity}".encode())
        digest.update(np.ascontiguousarray(self.order, dtype="<i8").tobytes())
        digest.update(np.ascontiguousarray(self.row_offsets, dtype="<i8").tobytes())
        return digest.hexdigest()


def _best_fit(lengths: IntArray, descending: IntArray, capacity: int) -> IntArray:
    """Row of each trace. `head[room]` and `below[row]` are the stacks of rows by room."""
    num = len(lengths)
    row_of = np.empty(num, np.int64)
    room_of = np.empty(num, np.int64)
    below = np.empty(num, np.int64)
    head = np.full(capacity + 1, -1, np.int64)
    words = np.zeros((capacity >> 6) + 1, np.uint64)
    num_rows = 0
    one = np.uint64(1)
    for index in descending:
        need = lengths[index]
        word = need >> 6
        bits = words[word] & ~((one << np.uint64(need & 63)) - one)
        while bits == 0 and word + 1 < len(words):
            word += 1
            bits = words[word]
        if bits == 0:
            row = num_rows
            num_rows += 1
            room = capacity
        else:
            low = 0
            while (bits >> np.uint64(low)) & one == 0:
                low += 1
            room = (word << 6) + low
            row = head[room]
            head[room] = below[row]
            if head[room] < 0:
                words[room >> 6] &= ~(one << np.uint64(room & 63))
        row_of[index] = row
        room -= need
        room_of[row] = room
        if room > 0:
            below[row] = head[room]
            head[room] = row
            words[room >> 6] |= one << np.uint64(room & 63)
    return row_of


@functools.cache
def _compiled_best_fit() -> Callable[[IntArray, IntArray, int], IntArray]:
    """Numba takes longer to import than all that a launcher does before it needs a plan."""
    import numba

    compiled: Callable[[IntArray, IntArray, int], IntArray] = numba.njit(cache=True)(_best_fit)
    return compiled


def best_fit_decreasing(lengths_N: npt.ArrayLike, capacity: int) -> Plan:
    """Pack traces into rows.

    Args:
        lengths_N: tokens of each trace, each in 1..capacity.
        capacity: tokens per row.

    Returns:
        The plan; ties in length keep the order of the traces, so it depends on nothing else.

    Raises:
        ValueError: a length is outside 1..capacity (over-long traces are settled before this).
    """
    lengths = np.ascontiguousarray(lengths_N, dtype=np.int64)
    if len(lengths) and (lengths.min() < 1 or lengths.max() > capacity):
        bad = int(np.flatnonzero((lengths < 1) | (lengths > capacity))[0])
        raise ValueError(f"trace {bad} has {lengths[bad]} tokens, expected 1 to {capacity}")
    descending = np.argsort(-lengths, kind="stable").astype(np.int64)
    row_of = _compiled_best_fit()(lengths, descending, capacity)
    # Grouping by row with a stable sort keeps the traces of a row in the order of the store.
    order = np.argsort(row_of, kind="stable").astype(np.int64)
    num_rows = int(row_of.max()) + 1 if len(row_of) else 0
    row_offsets = np.searchsorted(row_of[order], np.arange(num_rows + 1)).astype(np.int64)
    return Plan(order=order, row_offsets=row_offsets, capacity=capacity)
