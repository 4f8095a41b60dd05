"""The fused loss beside plain logits and torch's own fused loss: peak memory and time.

    python benchmarks/loss.py [--only memory|time|bfloat16] [--repeats 3]

4,096 rows, H 512, V 128,256, float32, 60 % of the targets trained. Memory is the growth of the
process's peak resident size over forward and backward, in a fresh process for each side, after a
small call that loads its libraries; inputs and the gradients of the inputs' own making are in it.
Times are medians of interleaved calls in one process. The sides:

- ours: `weighted_cross_entropy` on the trained rows, which are selected within what is measured;
- plain: logits of all rows, then `F.cross_entropy`; the logits live as long as the caller's outputs
  do, as with transformers' models. "plain, logits dropped": they are let go after the forward;
- torch: `F.linear_cross_entropy`, chunked, with its own choice of chunk and with chunks of 256.

Loss and gradients of all sides are compared first. Goals: memory at most 1/25 of plain and 0.8 of
torch; time at most 0.6 of plain, and in proportion to the trained share (within a quarter).
Result: benchmarks/results/loss.json. Exit code 0 when the goals are met.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import results_file  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.modules.linear_cross_entropy_options import (  # noqa: E402
    LinearCrossEntropyOptions,
)

from nmar_ds.model.objective import weighted_cross_entropy  # noqa: E402

N, H, V, SHARE = 4096, 512, 128_256, 0.6
SHARES = (1.0, 0.6, 0.3)
SEED = 20261130
MEMORY_PLAIN, MEMORY_TORCH, TIME_PLAIN, PROPORTION = 1 / 25, 0.8, 0.6, 1.25
GOALS = {
    "memory": "peak <= 1/25 of plain logits kept, <= 0.8 of torch's better chunk",
    "time": "<= 0.6 of plain at 60 % trained; over the share within 1.25 of proportion",
}
Side = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
         trained: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """Select, then the fused loss, as the training model does it."""
    rows = torch.nonzero(trained)[:, 0]
    weights = torch.ones(len(rows))
    return weighted_cross_entropy(
        hidden.index_select(0, rows), weight, None, targets[rows], weights
    ).loss_sum


KEPT: list[torch.Tensor] = []


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
          trained: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """All logits, which stay with the caller."""
    KEPT[:] = [F.linear(hidden, weight)]
    labels = torch.where(trained, targets, -100)
    return F.cross_entropy(KEPT[0].float(), labels, reduction="sum")


def plain_dropped(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                  trained: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """All logits, which only the graph may keep."""
    labels = torch.where(trained, targets, -100)
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def torch_fused(chunk: int | None) -> Side:
    """`F.linear_cross_entropy` with its own or with a given number of rows per chunk."""
    options = LinearCrossEntropyOptions(**({} if chunk is None else {"batch_chunk_size": chunk}))

    def call(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
             trained: torch.Tensor) -> torch.Tensor:  # fmt: skip
        labels = torch.where(trained, targets, -100)
        loss: torch.Tensor = F.linear_cross_entropy(  # type: ignore[attr-defined]
            hidden, weight, labels, reduction="sum", options=options
        )
        return loss

    return call


SIDES: dict[str, Side] = {
    "ours": ours,
    "plain": plain,
    "plain, logits dropped": plain_dropped,
    "torch": torch_fused(None),
    "torch, chunks of 256": torch_fused(256),
}


def problem(
    share: float, *, rows: int = N, vocab: int = V, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    """Hidden states, head, targets, and which of them are trained."""
    generator = torch.Generator().manual_seed(SEED)
    hidden = torch.randn(rows, H, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, H, generator=generator) * 0.02).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (rows,), generator=generator)
    order = torch.randperm(rows, generator=generator)
    trained = torch.zeros(rows, dtype=torch.bool)
    trained[order[: round(share * rows)]] = True
    return hidden, weight, targets, trained


def call(side: str, inputs: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """Forward and backward with an outer factor; the loss, and seconds."""
    for leaf in inputs[:2]:
        leaf.grad = None
    started = time.perf_counter()
    loss = SIDES[side](*inputs)
    (loss * 0.001).backward()
    seconds = time.perf_counter() - started
    KEPT.clear()
    return float(loss.detach()), seconds


def status(name: str) -> int:
    """Bytes of one line of /proc/self/status."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def peak(side: str) -> None:
    """Print the growth of this process's peak over one call."""
    call(side, problem(SHARE, rows=64, vocab=512))
    inputs = problem(SHARE)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = status("VmRSS")
    call(side, inputs)
    print(json.dumps(status("VmHWM") - before))


def measure_memory(repeats: int) -> dict[str, Any]:
    """Peaks, each in a process of its own, in turn."""
    grown: dict[str, list[int]] = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side in SIDES:
            done = subprocess.run([sys.executable, __file__, "--peak", side], check=True,
                                  stdout=subprocess.PIPE, text=True)  # fmt: skip
            grown[side].append(json.loads(done.stdout))
    median = {side: statistics.median(values) for side, values in grown.items()}
    fused = min(bytes_ for side, bytes_ in median.items() if side.startswith("torch"))
    return {
        "measured": "growth of peak resident memory, bytes", "bytes": grown, "median": median,
        "over plain": median["ours"] / median["plain"],
        "over plain, logits dropped": median["ours"] / median["plain, logits dropped"],
        "over torch": median["ours"] / fused,
        "weight gradient alone": 4 * V * H,
    }  # fmt: skip


def compare() -> float:
    """Largest relative difference of loss and gradients to the plain ones, on fewer rows."""
    inputs, worst = problem(SHARE, rows=512), 0.0
    expected = [torch.tensor(call("plain", inputs)[0]), *[leaf.grad for leaf in inputs[:2]]]
    for side in SIDES:
        seen = [torch.tensor(call(side, inputs)[0]), *[leaf.grad for leaf in inputs[:2]]]
        for a, b in zip(seen, expected, strict=True):
            assert a is not None and b is not None
            gap = float((a - b).abs().max() / b.abs().max())
            print(f"{side:24} {gap:.1e}")
            worst = max(worst, gap)
    assert worst < 1e-4, worst
    return worst


def measure_time(repeats: int, shares: tuple[float, ...], dtype: torch.dtype) -> dict[str, Any]:
    """Seconds of ours at each share, and of the others at the goal's share, in turn."""
    sides = [side for side in SIDES if side not in ("torch", "plain, logits dropped")]
    runs = [("ours", share) for share in shares]
    runs += [(side, SHARE) for side in sides if side != "ours"]
    inputs = {share: problem(share, dtype=dtype) for share in shares}
    seconds: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        for side, share in runs:
            took = call(side, inputs[share])[1]
            if repeat:  # the first touches fresh memory
                seconds.setdefault(f"{side}, {share:.0%} trained", []).append(took)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    whole = median["ours, 100% trained"]
    return {
        "seconds": seconds, "median": median,
        "over plain": median[f"ours, {SHARE:.0%} trained"] / median[f"plain, {SHARE:.0%} trained"],
        "over torch": median[f"ours, {SHARE:.0%} trained"]
        / median[f"torch, chunks of 256, {SHARE:.0%} trained"],
        "over proportion": {
            share: median[f"ours, {share:.0%} trained"] / (share * whole) for share in shares
        },
    }  # fmt: skip


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("memory", "time", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", choices=tuple(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        peak(options.peak)
        return 0
    rows: dict[str, dict[str, Any]] = {}
    if options.only in (None, "memory"):
        found = measure_memory(options.repeats)
        rows["memory"] = found | {"met": {
            "over plain": found["over plain"] <= MEMORY_PLAIN,
            "over torch": found["over torch"] <= MEMORY_TORCH,
        }}  # fmt: skip
    if options.only in (None, "time"):
        gap = compare()
        found = measure_time(options.repeats, SHARES, torch.float32)
        rows["time"] = found | {"largest difference": gap, "met": {
            "over plain": found["over plain"] <= TIME_PLAIN,
            "over proportion": max(found["over proportion"].values()) <= PROPORTION,
        }}  # fmt: skip
    if options.only in (None, "bfloat16"):
        found = measure_time(options.repeats, SHARES, torch.bfloat16)
        rows["bfloat16 time"] = found | {"met": {}}
    results_file.merge("loss", rows, GOALS, ("torch",))
    for name, row in rows.items():
        print(name, json.dumps({k: row[k] for k in row if k.startswith(("over", "median", "met"))},
                               indent=1))  # fmt: skip
    return 0 if all(all(row["met"].values()) for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
