"""Greedy decoding with the stack machine where a forward is dear and there is no cache.

Under ZeRO-3 every forward gathers the whole model, so what counts is their number. One forward over
a context and a guess of what follows gives the greedy token after every place of the guess: as many
of them hold as the guess is right, and one more. The next guess is what this forward would have
written (Jacobi decoding, Santilli et al., arXiv 2305.10427). The first guess is given: the trace's
own response. The outcome is that of `decoding.decode` at temperature 0, whatever is guessed; with
a good guess a whole response costs one forward.
"""

# T tokens of a sequence with its guess

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from nmar_ds.inference.decoding import Decoded
from nmar_ds.traces.reduction import Machine, walk
from nmar_ds.traces.schema import IdArray


class Asked(NamedTuple):
    """A sequence whose next tokens are asked for.

    Attributes:
        ids: int32[T] context and guess.
        first: the greedy token after each of `ids[first:]` is wanted.
    """

    ids: IdArray
    first: int

    @property
    def num_wanted(self) -> int:
        """How many tokens are asked for."""
        return len(self.ids) - self.first


NextIds = Callable[[Sequence[Asked]], list[IdArray]]


@dataclass(slots=True)
class _Open:
    """A response that is being written."""

    context: IdArray
    guess: IdArray
    max_new_tokens: int
    emitted: list[int] = field(default_factory=list)

    def is_done(self, eos_id: int) -> bool:
        """Stopped, or without room."""
        stopped = bool(self.emitted) and self.emitted[-1] == eos_id
        return stopped or len(self.emitted) >= self.max_new_tokens

    def asked(self) -> Asked:
        """The context, what is certain, and the guess, as far as tokens may still be written."""
        certain = np.concatenate([self.context, np.array(self.emitted, np.int32)])
        room = self.max_new_tokens - len(self.emitted) - 1
        return Asked(np.concatenate([certain, self.guess[:room]]), len(certain) - 1)

    def take(self, asked: Asked, next_ids: IdArray, eos_id: int) -> None:
        """Write what the guess had right, and the token after it."""
        guess = asked.ids[asked.first + 1 :]
        wrong = np.flatnonzero(guess != next_ids[:-1])
        num_sure = int(wrong[0]) + 1 if len(wrong) else len(next_ids)
        stops = np.flatnonzero(next_ids[:num_sure] == eos_id)
        if len(stops):
            num_sure = int(stops[0]) + 1
        self.emitted += next_ids[:num_sure].tolist()
        self.guess = next_ids[num_sure:]


def decode_drafted(
    next_ids: NextIds,
    prompts: Sequence[IdArray],
    drafts: Sequence[IdArray],
    *,
    machine: Machine,
    eos_id: int,
    max_new_tokens: Sequence[int],
    max_forwards: int,
    forced: Sequence[IdArray],
) -> list[Decoded]:
    """Decode all prompts side by side.

    Args:
        next_ids: the greedy tokens that each sequence asks for; one call is one forward.
        prompts: int32 arrays, one id at least.
        drafts: int32 arrays, the first guess of what follows; may be empty.
        machine: the id of `<UNDO>`, and what one of them undoes.
        eos_id: the stop token.
        max_new_tokens: tokens emitted at most, of each response by itself; one that has no room
            (0 or less) stays as it is.
        max_forwards: calls of `next_ids` at most. A response that is not done by then ends there,
            as by `max_new_tokens`; what it holds is certain.
        forced: int32 arrays, response already written, which may be undone.

    Returns:
        One `Decoded` per prompt, in order; no limit of undos is in force.
    """
    rows = [
        _Open(np.concatenate([prompt, start]).astype(np.int32), np.asarray(draft, np.int32), room)
        for prompt, start, draft, room in zip(prompts, forced, drafts, max_new_tokens, strict=True)
    ]
    for _ in range(max_forwards):
        waiting = [row for row in rows if not row.is_done(eos_id)]
        if not waiting:
            break
        asked = [row.asked() for row in waiting]
        for row, question, answer in zip(waiting, asked, next_ids(asked), strict=True):
            row.take(question, answer, eos_id)
    return [
        _decoded(row.emitted, start, machine, eos_id)
        for row, start in zip(rows, forced, strict=True)
    ]


def _decoded(emitted: list[int], start: IdArray, machine: Machine, eos_id: int) -> Decoded:
    raw = np.concatenate([start, np.array(emitted, np.int32)]).astype(np.int32)
    carried = walk(raw, machine)
    return Decoded(
        raw_ids=raw,
        num_forced=len(start),
        reduced_ids=raw[carried.kept],
        num_undos=emitted.count(machine.undo_id),
        num_strays=carried.num_strays,
        undo_limited=False,
        loop_limited=False,
        stop_reason="eos" if emitted and emitted[-1] == eos_id else "length",
    )
