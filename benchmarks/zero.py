"""ZeRO-3 on two gloo ranks: beside TRL + accelerate + DeepSpeed, and beside no sharding at all.

    python benchmarks/zero.py [--only tiny] [--steps 5]

Rows `tiny` and `smollm2`: the race of benchmarks/step.py with two ranks of one thread each, two
micro-batches of a row per step, both sides under DeepSpeed's stage 3 (TRL's with the settings that
its documentation shows). Goals: 2 times TRL for the tiny model, 1.3 for SmolLM2 (rows of 1,024; one
side in memory at a time, all steps of one and then of the other, twice).

Rows `... sharded`: our two ranks, and one process with the same model, loss and optimizer but no
engine, on one thread with as many rows as one rank has; in turns. Goal: the two ranks do at least
0.85 of twice what one process does. Two such processes at once are measured too: they share the
machine's caches and memory as the ranks do.

Result: benchmarks/results/zero.json. Exit code 0 when the goals are met.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import results_file  # noqa: E402
import sides  # noqa: E402

CAPACITY = {"tiny": 2048, "smollm2": 1024}
OVER_TRL = {"tiny": 2.0, "smollm2": 1.3}
SHARDED = 0.85
GOALS = {
    "ratio": "useful tokens/s over TRL: tiny 2, SmolLM2 1.3",
    "of two unsharded": "two ZeRO-3 ranks over twice one unsharded process: 0.85",
}
TRL_DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto", "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9,
        "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
}  # fmt: skip
ROWS = ("tiny", "tiny sharded", "smollm2", "smollm2 sharded")


def sharded(model: str, steps: int) -> dict[str, Any]:
    """Two ranks, one process, and two processes at once; in turns."""
    with tempfile.TemporaryDirectory(prefix="zero-") as place:
        job = sides.job_of(model, place, world_size=2, steps=steps, accumulation=2, threads=1,
                           capacity=CAPACITY[model])  # fmt: skip
        rows = sides.own_rows(job)
        # as many rows a process as a rank has: those of rank 0, and those of rank 1
        alone = [sides.Side(sides.plain_worker, job) for _ in range(2)]
        ranks = sides.Side(sides.ours_worker, job, 2)
        ranks.tell(rows)
        for rank, side in enumerate(alone):
            side.tell(rows[rank::2])
        for side in (ranks, *alone):
            side.hear()
        rates: dict[str, list[float]] = {"ranks": [], "one": [], "two at once": []}
        seconds: list[list[float]] = []
        for step in range(steps):
            at = slice(step * 4, (step + 1) * 4)
            tokens = [len(ids) for ids, _, _ in rows[at]]
            both, _ = ranks.step()
            # one alone does the first step's rows; both do the others at once
            took = []
            if step % 2:
                for side in alone:
                    took.append(side.step()[0])
            else:
                for side in alone:
                    side.tell("step")
                took = [side.hear()[0][0] for side in alone]
            seconds.append([both, *took])
            if step < 2:
                continue
            rates["ranks"].append(sum(tokens) / both)
            halves = [sum(tokens[0::2]) / took[0], sum(tokens[1::2]) / took[1]]
            if step % 2:
                rates["one"].append(sum(halves) / 2)
            else:
                rates["two at once"].append(sum(halves))
        for side in (ranks, *alone):
            side.close()
    median = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "tokens per second": median, "seconds": seconds,
        "of two unsharded": median["ranks"] / (2 * median["one"]),
        "of two unsharded at once": median["ranks"] / median["two at once"],
    }  # fmt: skip


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=ROWS, action="append")
    parser.add_argument("--steps", type=int, default=6, help="the first ones are not timed")
    options = parser.parse_args()
    good = True
    for name in options.only or ROWS:
        model = name.split()[0]
        if name.endswith("sharded"):
            found = sharded(model, options.steps)
            met = {"of two unsharded": found["of two unsharded"] >= SHARDED}
            found |= {"goal": SHARDED, "met": met}
        else:
            found = sides.race(model, world_size=2, accumulation=2, threads=1, steps=options.steps,
                               capacity=CAPACITY[model], deepspeed=TRL_DEEPSPEED,
                               alone=model == "smollm2")  # fmt: skip
            if "ratio" in found:
                gap = found["first loss, relative difference"]
                found |= {"goal": OVER_TRL[model], "met": {
                    "ratio": found["ratio"] >= OVER_TRL[model], "loss": gap <= 1e-5,
                }}  # fmt: skip
        good &= all(found.get("met", {"ended": False}).values())
        results_file.merge("zero", {name: found}, GOALS,
                           ("torch", "transformers", "deepspeed", "accelerate"))  # fmt: skip
        print(name, json.dumps({k: v for k, v in found.items() if k not in ("tokens", "losses")},
                               indent=1), flush=True)  # fmt: skip
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
