"""What DeepSpeed itself has saved on some ranks, taken over by others, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reslice_cases
from pool import RankPool

RUNS: dict[str, dict[str, Any]] = {
    "adamw-bf16-tied": {"optimizer": "adamw", "dtype": "bfloat16", "tied": True},
    "adamw-fp32-untied": {"optimizer": "adamw", "dtype": "float32", "tied": False},
    "adamw-bf16-persistent": {
        "optimizer": "adamw", "dtype": "bfloat16", "tied": False, "persistence": 100_000,
    },
    "adamw-bf16-offload-hpz": {
        "optimizer": "adamw", "dtype": "bfloat16", "tied": True, "spread": True,
    },
    "sgd-fp32-tied": {"optimizer": "sgd", "dtype": "float32", "tied": True},
}  # fmt: skip


@pytest.mark.parametrize("way", ["2-to-1", "1-to-2"])
@pytest.mark.parametrize("name", RUNS)
def test_all_state_is_the_same_on_other_ranks(
    name: str, way: str, one_rank: RankPool, two_ranks: RankPool, tmp_path: Path
) -> None:
    before, after = (two_ranks, one_rank) if way == "2-to-1" else (one_rank, two_ranks)
    saved = before.run(reslice_cases.train_and_save, str(tmp_path), **RUNS[name])[0]
    for taken in after.run(reslice_cases.reslice, str(tmp_path), **RUNS[name]):
        loss = taken.pop("loss")
        assert loss == pytest.approx(saved["loss"], rel=1e-5 if "fp32" in name else 1e-2)
        assert taken.pop("sub-groups") != saved["sub-groups"], "the case is to be a hard one"
        steps = [dict(pair) for pair in {tuple(each.items()) for each in taken.pop("steps")}]
        assert steps == ([{"step": 2.0}] if "adamw" in name else [{}])
        assert taken["counters"] == saved["counters"] == [2, 0]
        arrays = {key for key, value in taken.items() if isinstance(value, np.ndarray)}
        assert arrays == {key for key, value in saved.items() if isinstance(value, np.ndarray)}
        kinds = {key.split()[0] for key in arrays}
        assert kinds == {"fp32", "low"} | ({"exp_avg", "exp_avg_sq"} if "adamw" in name else set())
        for key in arrays:
            np.testing.assert_array_equal(taken[key], saved[key], err_msg=key)
