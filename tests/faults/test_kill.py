"""kill -9 of either rank anywhere: the run resumes to the very weights it would have had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from common import (
    SECONDS_TO_GO,
    TABLE,
    Launch,
    Prepared,
    assert_finished_as,
    kill_and_resume,
    name_of,
    newest_step,
)
from fork_server import ForkServer
from injected import POINTS_OF_ALL, RANK_0_POINTS

# Once the folder is renamed the new checkpoint is the newest.
PUBLISHED = ("after_rename", "written_aside:latest", "after_latest", "committed", "unmarked",
             "retained")  # fmt: skip


def cases() -> list[Any]:
    """(fault, step of the newest valid checkpoint after it)."""
    found: list[tuple[dict[str, Any], int | None]] = []
    for where in ("forward", "backward", "optimizer"):
        for step, newest in ((1, None), (4, 2), (7, 6)):
            for rank in (0, 1):
                found.append(({"where": where, "step": step, "rank": rank}, newest))
    for rank in (0, 1):
        for save, before in ((2, None), (6, 4)):
            found.append(({"where": "half_file", "step": save, "rank": rank}, before))
        for point in POINTS_OF_ALL:
            newest = 6 if point in PUBLISHED else 4
            found.append(({"where": "point", "point": point, "step": 6, "rank": rank}, newest))
    for point in RANK_0_POINTS:
        newest = 6 if point in PUBLISHED else 4
        found.append(({"where": "point", "point": point, "step": 6, "rank": 0}, newest))
    for point, newest in (("after_manifest", 6), ("after_rename", 8), ("unmarked", 8)):
        found.append(({"where": "point", "point": point, "step": 8, "rank": 0}, newest))
    return [pytest.param(fault, newest, id=name_of(fault))
            for fault, newest in found]  # fmt: skip


@pytest.mark.parametrize(("fault", "newest"), cases())
def test_a_killed_rank_costs_nothing(
    fault: dict[str, Any], newest: int | None, prepared: Prepared, server: ForkServer,
    tmp_path: Path,
) -> None:  # fmt: skip
    kill_and_resume(fault, newest, prepared=prepared, server=server, run=tmp_path / "run")


def test_dying_again_and_again_at_one_place(
    prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    """Leftovers of three deaths in one save do not keep the fourth attempt from it."""
    run = tmp_path / "run"
    TABLE.append(("kill -9 three times between rename and `latest`, steps 2 to 6", "LOST"))
    for step in (2, 4, 6):
        fault = {"where": "point", "point": "after_rename", "step": step, "rank": 0, "how": "kill"}
        assert -9 in server.run(f"output={run}", fault=fault)["codes"]
        assert newest_step(run) == step
    assert server.run(f"output={run}")["codes"] == [0, 0]
    assert_finished_as(run, prepared.digest)
    TABLE[-1] = (TABLE[-1][0], "recovered bit-exactly")


def test_dying_while_a_damaged_checkpoint_is_moved_aside(
    prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    TABLE.append(("kill -9 of rank 0 in moved_aside of save 6", "LOST"))
    assert server.run(f"output={run}", fault={**AT_SAVE_6, "point": "committed"})["codes"][0] == -9
    victim = run / "checkpoints/step-00000006/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    killed = server.run(f"output={run}", fault={**AT_SAVE_6, "point": "moved_aside"})
    assert killed["codes"][0] == -9 and "refused step-00000006" in killed["outputs"][0]
    assert newest_step(run) == 4
    assert server.run(f"output={run}")["codes"] == [0, 0]
    assert_finished_as(run, prepared.digest)
    TABLE[-1] = (TABLE[-1][0], "recovered bit-exactly")


AT_SAVE_6 = {"where": "point", "step": 6, "rank": 0, "how": "kill"}


@pytest.mark.parametrize(
    ("command", "fault", "newest"),
    [
        ("deepspeed", {"where": "backward", "step": 5, "rank": 1}, 4),
        ("deepspeed", {"where": "half_file", "step": 4, "rank": 0}, 2),
        ("torchrun", {"where": "point", "point": "after_hash", "step": 4, "rank": 1}, 2),
    ],
    ids=lambda value: name_of(value) if isinstance(value, dict) else "",
)
def test_a_killed_rank_under_a_real_launcher(  # noqa: PLR0917 (parameters and fixtures)
    command: str, fault: dict[str, Any], newest: int, prepared: Prepared, server: ForkServer,
    tmp_path: Path,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    name = f"kill -9 of {name_of(fault)}, under {command}"
    TABLE.append((name, "LOST"))
    launched = Launch(
        prepared.config, f"output={run}", fault={**fault, "how": "kill"}, command=command
    )
    try:
        launched.wait_for(f"step {newest - 1:>6}/8")
        launched.wait_until_gone(60, f"rank {fault['rank']}")
        launched.wait_until_gone(SECONDS_TO_GO)
        assert launched.finish() not in (0, 4), launched.said()
    finally:
        launched.clean_up()
    assert newest_step(run) == newest
    assert server.run(f"output={run}")["codes"] == [0, 0]
    assert_finished_as(run, prepared.digest)
    TABLE[-1] = (name, "recovered bit-exactly")
