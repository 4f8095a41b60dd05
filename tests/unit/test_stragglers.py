"""When a rank counts as slow: arithmetic alone."""

from __future__ import annotations

import torch

from nmar_ds.training.stragglers import FACTOR, PATIENCE, Stragglers, probe_seconds


def test_twice_the_median_ten_times_in_a_row_and_then_every_ten() -> None:
    assert (FACTOR, PATIENCE) == (2.0, 10)
    watch = Stragglers()
    found = [watch.note([1.0, 1.1, 2.2, 0.9]) for _ in range(30)]
    assert [step for step, ranks in enumerate(found, start=1) if ranks] == [10, 20, 30]
    assert found[9] == [(2, 2.2)]


def test_one_good_step_begins_the_count_anew() -> None:
    watch = Stragglers()
    for _ in range(3):
        assert not any(watch.note([1.0, 1.0, 5.0]) for _ in range(9))
        assert not watch.note([1.0, 1.0, 1.9])


def test_of_two_ranks_the_slow_one_is_named() -> None:
    watch = Stragglers()
    found = [watch.note([2.0, 1.0]) for _ in range(10)]
    assert found[-1] == [(0, 2.0)]


def test_equal_and_single_ranks_are_never_slow() -> None:
    for seconds in ([3.0], [0.5] * 8, [0.0, 0.0], [1.0, 1.99]):
        watch = Stragglers()
        assert not any(watch.note(seconds) for _ in range(25))


def test_the_probe_takes_time_and_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    assert 0 < probe_seconds(torch.device("cpu")) < 5
    assert torch.equal(state, torch.get_rng_state())
