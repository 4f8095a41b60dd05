"""Non-finite steps, and vocabularies that grow, on two real ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

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


STARTS: dict[str, dict[str, Any]] = {
    "mean": {"noise": 0.3, "seed": 11},
    "copy": {"method": "copy", "sources": ((7,),), "labels": ("x",)},
    "semantic": {
        "method": "semantic", "sources": ((3, 9), (20,)), "labels": ("a", "b"), "noise": 0.1,
    },
}  # fmt: skip
MODELS = [
    ("llama", True, 60, "mean"),
    ("llama", False, 60, "semantic"),
    ("phi", False, 60, "mean"),
    ("llama", True, 64, "copy"),
    ("llama", False, 64, "mean"),
    ("phi", False, 64, "semantic"),
]


@pytest.mark.parametrize(("family", "tied", "rows", "method"), MODELS)
def test_the_undo_row_starts_alike_for_any_number_of_ranks(
    one_rank: RankPool,
    two_ranks: RankPool,
    tmp_path: Path,
    *,
    family: str,
    tied: bool,
    rows: int,
    method: str,
) -> None:
    """ZeRO-3 on one rank and on two give, bit for bit, the rows of a plain model; id 60."""
    import transformers

    from nmar_ds.model.undo_init import UndoInit
    from nmar_ds.model.vocabulary import add_undo_rows

    folder = str(tmp_path / "model")
    cases.save_pretrained_folder(folder, rows=rows, tied=tied, family=family)
    init = {**STARTS[method], "excluded_ids": (0, 1, 60)}
    if family == "phi":
        init["output_bias"] = -1.5
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    add_undo_rows(plain, undo_id=60, num_known_rows=min(61, rows), init=UndoInit(**init))
    expected = {f"lm.{name}": value.detach().numpy() for name, value in plain.named_parameters()}
    single = one_rank.run(cases.load_folder, folder, undo_id=60, dtype="float32", init=init)
    double = two_ranks.run(cases.load_folder, folder, undo_id=60, dtype="float32", init=init)
    embedding = expected["lm.model.embed_tokens.weight"].astype(np.float64)
    head = embedding if tied else expected["lm.lm_head.weight"].astype(np.float64)
    norms = [float(np.linalg.norm(matrix[60])) for matrix in (embedding, head)]
    norms += [float(np.linalg.norm(matrix[2:60], axis=1).mean()) for matrix in (embedding, head)]
    if family == "phi":
        bias = expected["lm.lm_head.bias"]
        norms.append(float(bias[60]))
        assert bias[60] == pytest.approx(bias[2:60].astype(np.float64).mean() - 1.5, rel=1e-6)
    for result in (*single, *double):
        assert result["weights"].keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(result["weights"][name], value)
        assert result["norms"] == pytest.approx(norms, rel=1e-9)
        assert result["report"].startswith(str(UndoInit(**init)))


def test_heldout_figures_and_decodes_are_those_of_one_rank(
    one_rank: RankPool, two_ranks: RankPool
) -> None:
    """The same on both ranks; and training goes on, to the last bit, as if none had been taken."""
    first, second = two_ranks.run(cases.heldout_figures, measuring=True)
    assert first["measured"] == second["measured"]
    (alone,) = one_rank.run(cases.heldout_figures, measuring=True)
    assert len(alone["measured"]) == 4 and len(alone["forced"]) == 6 and max(alone["forced"]) > 1
    for (values, decodes), (own_values, own_decodes) in zip(
        first["measured"], alone["measured"], strict=True
    ):
        assert decodes == own_decodes
        assert values == pytest.approx(own_values, rel=1e-5)
        assert {"heldout/p_undo_elsewhere", "heldout/undo_count_accuracy"} < set(values)
    texts = [decodes for _, decodes in alone["measured"]]
    assert texts[0] != texts[-1], "the weights have moved"
    assert len({len(ids) for ids in texts[-1]}) > 1
    untouched, _ = two_ranks.run(cases.heldout_figures, measuring=False)
    for name, value in untouched["weights"].items():
        np.testing.assert_array_equal(first["weights"][name], value, err_msg=name)


@pytest.mark.parametrize("on_rank", [0, 1])
def test_a_node_without_the_kernel_ends_all_ranks(two_ranks: RankPool, on_rank: int) -> None:
    """Found while the engine is built, the others would wait in its first collective."""
    for error in two_ranks.run(cases.kernels_of_nodes, kernel=None, on_rank=on_rank):
        assert error == ("ConfigError", "model.attention: this node has no such kernel", True)


def test_nodes_whose_auto_finds_another_kernel_are_refused(two_ranks: RankPool) -> None:
    assert two_ranks.run(cases.kernels_of_nodes, kernel="segments", on_rank=1) == [None, None]
    for kind, message, shared in two_ranks.run(cases.kernels_of_nodes, kernel="masked", on_rank=1):
        assert kind == "LaunchError" and shared
        assert (
            "kernel of model.attention: is 'segments' on rank 0 and 'masked' on rank 1" in message
        )
