"""The phases of the self-test, one after the other, on the ranks of one process group."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nmar_ds import __version__
from nmar_ds.acceptance.bandwidth import check_bandwidth
from nmar_ds.acceptance.judgement import Limits
from nmar_ds.acceptance.proofs import check_exactness, check_isolation
from nmar_ds.acceptance.resume import check_resume
from nmar_ds.acceptance.verdict import Line, PhaseResult, died
from nmar_ds.errors import NmarError
from nmar_ds.training.engine import ProcessPeers, naming_lost_peers
from nmar_ds.training.preflight import node_name, run_preflight, write_report
from nmar_ds.training.ranks import Ranks

# Of the tiny model; its checkpoints take some 200 kilobytes.
CHECKPOINT_BYTES = 2**20


def run_phases(
    phases: Sequence[str],
    ranks: Ranks,
    device: torch.device,
    *,
    output: Path,
    dtype: str,
    min_bandwidth: float,
    timeout_seconds: int,
) -> bool:
    """Run phases and leave a result of each under `output`. Collective.

    A phase that ends with an error on any rank ends the self-test: the ranks may no longer be at
    one place. Its result, and that the later ones did not run, are written all the same.

    Args:
        phases: some of `verdict.PHASES`.
        ranks: this process among its peers; the process group is up.
        device: of this rank.
        output: folder that all ranks share.
        dtype: `float32` or `bfloat16`, of the timed matmul and of the training that is killed.
        min_bandwidth: GB/s asked of links and collectives.
        timeout_seconds: longest wait for a silent rank.

    Returns:
        Whether every phase came to its end. What it found is in its result.
    """
    peers = ProcessPeers()
    facts = _facts(peers, device)

    def preflight() -> list[Line]:
        limits = Limits.of_device(device.type)
        report = run_preflight(
            ranks, device, output=output, dtype=getattr(torch, dtype),
            checkpoint_bytes=CHECKPOINT_BYTES, limits=limits, timeout_seconds=timeout_seconds,
        )  # fmt: skip
        if peers.rank == 0:
            print(report.table(), flush=True)
            write_report(report, output)
        return [
            Line(check=f"{row.check} of {row.node}", passed=False, seen=row.value,
                 expected=row.expected, advice=row.advice)
            for row in report.bad
        ] or [Line(check="all nodes", passed=True, seen=f"{len(report.rows)} checks good",
                   expected="no bad node")]  # fmt: skip

    def resume() -> list[Line]:
        folder = output / "resume"
        if peers.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        lines = check_resume(peers, folder, dtype=dtype, timeout=timeout_seconds)
        if peers.rank == 0 and all(line.passed for line in lines):
            shutil.rmtree(folder, ignore_errors=True)  # logs and checkpoints of a failure stay
        return lines

    todo: dict[str, Callable[[], list[Line]]] = {
        "preflight": preflight,
        "isolation": lambda: check_isolation(peers),
        "exactness": lambda: check_exactness(peers, device),
        "resume": resume,
        "bandwidth": lambda: check_bandwidth(peers, device, min_bandwidth=min_bandwidth),
    }
    for number, phase in enumerate(phases):
        started = time.monotonic()
        try:
            with naming_lost_peers():
                lines = todo[phase]()
        # Whatever ends a phase is a verdict on it: a driver's error has no type to wait for.
        except Exception as error:
            why = f"{type(error).__name__}: {error}" if not isinstance(error, NmarError) else error
            _save(peers, output, died(phase, " ".join(f"{why}".split()), _since(started)))
            for later in phases[number + 1 :]:
                _save(peers, output, died(later, f"{phase} ended the self-test", 0.0))
            print(f"rank {peers.rank}: {phase}: {why}", flush=True)
            return False
        result = PhaseResult(phase=phase, lines=lines, seconds=_since(started), facts=facts)
        _save(peers, output, result)
        if peers.rank == 0:
            verdict = "passed" if result.passed else "FAILED"
            print(f"{phase:<10}{verdict} in {result.seconds:.0f} s", flush=True)
    return True


def _since(started: float) -> float:
    return round(time.monotonic() - started, 2)


def _save(peers: ProcessPeers, output: Path, result: PhaseResult) -> None:
    if peers.rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        result.save(output)


def _facts(peers: ProcessPeers, device: torch.device) -> dict[str, Any]:
    """The head of the page."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    everyone = peers.gather((node_name(), name or platform.machine()))
    nodes = list(dict.fromkeys(node for node, _ in everyone))
    kinds = list(dict.fromkeys(kind for _, kind in everyone))
    packages = ("torch", "deepspeed", "transformers")
    versions = [f"nmar_ds {__version__}", f"python {platform.python_version()}"]
    versions += [f"{package} {importlib.metadata.version(package)}" for package in packages]
    if device.type == "cuda":
        versions.append(f"cuda {torch.version.cuda}")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "nodes": f"{len(nodes)}: {', '.join(nodes[:16])}{' ...' if len(nodes) > 16 else ''}",
        "ranks": f"{peers.world_size} on {device.type}: {', '.join(kinds)}",
        "versions": ", ".join(versions),
    }
