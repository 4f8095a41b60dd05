"""The three collectives that ZeRO-3 lives on: are their results right, and how fast are they?

Bandwidth is that of the bus, as NCCL's own tests define it (nccl-tests, doc/PERFORMANCE.md): the
bytes that each rank must move, whatever their number, per second.
"""

# W ranks, E elements per rank

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from nmar_ds.acceptance.verdict import Line
from nmar_ds.training.engine import ProcessPeers, all_reduce

SIZES = {"cpu": (2**16, 2**20, 2**24), "cuda": (2**20, 2**26, 2**29)}  # bytes
REPEATS = 5


def check_bandwidth(
    peers: ProcessPeers, device: torch.device, *, min_bandwidth: float
) -> list[Line]:
    """Time and check each collective at several sizes. Collective.

    Args:
        peers: the ranks.
        device: of this rank.
        min_bandwidth: GB/s that each must reach at its largest size; 0 asks for nothing.
    """
    lines = []
    for name, run in COLLECTIVES.items():
        figures, num_wrong, best = [], 0, 0.0
        for size in SIZES[device.type]:
            # The slowest rank's median, and all ranks' errors.
            measured = peers.gather(_measure(run, size, device))
            num_wrong += sum(wrong for wrong, _ in measured)
            seconds = max(seconds for _, seconds in measured)
            share = (peers.world_size - 1) / peers.world_size
            moved = size * share * (2 if name == "all-reduce" else 1)
            best = moved / seconds / 1e9
            figures.append(f"{size / 2**20:g} MiB {seconds * 1e3:.3g} ms {best:.3g} GB/s")
        asked = f", at least {min_bandwidth:g} GB/s at the largest size" if min_bandwidth else ""
        lines.append(
            Line(
                check=name,
                passed=num_wrong == 0 and best >= min_bandwidth,
                seen=(f"{num_wrong} wrong elements; " if num_wrong else "") + "; ".join(figures),
                expected=f"exact sums and parts{asked}",
                advice="the network or its library delivers wrong numbers, or is slower than "
                "asked: see preflight's links, NCCL_SOCKET_IFNAME, NCCL_IB_HCA",
            )
        )
    return lines


def _measure(
    run: Callable[[int, torch.device], int], size: int, device: torch.device
) -> tuple[int, float]:
    """Wrong elements on this rank, and the median seconds; buffers are made anew each time."""
    num_wrong, seconds = 0, []
    for _ in range(REPEATS + 1):
        dist.barrier()
        started = time.perf_counter()
        wrong = run(size, device)
        seconds.append(time.perf_counter() - started)
        num_wrong += wrong
    return num_wrong, statistics.median(seconds[1:])


def _all_reduce(size: int, device: torch.device) -> int:
    world = dist.get_world_size()
    total = all_reduce(torch.full((size // 4,), dist.get_rank() + 1.0, device=device))
    return int((total != world * (world + 1) / 2).sum())


def _all_gather(size: int, device: torch.device) -> int:
    world = dist.get_world_size()
    num = max(1, size // 4 // world)
    part = torch.full((num,), dist.get_rank() + 1.0, device=device)
    whole = torch.empty(num * world, device=device)
    dist.all_gather_into_tensor(whole, part)
    expected = torch.arange(1, world + 1, device=device, dtype=whole.dtype)
    return int((whole.view(world, num) != expected[:, None]).sum())


def _reduce_scatter(size: int, device: torch.device) -> int:
    world = dist.get_world_size()
    num = max(1, size // 4 // world)
    places = torch.arange(1, world + 1, device=device, dtype=torch.float32)
    whole = (places.repeat_interleave(num) + dist.get_rank()).contiguous()
    part = torch.empty(num, device=device)
    dist.reduce_scatter_tensor(part, whole)
    expected = world * (dist.get_rank() + 1.0) + world * (world - 1) / 2
    return int((part != expected).sum())


COLLECTIVES = {
    "all-reduce": _all_reduce,
    "all-gather": _all_gather,
    "reduce-scatter": _reduce_scatter,
}
