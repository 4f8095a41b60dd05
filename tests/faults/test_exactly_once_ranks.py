"""Four lives of a run with real ranks: what their loaders handed out, played back, is the plan.

tests/unit/test_exactly_once.py has fifty more with the loader and the protocol alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import history
import pytest
from common import newest_step
from fork_server import ForkServer
from soak_faults import OVERRIDES, STEPS

LIVES: dict[str, list[dict[str, Any]]] = {
    "killed in steps": [
        {"where": "forward", "step": 5, "rank": 1, "how": "kill"},
        {"where": "optimizer", "step": 9, "rank": 0, "how": "kill"},
    ],
    "killed in saves": [
        {"where": "point", "point": "after_manifest", "step": 4, "rank": 0, "how": "kill"},
        {"where": "half_file", "point": "half_file", "step": 8, "rank": 1, "how": "kill"},
    ],
    "told to stop": [
        {"where": "backward", "step": 3, "rank": 0, "how": "SIGTERM"},
        {"where": "boundary", "step": 7, "rank": 1, "how": "SIGUSR2"},
    ],
    "no checkpoint, then a full disk": [
        {"where": "boundary", "step": 2, "rank": 1, "how": "kill"},
        {"where": "half_file", "point": "half_file", "step": 8, "rank": 0, "how": "full"},
        {"where": "point", "point": "after_rename", "step": 10, "rank": 0, "how": "kill"},
    ],
}


@pytest.fixture(scope="module")
def plan(config_file: Path) -> history.Plan:
    """Traces by step as one rank alone would read them; every epoch has each exactly once."""
    from nmar_ds.config import load_config
    from nmar_ds.data.loader import RowLoader
    from nmar_ds.training.planning import plan_run

    config = load_config(config_file, list(OVERRIDES))
    made = plan_run(config)
    alone = RowLoader(
        made.store, made.plan, made.store.role_counts, seed=config.seed,
        global_batch_rows=config.training.global_batch_rows, micro_batch_rows=1, rank=0,
        world_size=1, pad_id=0,
    )  # fmt: skip
    found = {
        step + 1: [
            int(t) for batch in alone.batches_of_step(step) for t in batch.trace_ids if t >= 0
        ]
        for step in range(STEPS)
    }
    assert STEPS >= 2 * made.steps_per_epoch
    assert history.covers_every_epoch(
        found, num_traces=made.store.num_traces, steps_per_epoch=made.steps_per_epoch
    )
    return found


@pytest.mark.parametrize("name", LIVES)
def test_real_ranks_consume_every_trace_exactly_once(
    name: str, plan: history.Plan, server: ForkServer, tmp_path: Path
) -> None:
    run, watched = tmp_path / "run", tmp_path / "history"
    for number, fault in enumerate(LIVES[name]):
        mark = tmp_path / f"struck-{number}"
        suffered = server.run(
            f"output={run}", *OVERRIDES, fault={**fault, "struck": str(mark)},
            watch=(watched, number), impatient=True,
        )  # fmt: skip
        assert mark.exists(), suffered
        assert newest_step(run) != STEPS
    done = server.run(f"output={run}", *OVERRIDES, watch=(watched, len(LIVES[name])))
    assert done["codes"] == [0, 0], done["outputs"]
    assert newest_step(run) == STEPS
    attempts = history.read(watched, [2] * (len(LIVES[name]) + 1))
    assert all(attempt.first is not None for attempt in attempts), "every attempt trained"
    assert history.lost_and_duplicated(attempts, plan) == (0, 0)
