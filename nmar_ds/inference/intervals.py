"""Bootstrap intervals, for measures that are no shares of independent events.

What is drawn again is problems (or traces), never tokens: the tokens of one response go wrong
together. Every measure of a report uses the same draws, so an interval depends on the seed and on
the measure's own numbers, and on nothing that was measured beside it.

Source: percentile bootstrap, Efron and Tibshirani 1993, An Introduction to the Bootstrap, ch. 13.
Cost: `NUM_RESAMPLES` x P multinomial counts a measure, 20 ms at 200 problems.
"""

# P problems or traces, R resamples, C columns

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nmar_ds.inference.metrics import auroc

NUM_RESAMPLES = 2000
LEVEL = 0.95
SEED = 0
CHUNK = 2**23  # counts held at once; 64 MiB

Floats = npt.NDArray[np.float64]
Bounds = tuple[float | None, float | None]


def draws(num_units: int, *, seed: int = SEED, num: int = NUM_RESAMPLES) -> Iterator[Floats]:
    """How often each unit was drawn, in chunks float64[R', P] that make `num` rows in all."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    shares = np.full(num_units, 1 / num_units)
    size = max(1, CHUNK // num_units)
    for first in range(0, num, size):
        counts = generator.multinomial(num_units, shares, size=min(size, num - first))
        yield counts.astype(np.float64)


def resampled_sums(columns_PC: npt.ArrayLike, *, seed: int = SEED) -> Floats:
    """float64[R, C]: the column sums of each resample of the rows."""
    columns = np.asarray(columns_PC, np.float64)
    return np.concatenate([counts @ columns for counts in draws(len(columns), seed=seed)])


def bounds(values_R: Floats) -> Bounds:
    """Percentile interval; resamples in which nothing was counted (nan) say nothing.

    None where it would be a point: units that all agree do not tell how others might differ.
    """
    known = values_R[~np.isnan(values_R)]
    if not len(known):
        return None, None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if np.isclose(low, high, rtol=1e-12, atol=0.0):  # sums of equal values differ in a last bit
        return None, None
    return float(low), float(high)


@dataclass(frozen=True, slots=True, eq=False)
class Mean:
    """A mean, kept as what each problem adds to its sum and to its count.

    Attributes:
        sums: float64[P].
        counts: float64[P]; 0 where a problem has no say.
    """

    sums: Floats
    counts: Floats

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Mean:
        """One value a problem, None where it has none."""
        listed = list(values)
        return cls.ratio(
            [value or 0.0 for value in listed], [float(value is not None) for value in listed]
        )

    @classmethod
    def ratio(cls, sums: Iterable[float], counts: Iterable[float]) -> Mean:
        """A ratio of two sums over problems, such as tokens emitted per token kept."""
        both = np.asarray(list(sums), np.float64), np.asarray(list(counts), np.float64)
        assert both[0].shape == both[1].shape, "a sum and a count for every problem"
        return cls(*both)

    @property
    def value(self) -> float | None:
        """Sum / count, None where nothing was counted."""
        count = float(self.counts.sum())
        return float(self.sums.sum()) / count if count else None

    @property
    def num_units(self) -> int:
        """Problems that have a say."""
        return int((self.counts != 0).sum())

    def bounds(self, seed: int = SEED) -> Bounds:
        """Bootstrap interval over the problems; none of fewer than two that have a say."""
        if self.num_units < 2:
            return None, None
        drawn = resampled_sums(np.stack([self.sums, self.counts], axis=1), seed=seed)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios = np.where(drawn[:, 1] != 0, drawn[:, 0] / drawn[:, 1], np.nan)
        return bounds(ratios)

    def as_dict(self) -> dict[str, float | int | None]:
        """The form kept in reports."""
        low, high = self.bounds()
        return {"value": self.value, "of": self.num_units, "low": low, "high": high}


@dataclass(frozen=True, slots=True, eq=False)
class Auroc:
    """Chance that a positive scores above a negative, a pair of which every problem gives.

    Attributes:
        positives, negatives: float64[P].
    """

    positives: Floats
    negatives: Floats

    @property
    def value(self) -> float | None:
        """Mann-Whitney's U over the number of pairs, None of no problems."""
        return auroc(self.positives, self.negatives)

    def bounds(self, seed: int = SEED) -> Bounds:
        """Bootstrap interval over the problems, a pair at a time; none of fewer than two."""
        num = len(self.positives)
        if num < 2:
            return None, None
        # By ranks: a table of all pairs would grow with the square of the problems.
        order = np.argsort(self.negatives)
        lower, upper = (
            np.searchsorted(self.negatives[order], self.positives, side=side)
            for side in ("left", "right")
        )
        parts = []
        for counts in draws(num, seed=seed):
            # below[:, n]: how many of the drawn negatives are among the n lowest.
            below = np.pad(counts[:, order].cumsum(axis=1), ((0, 0), (1, 0)))
            wins = (below[:, lower] + below[:, upper]) / 2  # ties count half
            parts.append((wins * counts).sum(axis=1))
        return bounds(np.concatenate(parts) / num**2)

    def as_dict(self) -> dict[str, float | int | None]:
        """The form kept in reports."""
        low, high = self.bounds()
        return {"value": self.value, "of": len(self.positives), "low": low, "high": high}
