"""What the ranks of a pool run for test_reslice.py: train a little and save, or re-slice and look."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import groups, safe_get_full_optimizer_state

from nmar_ds.acceptance import step as core
from nmar_ds.training import checkpoints
from nmar_ds.training.engine import ProcessPeers, all_reduce
from nmar_ds.training.loop import TrainingLoop
from nmar_ds.training.partitions import SavedPartitions

SUB_GROUP = 1500  # elements on a rank: several sub-groups, others on another number of ranks


def _tiny(*, optimizer: str, spread: bool = False, **run: Any) -> core.TinyRun:
    """With `spread`, the optimizer lives in host memory and a node keeps weights of its own."""
    plain = core.settings
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # a process makes one; a pool runs several

    def changed(*args: Any, **kwargs: Any) -> Any:
        config, settings = plain(*args, **kwargs)
        section = config.optimizer.model_copy(update={"name": optimizer})
        settings["zero_optimization"]["sub_group_size"] = SUB_GROUP
        if spread:
            settings["zero_force_ds_cpu_optimizer"] = False
            settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
            settings["zero_optimization"]["zero_hpz_partition_size"] = dist.get_world_size()
        return config.model_copy(update={"optimizer": section}), settings

    with mock.patch.object(core, "settings", changed):
        return core.tiny_run(learning_rate=0.01, **run)


def _state(engine: Any, optimizer: str) -> dict[str, Any]:
    """Everything that training goes on from, whole: fp32, low precision, moments, steps."""
    parameters = dict(engine.module.named_parameters())
    found = {f"fp32 {n}": v.numpy().copy() for n, v in engine.full_weights().items()}
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        for name, value in parameters.items():
            found[f"low {name}"] = value.detach().float().numpy().copy()
    for kind in ("exp_avg", "exp_avg_sq") if optimizer == "adamw" else ():
        for name, value in parameters.items():
            found[f"{kind} {name}"] = safe_get_full_optimizer_state(value, kind).numpy().copy()
    zero = engine._engine.optimizer
    kept = [zero.optimizer.state[flat] for flat in zero.fp32_partitioned_groups_flat]
    found["steps"] = [{k: float(v) for k, v in each.items() if k == "step"} for each in kept]
    found["sub-groups"] = len(zero.fp16_groups)
    found["counters"] = [engine._engine.global_steps, engine._engine.skipped_steps]
    return found


def _step(tiny: core.TinyRun, step: int) -> float:
    """One step of the real loop; the loss over all ranks."""
    loop = TrainingLoop(
        tiny.engine, tiny.loader, weights=np.array([0.0, 1.0, 0.0, 1.0, 1.0]),
        denominator_kind="common", optimizer=tiny.config.optimizer, training=tiny.config.training,
        total_steps=4, monitor=core.Quiet(), saver=core.Unsaved(), save_every=None,
        measure_heldout=dict, stop_requested=lambda: False,
    )  # type: ignore[arg-type] # fmt: skip
    tiny.engine.train()
    sums = loop.forward_backward(step, also_untrained=False)
    return float(all_reduce(torch.tensor([sums.loss], dtype=torch.float64)))


def train_and_save(folder: str, *, optimizer: str, **run: Any) -> dict[str, Any]:
    """Two steps, a checkpoint, and a third step to compare with."""
    tiny = _tiny(optimizer=optimizer, **run)
    for step in range(2):
        _step(tiny, step)
    state = _state(tiny.engine, optimizer)
    checkpoints.publish(
        lambda place, tag: tiny.engine.save_into(place, tag, {}), Path(folder), step=2,
        facts={"world_size": dist.get_world_size()}, peers=ProcessPeers(), keep=2, verified=set(),
    )  # fmt: skip
    return state | {"loss": _step(tiny, 2)}


def reslice(folder: str, *, optimizer: str, **run: Any) -> dict[str, Any]:
    """A fresh engine takes over what other ranks have saved; one step more."""
    tiny = _tiny(optimizer=optimizer, **run)
    place = Path(folder) / checkpoints.folder_name(2)
    with SavedPartitions(place, checkpoints.verify(place)) as saved:
        slices = tiny.engine.prepare_resliced(saved)
    tiny.engine.take_resliced(slices)
    return _state(tiny.engine, optimizer) | {"loss": _step(tiny, 2)}
