"""Saves in the background with real ranks: killed anywhere, full disks, stops; nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from common import (
    STEPS,
    TABLE,
    Prepared,
    assert_finished_as,
    digest_of,
    name_of,
    newest_step,
    state_of,
)
from fork_server import ForkServer

BEHIND = "checkpoint.asynchronous=true"
AT_6 = {"where": "point", "step": 6}
DEATHS = [
    ({"where": "half_file", "step": 6, "rank": 1}, 4),
    ({**AT_6, "point": "read_back", "rank": 0}, 4),
    ({**AT_6, "point": "after_hash", "rank": 1}, 4),
    ({**AT_6, "point": "before_manifest", "rank": 0}, 4),
    ({**AT_6, "point": "after_rename", "rank": 0}, 6),
    ({**AT_6, "point": "unmarked", "rank": 0}, 6),
]


def test_the_files_are_those_of_a_blocking_save(
    prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    result = server.run(f"output={run}", BEHIND)
    assert result["codes"] == [0, 0] and "failed" not in result["outputs"][0], result["outputs"]
    assert_finished_as(run, prepared.digest)
    for step in (6, STEPS):
        assert state_of(run, step) == state_of(prepared.whole, step)


@pytest.mark.parametrize(
    ("fault", "newest"), [pytest.param(*case, id=name_of(case[0])) for case in DEATHS]
)
def test_a_killed_rank_costs_nothing_in_the_background_either(
    fault: dict[str, Any], newest: int, prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    TABLE.append((f"kill -9 of {name_of(fault)}, in the background", "LOST"))
    killed = server.run(f"output={run}", BEHIND, fault={**fault, "how": "kill"}, impatient=True)
    assert killed["codes"][fault["rank"]] == -9, killed
    assert newest_step(run) == newest
    resumed = server.run(f"output={run}", BEHIND)
    assert resumed["codes"] == [0, 0], resumed["outputs"]
    assert f"after step {newest}" in resumed["outputs"][0]
    assert_finished_as(run, prepared.digest)
    TABLE[-1] = (TABLE[-1][0], "recovered bit-exactly")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_under_one_save_is_a_line_and_the_next_save_makes_up(
    rank: int, prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fault = {**AT_6, "step": 4, "point": "after_write", "rank": rank, "how": "full"}
    result = server.run(f"output={run}", BEHIND, fault=fault)
    assert result["codes"] == [0, 0], result["outputs"]
    said = [line for line in result["outputs"][0].splitlines() if line.startswith("save ")]
    assert len(said) == 1, result["outputs"][0]
    assert "of step 4 failed (1 in a row, 3 end the run)" in said[0]
    assert f"rank {rank} could not write" in said[0] and "No space left on device" in said[0]
    assert_finished_as(run, prepared.digest)


@pytest.mark.parametrize(
    ("step", "override"), [(4, "checkpoint.max_failed_saves=1"), (STEPS, "checkpoint.keep=2")]
)
def test_too_many_failures_and_a_failed_last_save_end_with_code_1(
    step: int, override: str, prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fault = {**AT_6, "step": step, "point": "after_write", "rank": 1, "how": "full"}
    result = server.run(f"output={run}", BEHIND, override, fault=fault)
    assert result["codes"] == [1, 1], result["outputs"]
    errors = [line for said in result["outputs"] for line in said.splitlines() if "error: " in line]
    assert len(errors) == 1 and "No space left on device" in errors[0], errors
    assert newest_step(run) == step - 2
    assert server.run(f"output={run}", BEHIND)["codes"] == [0, 0]
    assert_finished_as(run, prepared.digest)


def test_a_stop_while_a_save_is_being_written_ends_in_a_checkpoint_of_its_step(
    prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    """The signal comes from the very thread that writes, so the save is certainly under way."""
    run = tmp_path / "run"
    fault = {**AT_6, "step": 2, "point": "before_write", "rank": 1, "how": "SIGTERM"}
    result = server.run(f"output={run}", BEHIND, fault=fault)
    assert result["codes"] == [0, 0], result["outputs"]
    stopped = newest_step(run)
    assert stopped is not None and 3 <= stopped < STEPS
    assert f"stopped after step {stopped}; saved" in result["outputs"][0]
    assert server.run(f"output={run}", BEHIND)["codes"] == [0, 0]
    assert digest_of(run) == prepared.digest


def test_a_run_that_diverges_announces_the_save_it_had_begun(
    prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    """Step 5 fails before its end, where the save of step 4 would have been announced."""
    run = tmp_path / "run"
    result = server.run(
        f"output={run}", BEHIND, "checkpoint.every=4", "training.max_nonfinite_steps=1",
        fault={"where": "nonfinite", "step": 5, "rank": 0},
    )  # fmt: skip
    assert result["codes"] == [1, 1], result["outputs"]
    assert newest_step(run) == 4
