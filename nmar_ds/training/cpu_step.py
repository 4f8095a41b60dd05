"""What a step on CPUs need not do: clear memory it had a moment ago, copy or send tensors twice.

DeepSpeed's optimizer moves gradients as suits a GPU, whose memory is a hundred times as fast. On
a CPU a pass over the gradients of a small model is some percent of its step, and one through fresh
memory several times that (docs/speed.md).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from nmar_ds.training.estimate import NORM_BLOCK


def keep_freed_memory() -> None:
    """Tell glibc to use freed blocks again rather than give them back to the kernel at once.

    A step frees its activations and asks for them again; memory that the kernel has to clear in
    between costs a small model's step some percent. Other C libraries are left as they are. At
    most 2 GB at the heap's end stay with the process.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return
    trim_threshold, mmap_threshold = -1, -3  # their names in malloc.h
    # Before its version 2.35 glibc takes 32 MB at most. Setting the other one alone would fix this
    # one at 128 kB, which is worse than nothing.
    if set_option(mmap_threshold, 1 << 30) or set_option(mmap_threshold, 1 << 25):
        set_option(trim_threshold, 2**31 - 1)


def take_norms_in_blocks(zero: Any) -> None:
    """Let DeepSpeed's optimizer find the gradient's 2-norm without a copy in float64.

    It converts each partition as a whole, which costs a CPU more than the optimizer's own step.
    The norm of the blocks' norms is the same one, up to float64's rounding.
    """
    whole = zero.get_grad_norm_direct

    def in_blocks(gradients: Sequence[torch.Tensor], params: Any, norm_type: float = 2) -> Any:
        assert norm_type == 2, "the configuration clips by the 2-norm alone"
        norms = [
            [block.double().norm() for block in torch.split(part.reshape(-1), NORM_BLOCK)]
            for part in gradients
        ]
        return whole([torch.stack(blocks) for blocks in norms], params, norm_type)

    zero.get_grad_norm_direct = in_blocks


def flatten_in_place(zero: Any) -> None:
    """Let DeepSpeed's optimizer read a sub-group's gradients where they lie.

    They are neighbours in one buffer, which the next step's first backward overwrites; copying them
    out takes a step's time and as much memory as they have.
    """
    copied = zero.flatten

    def in_place(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        buffer, end = tensors[0].untyped_storage().data_ptr(), tensors[0].data_ptr()
        for part in tensors:
            inside = part.untyped_storage().data_ptr() == buffer and part.is_contiguous()
            if part.data_ptr() != end or not inside:
                flat: torch.Tensor = copied(tensors)
                return flat
            end += part.nbytes
        total = sum(part.numel() for part in tensors)
        return tensors[0].as_strided((total,), (1,))

    zero.flatten = in_place


def sum_gradients_by_exchange(coalesced_collectives: Any, comm: Any) -> None:
    """Let DeepSpeed's module of that name sum gradients over gloo with half the traffic.

    gloo has no reduce-scatter: torch reduces the whole buffer on every rank, in a copy, and drops
    what belongs to others. Here every rank is sent its own part alone and adds up what came, in
    order of rank.
    """

    def exchange(whole: torch.Tensor, part: torch.Tensor, group: Any = None) -> None:
        world_size = comm.get_world_size(group)
        if world_size == 1 and part.data_ptr() == whole.data_ptr():
            return  # it is its own sum
        received = torch.empty_like(whole)
        comm.all_to_all_single(received, whole, group=group)
        torch.sum(received.view(world_size, -1), dim=0, out=part)

    coalesced_collectives._torch_reduce_scatter_fn = exchange


def gather_weights_by_exchange(partition_parameters: Any, distributed: Any) -> None:
    """Let DeepSpeed's module of that name gather weights over gloo in a third of the time.

    Each rank sends its part to every other, straight from where it lies to where it belongs.
    gloo's own all-gather moves the same bytes through buffers and threads of its own.
    """

    def exchange(part: torch.Tensor, whole: torch.Tensor, group: Any = None) -> _Sent:
        world_size, own = distributed.get_world_size(group), distributed.get_rank(group)
        parts = whole.view(world_size, -1)
        if parts[own].data_ptr() != part.data_ptr():
            parts[own].copy_(part)
        works = []
        for distance in range(1, world_size):
            before, after = (own - distance) % world_size, (own + distance) % world_size
            works.append(distributed.irecv(parts[before], group=group, group_src=before))
            works.append(distributed.isend(parts[own], group=group, group_dst=after))
        return _Sent(works)

    partition_parameters._dist_allgather_fn = exchange


class _Sent:
    """Some messages on their way, as one."""

    def __init__(self, works: Sequence[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()
