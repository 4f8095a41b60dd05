"""What each signal to each process of a launch does: always a save, never an orphan.

docs/operations.md holds the same table. The exit code is that of the command (`deepspeed`,
`torchrun`), which is not always what its ranks deserve.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from common import TABLE, Launch, Prepared, assert_finished_as, newest_step, signal_and_save
from fork_server import ForkServer

TERM, INT, USR1, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL
HUP = signal.SIGHUP


@pytest.mark.parametrize(
    ("target", "number", "code"),
    [
        ("rank 0", USR1, 0),
        ("launch", TERM, 1),
        ("launch", USR1, 0),
        ("launch", KILL, 0),
        ("cli", TERM, -15),
        ("cli", INT, -2),
        ("cli", USR1, -10),
        ("cli", KILL, -9),
        ("group", TERM, -15),
        ("group", INT, -2),
        ("group", HUP, -1),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else str(value),
)
def test_a_signal_under_deepspeed(
    target: str, number: signal.Signals, code: int, prepared: Prepared, tmp_path: Path
) -> None:
    assert signal_and_save(prepared, tmp_path / "run", target, number) == code


@pytest.mark.parametrize(
    ("target", "number", "code"), [("rank 1", TERM, 0), ("cli", TERM, 1), ("cli", KILL, -9)]
)
def test_a_signal_under_torchrun(
    target: str, number: signal.Signals, code: int, prepared: Prepared, tmp_path: Path
) -> None:
    done = signal_and_save(prepared, tmp_path / "run", target, number, command="torchrun")
    assert done == code


# -- at awkward moments ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("point", "rank"),
    [("before_write", 0), ("after_write", 1), ("after_hash", 0), ("committed", 1)],
)
def test_a_signal_during_a_save(
    point: str, rank: int, prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    """The save is finished, the next step too, and another save ends the run."""
    run = tmp_path / "run"
    TABLE.append((f"TERM to rank {rank} at {point} of save 4", "LOST"))
    fault = {"where": "point", "point": point, "step": 4, "rank": rank, "how": "SIGTERM"}
    stopped = server.run(f"output={run}", fault=fault)
    assert stopped["codes"] == [0, 0], stopped
    assert "stopped after step 5; saved" in stopped["outputs"][0]
    assert newest_step(run) == 5
    assert server.run(f"output={run}")["codes"] == [0, 0]
    assert_finished_as(run, prepared.digest)
    TABLE[-1] = (TABLE[-1][0], "recovered bit-exactly")


@pytest.mark.parametrize("signals", ["SIGINT SIGINT", "SIGTERM SIGINT SIGUSR1 SIGUSR2"])
def test_several_signals_are_as_one(
    signals: str, prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    TABLE.append((f"{signals} to rank 1 in backward of step 3", "LOST"))
    fault = {"where": "backward", "step": 3, "rank": 1, "how": signals}
    stopped = server.run(f"output={run}", fault=fault)
    assert stopped["codes"] == [0, 0], stopped
    assert (
        f"stopped by a signal ({signals.split(maxsplit=1)[0]}) on rank 1" in stopped["outputs"][0]
    )
    assert newest_step(run) == 3
    assert server.run(f"output={run}")["codes"] == [0, 0]
    assert_finished_as(run, prepared.digest)
    TABLE[-1] = (TABLE[-1][0], "recovered bit-exactly")


def test_a_second_signal_while_the_first_ones_save_is_written(
    prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fault = {"where": "point", "point": "after_write", "step": 8, "rank": 0, "how": "SIGINT SIGINT"}
    assert server.run(f"output={run}", fault=fault)["codes"] == [0, 0]
    assert_finished_as(run, prepared.digest)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_before_the_first_step(
    rank: int, prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    TABLE.append((f"TERM to rank {rank} while the model is built", "LOST"))
    fault = {"where": "building", "rank": rank, "how": "SIGTERM"}
    stopped = server.run(f"output={run}", fault=fault)
    assert stopped["codes"] == [0, 0], stopped
    reason = f"stopped by a signal (SIGTERM) on rank {rank} before step 1: nothing new to save"
    assert reason in stopped["outputs"][0]
    assert newest_step(run) is None
    # And once more in a run that has a checkpoint: it stays as it is.
    half = {"where": "backward", "step": 4, "rank": rank, "how": "SIGTERM"}
    assert server.run(f"output={run}", fault=half)["codes"] == [0, 0]
    stopped = server.run(f"output={run}", fault=fault)
    assert stopped["codes"] == [0, 0] and "before step 5" in stopped["outputs"][0]
    assert newest_step(run) == 4
    assert server.run(f"output={run}")["codes"] == [0, 0]
    assert_finished_as(run, prepared.digest)
    TABLE[-1] = (TABLE[-1][0], "recovered bit-exactly")


def test_a_signal_before_the_ranks_have_met(prepared: Prepared, tmp_path: Path) -> None:
    """Nothing has been written yet: the rank ends at once, and its launcher ends the other."""
    run = tmp_path / "run"
    launched = Launch(
        prepared.config, f"output={run}", fault={"where": "planning", "rank": 1, "how": "SIGTERM"}
    )
    try:
        code = launched.finish(60)
        assert code != 0 and "Traceback" not in launched.said(), launched.said()
        launched.wait_until_gone(5)
    finally:
        launched.clean_up()
    assert not run.exists()


def test_a_launcher_that_dies_while_its_ranks_load(prepared: Prepared, tmp_path: Path) -> None:
    """It is missed once they have met, and nobody trains a step for nobody."""
    run = tmp_path / "run"
    fault = {"where": "planning", "rank": 0, "how": "sleep", "seconds": 2,
             "mark": str(tmp_path / "mark")}  # fmt: skip
    launched = Launch(prepared.config, f"output={run}", fault=fault)
    try:
        launched.wait_for_file(tmp_path / "mark")
        os.kill(launched.everyone["cli"], signal.SIGKILL)
        launched.wait_until_gone(60)
        said = launched.said()
    finally:
        launched.clean_up()
    assert re.search(r"stopped by the end of deepspeed .* before step 1: nothing new", said), said
    assert newest_step(run) is None


def test_an_orphaned_run_resumes_bit_exactly(
    prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    TABLE.append(("kill -9 of the deepspeed command during save 4", "LOST"))
    fault = {"where": "point", "point": "after_write", "step": 4, "rank": 0, "how": "sleep",
             "seconds": 3, "mark": str(tmp_path / "mark")}  # fmt: skip
    launched = Launch(prepared.config, f"output={run}", fault=fault)
    try:
        launched.wait_for_file(tmp_path / "mark")
        os.kill(launched.everyone["cli"], signal.SIGKILL)
        launched.wait_until_gone(40)
        said = launched.said()
    finally:
        launched.clean_up()
    assert re.search(r"stopped by the end of deepspeed \(pid \d+\) on rank [01]", said), said
    assert newest_step(run) == 5
    assert server.run(f"output={run}")["codes"] == [0, 0]
    assert_finished_as(run, prepared.digest)
    TABLE[-1] = (TABLE[-1][0], "recovered bit-exactly")
