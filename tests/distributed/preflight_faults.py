"""Faults put into preflight from outside, and `launcher/preflight.py` with one of them.

As a script: FAULT names the fault and FAULT_RANK the rank, in the environment.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def plant(fault: str) -> list[tuple[Any, str, Any]]:
    """Break this process; what was replaced, to put it back."""
    from nmar_ds.training import preflight

    kept = [(preflight, name, getattr(preflight, name))
            for name in ("node_name", "wall_clock", "matmul", "folder_facts", "versions")]  # fmt: skip
    right = {name: value for _, name, value in kept}
    preflight.node_name = lambda: "bad-host"
    if fault == "slow":

        def slow(a: Any, b: Any) -> Any:
            time.sleep(0.15)
            return right["matmul"](a, b)

        preflight.matmul = slow
    elif fault == "wrong":

        def wrong(a: Any, b: Any) -> Any:
            product = right["matmul"](a, b)
            product[3, 5] += 1
            return product

        preflight.matmul = wrong
    elif fault == "unstable":

        def unstable(a: Any, b: Any) -> Any:
            product = right["matmul"](a, b)
            if len(a) > preflight.EXACT_SIDE:
                product[3, 5] += time.perf_counter_ns() % 1000
            return product

        preflight.matmul = unstable
    elif fault == "hang":

        def hang(a: Any, b: Any) -> Any:
            time.sleep(3)  # longer than the timeout
            raise RuntimeError("a planted hang is over")

        preflight.matmul = hang
    elif fault == "skew":
        preflight.wall_clock = lambda: time.time() + 5
    elif fault == "folder":
        preflight.folder_facts = lambda output, peers: right["folder_facts"](
            output if peers.rank == 0 else output.with_name("elsewhere"), peers
        )
    elif fault == "versions":
        preflight.versions = lambda device: {**right["versions"](device), "torch": "1.0"}
    else:
        assert fault == "none"
    return kept


def measured(
    folder: str, *, fault: str, on_rank: int, timeout_seconds: int = 30
) -> tuple[list[Any], str | None, float]:
    """Preflight on the ranks of a pool: its bad rows, or what it raised; and its seconds."""
    import torch
    import torch.distributed as dist

    from nmar_ds.acceptance.judgement import Limits
    from nmar_ds.errors import PeerLostError
    from nmar_ds.training import preflight
    from nmar_ds.training.ranks import discover_ranks

    # Both ranks need not be one node, so that each is judged alone.
    ranks = dataclasses.replace(discover_ranks(os.environ), local_world_size=1)
    os.environ["TORCHELASTIC_RESTART_COUNT"] = folder  # a place of its own for each call
    kept = plant(fault if dist.get_rank() == on_rank else "none")
    if dist.get_rank() != on_rank:
        preflight.node_name = lambda: "good-host"
    try:
        report = preflight.run_preflight(
            ranks, torch.device("cpu"), output=Path(folder), dtype=torch.float32,
            checkpoint_bytes=1000, limits=Limits(slow_factor=5, slow_link_factor=50),
            timeout_seconds=timeout_seconds,
        )  # fmt: skip
        return [row for row in report.rows if row.verdict == "bad"], None, report.seconds
    except (PeerLostError, RuntimeError) as error:
        return [], str(error), 0.0
    finally:
        for place, name, value in kept:
            setattr(place, name, value)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    from launcher import preflight as launched

    if os.environ.get("RANK", os.environ.get("SLURM_PROCID")) == os.environ["FAULT_RANK"]:
        plant(os.environ["FAULT"])
    code = launched.main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
