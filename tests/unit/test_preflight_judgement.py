"""Planted bad nodes, and what preflight's judgement says of them: numbers in, verdicts out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from nmar_ds.acceptance.judgement import GIB, Limits, RankFacts, Row, judge, spans

NUM_NODES, PER_NODE = 4, 2
CHECKPOINT = 10 * GIB
LIMITS = Limits()


def job(*, gpus: bool = True) -> list[RankFacts]:
    """Four good nodes of two ranks."""
    return [
        RankFacts(
            node=f"n{rank // PER_NODE}",
            rank=rank,
            local_rank=rank % PER_NODE,
            local_world_size=PER_NODE,
            device="cuda" if gpus else "cpu",
            visible=2,
            cores=(rank % PER_NODE,),
            versions={"torch": "2.13", "driver": "550"},
            gpu_memory=(79 * GIB, 80 * GIB) if gpus else None,
            free=22 * GIB,
            tmp_free=GIB,
            clock=(-0.01 if rank else 0.0) if rank % PER_NODE == 0 else None,
            file_clock=0.002,
            flops=(1 + rank / 100) * 1e12,
        )
        for rank in range(NUM_NODES * PER_NODE)
    ]


LINKS = {(0, 2): 0.010, (2, 4): 0.011, (4, 6): 0.009, (0, 6): 0.012}


def bad(
    facts: list[RankFacts], links: dict[tuple[int, int], float] | None = None, **limits: Any
) -> list[Row]:
    rows = judge(
        facts,
        LINKS if links is None else links,
        link_bytes=10**6,
        checkpoint_bytes=CHECKPOINT,
        limits=dataclasses.replace(LIMITS, **limits),
    )
    return [row for row in rows if row.verdict == "bad"]


def planted(facts: list[RankFacts], rank: int, **wrong: Any) -> list[RankFacts]:
    return [dataclasses.replace(one, **wrong) if one.rank == rank else one for one in facts]


@pytest.mark.parametrize("gpus", [True, False])
def test_good_nodes_are_good_and_all_are_spoken_of(gpus: bool) -> None:
    facts = job(gpus=gpus)
    assert bad(facts) == []
    rows = judge(facts, LINKS, link_bytes=1, checkpoint_bytes=CHECKPOINT, limits=LIMITS)
    checks = {"devices", "versions", "run folder", "disk", "temporary files", "clock",
              "file times", "matmul", "products", "link"} | ({"GPU memory"} if gpus else set())  # fmt: skip
    for node in ("n0", "n1", "n2", "n3"):
        assert {row.check for row in rows if row.node == node} == checks


PLANTS = {
    "too few GPUs": (3, {"visible": 1}, "devices", "1 visible GPUs"),
    "another driver": (2, {"versions": {"torch": "2.13", "driver": "535"}}, "versions", "driver 535"),
    "a package missing": (2, {"versions": {"driver": "550"}}, "versions", "torch none"),
    "a full GPU": (5, {"gpu_memory": (71 * GIB, 80 * GIB)}, "GPU memory", "71.0 of 80.0 GiB free"),
    "a full disk": (6, {"free": int(21.9 * GIB)}, "disk", "21.9 GiB free"),
    "no room for temporary files": (6, {"tmp_free": GIB // 8}, "temporary files", "0.1 GiB free"),
    "a folder of its own": (4, {"sees_folder": False}, "run folder", "ranks 4 do not see"),
    "a read-only folder": (4, {"folder_problem": "run: Read-only"}, "run folder", "Read-only"),
    "a clock ahead": (2, {"clock": 1.2}, "clock", "+1.205 s from the others"),
    "a clock behind": (2, {"clock": -1.2}, "clock", "-1.190 s from the others"),
    "a wrong first clock": (0, {"clock": 7.0}, "clock", "+7.010 s from the others"),
    "file times behind": (7, {"file_clock": -1.5}, "file times", "-1.500 s from its clock"),
    "a slow GPU": (7, {"flops": 3.4e11}, "matmul", "340 GFLOP/s"),
    "a stuck GPU": (7, {"flops": 0.0}, "matmul", "0 GFLOP/s"),
    "a wrong product": (1, {"wrong": 1}, "products", "1 wrong and 0 unstable"),
    "an unstable product": (1, {"unstable": 3}, "products", "0 wrong and 3 unstable"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTS)
def test_each_planted_fault_names_its_node_alone(name: str) -> None:
    rank, wrong, check, value = PLANTS[name]
    rows = bad(planted(job(), rank, **wrong))
    assert [(row.node, row.check) for row in rows] == [(f"n{rank // PER_NODE}", check)]
    sentence = rows[0].sentence()
    assert sentence.startswith(f"bad node n{rank // PER_NODE} (ranks ") and "\n" not in sentence
    assert value in sentence and "measured, expected " in sentence and "; " in sentence
    assert str(rank) in sentence.split(")")[0] or "-" in sentence.split(")")[0]


def test_a_node_to_leave_out_is_given_as_an_argument() -> None:
    (row,) = bad(planted(job(), 7, flops=1e11))
    assert "sbatch --exclude=n3" in row.sentence()


def test_too_few_cores_for_the_ranks_of_a_node() -> None:
    facts = planted(job(gpus=False), 3, cores=(0,))
    assert [(row.node, row.check) for row in bad(facts)] == [("n1", "devices")]


def test_one_gpu_shown_to_each_rank_alone_is_refused_as_training_refuses_it() -> None:
    facts = [dataclasses.replace(one, visible=1) for one in job()]
    assert {row.node for row in bad(facts)} == {"n0", "n1", "n2", "n3"}


def test_the_slow_one_of_two_ranks_is_named_and_not_the_fast_one() -> None:
    facts = [dataclasses.replace(job()[0], flops=1e12), dataclasses.replace(job()[2], flops=3e11)]
    assert [(row.node, row.check) for row in bad(facts, {})] == [("n1", "matmul")]
    facts[1] = dataclasses.replace(facts[1], flops=3.4e11)
    assert bad(facts, {}) == [], "a third of the pace is what a busy machine may have"


def test_of_two_clocks_the_first_is_taken_for_right() -> None:
    facts = planted([job()[0], job()[2]], 2, clock=3.0)
    assert [(row.node, row.check) for row in bad(facts, {})] == [("n1", "clock")]


def test_a_rank_all_of_whose_links_are_slow_is_named_alone() -> None:
    links = {**LINKS, (2, 4): 0.2, (4, 6): 0.3}
    assert [(row.node, row.check) for row in bad(job(), links)] == [("n2", "link")]


def test_of_three_in_a_ring_the_slow_one_is_named_alone() -> None:
    links = {(0, 2): 0.01, (2, 4): 0.2, (0, 4): 0.3}
    assert [row.node for row in bad(job()[:6], links)] == ["n2"]


def test_a_slow_link_between_good_ranks_names_both() -> None:
    links = {**LINKS, (2, 4): 0.2}
    assert [row.node for row in bad(job(), links)] == ["n1", "n2"]


def test_two_neighbours_with_slow_links_are_both_named() -> None:
    links = {(0, 2): 0.2, (2, 4): 0.2, (4, 6): 0.2, (6, 8): 0.01, (8, 10): 0.01, (10, 12): 0.01,
             (0, 12): 0.01}  # fmt: skip
    facts = [dataclasses.replace(job()[0], node=f"n{r // 2}", rank=r) for r in range(13)]
    assert [row.node for row in bad(facts, links) if row.check == "link"] == ["n1", "n2"]


def test_a_single_link_is_judged_by_the_bandwidth_asked_for_only() -> None:
    links = {(0, 2): 1.0}  # 2 MB/s
    assert bad(job(), links) == []
    assert [row.node for row in bad(job(), links, min_bandwidth=0.1)] == ["n0", "n1"]
    assert bad(job(), links, min_bandwidth=0.001) == []


def test_figures_are_json_and_ranks_are_short() -> None:
    (row,) = bad(planted(job(), 7, flops=1.0))
    assert row.as_json()["ranks"] == (7,) and row.as_json()["verdict"] == "bad"
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_gpus_are_held_to_a_narrower_pace_than_shared_cores() -> None:
    assert Limits.of_device("cuda").slow_factor < Limits.of_device("cpu").slow_factor
