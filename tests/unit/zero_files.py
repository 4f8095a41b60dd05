"""ZeRO-3's checkpoint files as DeepSpeed 0.19 lays them out, written without DeepSpeed's engine.

The cutting here is the test's own: pad the flattened parameter to a multiple of the ranks, `chunk`.
tests/distributed/test_reslice.py compares with files that DeepSpeed itself has written.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nmar_ds.training import checkpoints
from nmar_ds.training import engine as _engine  # noqa: F401 (chooses DeepSpeed's accelerator)

State = dict[str, torch.Tensor]  # a whole tensor per kind: weight, exp_avg, ...


@dataclass
class Model:
    """What a checkpoint is made of.

    Attributes:
        groups: per optimizer group, parameters by name, each with a tensor per kind.
        frozen: parameters that no optimizer moves.
        buffers: persistent ones.
        shared: further names of tied parameters.
        scalars: of the optimizer, the same for all: its step.
        dtype: of the model.
    """

    groups: list[dict[str, State]]
    frozen: dict[str, torch.Tensor] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


def part_of(tensor: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """A rank's part of a parameter; the padding is rubbish, as it may be."""
    flat = tensor.flatten()
    padding = torch.full((-len(flat) % world_size,), 77.0, dtype=tensor.dtype)
    return torch.cat([flat, padding]).chunk(world_size)[rank].clone()


def sub_groups(group: dict[str, State], world_size: int, most: int) -> list[dict[str, State]]:
    """DeepSpeed's: a sub-group is closed once it has `most` elements on a rank."""
    found: list[dict[str, State]] = [{}]
    size = 0
    for name, state in group.items():
        found[-1][name] = state
        size += -(-state["weight"].numel() // world_size)
        if size >= most:
            found.append({})
            size = 0
    return [sub_group for sub_group in found if sub_group]


class ThreadPeers:
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, barrier: threading.Barrier, slots: list[Any]) -> None:
        self.rank, self.world_size = rank, len(slots)
        self._barrier, self._slots = barrier, slots

    def gather(self, value: Any) -> list[Any]:
        self._slots[self.rank] = value
        self._barrier.wait()
        found = list(self._slots)
        self._barrier.wait()
        return found

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]


def write_checkpoint(
    folder: Path, model: Model, world_size: int, *, most: int = 10**9, step: int = 3, **facts: Any
) -> checkpoints.Found:
    """Publish it at `folder/step-...` as `world_size` ranks would have; `most`: see `sub_groups`."""
    barrier, slots = threading.Barrier(world_size, timeout=60), [None] * world_size
    subs = [sub_groups(group, world_size, most) for group in model.groups]

    def publish(rank: int) -> Path:
        def write(place: Path, tag: str) -> None:
            name = f"zero_pp_rank_{rank}_mp_rank_00"
            prefix = "bf16_" if model.dtype == torch.bfloat16 else ""
            zero = optimizer_file(model, subs, rank, world_size)
            torch.save(zero, place / tag / f"{prefix}{name}_optim_states.pt")
            header = model_file(model, subs, rank, world_size) | {"global_steps": step}
            torch.save(header, place / tag / f"{name}_model_states.pt")

        return checkpoints.publish(
            write, folder, step=step, facts={"world_size": world_size, **facts},
            peers=ThreadPeers(rank, barrier, slots), keep=2, verified=set(),
        )  # fmt: skip

    with ThreadPoolExecutor(world_size) as pool:
        final = next(iter(pool.map(publish, range(world_size))))
    return checkpoints.Found(folder=final, manifest=checkpoints.verify(final))


def optimizer_file(
    model: Model, subs: list[list[dict[str, State]]], rank: int, world_size: int
) -> dict[str, Any]:
    """`*_optim_states.pt` of a rank."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    def joined(sub: dict[str, State], kind: str) -> torch.Tensor:
        return torch.cat([part_of(state[kind], rank, world_size) for state in sub.values()])

    flat = [sub for group in subs for sub in group]
    params, at = [], 0
    for group in subs:
        params.append({"lr": 0.1, "weight_decay": 0.0, "params": list(range(at, at + len(group)))})
        at += len(group)
    kinds = [kind for kind in next(iter(flat[0].values())) if kind != "weight"]
    kept = [{kind: joined(sub, kind) for kind in kinds} | model.scalars for sub in flat]
    state = {
        "zero_stage": ZeroStageEnum.weights, "loss_scaler": LossScaler(1.0),
        "dynamic_loss_scale": False, "overflow": False, "partition_count": world_size,
        "optimizer_state_dict": {
            "state": {index: each for index, each in enumerate(kept) if each},
            "param_groups": params,
        },
        "fp32_flat_groups": [torch.nn.Parameter(joined(sub, "weight")) for sub in flat],
    }  # fmt: skip
    return {"optimizer_state_dict": state, "ds_config": {}, "ds_version": "0.19"}


def model_file(
    model: Model, subs: list[list[dict[str, State]]], rank: int, world_size: int
) -> dict[str, Any]:
    """`*_model_states.pt` of a rank."""
    flat = [sub for group in subs for sub in group]
    names = [*(name for sub in flat for name in sub), *model.frozen, *model.shared]
    return {
        "module": {name: torch.empty(0, dtype=model.dtype) for name in names} | model.buffers,
        "buffer_names": list(model.buffers),
        "param_shapes": [{n: state["weight"].shape for n, state in sub.items()} for sub in flat],
        "frozen_param_shapes": {n: value.shape for n, value in model.frozen.items()},
        "frozen_param_fragments": {
            n: part_of(value, rank, world_size) for n, value in model.frozen.items()
        },
        "shared_params": model.shared if rank == 0 else {},
        "dp_world_size": world_size, "mp_world_size": 1, "global_samples": 12, "skipped_steps": 0,
        "ds_version": "0.19", "nmar": {"torch": torch.get_rng_state()},
    }  # fmt: skip
