"""Where the traces of a packed micro-batch lie, and how they are grouped for attention."""

# B rows, T tokens per row, N = B*T tokens of the flattened micro-batch, S segments,
# n segments of a bucket, L padded length of a bucket, U distinct lengths

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

T = TypeVar("T")

# The bucketing weighs padding against kernel launches, in units of one query-key pair.
# Measured on a CPU core, forward + backward, 9 heads of 64: a pair 0.12 us, a token's copies
# 4 us, a bucket's launches 250 us. Only the ratios matter, and only for speed.
_PAIRS_PER_LAUNCH = 2048
_PAIRS_PER_TOKEN = 32


@dataclass(frozen=True, eq=False)
class Bucket:
    """Segments of near lengths that are attended to in one kernel call.

    Attributes:
        num_segments: n.
        padded_length: L, the longest of them.
        num_tokens: real tokens in them (the bucket's share of `SegmentLayout.order`).
        slots: int64[num_tokens] places of the real tokens in the padded n*L block, or None where
            every segment has length L and nothing is padded.
    """

    num_segments: int
    padded_length: int
    num_tokens: int
    slots: Tensor | None


@dataclass(frozen=True, eq=False)
class SegmentLayout:
    """Where the segments of one micro-batch lie; built once, used by every layer.

    Attributes:
        num_tokens: N of the flattened micro-batch, padding included.
        order: int64[1..N] flat positions of all attended tokens, bucket after bucket. Padding is
            not among them: its attention output is zero.
        buckets: the kernel calls.
        borders: int32[S+1], where each segment begins, padding's among them; N at the end.
        longest: tokens of the longest segment, padding's among them.
    """

    num_tokens: int
    order: Tensor
    buckets: tuple[Bucket, ...]
    borders: Tensor
    longest: int
    _kept: dict[Hashable, Any] = field(default_factory=dict)

    def kept(self, name: Hashable, make: Callable[[], T]) -> T:
        """What a kernel needs of this layout, made for the first layer and kept for the others."""
        if name not in self._kept:
            self._kept[name] = make()
        found: T = self._kept[name]
        return found

    def segment_of_token(self) -> Tensor:
        """int64[N] the number of each token's segment."""

        def find() -> Tensor:
            tokens_N = torch.arange(self.num_tokens, device=self.borders.device)
            return torch.searchsorted(self.borders, tokens_N.int(), right=True)

        return self.kept("segment_of_token", find)

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens: npt.NDArray[np.integer] | Tensor,
        device: torch.device | str = "cpu",
        *,
        padding: npt.NDArray[np.bool_] | None = None,
    ) -> SegmentLayout:
        """Build the index tensors for a micro-batch.

        Args:
            cu_seqlens: int[S+1] borders of the segments in the flattened B*T tokens, from 0 to N,
                strictly rising. A row's padding tail is a segment of its own.
            device: where the model runs.
            padding: bool[S], True for segments that hold padding only. They are left out of the
                buckets, which saves their cost. None: attend to all.

        Raises:
            ValueError: the borders do not start at 0 or do not rise.
        """
        borders = np.asarray(cu_seqlens.cpu() if isinstance(cu_seqlens, Tensor) else cu_seqlens)
        borders = borders.astype(np.int64)
        if borders.ndim != 1 or len(borders) < 2 or borders[0] != 0 or (np.diff(borders) < 1).any():
            raise ValueError(f"cu_seqlens must rise strictly from 0, got {borders.tolist()}")
        longest = int(np.diff(borders).max())
        starts, lengths = borders[:-1], np.diff(borders)
        if padding is not None:
            kept = ~np.asarray(padding, dtype=bool)
            # A rank whose micro-batch is all padding still needs q, k and v in its graph: a
            # weight without a gradient on one rank hangs ZeRO-3. Its first token stands in.
            none_left = not kept.any()
            starts, lengths = starts[kept], lengths[kept]
            if none_left:
                starts, lengths = np.zeros(1, np.int64), np.ones(1, np.int64)
        by_length = np.argsort(lengths, kind="stable")
        starts, lengths = starts[by_length], lengths[by_length]
        order: list[npt.NDArray[np.int64]] = []
        buckets: list[Bucket] = []
        for first, end in _partition(lengths):
            tokens, bucket = _bucket(starts[first:end], lengths[first:end], device)
            order.append(tokens)
            buckets.append(bucket)
        positions = np.concatenate(order)
        return cls(
            num_tokens=int(borders[-1]),
            order=torch.from_numpy(positions).to(device),
            buckets=tuple(buckets),
            borders=torch.from_numpy(borders.astype(np.int32)).to(device),
            longest=longest,
        )


def _partition(lengths_S: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Cut sorted lengths into the runs whose padded cost plus launches is least.

    Dynamic programme over the U distinct lengths, O(U^2) in vectorised steps; U is at most
    sqrt(2 N), so at most about 360 steps for 65,536 tokens.

    Args:
        lengths_S: segment lengths, ascending.

    Returns:
        (first, end) index pairs into `lengths_S`.
    """
    values, firsts = np.unique(lengths_S, return_index=True)
    ends = np.append(firsts[1:], len(lengths_S))
    best = np.zeros(len(values) + 1)
    choice = np.zeros(len(values) + 1, dtype=np.int64)
    for last, length in enumerate(values):
        num_segments = ends[last] - firsts[: last + 1]
        padded = num_segments * (length * length + _PAIRS_PER_TOKEN * length)
        costs = best[: last + 1] + padded + _PAIRS_PER_LAUNCH
        choice[last + 1] = np.argmin(costs)
        best[last + 1] = costs[choice[last + 1]]
    runs: list[tuple[int, int]] = []
    end = len(values)
    while end > 0:
        first = int(choice[end])
        runs.append((int(firsts[first]), int(ends[end - 1])))
        end = first
    return runs[::-1]


def _bucket(
    starts_n: npt.NDArray[np.int64],
    lengths_n: npt.NDArray[np.int64],
    device: torch.device | str,
) -> tuple[npt.NDArray[np.int64], Bucket]:
    """Flat token positions of one run of segments, and its padded block."""
    padded_length = int(lengths_n[-1])
    columns_L = np.arange(padded_length)
    real_nL = columns_L[None, :] < lengths_n[:, None]
    tokens = (starts_n[:, None] + columns_L[None, :])[real_nL]
    slots = None if real_nL.all() else torch.from_numpy(np.flatnonzero(real_nL)).to(device)
    return tokens, Bucket(len(lengths_n), padded_length, len(tokens), slots)
