"""How near a step comes to what the machine's matrix products allow, and where the rest goes.

    python benchmarks/roofline.py [--only tiny] [--steps 8]

Needed: the floating-point operations of a step by mSFT's mathematics: the layers on the tokens that
are not padding, the head on the trained targets, attention on half the squares of the traces; twice
as much for the backward as for the forward. No optimizer, no norm, nothing recomputed. Divided by
the rate of a 2,048-cubed product in the same dtype on the same threads, measured in turns with the
steps, that is the least time; the row says which share of the measured time it is (goal 0.75).

`engine`: the product's loop under ZeRO-3, one process. `plain`: the same model, loss and AdamW
without an engine. The profile is of one more step of each. Result:
benchmarks/results/roofline.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import results_file  # noqa: E402
import sides  # noqa: E402

GOAL = 0.75
GOALS = {"share": "needed FLOPs at the machine's matmul rate over the measured step: 0.75"}
CASES = {
    "tiny": ("tiny", "float32", 4096),
    "tiny-bfloat16": ("tiny", "bfloat16", 4096),
    "smollm2": ("smollm2", "float32", 2048),
    "smollm2-bfloat16": ("smollm2", "bfloat16", 2048),
}


def needed_flops(config: Any, rows: list[sides.Row]) -> dict[str, float]:
    """Of forward and backward, by part."""
    size, layers = config.hidden_size, config.num_hidden_layers
    width = getattr(config, "head_dim", None) or size // config.num_attention_heads
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    layer = size * width * (2 * heads + 2 * groups) + 3 * size * config.intermediate_size
    tokens = sum(len(ids) for ids, _, _ in rows)
    trained = sum(label != -100 for _, labels, _ in rows for label in labels)
    squares = sum(length**2 for _, _, lengths in rows for length in lengths)
    return {
        "layers": 6.0 * tokens * layers * layer,
        "head": 6.0 * trained * config.vocab_size * size,
        "attention": 6.0 * layers * heads * width * squares,
    }


def matmul_rate(dtype: Any) -> float:
    """Floating-point operations a second, the median of some products."""
    import torch

    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    out, seconds = torch.empty_like(a), []
    for _ in range(12):
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / statistics.median(seconds[2:])


PARTS = (
    ("attention", ("attention",)),
    ("optimizer", ("adamw",)),
    ("products", ("mm", "linear", "matmul", "bmm")),
    ("moving memory", ("copy_", "cat", "fill_", "zero_", "clone", "index", "c10d", "gloo",
                       "scatter", "gather", "embedding")),
    ("elementwise, norms", ("",)),
)  # fmt: skip


def profile_of(run: Callable[[], Any]) -> dict[str, float]:
    """Shares of one step's time, by kind of operator; those of the head by themselves."""
    from torch.profiler import profile

    with profile() as found:
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
    parts: dict[str, float] = defaultdict(float)
    for event in found.events():
        if not event.name.startswith(("aten::", "c10d::", "gloo:")):
            continue
        above, in_head = event.cpu_parent, False
        while above is not None and not in_head:
            in_head = above.name.startswith("LinearCrossEntropy")
            above = above.cpu_parent
        part = next(p for p, names in PARTS if any(n in event.name for n in names))
        name = f"head: {'products' if part == 'products' else 'rest'}" if in_head else part
        parts[name] += event.self_cpu_time_total / 1e6
    parts["python, engine, waiting"] = seconds - sum(parts.values())
    return {name: part / seconds for name, part in parts.items()}


def measure(case: str, steps: int) -> dict[str, Any]:
    """Engine, plain and a product in turns."""
    from nmar_ds.training.ranks import complete_environment, discover_ranks

    model, dtype, capacity = CASES[case]
    ranks = discover_ranks({})
    complete_environment(os.environ, ranks)  # before torch, as launcher/train.py does it
    import torch
    import transformers

    from nmar_ds.training.engine import close_process_group, start_process_group

    start_process_group(ranks, timeout_seconds=300)
    with tempfile.TemporaryDirectory(prefix="roofline-") as place:
        job = sides.job_of(model, place, dtype=dtype, capacity=capacity, steps=steps + 1)
        rows = sides.own_rows(job)
        config = transformers.AutoConfig.from_pretrained(job["model"])
        loop = sides.ours_loop(job, rows, 0, 1)
        plain = sides.plain_step(job, rows)
    loop.engine.train()

    def engine_step(step: int) -> None:
        sums = loop.forward_backward(step, also_untrained=False)
        loop._agree(step + 1, sums, loop.engine.step_was_applied())

    shares: dict[str, list[float]] = {"engine": [], "plain": []}
    seconds: dict[str, list[float]] = {"engine": [], "plain": []}
    rates = []
    for step in range(steps):
        needed = sum(needed_flops(config, [rows[step]]).values())
        rates.append(matmul_rate(getattr(torch, dtype)))
        for name, run in (("engine", engine_step), ("plain", plain)):
            started = time.perf_counter()
            run(step)
            took = time.perf_counter() - started
            if step:
                seconds[name].append(took)
                shares[name].append(needed / rates[-1] / took)
    found = {
        "share": statistics.median(shares["engine"]),
        "share without engine": statistics.median(shares["plain"]),
        "matmul GFLOP per second": statistics.median(rates) / 1e9,
        "needed GFLOP, last step": {
            name: part / 1e9 for name, part in needed_flops(config, [rows[steps - 1]]).items()
        },
        "useful tokens, last step": len(rows[steps - 1][0]), "capacity": capacity,
        "seconds": seconds, "shares": shares,
        "profile, engine": profile_of(lambda: engine_step(steps)),
        "profile, plain": profile_of(lambda: plain(steps)),
        "goal": GOAL,
    }  # fmt: skip
    found["met"] = {"share": found["share"] >= GOAL}
    close_process_group()
    return found


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=tuple(CASES), help="default: each, in its own process")
    parser.add_argument("--steps", type=int, default=8, help="the first is not timed")
    options = parser.parse_args()
    if options.only is None:
        import subprocess

        command = [sys.executable, __file__, "--steps", str(options.steps), "--only"]
        codes = [subprocess.run([*command, case], check=False).returncode for case in CASES]
        return max(codes)
    found = measure(options.only, options.steps)
    results_file.merge("roofline", {options.only: found}, GOALS,
                       ("torch", "transformers", "deepspeed"))  # fmt: skip
    print(options.only, json.dumps(found, indent=1))
    return 0 if all(found["met"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
