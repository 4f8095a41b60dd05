"""Alignment: minimal, complete, and beginning at the first token that is not the reference's."""

from __future__ import annotations

import numpy as np
import pytest

from nmar_ds.traces import alignment
from nmar_ds.traces.alignment import Gap, align

NUM_PAIRS = 5000


def ids(text: str) -> np.ndarray:
    return np.array([ord(letter) for letter in text], dtype=np.int32)


def distance(gaps: list[Gap]) -> int:
    """What a script costs: in each gap, the longer side."""
    return sum(max(gap.end - gap.start, gap.resume - gap.cut) for gap in gaps)


def levenshtein(left: list[int], right: list[int]) -> int:
    """Wagner and Fischer's two rows, straight from the definition."""
    above = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        row = [i]
        for j, b in enumerate(right, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a != b)))
        above = row
    return above[-1]


def random_pair(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A reference and an edit of it: few letters, so that tokens repeat; either may be empty."""
    letters = int(rng.integers(1, 9))
    reference = rng.integers(letters, size=int(rng.integers(0, 31))).astype(np.int32)
    if rng.random() < 0.2:  # nothing to do with it
        return rng.integers(letters, size=int(rng.integers(0, 31))).astype(np.int32), reference
    sample = reference.tolist()
    for _ in range(int(rng.integers(0, 7))):
        place = int(rng.integers(0, len(sample) + 1))
        stretch = rng.integers(letters, size=int(rng.integers(0, 4))).tolist()
        sample[place : place + int(rng.integers(0, 4))] = stretch
    if rng.random() < 0.2:
        sample = sample[: int(rng.integers(0, len(sample) + 1))]
    return np.array(sample, dtype=np.int32), reference


def require_script(sample: np.ndarray, reference: np.ndarray, gaps: list[Gap]) -> None:
    """Carrying the gaps out gives the reference; outside them both are equal."""
    at, place, out = 0, 0, []
    for gap in gaps:
        assert gap.start >= at and gap.cut >= place
        assert gap.end > gap.start or gap.resume > gap.cut, "an empty gap"
        assert np.array_equal(sample[at : gap.start], reference[place : gap.cut])
        if gap is not gaps[0]:
            assert gap.start > at, "two gaps with nothing between are one"
        if gap.end > gap.start and gap.cut < len(reference):
            assert sample[gap.start] != reference[gap.cut], "it begins with a right token"
        out += [*sample[at : gap.start].tolist(), *reference[gap.cut : gap.resume].tolist()]
        at, place = gap.end, gap.resume
    assert np.array_equal(sample[at:], reference[place:])
    assert [*out, *sample[at:].tolist()] == reference.tolist()


def test_five_thousand_random_edits_are_aligned_minimally() -> None:
    rng = np.random.default_rng(5)
    num_gaps = 0
    for _ in range(NUM_PAIRS):
        sample, reference = random_pair(rng)
        gaps = align(sample, reference)
        require_script(sample, reference, gaps)
        assert distance(gaps) == levenshtein(sample.tolist(), reference.tolist())
        num_gaps += len(gaps)
    assert num_gaps > NUM_PAIRS, "the pairs differ at all"


@pytest.mark.parametrize(
    ("sample", "reference", "gaps"),
    [
        ("", "", []),
        ("abc", "abc", []),
        ("", "abc", [Gap(0, 0, 0, 3)]),
        ("abc", "", [Gap(0, 3, 0, 0)]),
        ("ab", "abc", [Gap(2, 2, 2, 3)]),  # a sample that stops too early
        ("abcd", "abc", [Gap(3, 4, 3, 3)]),  # one that runs on
        ("acd", "abcd", [Gap(1, 1, 1, 2)]),  # something left out: nothing to undo
        ("axbc", "abc", [Gap(1, 2, 1, 1)]),
        ("777", "77", [Gap(2, 3, 2, 2)]),  # repeated tokens: right as long as they are due
        ("axxd", "abcd", [Gap(1, 3, 1, 3)]),
        ("xbcy", "abcd", [Gap(0, 1, 0, 1), Gap(3, 4, 3, 4)]),
        ("abab", "baba", [Gap(0, 1, 0, 0), Gap(4, 4, 3, 4)]),
    ],
)
def test_pairs_by_hand(sample: str, reference: str, gaps: list[Gap]) -> None:
    assert align(ids(sample), ids(reference)) == gaps


def test_a_narrow_band_is_widened_until_it_holds_every_minimal_script() -> None:
    """Equal lengths start with the narrowest band; the only cheap script leaves it by 12."""
    middle = np.arange(100, 400, dtype=np.int32)
    sample = np.concatenate([[1], middle, np.arange(50, 62), [2]]).astype(np.int32)
    reference = np.concatenate([[3], np.arange(50, 62), middle, [4]]).astype(np.int32)
    gaps = align(sample, reference)
    require_script(sample, reference, gaps)
    assert distance(gaps) == levenshtein(sample.tolist(), reference.tolist()) == 26


def test_long_samples_that_agree_cost_a_narrow_band(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = np.random.default_rng(0).integers(32000, size=100_000).astype(np.int32)
    sample = reference.copy()
    sample[[10, 50_000, 99_000]] = -1
    monkeypatch.setattr(alignment, "MAX_CELLS", 1_000_000)
    assert align(sample, reference) == [Gap(n, n + 1, n, n + 1) for n in (10, 50_000, 99_000)]
    with pytest.raises(alignment.TooFarApartError, match=r"cells, expected at most 1,000,000"):
        align(np.full(5000, -1, dtype=np.int32), reference[:5000])
