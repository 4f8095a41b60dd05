"""Twenty places of a ten-step run to stop or die at; all resume to the very same final state."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from common import TABLE, Prepared, digest_of, name_of, newest_step, state_of
from fork_server import ForkServer

LENGTH = 10
LONG = f"training.steps={LENGTH}"
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT")


@pytest.fixture(scope="module")
def whole(prepared: Prepared, server: ForkServer) -> tuple[str, dict[str, Any]]:
    """Final weights and final state of the run that nothing interrupts."""
    run = prepared.folder / "ten"
    assert server.run(f"output={run}", LONG)["codes"] == [0, 0]
    return digest_of(run, LENGTH), state_of(run, LENGTH)


def places() -> list[Any]:
    """Before each of the ten steps (dying and being told to stop by turns), and inside each."""
    faults: list[dict[str, Any]] = []
    for step in range(1, LENGTH + 1):
        how = "kill" if step % 2 else SIGNALS[step // 2 % 4]
        faults.append({"where": "boundary", "step": step, "rank": step // 2 % 2, "how": how})
    inside = ("forward", "backward", "optimizer")
    for step in range(1, LENGTH + 1):
        how = SIGNALS[step // 2 % 4] if step % 2 else "kill"
        where = inside[step % 3]
        faults.append({"where": where, "step": step, "rank": step // 2 % 2, "how": how})
    return [pytest.param(f, id=f"{f['how']} {name_of(f)}".replace(" ", "-")) for f in faults]


@pytest.mark.parametrize("fault", places())
def test_resuming_from_anywhere_ends_in_the_same_bits(
    fault: dict[str, Any], whole: tuple[str, dict[str, Any]], server: ForkServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    TABLE.append((f"{fault['how']} {name_of(fault)}, of ten", "LOST"))
    result = server.run(f"output={run}", LONG, fault=fault)
    newest = newest_step(run)
    if fault["how"] == "kill":
        assert result["codes"][fault["rank"]] == -9, result
        assert newest is None or newest < fault["step"]
    else:  # told to stop in a step: that step is finished and saved
        assert result["codes"] == [0, 0], result
        assert newest == fault["step"]
    resumed = server.run(f"output={run}", LONG)
    assert resumed["codes"] == [0, 0], resumed["outputs"]
    said = re.search(r"resumed +from .* after step \d+|already complete", resumed["outputs"][0])
    assert (said is None) == (newest is None), resumed["outputs"][0]
    assert digest_of(run, LENGTH) == whole[0]
    assert state_of(run, LENGTH) == whole[1]
    TABLE[-1] = (TABLE[-1][0], "recovered bit-exactly")
