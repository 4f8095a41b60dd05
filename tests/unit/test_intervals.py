"""Bootstrap intervals against every resample there is, counted one by one."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest

from nmar_ds.inference import intervals
from nmar_ds.inference.intervals import Auroc, Mean, bounds, draws, resampled_sums
from nmar_ds.inference.metrics import auroc


def exact_bounds(statistics: list[float]) -> tuple[float, float]:
    """The quantiles of equally likely resamples, those without a value left out."""
    known = np.sort([value for value in statistics if not np.isnan(value)])
    places = (np.arange(len(known)) + 1) / len(known)
    low, high = (known[np.searchsorted(places, q)] for q in (0.025, 0.975))
    return float(low), float(high)


def test_a_ratio_over_four_problems_has_the_bounds_of_all_256_resamples() -> None:
    sums, counts = np.array([3.0, 0.0, 10.0, 1.0]), np.array([2.0, 0.0, 4.0, 1.0])
    everything = [
        sums[list(chosen)].sum() / total if (total := counts[list(chosen)].sum()) else np.nan
        for chosen in itertools.product(range(4), repeat=4)
    ]
    found = Mean.ratio(sums, counts)
    assert found.value == 14 / 7 and found.num_units == 3
    assert found.bounds() == pytest.approx(exact_bounds(everything))
    assert found.bounds() != pytest.approx(exact_bounds([v for v in everything if v < 2.5]))


def test_a_mean_is_of_the_problems_that_have_a_value() -> None:
    found = Mean.of([1, None, 3, 8])
    assert (found.value, found.num_units) == (4.0, 3)
    report = found.as_dict()
    assert (report["value"], report["of"]) == (4.0, 3)
    assert (report["low"], report["high"]) == found.bounds()
    assert Mean.of([None, None]).as_dict() == {"value": None, "of": 0, "low": None, "high": None}
    assert Mean.of([7, None]).bounds() == (None, None)  # one problem says nothing of spread
    assert Mean.of([0, 0, 5]).value == pytest.approx(5 / 3)


def test_a_mean_of_many_has_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    low, high = Mean.of(values.tolist()).bounds()
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_auroc_over_four_problems_has_the_bounds_of_all_256_resamples() -> None:
    positives, negatives = np.array([0.9, 0.5, 0.3, 0.8]), np.array([0.1, 0.5, 0.6, 0.2])
    everything = [
        auroc(positives[list(chosen)], negatives[list(chosen)]) or 0.0
        for chosen in itertools.product(range(4), repeat=4)
    ]
    found = Auroc(positives, negatives)
    assert found.value == auroc(positives, negatives)
    assert found.bounds() == pytest.approx(exact_bounds(everything))
    assert Auroc(np.empty(0), np.empty(0)).as_dict()["value"] is None
    assert Auroc(np.array([0.5]), np.array([0.2])).bounds() == (None, None)


def test_auroc_needs_no_table_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "CHUNK", 2**16)
    generator = np.random.default_rng(2)
    scores = Auroc(generator.normal(1.0, 1.0, 2000), generator.normal(0.0, 1.0, 2000))
    tracemalloc.start()
    low, high = scores.bounds()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8e6  # 2,000 times 2,000 numbers are 32e6 bytes
    assert low is not None and high is not None and low < (scores.value or 0) < high < low + 0.04


def test_draws_are_seeded_and_do_not_depend_on_their_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = np.concatenate(list(draws(7, seed=3)))
    assert whole.shape == (intervals.NUM_RESAMPLES, 7) and (whole.sum(axis=1) == 7).all()
    assert whole.mean(axis=0) == pytest.approx(np.ones(7), abs=0.1)
    monkeypatch.setattr(intervals, "CHUNK", 7 * 30)
    parts = list(draws(7, seed=3))
    assert len(parts) > 10 and np.array_equal(np.concatenate(parts), whole)
    assert not np.array_equal(np.concatenate(list(draws(7, seed=4))), whole)
    columns = np.arange(14.0).reshape(7, 2)
    assert np.array_equal(resampled_sums(columns, seed=3), whole @ columns)


def test_bounds_leave_out_what_counted_nothing() -> None:
    known = np.linspace(2.0, 4.0, 41)
    assert bounds(np.concatenate([[np.nan], known, [np.nan]])) == pytest.approx((2.05, 3.95))
    assert bounds(np.array([np.nan])) == (None, None)


def test_units_that_all_agree_have_no_interval() -> None:
    """Their resamples are equal: a point, which is not what is known of the next problem."""
    assert bounds(np.array([np.nan, 2.0, 2.0])) == (None, None)
    assert Mean.of([0] * 20).as_dict() == {"value": 0.0, "of": 20, "low": None, "high": None}
    assert Mean.of([0.1, 0.1, 0.1]).bounds() == (None, None)  # equal but for a last bit
    assert Mean.of([-1] * 8).bounds() == (None, None)
    parted = Auroc(np.linspace(0.6, 0.9, 20), np.linspace(0.1, 0.5, 20))
    assert parted.as_dict() == {"value": 1.0, "of": 20, "low": None, "high": None}
    assert Mean.of([0] * 19 + [1]).bounds() == (0.0, pytest.approx(0.15))
