"""A rank that is slower than the others is named with its machine, once in ten logged steps."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from common import Prepared
from fork_server import ForkServer


@pytest.mark.parametrize("rank", [0, 1])
def test_a_slow_rank_is_named(
    rank: int, prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = server.run(
        f"output={run}", "training.steps=12", fault={"where": "probe", "rank": rank, "how": ""}
    )
    assert done["codes"] == [0, 0], done
    said = done["outputs"][0]
    assert said.count("slow      ") == 1
    line = f"slow      rank {rank} on {socket.gethostname()}: local arithmetic takes "
    assert line in said[said.index("step     10/12") : said.index("step     11/12")]
