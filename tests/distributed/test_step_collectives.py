"""Collectives per micro-batch: as many as layers and head need, on every rank, whatever it trains."""

from __future__ import annotations

import pytest
from count_cases import collectives, gathers_beside_gloo, last_gradients, sums_beside_gloo
from pool import RankPool


def test_ranks_make_the_same_collectives_whatever_they_train(two_ranks: RankPool) -> None:
    both = two_ranks.run(collectives)
    one_idle = two_ranks.run(collectives, idle_rank=1)
    assert all(loss > 0 for run in both for loss in run["losses"])
    assert one_idle[1]["losses"] == [0.0] * 5 and one_idle[0]["losses"][0] > 0
    counts = [run["counts"] for run in (*both, *one_idle)]
    assert all(one == counts[0] for one in counts)
    # DeepSpeed learns the order in the first two; then what is gathered stays until the step
    expected = {"isend": 1, "irecv": 1, "all_to_all_single": 1}
    assert counts[0][2:] == [expected] * 3
    # each layer whole, twice at most: embedding, two layers, the last norm, head
    assert counts[0][0]["isend"] == counts[0][0]["irecv"] <= 10


def test_the_optimizer_reads_the_gradients_where_they_lie(two_ranks: RankPool) -> None:
    for run in two_ranks.run(last_gradients):
        assert run["flat"] and all(run["flat"])  # no copy of any sub-group's
        assert run["norm"] == pytest.approx(run["norm of all"], rel=1e-12)
        assert run["norm of all"] > 0 and run["largest norm block"] <= 1 << 18
        assert run["moved"] > 0


def test_sums_by_exchange_are_those_of_a_reduce_scatter(two_ranks: RankPool) -> None:
    for run in two_ranks.run(sums_beside_gloo):
        assert len(run["equal"]) == 8 and all(run["equal"])


def test_weights_by_exchange_are_those_of_an_all_gather(two_ranks: RankPool) -> None:
    for run in two_ranks.run(gathers_beside_gloo):
        assert len(run["equal"]) == 8 and all(run["equal"])
