"""The stack machine token by token: what a decoder that guards or streams knows of a response.

`traces.reduction` runs the same machine over a finished response; a test holds both against each
other. Every content the stack ever had is a node of a trie, so that coming back to one is seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from nmar_ds.traces.reduction import Machine


class Append(NamedTuple):
    """A token was written."""

    token: int


class Retract(NamedTuple):
    """An undo was carried out: how many tokens it took, which may be none, and which they were."""

    tokens: tuple[int, ...]


Event = Append | Retract


class Stack:
    """One response on its way.

    Args:
        machine: what one undo pops.
        ids: the response so far, undos among them.

    Attributes:
        ids: what is left of it.
        num_revisits: how often writing led back to a content that an undo had once left; as
            `metrics.num_revisits` counts.
    """

    def __init__(self, machine: Machine, ids: Iterable[int] = ()) -> None:
        self._machine = machine
        self.ids: list[int] = []
        self.num_revisits = 0
        self._path = [0]  # node of every height
        self._children: dict[tuple[int, int], int] = {}
        self._left: set[int] = set()  # nodes at which an undo struck
        self._popped: dict[int, set[int]] = {}  # node -> tokens an undo struck right after it
        for token in ids:
            self.write(token)

    def write(self, token: int) -> Event:
        """Carry out one more token."""
        if token != self._machine.undo_id:
            node = self._children.setdefault((self._path[-1], token), len(self._children) + 1)
            self.num_revisits += node in self._left
            self._path.append(node)
            self.ids.append(token)
            return Append(token)
        self._left.add(self._path[-1])
        height = self._height_after_undo()
        taken = tuple(self.ids[height:])
        if taken:
            # Not the first that is taken: under `span` and `reset` right tokens go along with the
            # error, and the correction begins with them (SPEC 2).
            self._popped.setdefault(self._path[-2], set()).add(taken[-1])
        del self.ids[height:], self._path[height + 1 :]
        return Retract(taken)

    def _height_after_undo(self) -> int:
        height = max(len(self.ids) - 1, 0)
        if self._machine.semantics == "reset":
            return 0
        if self._machine.semantics == "span":
            while height > 0 and self.ids[height - 1] not in self._machine.boundary_ids:
                height -= 1
        return height

    @property
    def taken_back(self) -> frozenset[int]:
        """Tokens that stood right here, after just this content, when an undo struck them."""
        return frozenset(self._popped.get(self._path[-1], ()))

    def copy(self) -> Stack:
        """Another response that has gone the same way so far."""
        other = Stack(self._machine)
        other.ids, other.num_revisits = list(self.ids), self.num_revisits
        other._path, other._children = list(self._path), dict(self._children)
        other._left = set(self._left)
        other._popped = {node: set(tokens) for node, tokens in self._popped.items()}
        return other
