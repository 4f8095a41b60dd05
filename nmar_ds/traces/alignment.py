"""Where a sampled response departs from its reference: a minimal edit script over ids.

A trace made of a model's own sample keeps what the sample has in common with the reference and
turns each stretch that it has instead into a deviation. Which stretches these are must not depend
on luck: difflib's matching blocks (which the published N-MARS code aligns by) are neither minimal
nor complete, and lose a correction where the sample has nothing in a gap.

The script costs one per token inserted, deleted or replaced (Levenshtein). Among the minimal ones
it is the one that goes along with the reference as long as it can, so that a deviation begins at
the first token that is not the reference's.
"""

# N tokens of the sample, M of the reference, D their distance

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nmar_ds.traces.schema import IdArray

IntArray = npt.NDArray[np.int32]
MAX_CELLS = 2**27  # of the table: half a GB; a sample of 8,000 tokens with nothing in common fits


class Gap(NamedTuple):
    """A stretch where sample and reference differ; at least one of both is not empty there.

    Attributes:
        start, end: the sample's tokens there.
        cut, resume: the reference's tokens there.
    """

    start: int
    end: int
    cut: int
    resume: int


class TooFarApartError(ValueError):
    """A sample too long and too different for the table."""


def align(sample_N: IdArray, reference_M: IdArray) -> list[Gap]:
    """The gaps of a minimal edit script, in order.

    Between two gaps, before the first and after the last, sample and reference are equal. The
    distance is the sum over the gaps of the longer side.

    Args:
        sample_N: int32[N], N >= 0.
        reference_M: int32[M], M >= 0.

    Raises:
        TooFarApartError: it would take more than `MAX_CELLS` cells. Memory is four bytes times N
            times about 4 D.
    """
    head = _common(sample_N, reference_M)
    # A common end stays: cutting it off would end a script's way along the reference too early.
    sample = np.ascontiguousarray(sample_N[head:], dtype=np.int32)
    reference = np.ascontiguousarray(reference_M[head:], dtype=np.int32)
    if not len(sample) or not len(reference):
        gap = Gap(head, head + len(sample), head, head + len(reference))
        return [gap] if len(sample) or len(reference) else []
    moves = _moves(sample, reference)
    return [
        Gap(head + start, head + end, head + cut, head + resume)
        for start, end, cut, resume in _gaps(moves)
    ]


def _common(left: IdArray, right: IdArray) -> int:
    """Length of the common beginning."""
    shorter = min(len(left), len(right))
    differs = np.flatnonzero(left[:shorter] != right[:shorter])
    return int(differs[0]) if len(differs) else shorter


def _moves(sample: IntArray, reference: IntArray) -> npt.NDArray[np.uint8]:
    """The script as steps: 0 both equal, 1 replaced, 2 sample only, 3 reference only.

    The table is a band of diagonals around the two corners, widened until the distance proves
    that no minimal script leaves it (Ukkonen, 1985).
    """
    fill, follow = _compiled()
    width = abs(len(sample) - len(reference)) + 1
    while True:
        # A script of distance D leaves the corners' diagonals by no more than D.
        cells = (len(sample) + 1) * (2 * width + 1)
        if cells > MAX_CELLS:
            raise TooFarApartError(
                f"{len(sample)} sampled tokens in place of {len(reference)}: aligning them takes "
                f"{cells:,} cells, expected at most {MAX_CELLS:,}"
            )
        table = fill(sample, reference, width)
        if table[0, width] <= width or width >= max(len(sample), len(reference)):
            moves: npt.NDArray[np.uint8] = follow(sample, reference, table, width)
            return moves
        width *= 2


def _gaps(moves: npt.NDArray[np.uint8]) -> list[tuple[int, int, int, int]]:
    """Runs of steps that are no matches, as places in both sequences."""
    takes_sample = np.cumsum(moves != 3)
    takes_reference = np.cumsum(moves != 2)
    is_gap = np.concatenate([[False], moves != 0, [False]])
    starts = np.flatnonzero(is_gap[1:] & ~is_gap[:-1])
    ends = np.flatnonzero(is_gap[:-1] & ~is_gap[1:])
    samples = np.concatenate([[0], takes_sample]).astype(int)
    references = np.concatenate([[0], takes_reference]).astype(int)
    return [
        (int(samples[s]), int(samples[e]), int(references[s]), int(references[e]))
        for s, e in zip(starts, ends, strict=True)
    ]


def _fill(sample: IntArray, reference: IntArray, width: int) -> IntArray:
    """Distances of the two ends from every place in the band: table[i, j - i + width]."""
    num_sample, num_reference = len(sample), len(reference)
    far = num_sample + num_reference + 1
    table = np.full((num_sample + 1, 2 * width + 1), far, np.int32)
    for i in range(num_sample, -1, -1):
        for j in range(min(num_reference, i + width), max(0, i - width) - 1, -1):
            place = j - i + width
            if i == num_sample:
                table[i, place] = num_reference - j
                continue
            if j == num_reference:
                table[i, place] = num_sample - i
                continue
            best = table[i + 1, place] + (0 if sample[i] == reference[j] else 1)
            if place > 0:  # the sample's token is one too many
                best = min(best, table[i + 1, place - 1] + 1)
            if place < 2 * width:  # the reference's is missing
                best = min(best, table[i, place + 1] + 1)
            table[i, place] = best
    return table


def _follow(
    sample: IntArray, reference: IntArray, table: IntArray, width: int
) -> npt.NDArray[np.uint8]:
    """A minimal script from the start, taking every match it meets."""
    num_sample, num_reference = len(sample), len(reference)
    moves = np.empty(num_sample + num_reference, np.uint8)
    i = j = num = 0
    while i < num_sample or j < num_reference:
        place = j - i + width
        if i == num_sample:
            move = 3
        elif j == num_reference:
            move = 2
        elif sample[i] == reference[j]:
            move = 0
        elif table[i + 1, place] + 1 == table[i, place]:
            move = 1
        elif place > 0 and table[i + 1, place - 1] + 1 == table[i, place]:
            move = 2
        else:
            move = 3
        moves[num] = move
        num += 1
        i += move != 3
        j += move != 2
    return moves[:num]


@functools.cache
def _compiled() -> tuple[Callable[..., IntArray], Callable[..., npt.NDArray[np.uint8]]]:
    """Both loops as machine code; numba is imported late, as in `packing`."""
    import numba

    return numba.njit(cache=True)(_fill), numba.njit(cache=True)(_follow)
