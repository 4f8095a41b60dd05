"""Decoding: tokens a second of the stack decoder beside transformers' `generate`.

    python benchmarks/decoding.py [--repeats 5] [--model FOLDER]

Both get the same ragged prompts, padded on the left, in one process, in turn; greedy, `<UNDO>`
banned and no stop token on both sides, so both write the same ids, which is checked. Models: a
tiny random Llama (4 layers, hidden size 256, 32,000 ids), and with `--model` a folder as well.
Goal: at least as many tokens a second at every batch size. CPU ratios say nothing of GPUs. Result:
benchmarks/results/decoding.json; exit code 0 when the goal is met.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from nmar_ds.inference.decoding import decode  # noqa: E402
from nmar_ds.traces.reduction import Machine  # noqa: E402
from nmar_ds.training.checkpoints import write_atomically  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "decoding.json"
CASES = ((1, 64), (8, 64), (32, 32))  # sequences side by side, new tokens
PROMPT = (16, 96)  # tokens, uniform
UNDO, STOP = 3, 2


def tiny() -> Any:
    """A random Llama."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32_000, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def ours(model: Any, prompts: list[Any], num: int) -> list[list[int]]:
    """The stack decoder; the stop token is banned, as for the other side."""
    found = decode(
        model, prompts, machine=Machine(UNDO), eos_id=STOP, pad_id=0, max_new_tokens=num,
        undo_mode="ban", banned_ids=(STOP,), batch_size=len(prompts),
    )  # fmt: skip
    return [decoded.raw_ids.tolist() for decoded in found]


def theirs(model: Any, prompts: list[Any], num: int) -> list[list[int]]:
    """`generate`, with padding and mask made here as a user would."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, longest - len(prompt) :] = 1
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=num, do_sample=False, pad_token_id=0,
        eos_token_id=None, suppress_tokens=[UNDO, STOP],
    )  # fmt: skip
    return [row[longest:].tolist() for row in output]


def measure(name: str, model: Any, repeats: int) -> list[dict[str, Any]]:
    """Every batch size: medians of runs in turn."""
    rows = []
    rng = np.random.default_rng(1)
    for size, num in CASES:
        lengths = rng.integers(*PROMPT, size=size)
        top = model.config.vocab_size
        prompts = [rng.integers(10, top, size=n).astype(np.int64) for n in lengths]
        sides = {"ours": ours, "generate": theirs}
        ids = {side: run(model, prompts, num) for side, run in sides.items()}  # and warm
        if ids["ours"] != ids["generate"]:
            sys.exit(f"{name}, {size} sequences: the two sides do not write the same ids")
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(repeats):
            for side, run in sides.items():
                started = time.perf_counter()
                run(model, prompts, num)
                seconds[side].append(time.perf_counter() - started)
        median = {side: statistics.median(took) for side, took in seconds.items()}
        row = {
            "model": name, "sequences": size, "new_tokens": num, "seconds": seconds,
            "tokens_per_second": {side: size * num / took for side, took in median.items()},
            "times_generate": median["generate"] / median["ours"],
        }  # fmt: skip
        rows.append(row)
        print(f"{name:16} {size:3} sequences: {row['tokens_per_second']['ours']:8,.0f} tok/s, "
              f"{row['times_generate']:.2f} x generate", flush=True)  # fmt: skip
    return rows


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", type=Path, help="a model folder to measure as well")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = measure("tiny", tiny(), options.repeats)
    if options.model:
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model).float().eval()
        rows += measure(options.model.name, model, options.repeats)
    met = all(row["times_generate"] >= 1 for row in rows)
    table = {
        "command": "python benchmarks/decoding.py", "date": time.strftime("%Y-%m-%d"),
        "goal": "times_generate >= 1", "met": met, "rows": rows,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared",
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": version("transformers")},
    }  # fmt: skip
    write_atomically(RESULT, json.dumps(table, indent=1) + "\n")
    print("met" if met else "not met")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
