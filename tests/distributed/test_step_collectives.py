"""Collectives per micro-batch: as many as layers and head need, on every rank, whatever it trains."""

from __future__ import annotations

from count_cases import collectives
from pool import RankPool


def test_ranks_make_the_same_collectives_whatever_they_train(two_ranks: RankPool) -> None:
    both = two_ranks.run(collectives)
    one_idle = two_ranks.run(collectives, idle_rank=1)
    assert all(loss > 0 for run in both for loss in run["losses"])
    assert one_idle[1]["losses"] == [0.0] * 5 and one_idle[0]["losses"][0] > 0
    counts = [run["counts"] for run in (*both, *one_idle)]
    assert all(one == counts[0] for one in counts)
    # DeepSpeed learns the order in the first ones; from then on each is like the last
    assert counts[0][3] == counts[0][4]
    print(counts[0])
