"""A whole training step beside TRL's SFTTrainer with BFD packing, one process: useful tokens/s.

    python benchmarks/step.py [--only tiny-2048] [--steps 6]

Same weights, same packed traces (length law `trace` of benchmarks/data.py, about 60 % trained),
steps taken in turns (benchmarks/sides.py); TRL packs, and both train on its rows. Tokens count when
they are not padding. Models: a Llama of 4 layers, H 256, V 32,000, random; SmolLM2-135M-Instruct
(examples/smollm2/convert.py writes it to runs/). In bfloat16 both sides hold bfloat16 weights; ours
has float32 masters beside them, TRL updates the bfloat16 ones themselves.

Neither side recomputes activations; in the rows `... defaults` each does what it does unless told
otherwise: TRL recomputes, ours does not. In the rows `... alone` the sides are not in memory
together: all steps of one, then all of the other, twice.

Goals, times TRL: the tiny one 5 at 2,048, 5.3 at 4,096, 6 at 8,192; SmolLM2 1.5 at 2,048, 2.2 at
4,096, 3 at 8,192 (where a side is killed for want of memory, the row says so). The first step's
losses agree to 1e-5 in float32; in bfloat16 to 2e-3, its rounding. Result:
benchmarks/results/step.json, a row at a time. Exit code 0 when the goals are met.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import results_file  # noqa: E402
import sides  # noqa: E402

ROWS = {
    "tiny-2048": ("tiny", "float32", 2048, 5.0),
    "tiny-4096": ("tiny", "float32", 4096, 5.3),
    "tiny-8192": ("tiny", "float32", 8192, 6.0),
    "tiny-2048-defaults": ("tiny", "float32", 2048, 5.0),
    "tiny-4096-defaults": ("tiny", "float32", 4096, 5.3),
    "tiny-8192-defaults": ("tiny", "float32", 8192, 6.0),
    "smollm2-2048": ("smollm2", "float32", 2048, 1.5),
    "smollm2-4096": ("smollm2", "float32", 4096, 2.2),
    "smollm2-8192": ("smollm2", "float32", 8192, 3.0),
    "smollm2-4096-defaults": ("smollm2", "float32", 4096, 2.2),
    "smollm2-4096-alone": ("smollm2", "float32", 4096, 2.2),
    "smollm2-8192-defaults-alone": ("smollm2", "float32", 8192, 3.0),
    "smollm2-bfloat16-8192-defaults-alone": ("smollm2", "bfloat16", 8192, 3.0),
    "smollm2-bfloat16-2048": ("smollm2", "bfloat16", 2048, 1.5),
    "smollm2-bfloat16-4096": ("smollm2", "bfloat16", 4096, 2.2),
}
LOSS_BOUND = {"float32": 1e-5, "bfloat16": 2e-3}
GOALS = {"ratio": "useful tokens/s over TRL, median over the steps; see benchmarks/step.py"}
PACKAGES = ("torch", "transformers", "deepspeed", "accelerate")


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=tuple(ROWS), action="append")
    parser.add_argument("--steps", type=int, default=6, help="the first is not timed")
    options = parser.parse_args()
    good = True
    for name in options.only or ROWS:
        model, dtype, capacity, goal = ROWS[name]
        found = sides.race(model, dtype=dtype, capacity=capacity, steps=options.steps,
                           recomputes="defaults" in name, alone="alone" in name)  # fmt: skip
        if "ratio" in found:
            gap = found["first loss, relative difference"]
            found["goal"] = goal
            found["met"] = {"ratio": found["ratio"] >= goal, "loss": gap <= LOSS_BOUND[dtype]}
            good &= all(found["met"].values())
        results_file.merge("step", {name: found}, GOALS, PACKAGES)
        shown = {k: found[k] for k in found if k not in ("tokens", "losses")}
        print(name, json.dumps(shown, indent=1), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
