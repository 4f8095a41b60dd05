"""The merges that a SentencePiece BPE model really makes, as `tokenizers` wants them written.

SentencePiece joins whichever neighbours spell the best-scored piece, the leftmost first;
`tokenizers` joins listed pairs in the order of the list. Writing down every split of every piece
(as transformers' converter does) is an approximation: it offers joins that SentencePiece never
makes, in an order of its own among equal scores.

Here the list is exact. While a piece P arises somewhere in a text, nothing crosses its borders, so
the joins inside it are those of encoding P alone. Hence a piece that does not come out whole when
encoded alone never arises, and any other arises from one pair only: the last join of that
encoding. Among pairs of different scores both libraries then take the same steps. Equal scores
need care, and are refused where they cannot be put in an order (`_ordered`).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

Pair = tuple[str, str]
# Runs are compared up to this many times the longest piece: both results repeat with its length.
NUM_PERIODS = 6


class InexpressibleError(ValueError):
    """A vocabulary whose joins no list of merges can reproduce; says which pieces."""


def derive_merges(scores: Mapping[str, float], matches_symbol: Callable[[str], bool]) -> list[Pair]:
    """List the pairs in the order in which they are joined.

    Cost: about a second per 32,000 pieces, quadratic in a piece's length.

    Args:
        scores: of the pieces that can be joined (normal and unused ones), by their text.
        matches_symbol: whether a user-defined symbol occurs in a text; such pieces never arise.

    Returns:
        At most one pair per piece, but for runs of one character.

    Raises:
        InexpressibleError: equal scores that leave the order open, or a part that is no piece.
    """
    pair_of: dict[str, Pair] = {}
    for piece in scores:
        if len(piece) > 1 and not matches_symbol(piece):
            pair = last_join(piece, scores)
            if pair is not None:
                pair_of[piece] = pair
    for piece, pair in pair_of.items():
        for part in pair:
            if part not in scores:
                raise InexpressibleError(f"the piece {piece!r} arises from {part!r}, which is none")
    levels: dict[float, list[str]] = defaultdict(list)
    for piece in pair_of:
        levels[scores[piece]].append(piece)
    best_use = _best_use(pair_of, scores)
    merges: list[Pair] = []
    for score in sorted(levels, reverse=True):
        level = levels[score]
        if len(level) == 1:
            merges.append(pair_of[level[0]])
        elif all(best_use.get(piece, -float("inf")) < score for piece in level):
            merges.extend(_ordered([pair_of[piece] for piece in level], score))
        else:
            merges.extend(_run_merges(level, pair_of, scores))
    return merges


def last_join(piece: str, scores: Mapping[str, float]) -> Pair | None:
    """Encode a piece alone as SentencePiece does.

    Returns:
        The two parts of the last join, or None where the piece does not come out whole.
    """
    symbols = list(piece)
    while len(symbols) > 2:
        place, best = -1, -float("inf")
        for number in range(len(symbols) - 1):
            score = scores.get(symbols[number] + symbols[number + 1])
            if score is not None and (place < 0 or score > best):
                place, best = number, score
        if place < 0:
            return None
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    return (symbols[0], symbols[1]) if len(symbols) == 2 else None


def _best_use(pair_of: Mapping[str, Pair], scores: Mapping[str, float]) -> dict[str, float]:
    """Map each piece to the best score of what it is a part of."""
    best: dict[str, float] = {}
    for piece, pair in pair_of.items():
        for part in pair:
            best[part] = max(best.get(part, -float("inf")), scores[piece])
    return best


def _ordered(pairs: list[Pair], score: float) -> list[Pair]:
    """Order pairs of equal score so that of two which overlap in a text the left one is first.

    That is what SentencePiece takes. No join of this level offers another of its score or better,
    so overlaps are all that matters.
    """
    starting: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        starting[pair[0]].append(pair)
    num_before = dict.fromkeys(pairs, 0)
    for pair in pairs:
        for follower in starting[pair[1]]:
            num_before[follower] += follower != pair
    ready = [pair for pair in pairs if num_before[pair] == 0]
    ordered: list[Pair] = []
    while ready:
        pair = ready.pop(0)
        ordered.append(pair)
        for follower in starting[pair[1]]:
            if follower != pair:
                num_before[follower] -= 1
                if num_before[follower] == 0:
                    ready.append(follower)
    if len(ordered) < len(pairs):
        rest = sorted(set(pairs) - set(ordered))[:2]
        raise InexpressibleError(f"the pairs {rest} share the score {score:g} and may overlap")
    return ordered


def _run_merges(
    level: Sequence[str], pair_of: Mapping[str, Pair], scores: Mapping[str, float]
) -> list[Pair]:
    """Merges for runs of one character that all have one score, as Llama has for spaces.

    SentencePiece grows such a run from the left, one character at a time, which no list of merges
    does. But what comes out can be had by doubling first and then adding what is left over; that
    it is the same is checked for every length that can matter, and refused otherwise.
    """
    score, unit = scores[level[0]], level[0][0]
    error = InexpressibleError(
        f"the pieces {sorted(level)[:3]} share the score {score:g} and are made of each other"
    )
    sizes = {len(piece) for piece in level}
    of_unit = {piece for piece in pair_of if piece == unit * len(piece)}
    used_elsewhere = any(
        scores[piece] >= score and piece not in of_unit and not of_unit.isdisjoint(pair)
        for piece, pair in pair_of.items()
    )
    if used_elsewhere or of_unit != set(level):
        raise error
    known = sizes | {1}
    doublings = []
    size = 1
    while 2 * size in sizes:
        doublings.append((size, size))
        size *= 2
    others = [(a, b) for a in known for b in known if a + b in sizes and (a, b) not in doublings]
    order = [*doublings, *sorted(others, reverse=True)]
    for length in range(1, NUM_PERIODS * max(sizes) + 1):
        if _grown(length, sizes) != _merged(length, order):
            raise error
    return [(unit * a, unit * b) for a, b in order]


def _grown(length: int, sizes: set[int]) -> list[int]:
    """Cut a run as SentencePiece does: the leftmost pair that spells a piece, again and again."""
    parts = [1] * length
    place = 0
    while place < len(parts) - 1:
        if parts[place] + parts[place + 1] in sizes:
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
            place = max(place - 1, 0)
        else:
            place += 1
    return parts


def _merged(length: int, order: Sequence[tuple[int, int]]) -> list[int]:
    """Cut a run as a list of merges does: the first pair of the list that occurs, leftmost."""
    rank = {pair: number for number, pair in enumerate(order)}
    parts = [1] * length
    while True:
        found = [
            (rank[pair], place)
            for place, pair in enumerate(itertools.pairwise(parts))
            if pair in rank
        ]
        if not found:
            return parts
        place = min(found)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
