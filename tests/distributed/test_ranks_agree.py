"""Non-finite steps, and vocabularies that grow, on two real ranks."""

from __future__ import annotations

import math
from pathlib import Path

import cases
import numpy as np
import pytest
from pool import RankPool


@pytest.mark.parametrize("kind", ["nan", "inf"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_nonfinite_step_is_skipped_counted_and_reported(
    two_ranks: RankPool, kind: str, dtype: str
) -> None:
    results = two_ranks.run(
        cases.poisoned_run, bad_steps=[1, 3, 4], kind=kind, on_rank=1, dtype=dtype
    )
    for result in results:
        assert result["error"] is None
        assert result["total"] == 3
        weights = result["weights"]
        assert all(math.isfinite(value) for value in weights)
        assert weights[1] == weights[0], "a poisoned step must not move the weights"
        assert weights[4] == weights[3] == weights[2]
        assert weights[5] != weights[4]
        said = [line for line in result["lines"] if "non-finite" in line]
        assert [line.split(":")[0] for line in said] == ["step 2", "step 4", "step 5"]
        assert "rows [" in said[0]


@pytest.mark.parametrize("on_rank", [0, 1])
def test_three_nonfinite_steps_in_a_row_stop_all_ranks(two_ranks: RankPool, on_rank: int) -> None:
    results = two_ranks.run(
        cases.poisoned_run, bad_steps=[1, 2, 3, 4], kind="nan", on_rank=on_rank, dtype="float32"
    )
    for result in results:
        assert (
            result["error"] is not None and "step 4: 3 non-finite steps in a row" in result["error"]
        )
        assert len(result["weights"]) == 4


@pytest.mark.parametrize("on_rank", [0, 1])
def test_a_stop_signal_on_one_rank_stops_all(two_ranks: RankPool, on_rank: int) -> None:
    results = two_ranks.run(
        cases.poisoned_run, bad_steps=[], kind="nan", on_rank=on_rank, dtype="float32", stop_at=3
    )
    for result in results:
        assert result["complete"] is False
        assert result["saved"] == [3]
        assert len(result["weights"]) == 3


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("rows", "undo_id"), [(60, 60), (64, 60)], ids=["grown", "spare-row"])
def test_undo_rows_are_equal_on_all_ranks(
    two_ranks: RankPool, tmp_path: Path, tied: bool, rows: int, undo_id: int
) -> None:
    folder = str(tmp_path / "model")
    cases.save_pretrained_folder(folder, rows=rows, tied=tied)
    first, second = two_ranks.run(cases.load_folder, folder, undo_id=undo_id, dtype="float32")
    from safetensors.numpy import load_file

    stored = load_file(f"{folder}/model.safetensors")
    assert first["vocab_size"] == max(rows, undo_id + 1), "never shrunk"
    names = ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]
    for name, value in stored.items():
        loaded = first["weights"][f"lm.{name}"]
        np.testing.assert_array_equal(loaded, second["weights"][f"lm.{name}"])
        if name in names:
            known = value[:undo_id]
            np.testing.assert_array_equal(loaded[:undo_id], known)
            np.testing.assert_allclose(loaded[undo_id], known.mean(axis=0), rtol=1e-5, atol=1e-7)
            np.testing.assert_array_equal(loaded[undo_id + 1 :], value[undo_id + 1 :])
        else:
            np.testing.assert_array_equal(loaded, value)
