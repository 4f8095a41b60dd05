"""What decoded ids are worth: the measures of SPEC 7, as pure functions over ids.

All functions take the *response* alone (no prompt), so that the stack machine's base is index 0.
A token is *right* if, at the moment it was written, the stack up to and including it was the
beginning of the unique reference; everything else, from the first mismatch on, is *wrong*.

Under `span` and `reset` an undo cannot stop at the first wrong token: right tokens have to go with
it. Those are no fault of the model and count neither for nor against it.
"""

# R tokens of a raw response, undone tokens and undos among them

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nmar_ds.traces.reduction import Machine, depths, num_undos
from nmar_ds.traces.schema import IdArray

Z_95 = 1.959963984540054  # two-sided 95 % point of the normal distribution


@dataclass(frozen=True, slots=True)
class Rate:
    """A share, kept as its two counts.

    Attributes:
        num: events that happened.
        of: events that could have.
        units: independent events they are worth, where one problem gives several: tokens of a
            response go wrong together, and an interval over tokens would be too narrow.
    """

    num: int
    of: int
    units: float | None = None

    @classmethod
    def over(cls, events: Iterable[bool]) -> Rate:
        """Count the true ones."""
        listed = [bool(event) for event in events]
        return cls(sum(listed), len(listed))

    @classmethod
    def spread(cls, nums: Iterable[int], sizes: Iterable[int]) -> Rate:
        """Add up events that come by problem: what happened, and could have, in each.

        The problems are worth `sum(sizes)^2 / sum(sizes^2)` events: their number where all are of
        a size, and hardly more than 1 where one of them has nearly all events.

        Source: Kish 1965, Survey Sampling, ch. 8, with events of one problem wholly dependent.
        """
        listed = [int(size) for size in sizes]
        squares = sum(size * size for size in listed)
        units = sum(listed) ** 2 / squares if squares else 0.0
        return cls(sum(int(num) for num in nums), sum(listed), units)

    @property
    def value(self) -> float | None:
        """Num / of, None where nothing could have happened."""
        return self.num / self.of if self.of else None

    @property
    def bounds(self) -> tuple[float, float]:
        """Wilson's 95 % interval."""
        units = self.of if self.units is None else min(self.units, self.of)
        return wilson((self.value or 0.0) * units, units)

    def as_dict(self) -> dict[str, float | int | None]:
        """The form kept in reports: counts, share and its Wilson 95 % interval."""
        value, (low, high) = self.value, self.bounds
        return {"value": value, "num": self.num, "of": self.of, "low": low, "high": high}


def wilson(num: float, of: float, z: float = Z_95) -> tuple[float, float]:
    """Score interval of a binomial share; (0, 1) where nothing was counted.

    Source: Wilson 1927, JASA 22:209. Unlike the normal interval it does not shrink to a point
    at shares of 0 or 1, where these evaluations live.
    """
    if of == 0:
        return 0.0, 1.0
    share = num / of
    centre = share + z * z / (2 * of)
    spread = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    scale = 1 + z * z / of
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def transitions(before: Sequence[bool], after: Sequence[bool]) -> tuple[Rate, Rate]:
    """Wrong-to-right and right-to-wrong rates from one way of answering to another.

    Args:
        before: right or not, per problem, without the faculty (undo banned).
        after: the same problems with it.

    Returns:
        (wrong to right, out of the wrong before; right to wrong, out of the right before).
    """
    pairs = list(zip(before, after, strict=True))
    gained = Rate.over(late for early, late in pairs if not early)
    lost = Rate.over(not late for early, late in pairs if early)
    return gained, lost


@dataclass(frozen=True, slots=True, kw_only=True)
class Pops:
    """What the undos of one response took away, judged against its unique reference.

    Attributes:
        popped_right: right tokens popped that did not have to be: by an undo that found nothing
            wrong on the stack. This is the false undo.
        popped_along: right tokens popped together with a wrong one above them, by one undo, which
            could not have stopped earlier; always 0 under `token`.
        popped_wrong: wrong tokens that were popped.
        num_wrong: wrong tokens written, popped or not.
    """

    popped_right: int
    popped_along: int
    popped_wrong: int
    num_wrong: int


def judge_pops(raw_ids: IdArray, reference_ids: IdArray, machine: Machine) -> Pops:
    """Count right and wrong tokens popped; sums give undo precision and recall.

    Precision is `popped_wrong / (popped_wrong + popped_right)`: what had to go along is in neither.
    Whenever something wrong is on the stack, the undos that take exactly it back end where its
    deviation starts (`reduction.start_of`), so an undo that pops a wrong token pops no right one
    needlessly, and one that pops right tokens only does nothing else.

    Args:
        raw_ids: int[R] response with its undos.
        reference_ids: int[...] the one right response, stop token included.
        machine: what one undo pops.
    """
    raw_ids = np.asarray(raw_ids)
    wrong_R = _wrong(raw_ids, reference_ids, machine)
    counts = {"popped_right": 0, "popped_along": 0, "popped_wrong": 0}
    stack: list[bool] = []  # of each token on the stack: whether it is wrong
    heights = depths(raw_ids, machine).tolist()
    for token, height, is_wrong in zip(raw_ids.tolist(), heights, wrong_R.tolist(), strict=True):
        if token != machine.undo_id:
            stack.append(is_wrong)
            continue
        popped = stack[height:]
        del stack[height:]
        counts["popped_wrong"] += sum(popped)
        counts["popped_along" if any(popped) else "popped_right"] += len(popped) - sum(popped)
    return Pops(**counts, num_wrong=int(wrong_R.sum()))


def _wrong(raw_ids: IdArray, reference_ids: IdArray, machine: Machine) -> npt.NDArray[np.bool_]:
    """bool[R]: an ordinary token at or after a mismatch with the reference. Undos are False."""
    heights_R = depths(raw_ids, machine).tolist()
    wrong_R = np.zeros(len(raw_ids), np.bool_)
    right_to = [True]  # right_to[d]: the lowest d tokens of the present stack begin the reference
    for index, (token, height) in enumerate(zip(raw_ids.tolist(), heights_R, strict=True)):
        if token == machine.undo_id:
            continue
        place = height - 1
        fits = place < len(reference_ids) and token == int(reference_ids[place])
        del right_to[height:]
        right_to.append(right_to[place] and fits)
        wrong_R[index] = not right_to[height]
    return wrong_R


def first_wrong(raw_ids: IdArray, reference_ids: IdArray, machine: Machine) -> int | None:
    """Index of the first wrong token of a response, None if all it wrote was right."""
    wrong = np.flatnonzero(_wrong(np.asarray(raw_ids), reference_ids, machine))
    return int(wrong[0]) if len(wrong) else None


def leading_undos(emitted_ids: IdArray, undo_id: int) -> int:
    """Number of undos before the first other token."""
    others = np.flatnonzero(np.asarray(emitted_ids) != undo_id)
    return int(others[0]) if len(others) else len(emitted_ids)


def detection_latency(raw_ids: IdArray, onset: int, undo_id: int) -> int | None:
    """Tokens from the first wrong token to the first undo after it.

    1 is the quickest there is, the undo right after the wrong token. None: never undone.

    Args:
        raw_ids: int[R] response.
        onset: index in it of the first wrong token.
        undo_id: id of `<UNDO>`.
    """
    undos = np.flatnonzero(np.asarray(raw_ids)[onset:] == undo_id)
    return int(undos[0]) if len(undos) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """How one forced deviation was taken.

    Attributes:
        undone: the very first emitted token is an undo.
        exact: the emitted text opens with the right number of undos and no more.
        over: it opens with more, so that right tokens were popped that did not have to be, or the
            base was hit.
        parroted: after its opening undos it writes the deviation again, as it was written: under
            `span` and `reset` with the right tokens at its head. None without an undo.
    """

    undone: bool
    exact: bool
    over: bool
    parroted: bool | None


def judge_recovery(emitted_ids: IdArray, deviation_ids: IdArray, machine: Machine) -> Recovery:
    """Judge what a model emits right after a deviation that was forced on it.

    Args:
        emitted_ids: what the model wrote after the deviation.
        deviation_ids: the forced span, from where undos can come back to.
        machine: gives the number of undos that take it back whole: under `reset` 1.
    """
    num_expected = num_undos(deviation_ids, machine)
    run = leading_undos(emitted_ids, machine.undo_id)
    retry = np.asarray(emitted_ids)[run : run + len(deviation_ids)]
    return Recovery(
        undone=run > 0,
        exact=run == num_expected,
        over=run > num_expected,
        parroted=bool(np.array_equal(retry, deviation_ids)) if run > 0 else None,
    )


def num_revisits(raw_ids: IdArray, machine: Machine) -> int:
    """How often writing a token led back to a stack content that an undo had once left.

    Under `token` that is any content the response had been at before. Under `span` and `reset` a
    correction writes the right head of its deviation again: contents that it had merely passed
    through, and going through them once more is no loop. With strictly greedy, memoryless decoding
    one revisit would be a loop for ever; a model that sees its undone tokens can get out, so this
    is a count.
    """
    raw_ids = np.asarray(raw_ids)
    heights = depths(raw_ids, machine).tolist()
    children: dict[tuple[int, int], int] = {}  # a trie of all contents: (node, token) -> node
    path = [0]  # node of every height of the present stack
    left: set[int] = set()  # nodes at which an undo struck
    revisits = 0
    for token, height in zip(raw_ids.tolist(), heights, strict=True):
        if token == machine.undo_id:
            left.add(path[-1])
            del path[height + 1 :]
            continue
        node = children.setdefault((path[-1], token), len(children) + 1)
        path.append(node)
        revisits += node in left
    return revisits


def overhead(raw: Iterable[IdArray], reduced: Iterable[IdArray]) -> float | None:
    """Tokens emitted per token kept; under `token` it is 1 / (1 - 2u) at u undos per token."""
    num_kept = sum(len(ids) for ids in reduced)
    return sum(len(ids) for ids in raw) / num_kept if num_kept else None


def auroc(positives: npt.ArrayLike, negatives: npt.ArrayLike) -> float | None:
    """Chance that a positive scores above a negative, ties counted half (Mann-Whitney U)."""
    positives, ordered = np.asarray(positives, np.float64), np.sort(np.asarray(negatives, float))
    if len(positives) == 0 or len(ordered) == 0:
        return None
    below = np.searchsorted(ordered, positives, side="left")
    upto = np.searchsorted(ordered, positives, side="right")
    return float(((below + upto) / 2).mean() / len(ordered))
