"""G6: a rank that is stopped (SIGSTOP) takes all others with it in time, stacks left, code 5.

Real launches; and by the fork server, which is no launcher and ends nobody: work that is slow and
legitimate, a hang that is no stop, and the other rank.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from common import STEPS, TABLE, Launch, Prepared, assert_finished_as, name_of, newest_step
from fork_server import ForkServer

FAST, SLOW = 8, 25  # a start on two busy cores takes ten seconds and more
LIMITS = (f"training.timeout_seconds={FAST}", f"training.slow_timeout_seconds={SLOW}")
SECONDS_TO_GO = 10
PLACES = [
    ({"where": "building", "rank": 1}, "start", SLOW),
    (
        {"where": "forward", "step": 3, "rank": 0},
        "forward or backward",  # the other rank may be ahead
        FAST,
    ),
    ({"where": "backward", "step": 5, "rank": 1}, "backward", FAST),
    ({"where": "point", "point": "after_write", "step": 4, "rank": 0}, "save", SLOW),
    ({"where": "evaluation", "step": 1, "rank": 1}, "evaluation", SLOW),
]


def stacks_of(run: Path) -> dict[str, str]:
    folders = list((run / "stacks").iterdir())
    assert len(folders) == 1
    return {path.name: path.read_text() for path in folders[0].glob("rank-*.txt")}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[1])
def test_a_stopped_rank(
    place: tuple[dict[str, Any], str, int], prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    fault, phases, limit = place
    run, mark = tmp_path / "run", tmp_path / "mark"
    TABLE.append((f"SIGSTOP of {name_of(fault)}", "LOST"))
    launched = Launch(
        prepared.config, f"output={run}", "training.eval_every=3", *LIMITS,
        fault={**fault, "how": "SIGSTOP", "struck": str(mark)},
    )  # fmt: skip
    try:
        launched.wait_for_file(mark)
        started = time.time()
        launched.wait_until_gone(limit + SECONDS_TO_GO + 20, "rank 0", "rank 1")
        took = time.time() - started
        code = launched.finish(40)
    finally:
        launched.clean_up()
    said = launched.said()
    assert took <= limit + SECONDS_TO_GO, f"{took} s\n{said}"
    assert code == 5, said
    stacks = stacks_of(run)
    assert stacks.keys() == {"rank-0.txt", "rank-1.txt"}
    assert all("most recent call first" in text for text in stacks.values())
    line = (run / "outcome").read_text()
    found = re.match(r"hang: rank \d: no progress in phase '([a-z ]+)'", line)
    assert found is not None and found[1] in phases.split(" or "), line
    assert f"rank {fault['rank']} (pid " in line and "had been stopped" in line
    resumed = server.run(f"output={run}")
    assert resumed["codes"] == [0, 0], resumed["outputs"]
    assert_finished_as(run, prepared.digest)
    TABLE[-1] = (TABLE[-1][0], f"recovered bit-exactly; all gone in {took:.0f} s (limit {limit})")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_and_could_answer(
    rank: int, prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fault = {"where": "forward", "step": 3, "rank": rank, "how": "sleep", "seconds": 600,
             "mark": str(tmp_path / "mark")}  # fmt: skip
    hung = server.run(f"output={run}", "training.timeout_seconds=3", fault=fault)
    assert hung["codes"] == [5, 5] and not hung["overdue"], hung
    stacks = stacks_of(run)
    assert "in strike" in stacks[f"rank-{rank}.txt"]  # it shows which rank is at fault, and where
    assert "in strike" not in stacks[f"rank-{1 - rank}.txt"]
    assert (run / "outcome").read_text().startswith("hang: ")
    assert newest_step(run) == 2


@pytest.mark.parametrize(
    "fault",
    [
        {"where": "building", "rank": 0},
        {"where": "point", "point": "before_write", "step": 4, "rank": 1},
        {"where": "point", "point": "retained", "step": 4, "rank": 0},
        {"where": "evaluation", "step": 1, "rank": 0},
    ],
    ids=["building", "save", "retention", "evaluation"],
)
def test_slow_work_is_no_hang(
    fault: dict[str, Any], prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    slow = {**fault, "how": "sleep", "seconds": 6, "mark": str(tmp_path / "mark")}
    limits = ("training.timeout_seconds=3", "training.slow_timeout_seconds=60")
    done = server.run(f"output={run}", "training.eval_every=3", *limits, fault=slow)
    assert done["codes"] == [0, 0] and (tmp_path / "mark").exists(), done
    assert (run / "outcome").read_text() == f"complete step {STEPS}\n"
    assert not (run / "stacks").exists()
