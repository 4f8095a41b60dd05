"""What a trace is: token ids, and for each token the role it plays (SPEC section 1)."""

# T tokens in a trace

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

IdArray = npt.NDArray[np.int32]
RoleArray = npt.NDArray[np.uint8]


class Role(IntEnum):
    """The part a token plays; the value is the byte kept in stores."""

    PROMPT = 0
    PREFIX = 1
    DEVIATION = 2
    UNDO = 3
    CORRECTION = 4

    @property
    def label(self) -> str:
        """Lower-case name, as written in records, configurations and TensorBoard tags."""
        return self.name.lower()


NUM_ROLES = len(Role)
NO_ROLE = 255  # padding, and the target of a trace's last token
ROLE_BY_LABEL = {role.label: role for role in Role}


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A maximal run of tokens of one role.

    Attributes:
        role: the role of every token in it.
        ids: int32[n], n >= 1.
        start: index of its first token in the trace.
    """

    role: Role
    ids: IdArray
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One checked training example.

    Attributes:
        ids: int32[T] token ids.
        roles: uint8[T], a `Role` value per token.
        onsets: for each deviation, in order, the index in `ids` of its first *wrong* token
            (SPEC 2, invariant 7: snapping may move right tokens into a deviation).
        line: 1-based line of the record in its source file.
        source: index of that file in the list of sources.
    """

    ids: IdArray
    roles: RoleArray
    onsets: tuple[int, ...] = ()
    line: int = 0
    source: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def segments(self) -> Iterator[Segment]:
        """Yield the role runs in order; the grammar keeps equal roles apart."""
        cuts = np.flatnonzero(np.diff(self.roles)) + 1
        starts = [0, *cuts.tolist()] if len(self.ids) else []
        for start, end in zip(starts, [*starts[1:], len(self.ids)], strict=True):
            yield Segment(role=Role(int(self.roles[start])), ids=self.ids[start:end], start=start)
