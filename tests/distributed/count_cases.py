"""Collectives of a micro-batch, by name, whatever this rank trains on."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from nmar_ds.acceptance.step import tiny_run
from nmar_ds.model.training_model import MicroBatchLoss
from nmar_ds.training.loop import forward_arguments

NAMES = ("all_gather_into_tensor", "all_gather", "reduce_scatter_tensor", "reduce_scatter",
         "all_reduce", "broadcast", "barrier", "reduce", "gather", "scatter", "send", "recv",
         "all_to_all", "all_to_all_single")  # fmt: skip
MESSAGES = ("isend", "irecv")  # torch's, not through DeepSpeed


def collectives(*, idle_rank: int | None = None, num_micro_batches: int = 6) -> dict[str, Any]:
    """Train on the same rows; count what goes over the network in each micro-batch. Collective.

    Args:
        idle_rank: trains on nothing, as a rank does whose rows are filler.
        num_micro_batches: all of one step, so that no optimizer step lies between them.
    """
    from deepspeed.comm import comm

    tiny = tiny_run(tied=False, global_rows=2 * num_micro_batches, num_traces=200)
    weights = np.array([0.0, 1.0, 0.0, 1.0, 1.0]) * (dist.get_rank() != idle_rank)
    seen: Counter[str] = Counter()

    def counting(name: str, plain: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen[name] += 1
            return plain(*args, **kwargs)

        return call

    counts, losses = [], []
    with contextlib.ExitStack() as counted:
        for place, names in ((comm.cdb, NAMES), (dist, MESSAGES)):
            for name in names:
                if hasattr(place, name):
                    call = counting(name, getattr(place, name))
                    counted.enter_context(mock.patch.object(place, name, call))
        tiny.engine.train()
        for batch in tiny.loader.batches_of_step(0)[: num_micro_batches - 1]:
            seen.clear()
            arguments = forward_arguments(batch, weights, tiny.engine.device)
            result: MicroBatchLoss = tiny.engine(**arguments)
            tiny.engine.backward(result.loss_sum)
            tiny.engine.step()
            counts.append(dict(seen))
            losses.append(float(result.loss_sum.detach()))
    return {"counts": counts, "losses": losses}


def last_gradients() -> dict[str, Any]:
    """One clipped step; what the optimizer was given as gradients, and their norm. Collective."""
    tiny = tiny_run(tied=False, global_rows=2, num_traces=200)
    tiny.engine.train()
    zero = tiny.engine._engine.optimizer
    buffer = zero.grad_partitions_flat_buffer.untyped_storage()
    flat, blocks = [], [0]
    flatten, double = zero.flatten, torch.Tensor.double

    def watched_flatten(parts: Any) -> torch.Tensor:
        made: torch.Tensor = flatten(parts)
        flat.append(made.untyped_storage().data_ptr() == buffer.data_ptr())
        assert torch.equal(made, torch.cat([part.reshape(-1) for part in parts]))
        return made

    def watched_double(tensor: torch.Tensor) -> torch.Tensor:
        blocks.append(tensor.numel())
        return double(tensor)

    batch = tiny.loader.batches_of_step(0)[0]
    weights = np.array([0.0, 1.0, 0.0, 1.0, 1.0])
    result: MicroBatchLoss = tiny.engine(**forward_arguments(batch, weights, tiny.engine.device))
    tiny.engine.backward(result.loss_sum)
    squares = sum(float(g.double().square().sum()) for g in tiny.engine.full_gradients().values())
    before = tiny.engine.full_weights()
    with mock.patch.object(torch.Tensor, "double", watched_double):
        zero.flatten = watched_flatten
        tiny.engine.step()
    after = tiny.engine.full_weights()
    return {
        "flat": flat, "norm": tiny.engine.gradient_norm(), "norm of all": squares**0.5,
        "largest norm block": max(blocks),
        "moved": max(float((after[name] - before[name]).abs().max()) for name in after),
    }  # fmt: skip


def sums_beside_gloo() -> dict[str, Any]:
    """DeepSpeed's sums of gradients beside torch's own reduce-scatter, bit for bit. Collective."""
    from deepspeed.runtime.comm import coalesced_collectives

    rank, world_size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    equal = []
    for dtype in (torch.float32, torch.bfloat16):
        for sizes in ([6], [7], [1, 1, 1], [40_000, 3, 1001]):  # odd ones are padded
            tensors = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
            expected = []
            for tensor in tensors:
                whole = torch.zeros(-(-len(tensor) // world_size) * world_size, dtype=dtype)
                whole[: len(tensor)] = tensor / world_size
                part = torch.empty(len(whole) // world_size, dtype=dtype)
                dist.reduce_scatter_tensor(part, whole)
                expected.append(part[: max(0, len(tensor) - rank * len(part))])
            found = coalesced_collectives.reduce_scatter_coalesced(tensors)
            equal.append(all(torch.equal(*pair) for pair in zip(found, expected, strict=True)))
    return {"equal": equal}


def gathers_beside_gloo() -> dict[str, Any]:
    """DeepSpeed's gathers of weights beside torch's own, several on their way. Collective."""
    from deepspeed.runtime.zero import partition_parameters

    rank, world_size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    waiting, expected = [], []
    for dtype in (torch.float32, torch.bfloat16):
        for size in (1, 7, 100_003, 3):
            part = torch.randn(size, generator=generator).to(dtype)
            whole, gathered = (torch.full((world_size * size,), 7.0, dtype=dtype) for _ in "12")
            dist.all_gather_into_tensor(gathered, part)
            expected.append(gathered)
            if size == 7:  # it may lie in its place already
                part = whole.narrow(0, rank * size, size).copy_(part)
            handle = partition_parameters._dist_allgather_fn(part, whole, dist.group.WORLD)
            waiting.append((handle, whole))
    for handle, _ in waiting:
        handle.wait()
    pairs = zip(waiting, expected, strict=True)
    return {"equal": [torch.equal(found, one) for (_, found), one in pairs]}
