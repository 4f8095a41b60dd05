"""A preset at its true width with one layer, and what two ranks do with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nmar_ds.acceptance.measured import small_engine, state_bytes, train_full_rows
from nmar_ds.config import RunConfig, load_config

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 4096
LENGTH = 64
# True hidden size and heads, but a quarter of the inner width: two ranks fit in 16 GB.
NARROWED = {"llama3_70b": {"intermediate_size": 7168}}


def wide_keys(name: str) -> dict[str, Any]:
    """The architecture's keys with one layer; the vocabulary is the tokenizer's."""
    keys = json.loads((ROOT / f"configs/architectures/{name}/config.json").read_text())
    own = {"vocab_size", "architectures", "bos_token_id", "eos_token_id"}
    kept = {key: value for key, value in keys.items() if key not in own}
    return {**kept, "num_hidden_layers": 1, **NARROWED.get(name, {})}


def wide_config(name: str) -> RunConfig:
    """The preset on two ranks that are one node; a rate at which one step is seen in the loss."""
    preset = load_config(ROOT / f"configs/{name}.yaml").model_dump()
    checkpointing = preset["model"]["activation_checkpointing"]
    preset["model"] = {
        "config": wide_keys(name), "dtype": "bfloat16", "activation_checkpointing": checkpointing
    }  # fmt: skip
    preset["training"] |= {"global_batch_rows": 2, "micro_batch_rows": 1, "world_size": 2}
    preset["data"]["sequence_length"] = LENGTH
    preset["optimizer"]["learning_rate"] = 1e-3
    if preset["zero"]["hpz_partition_size"] > 1:
        preset["zero"]["hpz_partition_size"] = 2
    # Two ranks hold of this layer what many share of the model: smaller portions.
    preset["zero"] |= {"reduce_bucket_size": 20_000_000, "sub_group_size": 20_000_000}
    return RunConfig.model_validate(preset)


def _status(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        found = next(line for line in lines if line.startswith(f"{name}:"))
    return int(found.split()[1]) * 1024


def wide_steps(name: str) -> dict[str, Any]:
    """Two optimizer steps on the same rows. Collective."""
    before = _status("VmRSS")
    config = wide_config(name)
    engine = small_engine(config, vocab=VOCAB)
    losses = train_full_rows(engine, config, vocab=VOCAB, micro_batches=2)
    parameters: list[Any] = list(engine.module.parameters())
    return {
        "losses": [loss / (LENGTH - 1) for loss in losses],
        "applied": engine.step_was_applied(),
        "norm": engine.gradient_norm(),
        "bytes": state_bytes(engine),
        "copies": sum(parameter.ds_secondary_tensor is not None for parameter in parameters),
        "numel": [parameter.ds_numel for parameter in parameters],
        "peak": _status("VmHWM") - before,
    }
