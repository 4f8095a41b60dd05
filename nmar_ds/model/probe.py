"""The micro-batch the canary looks at, in flat arrays, and the changes it makes to it."""

# B rows, T tokens per row, N = B*T, S segments

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nmar_ds.data.loader import Batch
from nmar_ds.model.attention import SegmentLayout
from nmar_ds.traces.schema import NO_ROLE, Role

Ids = npt.NDArray[np.int64]

# Per trace: the logits of a whole long trace would not fit beside a large model.
_MAX_POSITIONS = 64


@dataclass(frozen=True)
class Probe:
    """A micro-batch as flat arrays.

    Attributes:
        shape: (B, T).
        ids: int64[N].
        roles: uint8[N], `NO_ROLE` for padding.
        borders: int64[S+1] of the segments.
        padding: bool[S], True for segments of padding.
    """

    shape: tuple[int, int]
    ids: Ids
    roles: npt.NDArray[np.uint8]
    borders: Ids
    padding: npt.NDArray[np.bool_]

    @classmethod
    def of_batch(cls, batch: Batch) -> Probe:
        """Flatten a loader's batch."""
        rows, length = batch.input_ids.shape
        return cls(
            shape=(rows, length),
            ids=batch.input_ids.ravel(),
            roles=batch.roles.ravel(),
            borders=batch.cu_seqlens.astype(np.int64),
            padding=batch.trace_ids < 0,
        )

    @classmethod
    def twins(cls, one: Probe, vocab_size: int, rng: np.random.Generator) -> Probe:
        """A row of one trace and an altered copy of it, cut to fit.

        Args:
            one: a probe with at most one trace, of at least two tokens per row. Without a trace
                random ids stand in.
            vocab_size: ids are below it.
            rng: for the ids.
        """
        length = one.shape[1]
        ids = rng.integers(vocab_size, size=length)
        roles = np.full(length, Role.PREFIX, dtype=np.uint8)
        for start, end in one.traces():
            ids, roles = one.ids[start:end], one.roles[start:end]
        ids, roles = ids[: length // 2], roles[: length // 2]
        num = len(ids)
        row_ids = np.zeros(length, dtype=np.int64)
        row_roles = np.full(length, NO_ROLE, dtype=np.uint8)
        row_ids[: 2 * num] = np.concatenate([ids, other_ids(ids, vocab_size, rng)])
        row_roles[: 2 * num] = np.concatenate([roles, roles])
        borders = np.unique(np.array([0, num, 2 * num, length]))
        return cls((1, length), row_ids, row_roles, borders, borders[:-1] >= 2 * num)

    def traces(self) -> list[tuple[int, int]]:
        """(start, end) of each trace in the flat arrays."""
        spans = zip(self.borders[:-1], self.borders[1:], self.padding, strict=True)
        return [(int(start), int(end)) for start, end, is_padding in spans if not is_padding]

    def row(self, index: int) -> Probe:
        """One row as a probe of its own."""
        first, end = index * self.shape[1], (index + 1) * self.shape[1]
        inside = (self.borders[:-1] >= first) & (self.borders[:-1] < end)
        return Probe(
            shape=(1, self.shape[1]),
            ids=self.ids[first:end],
            roles=self.roles[first:end],
            borders=np.append(self.borders[:-1][inside], end) - first,
            padding=self.padding[inside],
        )

    def alone(self, start: int, end: int) -> Probe:
        """One trace, unpacked."""
        return Probe(
            shape=(1, end - start),
            ids=self.ids[start:end],
            roles=self.roles[start:end],
            borders=np.array([0, end - start]),
            padding=np.array([False]),
        )

    def positions(self) -> Ids:
        """Position ids, int64[N], from 0 in every segment."""
        starts = np.repeat(self.borders[:-1], np.diff(self.borders))
        result: Ids = np.arange(len(self.ids)) - starts
        return result

    def targets(self) -> tuple[Ids, npt.NDArray[np.uint8]]:
        """Next id and its role at each place, trace by trace, independently of the loader."""
        targets = np.full(len(self.ids), -1, dtype=np.int64)
        roles = np.full(len(self.ids), NO_ROLE, dtype=np.uint8)
        for start, end in self.traces():
            targets[start : end - 1] = self.ids[start + 1 : end]
            roles[start : end - 1] = self.roles[start + 1 : end]
        return targets, roles

    def inputs(
        self, device: torch.device | str, ids: Ids | None = None
    ) -> tuple[Tensor, Tensor, SegmentLayout]:
        """The model's inputs: ids and positions int64[B, T], and the layout.

        Args:
            device: where the model runs.
            ids: int64[N] in place of the probe's own.
        """
        input_ids_BT = torch.from_numpy((self.ids if ids is None else ids).reshape(self.shape))
        position_ids_BT = torch.from_numpy(self.positions().reshape(self.shape))
        layout = SegmentLayout.from_cu_seqlens(self.borders, device, padding=self.padding)
        return input_ids_BT.to(device), position_ids_BT.to(device), layout


def other_ids(ids: Ids, vocab_size: int, rng: np.random.Generator) -> Ids:
    """An id other than the present one at every place, int64 as `ids`."""
    result: Ids = (ids + rng.integers(1, vocab_size, size=len(ids))) % vocab_size
    return result


def sampled_positions(start: int, end: int) -> Ids:
    """Places of a trace whose logits are looked at: both its ends and an even sample between."""
    if end - start <= _MAX_POSITIONS:
        return np.arange(start, end)
    quarter = _MAX_POSITIONS // 4
    middle = np.linspace(start, end - 1, 2 * quarter).astype(np.int64)
    ends = [np.arange(start, start + quarter), np.arange(end - quarter, end)]
    return np.unique(np.concatenate([middle, *ends]))
