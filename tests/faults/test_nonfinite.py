"""G10: NaN and Inf on either rank, once and four times in a row; weights stay what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from common import STEPS, Prepared, newest_step
from fork_server import ForkServer

from nmar_ds.training.checkpoints import folder_name, verify


def weights_after(run: Path, step: int) -> dict[str, Any]:
    """fp32 master weights by name, from a verified checkpoint."""
    from nmar_ds.training.checkpoints import Found
    from nmar_ds.training.export import full_state

    folder = run / "checkpoints" / folder_name(step)
    return full_state(Found(folder=folder, manifest=verify(folder)))


def all_finite(weights: dict[str, Any]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in weights.values())


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_is_counted_and_passed_over(
    value: str, rank: int, prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fault = {"where": "nonfinite", "step": 5, "rank": rank, "value": value}
    done = server.run(f"output={run}", fault=fault)
    assert done["codes"] == [0, 0], done
    said = done["outputs"][0]
    assert said.count(": non-finite") == 1, said
    assert "step 5: non-finite gradient, skipped (1 in a row, 1 in all); rows [" in said
    assert newest_step(run) == STEPS and all_finite(weights_after(run, STEPS))
    assert (run / "outcome").read_text() == f"complete step {STEPS}\n"


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("rank", [0, 1])
def test_four_in_a_row_end_the_run_at_the_third(
    value: str, rank: int, prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fault = {"where": "nonfinite", "step": 5, "num": 4, "rank": rank, "value": value}
    done = server.run(f"output={run}", fault=fault)
    assert done["codes"] == [1, 1] and done["seconds_apart"] < 10, done
    said = done["outputs"][0]
    for number, step in enumerate((5, 6, 7), start=1):
        line = f"step {step}: non-finite gradient, skipped ({number} in a row, {number} in all)"
        assert line in said, said
    assert "step 8" not in said.split("canary")[1]
    assert "".join(done["outputs"]).count("error: ") == 1 and "Traceback" not in said
    assert (run / "outcome").read_text().startswith("diverged: step 7: 3 non-finite steps in a row")
    # The checkpoint of step 6 was published between the second and the third.
    assert newest_step(run) == 6
    before, after = weights_after(run, 4), weights_after(run, 6)
    assert all_finite(after) and all(bool((before[n] == after[n]).all()) for n in before)
    resumed = server.run(f"output={run}")
    assert resumed["codes"] == [0, 0], resumed
    assert "after step 6" in resumed["outputs"][0]
    assert newest_step(run) == STEPS and all_finite(weights_after(run, STEPS))
