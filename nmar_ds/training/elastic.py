"""A run saved by W ranks goes on under W' ranks: each takes its slices of everybody's state.

Nothing is converted on disk. Every new rank reads, of each parameter, the elements that are its own
now (see `partitions`), straight into the fp32 weights that DeepSpeed has laid out for it, and the
same elements of the optimizer's moments; what pads the last part is zero. The checkpoint stays as
it is, and the next save is one of W' ranks.

Random numbers: a rank's generator has no heir when the ranks are others, so each rank starts a new
one from the run's seed, the step, the number of ranks and its own. Row order and the first weights
never depend on it; dropout does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nmar_ds.errors import CheckpointError
from nmar_ds.training.partitions import WEIGHT, SavedPartitions


@dataclass(frozen=True, slots=True)
class SubGroup:
    """Parameters that DeepSpeed keeps as one flat tensor on this rank.

    Attributes:
        parameters: (name, elements of the whole parameter), in order.
        weights: this rank's fp32 weights; they are overwritten.
        param_group: index of the optimizer's group that it belongs to.
    """

    parameters: Sequence[tuple[str, int]]
    weights: torch.Tensor
    param_group: int


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of everything a rank holds.

    Attributes:
        rank: of `world_size`.
        world_size: ranks now.
    """

    rank: int
    world_size: int

    def of(self, numel: int) -> tuple[int, int, int]:
        """Its elements [start, stop) of a parameter, and the length of its padded part."""
        part = -(-numel // self.world_size)
        start = min(self.rank * part, numel)
        return start, min(start + part, numel), part


def reslice(saved: SavedPartitions, groups: Sequence[SubGroup], share: Share) -> dict[str, Any]:
    """This rank's optimizer state, as DeepSpeed would have saved it with as many ranks.

    Args:
        saved: the checkpoint.
        groups: what this rank holds now.
        share: of this rank.

    Raises:
        CheckpointError: the checkpoint is of other parameters, or its parts do not fit.
    """
    _check_names(saved, groups)
    state = {}
    for index, group in enumerate(groups):
        names = [name for name, _ in group.parameters]
        kinds, scalars = saved.kinds(names[0]), saved.scalars(names[0])
        for name in names[1:]:
            if saved.kinds(name) != kinds or saved.scalars(name) != scalars:
                raise CheckpointError(
                    f"{saved.folder}: {names[0]} and {name} are at different steps or of "
                    "different optimizers, expected one"
                )
        fill(saved, WEIGHT, group.parameters, group.weights.data, share)
        moments = {kind: torch.zeros_like(group.weights.data) for kind in kinds if kind != WEIGHT}
        for kind, flat in moments.items():
            fill(saved, kind, group.parameters, flat, share)
        if kept := {**scalars, **moments}:
            state[index] = kept
    members = [
        [index for index, group in enumerate(groups) if group.param_group == number]
        for number in range(len(saved.param_groups))
    ]
    optimizer = {
        "state": state,
        "param_groups": [
            {**settings, "params": mine}
            for settings, mine in zip(saved.param_groups, members, strict=True)
        ],
    }
    return {
        **saved.optimizer_header(),
        "partition_count": share.world_size,
        "optimizer_state_dict": optimizer,
        "fp32_flat_groups": [group.weights for group in groups],
    }


def frozen_fragments(saved: SavedPartitions, share: Share) -> dict[str, torch.Tensor]:
    """This rank's parts of the parameters that no optimizer moves."""
    fragments = {}
    for name in sorted(saved.frozen):
        numel = saved.numel(name)
        fragments[name] = torch.zeros(share.of(numel)[2], dtype=saved.dtype(name))
        fill(saved, WEIGHT, [(name, numel)], fragments[name], share)
    return fragments


def fill(
    saved: SavedPartitions,
    kind: str,
    parameters: Sequence[tuple[str, int]],
    flat: torch.Tensor,
    share: Share,
) -> None:
    """Write a rank's parts of some parameters end to end into a flat tensor, padding as zeros."""
    at = 0
    for name, numel in parameters:
        start, stop, part = share.of(numel)
        for first, piece in saved.pieces(name, kind, start, stop):
            place = at + first - start
            flat[place : place + len(piece)].copy_(piece)
        flat[at + stop - start : at + part].zero_()
        at += part
    if at != len(flat):
        raise CheckpointError(
            f"{saved.folder}: this rank's parts are {at} elements, expected {len(flat)}"
        )


def seed_of(seed: int, step: int, rank: int, world_size: int) -> int:
    """Of a rank's random numbers after a change of the number of ranks."""
    text = f"resumed {seed} {step} {rank} {world_size}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


def _check_names(saved: SavedPartitions, groups: Sequence[SubGroup]) -> None:
    """Whether the checkpoint's trained parameters are those of this run, with their sizes."""
    stored = {name: saved.numel(name) for name in saved.shapes if name not in saved.frozen}
    wanted = {name: numel for group in groups for name, numel in group.parameters}
    differing = sorted(n for n in stored.keys() | wanted if stored.get(n) != wanted.get(n))
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{saved.folder}: {name}: has {stored.get(name, 'no')} elements, expected "
            f"{wanted.get(name, 'none')} ({len(differing)} such parameters)"
        )
