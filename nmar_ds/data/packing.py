"""Which traces share a row: decided by lengths alone (no tokens are moved).

Rows are filled one after another, each with the longest traces left that fit: first-fit
decreasing, row by row. The last trace of a row is where room is lost, so there two shorter ones
are taken instead if together they fill it better: among lengths of 0.2 to 0.7 of a row this
leaves 0.1 % of the rows too many instead of 1.3 %. Where looking ahead does not pay (it spends
short traces early), the block is filled again without; never more rows than first-fit decreasing.

Only how many traces there are of each length is looked at, and a row that can be repeated is
repeated, so deciding costs less than the two passes of counting that sort the traces by length and
then by row. Lengths run out and never come back: the longest left that fits is found by following
pointers to shorter ones, which are shortened on the way. The plan costs O(traces) for a fixed row
length.

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
TRIES = 64  # pairs looked at for the end of a row


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


def _longest(fit: npt.NDArray[np.int32], room: int) -> int:
    """The longest length left that fits, 0 if none; halves the path it takes.

    `fit[length]` is the length itself while it is left, and a shorter one afterwards.
    """
    while fit[room] != room:
        fit[room] = fit[fit[room]]
        room = fit[room]
    return room


def _best_pair(
    fit: npt.NDArray[np.int32], left: IntArray, room: int, shortest: int, tries: int
) -> tuple[int, int]:
    """The two lengths left that fill the room best among `tries`, longer first; 0, 0 if none."""
    best = (0, 0)
    first = _longest(fit, room - shortest)
    for _ in range(tries):
        # Neither this one with its like nor a shorter one can do better: all pairs were seen.
        if 2 * first <= best[0] + best[1]:
            break
        second = _longest(fit, min(first, room - first))
        if second == first and left[first] == 1:
            second = _longest(fit, first - 1)
        if second > 0 and first + second > best[0] + best[1]:
            best = (first, second)
            if first + second == room:
                break
        first = _longest(fit, first - 1)
    return best


def _next_row(
    fit: npt.NDArray[np.int32],
    left: IntArray,
    shortest: int,
    tries: int,
    row: npt.NDArray[np.int32],
) -> int:
    """Takes one row's traces out of `left`, which like `fit` goes from 0 to a row's capacity.

    `row[kind]` becomes a length and how many of it; returns the number of kinds.
    """
    room = len(fit) - 1
    num_kinds = 0
    while room >= shortest:
        length = _longest(fit, room)
        other = 0
        # As many as leave the row full, or room for another.
        num = min(left[length], (room if room % length == 0 else room - shortest) // length)
        if num == 0:  # it would be the last
            num = 1
            first, second = _best_pair(fit, left, room, shortest, tries)
            if first + second > length:
                length, other = first, second
        while length > 0:
            if num_kinds > 0 and row[num_kinds - 1, 0] == length:
                row[num_kinds - 1, 1] += num
            else:
                row[num_kinds, 0], row[num_kinds, 1] = length, num
                num_kinds += 1
            left[length] -= num
            if left[length] == 0:
                fit[length] = fit[length - 1]
            room -= num * length
            length, other, num = other, 0, 1
        while shortest < len(fit) - 1 and left[shortest] == 0:
            shortest += 1
    return num_kinds


def _fill_rows(
    by_length: npt.NDArray[np.int32], starts: IntArray, capacity: int, tries: int
) -> tuple[npt.NDArray[np.int32], int]:
    """The row of each trace, and the number of rows.

    Args:
        by_length: the traces by length, those of a length in the store's order.
        starts: int64[capacity + 2], where those of each length begin.
        capacity: tokens per row.
        tries: pairs to look at for the end of a row; none is first-fit decreasing.
    """
    left = starts[1:] - starts[:-1]
    at = starts[:-1].copy()
    fit = np.zeros(capacity + 1, np.int32)
    for length in range(1, capacity + 1):
        fit[length] = length if left[length] > 0 else fit[length - 1]
    row_of = np.empty(len(by_length), np.int32)
    row = np.empty((capacity, 2), np.int32)
    num_rows = num_placed = 0
    shortest = 1
    while num_placed < len(by_length):
        while left[shortest] == 0:
            shortest += 1
        num_kinds = _next_row(fit, left, shortest, tries, row)
        # The next row would be the same while enough are left of each of its lengths.
        repeats = len(by_length)
        for kind in range(num_kinds):
            repeats = min(repeats, 1 + left[row[kind, 0]] // row[kind, 1])
        for number in range(num_rows, num_rows + repeats):
            for kind in range(num_kinds):
                length = row[kind, 0]
                for place in range(at[length], at[length] + row[kind, 1]):
                    row_of[by_length[place]] = number
                at[length] += row[kind, 1]
        num_rows += repeats
        for kind in range(num_kinds):
            length = row[kind, 0]
            num_placed += repeats * row[kind, 1]
            left[length] -= (repeats - 1) * row[kind, 1]
            if left[length] == 0:
                fit[length] = fit[length - 1]
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


@functools.cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Numba takes longer to import than all that a launcher does before it needs a plan."""
    import numba

    for function in (_longest, _best_pair, _next_row):
        globals()[function.__name__] = numba.njit(cache=True)(function)
    return numba.njit(cache=True)(_fill_rows), numba.njit(cache=True)(_by_counting)


def pack(lengths_N: npt.ArrayLike, capacity: int) -> Plan:
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
    order = np.empty(len(lengths), dtype=np.int64)
    row_offsets = [np.zeros(1, dtype=np.int64)]
    num_blocks = max(1, round(len(lengths) / BLOCK))
    edges = [len(lengths) * number // num_blocks for number in range(num_blocks + 1)]
    for start, end in itertools.pairwise(edges):
        block = lengths[start:end]
        if len(block) and (block.min() < 1 or block.max() > capacity):
            bad = start + int(np.flatnonzero((block < 1) | (block > capacity))[0])
            raise ValueError(f"trace {bad} has {lengths[bad]} tokens, expected 1 to {capacity}")
        packed, ends = _pack_block(block.astype(np.int32), capacity)
        np.add(packed, start, out=order[start:end])
        row_offsets.append(ends + start)
    return Plan(order=order, row_offsets=np.concatenate(row_offsets), capacity=capacity)


def _pack_block(
    lengths: npt.NDArray[np.int32], capacity: int
) -> tuple[npt.NDArray[np.int32], IntArray]:
    """Traces in row order, and where each row ends."""
    fill_rows, by_counting = _compiled()
    by_length, starts = by_counting(lengths, capacity + 1)
    row_of, num_rows = fill_rows(by_length, starts, capacity, TRIES)
    if (num_rows - 1) * capacity >= lengths.sum(dtype=np.int64):  # one fewer could do
        plain, num_plain = fill_rows(by_length, starts, capacity, 0)
        if num_plain < num_rows:
            row_of, num_rows = plain, num_plain
    # Counting keeps the traces of a row in the order of the store.
    order, starts = by_counting(row_of, num_rows)
    return order, starts[1:]
