"""Which rank gets which row of a step, so that all have about the same to do.

Ranks meet in every collective of every micro-batch, so the slowest sets the pace. What a row costs
beside its fixed length is attention, the sum of its traces' squared lengths, and the head, its
trained targets. Rows of like cost go into one micro-batch, and within it each goes where it evens
out what the ranks have been given so far. *Which* rows make up a step is settled before and does
not depend on the number of ranks.
"""

# G rows of a step, W ranks, K kinds of cost

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def deal(costs_GK: npt.NDArray[np.float64], world_size: int) -> npt.NDArray[np.int64]:
    """Deal rows to ranks, round by round: every rank gets one of each round's rows.

    Args:
        costs_GK: float64[G, K], each kind scaled so that its numbers compare with the others'; G is
            a multiple of W.
        world_size: W.

    Returns:
        int64[G / W, W], row indices; round after round, costly rows first. Deterministic.
    """
    num_rows = len(costs_GK)
    assert num_rows % world_size == 0, "filled up with empty rows before"
    # Stable: rows that cost the same keep their order.
    order = np.argsort(-costs_GK.sum(axis=1), kind="stable").reshape(-1, world_size)
    dealt = np.empty_like(order)
    ahead_WK = np.zeros((world_size, costs_GK.shape[1]))  # of the mean rank, so far
    for number, rows in enumerate(order):
        over_WK = costs_GK[rows] - costs_GK[rows].mean(axis=0)
        is_free_W = np.ones(world_size, dtype=bool)
        # Those that matter most choose first.
        for place in np.argsort(-np.abs(over_WK).sum(axis=1), kind="stable"):
            uneven_W = ((ahead_WK + over_WK[place]) ** 2).sum(axis=1) - (ahead_WK**2).sum(axis=1)
            rank = int(np.where(is_free_W, uneven_W, np.inf).argmin())
            dealt[number, rank] = rows[place]
            is_free_W[rank] = False
            ahead_WK[rank] += over_WK[place]
    return dealt
