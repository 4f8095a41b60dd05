"""G7: twenty signals at drawn moments to one rank: code 0, no step lost, the same bits at the end."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from common import STEPS, TABLE, Prepared, newest_step, state_of
from fork_server import ForkServer

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
DRAW = random.Random(7)
MOMENTS = [(DRAW.randrange(2), DRAW.choice(SIGNALS), round(DRAW.random(), 3)) for _ in range(20)]


@pytest.mark.parametrize("number", range(len(MOMENTS)))
def test_a_signal_at_any_moment(
    number: int, prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    rank, name, share = MOMENTS[number]
    whole = prepared.whole
    seconds = (whole / "outcome").stat().st_mtime - (whole / "run.lock").stat().st_mtime
    for attempt in range(6):  # a run that was faster than the signal shows nothing
        run = tmp_path / f"run{attempt}"
        struck = {"ranks": [rank], "signal": name, "seconds": share * seconds / 2**attempt,
                  "after": str(run / "attempts.jsonl")}  # fmt: skip
        stopped = server.run(f"output={run}", struck=struck)
        if stopped["struck"]:
            break
    assert stopped["struck"]
    TABLE.append((f"{name} to rank {rank}, {share:.0%} through a run", "LOST"))
    assert stopped["codes"] == [0, 0], stopped
    said = stopped["outputs"][0]
    done = max(map(int, re.findall(r"^step +(\d+)/", said, re.MULTILINE)), default=None)
    assert newest_step(run) == done, said
    line = f"interrupted step {done or 0}: a signal ({name}) on rank {rank}\n"
    assert (run / "outcome").read_text() in (line, f"complete step {STEPS}\n"), said
    assert server.run(f"output={run}")["codes"] == [0, 0]
    assert state_of(run) == state_of(whole)  # moments and random state too
    TABLE[-1] = (TABLE[-1][0], f"recovered bit-exactly from step {done}")
