"""Every preset takes real ZeRO-3 steps on two ranks, at its true width, with one layer.

`make test-presets`, one preset at a time: about 30 bytes a weight over both ranks, so 3 to 16 GB.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest
from pool import RankPool
from wide_cases import VOCAB, wide_config, wide_keys, wide_steps

from nmar_ds.model.architecture import architecture_of
from nmar_ds.training.estimate import memory_of

# One layer at true width, embedding and head of 4,096 rows, and the last norm.
WEIGHTS = {
    "llama3_1b": 69_212_160,
    "llama3_8b": 251_670_528,
    "qwen3_32b": 529_546_496,
    "llama3_70b": 394_289_152,
}
BYTES_PER_WEIGHT = 30  # over both ranks: 18 of state, 2 of hpZ, gathered weights and gradients
BYTES_PER_RANK = 5 * 10**8  # whatever the model: libraries, buckets, what the allocator keeps
SPARE = 10**9


@contextmanager
def guarded(pool: RankPool) -> Iterator[None]:
    """End the ranks, rather than another program of this machine, where memory runs out."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            if psutil.virtual_memory().available < SPARE:
                for process in pool._processes:
                    process.kill()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_preset_takes_a_step_at_its_true_width(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    shape = architecture_of(wide_keys(name), rows=VOCAB, place=name)
    assert shape.num_weights == WEIGHTS[name]
    most = BYTES_PER_WEIGHT * shape.num_weights + 2 * BYTES_PER_RANK
    free = psutil.virtual_memory().available - SPARE
    assert free >= most, f"{free:,} bytes are free, {name} needs {most:,}"
    pool = RankPool(2)
    try:
        with guarded(pool):
            ranks = pool.run(wide_steps, name, timeout=900)
    finally:
        pool.close()
    expected = memory_of(wide_config(name), shape, world_size=2)
    peak = sum(rank["peak"] for rank in ranks)
    record_property("bytes_per_weight", round(peak / shape.num_weights, 1))
    print(f"\n{name}: {shape.num_weights:,} weights, {peak / 1e9:.1f} GB at most on two ranks, "
          f"{peak / shape.num_weights:.1f} bytes a weight; losses {ranks[0]['losses']}")  # fmt: skip
    for rank in ranks:
        assert sorted(rank["numel"]) == sorted(
            numel for numel, count in shape.parameters() for _ in range(count)
        )
        first, second = rank["losses"]
        # A random model guesses: logits of variance 0.02^2 a hidden unit.
        assert first == pytest.approx(math.log(VOCAB) + 0.02**2 * shape.hidden / 2, abs=0.4)
        assert second < first - 0.1, "the step was no use"
        assert rank["applied"] and 0 < rank["norm"] < math.inf
        assert rank["bytes"]["gradients"] == expected.gradients
        assert rank["bytes"]["optimizer"] == expected.optimizer
        # Second copies are dropped by a step, and this is after one.
        assert rank["copies"] == 0 and rank["bytes"]["weights"] == expected.weights
    assert peak < most
