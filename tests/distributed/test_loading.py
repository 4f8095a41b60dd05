"""A folder loaded under ZeRO-3: equal to transformers' own result, and lean on every rank.

The memory test starts ranks of its own for each loader, so that neither inherits the other's
heap; a tiny model of the same kind is loaded first, so that imports and buffers of the process
group are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch
import transformers
from pool import RankPool

MEGABYTE = 2**20
SLACK = 8 * MEGABYTE  # the reader's chunk, the skeleton's objects, what the allocator rounds up
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32,
    "short_factor": [1.001, 1.037, 1.111, 1.337], "long_factor": [1.7, 2.3, 3.1, 5.9],
}  # fmt: skip


def save(folder: Path, size: str, **keys: Any) -> list[Path]:
    """A random Llama folder; returns its weight files."""
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**keys)).save_pretrained(
        folder, max_shard_size=size
    )
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_partitions_hold_what_transformers_loads(
    two_ranks: RankPool, tmp_path: Path, tied: bool, dtype: str
) -> None:
    """Parameters and buffers, bit for bit; frequencies too, whose factors zero.Init would round."""
    keys = {**cases.model_keys(tied), "rope_parameters": LONGROPE}
    keys.pop("model_type")
    torch.manual_seed(5)
    assert len(save(tmp_path, "8KB", **keys, vocab_size=cases.VOCAB)) >= 4
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=getattr(torch, dtype), local_files_only=True
    )
    for result in two_ranks.run(cases.stream_folder, str(tmp_path), dtype=dtype):
        for kind in ("parameters", "buffers"):
            theirs = dict(getattr(expected, f"named_{kind}")())
            assert result[kind].keys() == theirs.keys()
            for name, (own_dtype, value) in result[kind].items():
                assert own_dtype == str(theirs[name].dtype)
                np.testing.assert_array_equal(value, theirs[name].detach().float().numpy())


def test_a_step_from_a_loaded_folder_is_exact(two_ranks: RankPool, tmp_path: Path) -> None:
    """Its gradients are those of the stock model with the folder's weights."""
    keys = cases.model_keys(False)
    keys.pop("model_type")
    torch.manual_seed(6)
    save(tmp_path, "8KB", **keys, vocab_size=cases.VOCAB)
    weights = [0.0, 1.0, 0.0, 1.0, 1.0]
    results = two_ranks.run(cases.train_step, tied=False, weights=weights, folder=str(tmp_path))
    stored = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for result in results:
        for name, value in result["before"].items():
            theirs = stored[name.removeprefix("lm.")].numpy().copy()
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                theirs[cases.UNDO] = value[cases.UNDO]  # set by `add_undo_rows`
            np.testing.assert_array_equal(value, theirs)
        parts, _, counts = cases.reference_gradients(
            result["before"], tied=False, traces=result["traces"], dtype=torch.float32
        )
        for name, value in result["gradients"].items():
            wanted = sum(weights[role] * parts[role][name] for role in range(5)) / counts[1:].sum()
            np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fault", ["missing", "cut-on-rank-0", "other-files"])
def test_a_fault_on_one_rank_ends_all(two_ranks: RankPool, tmp_path: Path, fault: str) -> None:
    """No rank is left in a collective: the pool would time out."""
    keys = cases.model_keys(True)
    keys.pop("model_type")
    folders = [tmp_path / "rank0", tmp_path / "rank1"]
    for folder in folders:
        torch.manual_seed(5)
        files = save(folder, "8KB", **keys, vocab_size=cases.VOCAB)
    if fault == "missing":
        files[1].unlink()
        expected = f"{files[1].name}: is named by"
    elif fault == "other-files":
        for file in folders[1].glob("*.safetensors*"):
            file.unlink()
        save(folders[1], "5GB", **keys, vocab_size=cases.VOCAB)
        expected = "rank 1 sees other weights there than rank 0"
    else:
        expected = "ends inside"
    cut = fault == "cut-on-rank-0"
    results = two_ranks.run(
        cases.refused_folder, [str(folder) for folder in folders], cut=cut, timeout=60
    )
    assert expected in results[0] and results[0] == results[1]


@pytest.fixture
def fresh_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("loader", ["streaming", "transformers"])
def test_peak_memory_is_partitions_and_one_and_a_half_shards(
    fresh_ranks: RankPool, tmp_path: Path, loader: str
) -> None:
    """And transformers' own path needs more on rank 0, so the bound says something."""
    common = {"num_attention_heads": 8, "num_key_value_heads": 8}
    save(tmp_path / "tiny", "5GB", hidden_size=64, intermediate_size=96, vocab_size=64,
         num_hidden_layers=1, **common)  # fmt: skip
    files = save(tmp_path / "model", "30MB", hidden_size=768, intermediate_size=2048,
                 vocab_size=2000, num_hidden_layers=6, **common)  # fmt: skip
    sizes = [file.stat().st_size for file in files]
    assert len(sizes) >= 6 and sum(sizes) > 150 * MEGABYTE
    results = fresh_ranks.run(
        cases.loading_memory, str(tmp_path / "model"), str(tmp_path / "tiny"), loader=loader
    )
    bounds = [result["partitions"] + 1.5 * max(sizes) + SLACK for result in results]
    if loader == "streaming":
        for result, bound in zip(results, bounds, strict=True):
            assert result["growth"] <= bound
    else:
        assert results[0]["growth"] > bounds[0]
