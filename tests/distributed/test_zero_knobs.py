"""hpZ and the optimizer in host memory change where things lie, not what is learnt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import save_pretrained_folder
from pool import RankPool
from zero_cases import VOCAB, knob_run, whole_inside_a_layer

from nmar_ds.acceptance.tiny import model_keys

PLAIN = {"param_persistence_threshold": 0}


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    """Two "nodes" of two ranks."""
    pool = RankPool(4)
    yield pool
    pool.close()


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        assert mine["finite"] and mine["losses"] == theirs["losses"]
        assert mine["losses"][0] != mine["losses"][-1], "nothing was learnt"
        for name, value in mine["weights"].items():
            assert np.array_equal(value, theirs["weights"][name]), name


@pytest.mark.parametrize("persistence", [0, 100])
def test_hpz_learns_the_same_bits(four_ranks: RankPool, persistence: int) -> None:
    zero = {"param_persistence_threshold": persistence}
    plain = four_ranks.run(knob_run, zero=zero)
    hpz = four_ranks.run(knob_run, zero={**zero, "hpz_partition_size": 2})
    assert [run["copies"] for run in plain] == [0] * 4
    assert all(run["copies"] == run["partitioned"] >= 16 for run in hpz), "no second copy was made"
    same(plain, hpz)


def test_hpz_learns_the_same_bits_from_a_folder(four_ranks: RankPool, tmp_path: Path) -> None:
    """Loaded tensor by tensor and given a row for `<UNDO>` after partitions and copies exist."""
    save_pretrained_folder(str(tmp_path), rows=VOCAB - 1, tied=False)
    plain = four_ranks.run(knob_run, zero=PLAIN, folder=str(tmp_path))
    hpz = four_ranks.run(knob_run, zero={**PLAIN, "hpz_partition_size": 2}, folder=str(tmp_path))
    same(plain, hpz)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_optimizer_in_host_memory_learns_the_same(
    four_ranks: RankPool, dtype: str, optimizer: str
) -> None:
    section = {"name": optimizer, "learning_rate": 0.01, "weight_decay": 0.1}
    plain = four_ranks.run(knob_run, zero=PLAIN, dtype=dtype, optimizer=section)
    host = four_ranks.run(
        knob_run, zero={**PLAIN, "offload_optimizer": {}}, dtype=dtype, optimizer=section
    )
    for mine, theirs in zip(plain, host, strict=True):
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
        for name, value in mine["weights"].items():
            np.testing.assert_allclose(value, theirs["weights"][name], rtol=1e-4, atol=1e-6)


def test_sub_groups_learn_the_same_bits(four_ranks: RankPool) -> None:
    plain = four_ranks.run(knob_run, zero=PLAIN)
    cut = four_ranks.run(knob_run, zero={**PLAIN, "sub_group_size": 500})
    same(plain, cut)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_embedding_and_head_are_not_gathered_while_layers_run(
    two_ranks: RankPool, tied: bool
) -> None:
    """Of a large model they are as large as layers, and `max_live_parameters` counts them."""
    for found in two_ranks.run(whole_inside_a_layer, keys=model_keys(tied)):
        assert found == [{"forward": [False, False], "backward": [False, False]}] * 4
