"""Estimates of `--dry-run` beside what is measured, and beside DeepSpeed's own estimator.

    python benchmarks/estimates.py

State (weights, gradients, optimizer) is that of a real ZeRO-3 engine on two CPU ranks after three
steps, in bytes of DeepSpeed's own tensors; goal: within 1 %. Saved activations are what autograd
holds after a forward, counted by saved-tensor hooks, each storage once; goal: within 10 %. What an
optimizer step takes beside the state is the peak of torch's allocations in it, on the same ranks;
for CUDA with what DeepSpeed and torch do there in its place; goal: within 2 %.
DeepSpeed's `estimate_zero3_model_states_mem_needs` counts 18 bytes a weight, and 4 for the largest
layer, which is no state; it knows no dtype but bf16 and no hpZ.

Exit code 0 when the goals are met. The result goes to benchmarks/results/estimates.json.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "distributed")]

from pool import RankPool  # noqa: E402
from zero_cases import knob_run, run_config, step_run  # noqa: E402

from nmar_ds.acceptance.measured import saved_bytes  # noqa: E402
from nmar_ds.model.architecture import architecture_of  # noqa: E402
from nmar_ds.training import estimate  # noqa: E402
from nmar_ds.training.checkpoints import write_atomically  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "estimates.json"
VOCAB = 2000
STATE_GOAL, ACTIVATIONS_GOAL, STEP_GOAL = 0.01, 0.10, 0.02


def keys(model_type: str, hidden: int, layers: int, **more: Any) -> dict[str, Any]:
    """A small model of the presets' proportions."""
    return {
        "model_type": model_type, "hidden_size": hidden, "intermediate_size": hidden * 7 // 2,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 128, "head_dim": 32, "max_position_embeddings": 1024,
        **more,
    }  # fmt: skip


MODELS = {
    "llama 1M": keys("llama", 128, 4, tie_word_embeddings=True),
    "llama 8M": keys("llama", 256, 8),
    "qwen3 29M": keys("qwen3", 512, 8),
}
KNOBS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "float32": {"dtype": "float32"},
    "bfloat16, hpZ": {"dtype": "bfloat16", "zero": {"hpz_partition_size": 2}},
}


def deepspeeds_own(shape: Any) -> int:
    """Its bytes per GPU, on one node of two."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    largest = max(*shape.layer_matrices(), shape.rows * shape.hidden)
    _, device, _ = estimate_zero3_model_states_mem_needs(
        shape.num_weights, largest, num_gpus_per_node=2, num_nodes=1, cpu_offload=False
    )
    return int(device)


def state_rows(pool: RankPool) -> list[dict[str, Any]]:
    """Every model under every knob."""
    rows = []
    for name, model in MODELS.items():
        shape = architecture_of(model, rows=VOCAB, place=name)
        for knob, case in KNOBS.items():
            ranks = pool.run(knob_run, keys=model, vocab=VOCAB, timeout=600,
                             **{"zero": {}, **case})  # fmt: skip
            seen = max(sum(rank["bytes"].values()) for rank in ranks)
            config = run_config(
                {"config": model, "dtype": case["dtype"]}, zero=case.get("zero", {})
            )
            reckoned = estimate.memory_of(config, shape, world_size=2).state
            rows.append({
                "model": name, "weights": shape.num_weights, "knobs": knob,
                "measured": seen, "estimated": reckoned,
                "error": abs(reckoned / seen - 1), "deepspeed": deepspeeds_own(shape),
            })  # fmt: skip
    return rows


def step_rows(pool: RankPool) -> list[dict[str, Any]]:
    """Every model's optimizer step on a CPU, and as it is on CUDA."""
    rows = []
    zero = {"param_persistence_threshold": 0}
    for name, model in MODELS.items():
        shape = architecture_of(model, rows=VOCAB, place=name)
        for device in ("cpu", "cuda"):
            seen = max(pool.run(step_run, keys=model, vocab=VOCAB, dtype="bfloat16", zero=zero,
                                as_on_cuda=device == "cuda", timeout=600))  # fmt: skip
            config = run_config({"config": model, "dtype": "bfloat16"}, zero=zero)
            reckoned = estimate.memory_of(config, shape, world_size=2, device=device).step
            reckoned -= estimate.FP32 * config.zero.reduced_at_once(device)  # there before the step
            rows.append({"model": name, "device": device, "measured": seen,
                         "estimated": reckoned, "error": abs(reckoned / seen - 1)})  # fmt: skip
    return rows


def activation_rows() -> list[dict[str, Any]]:
    """Every model, with and without checkpointing."""
    rows = []
    for name, model in MODELS.items():
        shape = architecture_of(model, rows=VOCAB, place=name)
        for dtype, item in (("bfloat16", 2), ("float32", 4)):
            for recompute in (False, True):
                seen = saved_bytes(
                    model, vocab=VOCAB, rows=2, length=256, dtype=dtype, recompute=recompute
                )
                reckoned = estimate.saved_bytes(shape, 512, item, recompute=recompute)
                reckoned += estimate.loss_kept_bytes(shape, 512, item)
                rows.append({
                    "model": name, "dtype": dtype, "checkpointing": recompute,
                    "measured": seen, "estimated": reckoned, "error": abs(reckoned / seen - 1),
                })  # fmt: skip
    return rows


def main() -> int:
    """Returns the exit code."""
    pool = RankPool(2)
    try:
        state, step = state_rows(pool), step_rows(pool)
    finally:
        pool.close()
    activations = activation_rows()
    for row in state:
        print(f"state        {row['model']:10} {row['knobs']:14} measured "
              f"{row['measured']:>12,}  estimated {row['estimated']:>12,}  "
              f"DeepSpeed's {row['deepspeed']:>12,}")  # fmt: skip
    for row in activations:
        kept = "checkpointed" if row["checkpointing"] else "all kept"
        print(f"activations  {row['model']:10} {row['dtype']:9}{kept:13} measured "
              f"{row['measured']:>12,}  estimated {row['estimated']:>12,}")  # fmt: skip
    for row in step:
        print(f"step         {row['model']:10} {row['device']:14} measured "
              f"{row['measured']:>12,}  estimated {row['estimated']:>12,}")  # fmt: skip
    goals = {"state": STATE_GOAL, "activations": ACTIVATIONS_GOAL, "step": STEP_GOAL}
    rows = {"state": state, "activations": activations, "step": step}
    worst = {kind: max(row["error"] for row in rows[kind]) for kind in rows}
    ok = all(worst[kind] <= goal for kind, goal in goals.items())
    facts = {"goals": goals, "worst": worst, "met": ok, **rows,
             "python": platform.python_version(), "versions": versions()}  # fmt: skip
    write_atomically(RESULT, json.dumps(facts, indent=1) + "\n")
    listed = ", ".join(f"{kind} {error:.2%}" for kind, error in worst.items())
    print(f"worst: {listed}: {'goals met' if ok else 'goals missed'}")
    return 0 if ok else 1


def versions() -> dict[str, str]:
    """Of the libraries whose tensors are counted."""
    import deepspeed
    import torch
    import transformers

    return {module.__name__: module.__version__ for module in (torch, deepspeed, transformers)}


if __name__ == "__main__":
    sys.exit(main())
