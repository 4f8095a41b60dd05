"""ZeRO-3 on two gloo ranks: beside TRL + accelerate + DeepSpeed, and beside no sharding at all.

    python benchmarks/zero.py [--only tiny] [--steps 5]

Rows `tiny` and `smollm2`: the race of benchmarks/step.py with two ranks of one thread each, two
micro-batches of a row per step, both sides under DeepSpeed's stage 3 (TRL's with the settings that
its documentation shows). Goals: 2 times TRL for the tiny model, 1.3 for SmolLM2 (rows of 1,024; one
side in memory at a time, all steps of one and then of the other, twice).

Rows `... sharded`: our two ranks, and one process with the same model, loss and optimizer but no
engine, on one thread with the rows of rank 0; in turns. Goal: where both ranks have these rows, and
so the work of the process, they do at least 0.85 of twice what it does. Measured too: ranks that
have rows apart, where the one with less to do waits for the other in every micro-batch.

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
WARM_UP = 2  # steps that are not timed
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
    """Two ranks and one process, in turns; as ratios within each step."""
    with tempfile.TemporaryDirectory(prefix="zero-") as place:
        job = sides.job_of(model, place, world_size=2, steps=steps, accumulation=2, threads=1,
                           capacity=CAPACITY[model])  # fmt: skip
        rows = sides.own_rows(job)
        # A step has four rows. The ranks take them as they are and then rank 0's on both; the
        # process takes those of rank 1 and then those of rank 0. So what is compared for the goal
        # is the second step of each, when caches and memory are its own again.
        for_ranks: list[sides.Row] = []
        for_one: list[sides.Row] = []
        for at in range(0, 4 * steps, 4):
            first, second, third, fourth = rows[at : at + 4]
            for_ranks += [first, second, third, fourth, first, first, third, third]
            for_one += [second, fourth, first, third]
        job |= {"steps": 2 * steps}
        ranks, one = sides.Side(sides.ours_worker, job, 2), sides.Side(sides.plain_worker, job)
        ranks.tell(for_ranks)
        one.tell(for_one)
        for side in (ranks, one):
            side.hear()
        seconds: dict[str, list[float]] = {
            name: [] for name in ("ranks", "ranks, equal rows", "rank 1's rows", "rank 0's rows")
        }
        for _ in range(steps):
            for name, side in zip(seconds, (ranks, ranks, one, one), strict=True):
                seconds[name].append(side.step()[0])
        for side in (ranks, one):
            side.close()
    apart, equal, other, zeroth = (each[WARM_UP:] for each in seconds.values())
    ratios = {
        "of two unsharded": [a / b for a, b in zip(zeroth, equal, strict=True)],
        "of two unsharded, rows apart": [
            (a + b) / 2 / c for a, b, c in zip(zeroth, other, apart, strict=True)
        ],
    }
    return {name: statistics.median(each) for name, each in ratios.items()} | {
        "ratios": ratios, "seconds": seconds,
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
