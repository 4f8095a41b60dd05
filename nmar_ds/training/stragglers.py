"""Which rank is slow.

ZeRO-3's ranks wait for each other in every layer, so their steps take equally long whoever is slow.
Told apart they are by a fixed piece of local arithmetic, timed at each logged step: it shows a
throttled GPU or a CPU that others use, not a slow network or disk. Cost: some milliseconds on a
CPU, about one on a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

FACTOR = 2.0  # times the median
PATIENCE = 10  # logged steps in a row


def probe_seconds(device: torch.device) -> float:
    """Best of three products of two matrices. Waits for a GPU, so never inside a step."""
    on_gpu = device.type == "cuda"
    size, dtype = (4096, torch.bfloat16) if on_gpu else (256, torch.float32)
    matrix = torch.ones(size, size, device=device, dtype=dtype)  # draws no random numbers
    seconds = []
    for _ in range(3):
        if on_gpu:
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        matrix @ matrix
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


class Stragglers:
    """Remembers for how many logged steps in a row each rank has been slow."""

    def __init__(self) -> None:
        self._in_a_row: dict[int, int] = {}

    def note(self, seconds: Sequence[float]) -> list[tuple[int, float]]:
        """Count one logged step.

        Args:
            seconds: of each rank, in order of rank.

        Returns:
            Ranks that have now been slow PATIENCE times in a row (and again after as many more),
            with how many times the median they took.
        """
        # The lower median: of two ranks, the slow one must not be half of what it is compared with.
        median = statistics.median_low(seconds)
        found = []
        for rank, own in enumerate(seconds):
            slow = own >= FACTOR * median > 0
            self._in_a_row[rank] = self._in_a_row.get(rank, 0) + 1 if slow else 0
            if slow and self._in_a_row[rank] % PATIENCE == 0:
                found.append((rank, own / median))
        return found
