"""The streamed export: the same files as transformers writes with the whole model in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from zero_files import Model, write_checkpoint

from nmar_ds.errors import CheckpointError, ConfigError
from nmar_ds.training import export, partitions, weights_out
from nmar_ds.training.checkpoints import Found
from nmar_ds.training.export import check_shard_size, write_in_memory

KEYS: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "eos_token_id": 1,
    "bos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
MODELS = {
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-untied": {"model_type": "llama", "tie_word_embeddings": False},
    "gemma3-tied": {"model_type": "gemma3_text", "sliding_window": 16},
    "phi-with-biases": {"model_type": "phi"},
    "gpt2-tied": {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2},
}


def checkpoint(folder: Path, name: str, *, ranks: int, dtype: str, most: int = 3000) -> Found:
    """A checkpoint whose weights are the random ones of that model."""
    keys = {**KEYS, **MODELS[name]}
    config = transformers.CONFIG_MAPPING[keys["model_type"]].from_dict(
        {k: v for k, v in keys.items() if k != "model_type"}
    )
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    named = dict(model.named_parameters())
    shared = {
        f"lm.{name}": next(f"lm.{n}" for n, value in named.items() if value is parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False) if name not in named
    }  # fmt: skip
    groups = [
        {f"lm.{n}": {kind: torch.randn(v.shape) for kind in ("weight", "exp_avg", "exp_avg_sq")}
         for n, v in named.items() if (v.dim() > 1) == decayed}
        for decayed in (True, False)
    ]  # fmt: skip
    saved = Model(
        groups, shared=shared, scalars={"step": torch.tensor(3.0)}, dtype=getattr(torch, dtype),
        buffers={f"lm.{n}": v for n, v in model.named_buffers() if n in model.state_dict()},
    )  # fmt: skip
    facts = {"dtype": dtype, "model_config": config.to_dict()}
    return write_checkpoint(folder, saved, ranks, most=most, **facts)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(("dtype", "ranks"), [("float32", 1), ("bfloat16", 3)])
@pytest.mark.parametrize("name", MODELS)
def test_the_files_are_those_of_save_pretrained(
    name: str, dtype: str, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "PIECE_BYTES", 1000)  # pieces end inside rows and parts
    found = checkpoint(tmp_path, name, ranks=ranks, dtype=dtype)
    for size in ("20KB", "5GB"):
        streamed, plain = tmp_path / f"streamed-{size}", tmp_path / f"plain-{size}"
        streamed.mkdir()
        wrote = export._write_model(found, streamed, size)
        assert wrote == write_in_memory(found, plain, size)
        assert (wrote.num_shards > 1) == (size == "20KB")
        one, other = files_of(streamed), files_of(plain)
        assert one.keys() == other.keys()
        assert one == other, [n for n in one if one[n] != other[n]]
    model = transformers.AutoModelForCausalLM.from_pretrained(streamed, local_files_only=True)
    assert sum(p.numel() for p in model.parameters()) == wrote.num_weights


def test_a_shard_of_several_dtypes_is_laid_out_as_safetensors_does(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {
        f"{letter}-{str(dtype)[6:]}": torch.arange(size).to(dtype).reshape(-1, size)
        for dtype in weights_out.DTYPE_NAMES for letter, size in (("b", 3), ("a", 5), ("é", 1))
    }  # fmt: skip

    class Source:
        def append(self, name: str, dtype: torch.dtype, file: Any) -> None:
            file.write(weights_out._bytes(tensors[name].flatten()))

    with (tmp_path / "ours").open("wb") as file:
        weights_out._write_shard(file, tensors, Source())  # type: ignore[arg-type]
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_model_that_is_stored_otherwise_is_exported_whole_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mixtral = {"model_type": "mixtral", "num_local_experts": 2}
    monkeypatch.setitem(MODELS, "mixtral", mixtral)
    found = checkpoint(tmp_path, "mixtral", ranks=2, dtype="float32")
    (tmp_path / "out").mkdir()
    export._write_model(found, tmp_path / "out", "5GB")
    assert "mixtral: transformers stores its weights by other names" in capsys.readouterr().out
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = export.full_state(found)
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key])


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    found = checkpoint(tmp_path, "llama-untied", ranks=2, dtype="float32")
    for number, (change, message) in enumerate([
        ({"num_hidden_layers": 1}, "model.layers.1"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"vocab_size": 60}, "lm_head.weight"),
    ]):  # fmt: skip
        config = {**found.manifest["model_config"], **change}
        config.pop("layer_types", None)
        other = Found(folder=found.folder, manifest={**found.manifest, "model_config": config})
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(CheckpointError, match=f"do not fit the model.*{message}"):
            weights_out.write_weights(
                other, weights_out.empty_model(other), folder, max_shard_size="5GB"
            )


@pytest.mark.parametrize("text", ["5 GB", "5", "GB", "0GB", "-1GB", "5gb", "1e3MB", ""])
def test_a_shard_size_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--max-shard-size: is .*, expected a size as 5GB"):
        check_shard_size(text)
    assert check_shard_size("1.5MB") == "1.5MB"


def test_memory_does_not_grow_with_the_model() -> None:
    """At a small size, in a process of its own; benchmarks/export_memory.py measures a larger one."""
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "benchmarks/export_memory.py", "--megabytes", "96", "--shard", "12MB",
         "--no-result"],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root), "DS_ACCELERATOR": "cpu"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
