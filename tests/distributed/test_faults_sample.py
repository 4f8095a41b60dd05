"""A sample of tests/faults (`make test-faults`): two kills and one lost launcher."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from common import Prepared, kill_and_resume, signal_and_save
from fixtures import config_file, prepared, server  # noqa: F401
from fork_server import ForkServer

pytestmark = pytest.mark.launch


@pytest.mark.parametrize(
    ("fault", "newest"),
    [
        ({"where": "backward", "step": 5, "rank": 1}, 4),
        ({"where": "half_file", "step": 6, "rank": 0}, 4),
    ],
    ids=["backward", "half_file"],
)
def test_a_killed_rank_costs_nothing(
    fault: dict[str, Any],
    newest: int,
    prepared: Prepared,  # noqa: F811
    server: ForkServer,  # noqa: F811
    tmp_path: Path,
) -> None:
    kill_and_resume(fault, newest, prepared=prepared, server=server, run=tmp_path / "run")


def test_a_run_whose_launcher_is_killed_saves_and_ends(
    prepared: Prepared,  # noqa: F811
    tmp_path: Path,
) -> None:
    assert signal_and_save(prepared, tmp_path / "run", "cli", signal.SIGKILL) == -9
