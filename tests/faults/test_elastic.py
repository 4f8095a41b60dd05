"""A run killed under one number of ranks goes on under another: every row once, the same losses.

The other number of ranks sums the same terms in another order, so the losses agree to rounding and
no further; a lost row, a moment of another parameter or a wrong denominator is far outside of that.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import history
import pytest
from common import STEPS, TABLE, Prepared, newest_step
from fork_server import ForkServer

RELATIVE = 1e-5
SAVED = 4  # the newest checkpoint when step 6 is struck
CHANGES = [(2, 1), (1, 2), (2, 3)]  # 4 rows a step: 3 ranks run two empty rows beside them


def losses_of(run: Path) -> dict[int, float]:
    """Loss of the whole global batch by step; where a step was repeated, the latest."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("loss/total")}


class Whole:
    """The run that nothing interrupts, on each number of ranks."""

    def __init__(self, prepared: Prepared, server: ForkServer) -> None:
        self.losses = cache(self._losses)
        self._prepared, self._server = prepared, server

    def _losses(self, world_size: int) -> dict[int, float]:
        if world_size == 2:
            return losses_of(self._prepared.whole)
        run = self._prepared.folder / f"whole-{world_size}"
        result = self._server.run(f"output={run}", num_ranks=world_size)
        assert set(result["codes"]) == {0}, result["outputs"]
        return losses_of(run)


@pytest.fixture(scope="module")
def whole(prepared: Prepared, server: ForkServer) -> Whole:
    return Whole(prepared, server)


def plan_of(config: Path) -> history.Plan:
    """Traces of every step, from a loader that stands alone."""
    from nmar_ds.config import load_config
    from nmar_ds.data.loader import RowLoader
    from nmar_ds.training.planning import plan_run

    settings = load_config(config)
    plan = plan_run(settings)
    loader = RowLoader(
        plan.store, plan.plan, plan.store.role_counts, seed=settings.seed,
        global_batch_rows=settings.training.global_batch_rows, micro_batch_rows=1, rank=0,
        world_size=1, pad_id=0,
    )  # fmt: skip
    return {
        step + 1: [int(t) for b in loader.batches_of_step(step) for t in b.trace_ids if t >= 0]
        for step in range(STEPS)
    }


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: f"{change[0]}-to-{change[1]}")
def test_another_number_of_ranks_goes_on(
    change: tuple[int, int], whole: Whole, prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    before, after = change
    run, watched = tmp_path / "run", tmp_path / "history"
    TABLE.append((f"{before} ranks killed, {after} go on", "LOST"))
    fault = {"where": "backward", "step": 6, "rank": 0, "how": "kill"}
    killed = server.run(f"output={run}", fault=fault, num_ranks=before, watch=(watched, 0))
    assert killed["codes"][0] == -9 and newest_step(run) == SAVED, killed["outputs"]
    resumed = server.run(f"output={run}", num_ranks=after, watch=(watched, 1))
    assert set(resumed["codes"]) == {0}, resumed["outputs"]
    said = f"after step {SAVED}, saved by {before} ranks and re-sliced for {after}"
    assert said in resumed["outputs"][0], resumed["outputs"][0]
    empty = "empty     2 rows in every step: 4 do not divide among 3 ranks x 1"
    assert (empty in resumed["outputs"][0]) == (after == 3)
    assert newest_step(run) == STEPS

    attempts = history.read(watched, [before, after])
    assert history.lost_and_duplicated(attempts, plan_of(prepared.config)) == (0, 0)
    assert attempts[1].first == SAVED + 1
    expected, got = whole.losses(before), losses_of(run)
    assert sorted(got) == sorted(expected) == list(range(1, STEPS + 1))
    gaps = {step: abs(got[step] / expected[step] - 1) for step in expected}
    assert max(gaps.values()) <= RELATIVE, gaps
    TABLE[-1] = (TABLE[-1][0], f"recovered, losses within {max(gaps.values()):.1e}")
