"""The kill switch: a file that stops a run, and lets none start until it is removed."""

from __future__ import annotations

import re
from pathlib import Path

from common import Prepared, newest_step
from fork_server import ForkServer

ENDLESS = ("training.steps=4000", "checkpoint.every=4000")


def test_a_stop_file_saves_stops_and_stays(
    prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # Made by the rank that does not look for it; the signal to itself is none that stops.
    fault = {"where": "backward", "step": 3, "rank": 1, "how": "SIGCONT", "struck": str(run / "STOP")}  # fmt: skip
    stopped = server.run(f"output={run}", *ENDLESS, fault=fault)
    assert stopped["codes"] == [0, 0], stopped
    said = stopped["outputs"][0]
    found = re.search(r"stopped after step (\d+); saved\nstopped by STOP\n", said)
    assert found is not None, said
    step = int(found[1])
    assert newest_step(run) == step >= 3
    assert (run / "outcome").read_text() == f"stopped step {step}: STOP\n"

    before = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}
    refused = server.run(f"output={run}", *ENDLESS)
    assert refused["codes"] == [2, 2], refused
    assert refused["outputs"][0].count("\n") == 1 and not refused["outputs"][1]
    assert refused["outputs"][0].startswith(f"error: {run}/STOP: the kill switch is set")
    assert before == {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}
    assert (run / "outcome").read_text().startswith(f"refused: {run}/STOP: ")
    assert len((run / "attempts.jsonl").read_text().splitlines()) == 2  # no attempt was made

    (run / "STOP").unlink()
    last = {"where": "backward", "step": step + 2, "rank": 0, "how": "SIGTERM"}
    resumed = server.run(f"output={run}", *ENDLESS, fault=last)
    assert resumed["codes"] == [0, 0], resumed
    assert f"after step {step}\n" in resumed["outputs"][0]
    assert newest_step(run) == step + 2
    line = f"interrupted step {step + 2}: a signal (SIGTERM) on rank 0\n"
    assert (run / "outcome").read_text() == line


def test_a_stop_file_before_the_first_step(
    prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fault = {"where": "building", "rank": 1, "how": "SIGCONT", "struck": str(run / "STOP")}
    stopped = server.run(f"output={run}", fault=fault)
    assert stopped["codes"] == [0, 0], stopped
    assert "stopped by STOP before step 1: nothing new to save" in stopped["outputs"][0]
    assert (run / "outcome").read_text() == "stopped step 0: STOP\n"
    assert newest_step(run) is None


def test_a_killed_rank_leaves_an_outcome(
    prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    for rank in (0, 1):
        run = tmp_path / f"run{rank}"
        fault = {"where": "backward", "step": 3, "rank": rank, "how": "kill"}
        killed = server.run(f"output={run}", fault=fault)
        assert killed["codes"][rank] == -9
        assert (run / "outcome").read_text().startswith("failed: another rank ended or did not")
