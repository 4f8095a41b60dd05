"""How the speed benchmarks keep their results: rows measured one at a time, joined in one file."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CAVEAT = "CPU figures: they say nothing of GPUs, where the peers have Triton and flash paths"


def merge(
    name: str, rows: dict[str, dict[str, Any]], goals: dict[str, str], packages: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    """Put measured rows in `results/<name>.json`, beside those measured before; return all.

    Args:
        name: of the benchmark.
        rows: figures by row; each is dated and keeps the command that measured it.
        goals: what was asked, in words, by figure.
        packages: whose versions count.
    """
    path = RESULTS / f"{name}.json"
    kept = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else {}
    stamp = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join([f"python benchmarks/{name}.py", *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            **{one: version(one) for one in packages},
        },
        "machine": f"{platform.machine()} with {instruction_set()}, {os.cpu_count()} cores, "
        "shared with other work",
    }
    kept |= {row: stamp | figures for row, figures in rows.items()}
    # benchmarks do not wait for a whole file to be right, but a torn one would lose other rows
    from nmar_ds.training.checkpoints import write_atomically

    table = {"caveat": CAVEAT, "goals": goals, "rows": dict(sorted(kept.items()))}
    write_atomically(path, json.dumps(table, indent=1) + "\n")
    return kept


def instruction_set() -> str:
    """What torch's kernels use of this CPU, as AVX2 or AVX512: ratios differ between the two."""
    import torch

    return str(torch.backends.cpu.get_cpu_capability())


def verdict(seen: float, goal: float, *, at_least: bool) -> str:
    """`met` or `MISSED`."""
    return "met" if (seen >= goal if at_least else seen <= goal) else "MISSED"
