"""Which traces share a row: best-fit decreasing over lengths alone (no tokens are moved).

Every trace goes, longest first, into the fullest row that still has room for it; where none
has, it opens a row. Rows with equal room are kept in one stack per amount of room, and a bitmap
of the amounts in use finds the fullest fitting row in O(capacity / 64) at worst. Traces of one
length are placed together: the row that takes one of them is the fullest that fits the next, until
it is full. Sorting is counting, so the plan costs O(traces) for a fixed row length.

Large stores are packed in blocks of consecutive traces. Beyond a hundred thousand traces rows can
be filled no better, but the tables outgrow the caches, and the traces of a row would lie all over
the store's files.
"""

# N traces, R rows

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BLOCK = 2**17


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
        values = np.asarray(values_N)
        columns = values[:, None] if values.ndim == 1 else values
        sums = np.empty((self.num_rows, columns.shape[1]), dtype=np.int64)
        total = np.zeros(len(values) + 1, dtype=np.int64)
        for number in range(columns.shape[1]):  # one at a time: a store may have millions
            np.cumsum(columns[:, number][self.order], out=total[1:])
            sums[:, number] = total[self.row_offsets[1:]] - total[self.row_offsets[:-1]]
        return sums.reshape(self.num_rows, *values.shape[1:])

    def fingerprint(self) -> str:
        """sha256 over rows and capacity; a resumed run must find the same."""
        digest = hashlib.sha256(f"plan 1 {self.capacity}".encode())
        digest.update(np.ascontiguousarray(self.order, dtype="<i8").tobytes())
        digest.update(np.ascontiguousarray(self.row_offsets, dtype="<i8").tobytes())
        return digest.hexdigest()


def _best_fit(
    lengths: npt.NDArray[np.int32], capacity: int, descending: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int32], int]:
    """The row of each trace, and the number of rows.

    `head[room]` and `below[row]` are the stacks of rows by room, `words` the rooms that have one.
    `descending` has the traces by length, longest first, those of a length in the store's order.
    """
    row_of = np.empty(len(lengths), np.int32)
    below = np.empty(len(lengths), np.int32)
    head = np.full(capacity + 1, -1, np.int32)
    words = np.zeros((capacity >> 6) + 1, np.uint64)
    num_rows = 0
    one = np.uint64(1)
    at = 0
    while at < len(descending):
        need = lengths[descending[at]]
        word = need >> 6
        bits = words[word] & ~((one << np.uint64(need & 63)) - one)
        while bits == 0 and word + 1 < len(words):
            word += 1
            bits = words[word]
        if bits == 0:
            row, room = num_rows, capacity
            num_rows += 1
        else:
            room = (word << 6) + _lowest_bit(bits)
            row = head[room]
            head[room] = below[row]
            if head[room] < 0:
                words[room >> 6] &= ~(one << np.uint64(room & 63))
        while room >= need and at < len(descending) and lengths[descending[at]] == need:
            row_of[descending[at]] = row
            room -= need
            at += 1
        if room > 0:
            below[row] = head[room]
            head[room] = row
            words[room >> 6] |= one << np.uint64(room & 63)
    return row_of, num_rows


def _by_counting(
    keys: npt.NDArray[np.int32], num_keys: int
) -> tuple[npt.NDArray[np.int32], IntArray]:
    """Indices by key, equal keys in order; and where each key's begin, int64[num_keys + 1]."""
    starts = np.zeros(num_keys + 1, np.int64)
    for key in keys:
        starts[key + 1] += 1
    for key in range(num_keys):
        starts[key + 1] += starts[key]
    order = np.empty(len(keys), np.int32)
    place = starts.copy()
    for index in range(len(keys)):
        order[place[keys[index]]] = index
        place[keys[index]] += 1
    return order, starts


def _lowest_bit(bits: Any) -> int:
    """Index of the lowest set bit of a 64-bit word that has one, by halves."""
    low = 0
    for half in (32, 16, 8, 4, 2, 1):
        if bits & ((np.uint64(1) << np.uint64(half)) - np.uint64(1)) == 0:
            bits >>= np.uint64(half)
            low += half
    return low


@functools.cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Numba takes longer to import than all that a launcher does before it needs a plan."""
    import numba

    globals()["_lowest_bit"] = numba.njit(cache=True)(_lowest_bit)
    return numba.njit(cache=True)(_best_fit), numba.njit(cache=True)(_by_counting)


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
    lengths = np.ascontiguousarray(lengths_N)
    if len(lengths) and (lengths.min() < 1 or lengths.max() > capacity):
        bad = int(np.flatnonzero((lengths < 1) | (lengths > capacity))[0])
        raise ValueError(f"trace {bad} has {lengths[bad]} tokens, expected 1 to {capacity}")
    order = np.empty(len(lengths), dtype=np.int64)
    row_offsets = [np.zeros(1, dtype=np.int64)]
    num_blocks = max(1, round(len(lengths) / BLOCK))
    edges = [len(lengths) * number // num_blocks for number in range(num_blocks + 1)]
    for start, end in itertools.pairwise(edges):
        block = lengths[start:end].astype(np.int32)
        order[start:end], ends = _pack_block(block, capacity)
        order[start:end] += start
        row_offsets.append(ends + start)
    return Plan(order=order, row_offsets=np.concatenate(row_offsets), capacity=capacity)


def _pack_block(
    lengths: npt.NDArray[np.int32], capacity: int
) -> tuple[npt.NDArray[np.int32], IntArray]:
    """Traces in row order, and where each row ends."""
    best_fit, by_counting = _compiled()
    descending, _ = by_counting(capacity - lengths, capacity)
    row_of, num_rows = best_fit(lengths, capacity, descending)
    # Counting keeps the traces of a row in the order of the store.
    order, starts = by_counting(row_of, num_rows)
    return order, starts[1:]
