"""For people who stay with plain `generate`, or with a server that returns ids.

    processor = UndoLogitsProcessor(machine, num_prompt=inputs.input_ids.shape[1], tabu=True)
    output = model.generate(**inputs, logits_processor=LogitsProcessorList([processor]))
    responses = reduce_generated(output, inputs.input_ids.shape[1], machine, eos_id=eos_id)

Greedy decoding then gives what `decoding.decode` gives under the same limits. The processor keeps
nothing but a cache: it follows rows that beam search has put elsewhere.
"""

# B sequences in a batch (rows), T tokens so far, V vocabulary

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor

from nmar_ds.errors import ConfigError
from nmar_ds.inference.decoding import UndoMode
from nmar_ds.inference.stack import Stack
from nmar_ds.traces.reduction import Machine, walk
from nmar_ds.traces.schema import IdArray


class UndoLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    """The guards of `decoding.decode` as a logits processor; see there for the arguments.

    Args:
        machine: the id of `<UNDO>`, and what one of them undoes.
        num_prompt: columns of the (left-padded) prompts, which no undo reaches.
        num_forced: columns after them that hold the beginning of a response.
        max_undos, max_consecutive_undos, undo_mode, undo_bias, tabu, max_revisits: as there.

    Raises:
        ConfigError: there is nothing before the response.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        num_prompt: int,
        num_forced: int = 0,
        max_undos: int = 256,
        max_consecutive_undos: int = 64,
        undo_mode: UndoMode = "allow",
        undo_bias: float = 0.0,
        tabu: bool = False,
        max_revisits: int | None = None,
    ) -> None:
        if num_prompt < 1 or num_forced < 0:
            raise ConfigError(
                f"num_prompt, num_forced: {num_prompt}, {num_forced}, expected at least 1 and 0"
            )
        self._machine, self._num_prompt, self._num_forced = machine, num_prompt, num_forced
        self._max_undos = 0 if undo_mode == "ban" else max_undos
        self._max_run, self._bias = max_consecutive_undos, undo_bias
        self._tabu, self._max_revisits = tabu, max_revisits
        self._rows: dict[tuple[int, ...], _Row] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Apply the rules to the scores of the next tokens.

        Args:
            input_ids: int64[B, T].
            scores: float[B, V].
        """
        undo_id = self._machine.undo_id
        scores = scores.clone()
        scores[:, undo_id] += self._bias
        seen: dict[tuple[int, ...], _Row] = {}
        for place, ids in enumerate(input_ids[:, self._num_prompt :].tolist()):
            row = self._row(tuple(ids))
            seen[tuple(ids)] = row
            if row.banned:
                scores[place, undo_id] = -math.inf
            if self._tabu:
                scores[place, sorted(row.stack.taken_back)] = -math.inf
        self._rows = seen
        return scores

    def _row(self, ids: tuple[int, ...]) -> _Row:
        """The state after some ids: from that after all but the last, where it is known."""
        before = self._rows.get(ids[:-1]) if len(ids) > self._num_forced else None
        if before is not None:
            return self._after(before, ids[-1])
        row = _Row(Stack(self._machine, ids[: self._num_forced]), self._max_undos <= 0)
        row.revisits = row.stack.num_revisits
        for token in ids[self._num_forced :]:
            row = self._after(row, token)
        return row

    def _after(self, row: _Row, token: int) -> _Row:
        row = row.copy()
        row.stack.write(token)
        if token == self._machine.undo_id:
            row.num_undos, row.run = row.num_undos + 1, row.run + 1
        else:
            row.run = 0
        row.banned |= row.num_undos >= self._max_undos or row.run >= self._max_run
        if self._max_revisits is not None:
            row.banned |= row.stack.num_revisits - row.revisits > self._max_revisits
        return row


class _Row:
    """What the limits need to know of one row."""

    def __init__(self, stack: Stack, banned: bool) -> None:
        self.stack, self.banned = stack, banned
        self.num_undos = self.run = self.revisits = 0

    def copy(self) -> _Row:
        """Two beams may come from one row."""
        other = _Row(self.stack.copy(), self.banned)
        other.num_undos, other.run, other.revisits = self.num_undos, self.run, self.revisits
        return other


def reduce_generated(
    sequences: Any, num_prompt: int, machine: Machine, *, eos_id: int | Sequence[int]
) -> list[IdArray]:
    """Carry out the undos of what `generate` or a server returned.

    Args:
        sequences: int[B, T] or ragged lists of ids, prompts included.
        num_prompt: ids of each that are prompt (columns, where prompts are padded on the left).
        machine: what one undo pops.
        eos_id: stop token, or several; what comes after the first is padding.

    Returns:
        For each sequence int32[...], the response that is meant, its stop token included.
    """
    stops = {eos_id} if isinstance(eos_id, int) else set(eos_id)
    found = []
    for sequence in sequences:
        ids = np.asarray([int(token) for token in sequence][num_prompt:], np.int32)
        ends = np.flatnonzero(np.isin(ids, list(stops)))
        ids = ids[: int(ends[0]) + 1] if len(ends) else ids
        found.append(ids[walk(ids, machine).kept])
    return found
