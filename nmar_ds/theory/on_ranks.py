"""The identities again under real ZeRO-3: two ranks (gloo), two accumulation steps, fp32.

What each rank runs is the self-test's own step and reference (`nmar_ds.acceptance`), so its model
is that tiny random one: DeepSpeed partitions no float64.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from nmar_ds.errors import LaunchError, NmarError
from nmar_ds.training.outcome import end_process
from nmar_ds.training.ranks import complete_environment, discover_ranks

NUM_RANKS = 2


def figures_under_zero3(peers: Any) -> dict[str, Any]:
    """Relative residuals of (a) and (b), `apart`, and what they were taken on. Collective."""
    from nmar_ds.acceptance import proofs, step

    same, differ = proofs.same_term_figures(peers), proofs.safety_gap_figures(peers)
    micro = step.tiny_run(**proofs.size_of(peers.world_size)).loader.accumulation_steps
    return {
        "ranks": peers.world_size,
        "micro_batches": micro,
        "apart": differ.pop("apart"),
        "gaps": {
            **{f"(a) {name}": seen for name, seen in same.items()},
            **{f"(b) {name}": seen for name, seen in differ.items()},
        },
    }


def start(output: Path, *, timeout_seconds: int) -> dict[str, Any]:
    """Start two ranks on this machine, on a free port, and wait for their figures.

    Raises:
        LaunchError: they failed, or took too long; the last line they wrote is in it.
    """
    file, log = output / "zero3.ranks.json", output / "zero3.log"
    file.unlink(missing_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={NUM_RANKS}",
        "--master_addr=127.0.0.1", f"--master_port={port}", "-m", __name__, str(file),
        str(timeout_seconds),
    ]  # fmt: skip
    environment = {
        **{name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCHER},
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    with log.open("wb") as written:
        process = subprocess.Popen(command, stdout=written, stderr=written, env=environment)
        try:
            code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                _kill_tree(process.pid)
                process.wait()
    if code is None:
        raise LaunchError(f"{log}: two ranks took over {timeout_seconds} s (timeout_seconds)")
    if code != 0 or not file.exists():
        raise LaunchError(f"{log}: two ranks ended with code {code}: read it")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    return found


def _kill_tree(pid: int) -> None:
    """The launcher first, so that it starts nothing anew; its ranks have sessions of their own."""
    launcher = psutil.Process(pid)
    launcher.suspend()
    until = time.monotonic() + 5
    while launcher.status() != psutil.STATUS_STOPPED and time.monotonic() < until:
        time.sleep(0.01)
    below = launcher.children(recursive=True)
    for each in (launcher, *below):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(below, timeout=10)


_OF_A_LAUNCHER = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
    "MASTER_PORT",
)  # fmt: skip


def _rank(file: Path, timeout_seconds: int) -> int:
    """One rank's work; its exit code."""
    ranks = discover_ranks(os.environ)
    complete_environment(os.environ, ranks)
    from nmar_ds.training import engine

    try:
        engine.start_process_group(ranks, timeout_seconds=timeout_seconds)
        found = figures_under_zero3(engine.ProcessPeers())
    except NmarError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    if ranks.rank == 0:
        file.write_text(json.dumps(found), encoding="utf-8")
    engine.close_process_group()
    return 0


if __name__ == "__main__":
    end_process(_rank(Path(sys.argv[1]), int(sys.argv[2])))
