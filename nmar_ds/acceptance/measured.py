"""What a step really keeps: state and activations, counted on small models to check estimates."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np
import torch

from nmar_ds.acceptance.tiny import ListSource
from nmar_ds.config import ModelSection, RunConfig, deepspeed_config
from nmar_ds.data.loader import RowLoader, count_targets
from nmar_ds.data.packing import pack
from nmar_ds.model.loading import load_model
from nmar_ds.model.training_model import UndoTrainingModel
from nmar_ds.traces.schema import Role
from nmar_ds.training.engine import Engine, ProcessPeers, device_kind, make_optimizer
from nmar_ds.training.loop import forward_arguments

NO_IDS: dict[str, int | None] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
WEIGHTS = np.array([0.0, 1.0, 0.0, 1.0, 1.0])


def full_rows(
    num_rows: int, length: int, vocab: int, *, rank: int = 0, world_size: int = 1, micro_rows: int
) -> RowLoader:
    """One step of traces that fill a row each; all but the first token of each is trained."""
    rng = np.random.default_rng(0)
    traces = []
    for _ in range(num_rows):
        roles = np.full(length, Role.PREFIX, dtype=np.uint8)
        roles[0] = Role.PROMPT
        traces.append((rng.integers(0, vocab - 1, size=length).astype(np.int32), roles))
    source = ListSource(traces)
    plan = pack([length] * num_rows, length)
    return RowLoader(
        source, plan, count_targets(num_rows, source.roles), seed=1,
        global_batch_rows=num_rows, micro_batch_rows=micro_rows,
        rank=rank, world_size=world_size, pad_id=0,
    )  # fmt: skip


def saved_bytes(
    keys: dict[str, Any], *, vocab: int, rows: int, length: int, dtype: str, recompute: bool
) -> int:
    """Bytes that autograd holds after the forward of one micro-batch, each storage once.

    Parameters are not counted.
    """
    section = ModelSection.model_validate(
        {"config": keys, "dtype": dtype, "activation_checkpointing": recompute}
    )
    loaded = load_model(
        section, {}, tokenizer_size=vocab, undo_id=vocab - 1, ids=NO_IDS, seed=0, partition=False
    )
    model = UndoTrainingModel(loaded.model).train()
    batch = full_rows(rows, length, vocab, micro_rows=rows).batches_of_step(0)[0]
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in known:
            kept[address] = tensor  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**forward_arguments(batch, WEIGHTS, torch.device("cpu")))
    assert loss.loss_sum.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def small_engine(config: RunConfig, *, vocab: int) -> Engine:
    """The engine of a run whose model is `model.config` or a folder. Collective."""
    peers = ProcessPeers()
    settings = deepspeed_config(config, world_size=peers.world_size, device=device_kind())
    loaded = load_model(
        config.model, settings, tokenizer_size=vocab, undo_id=vocab - 1, ids=NO_IDS,
        seed=config.seed, peers=peers,
    )  # fmt: skip
    model = UndoTrainingModel(loaded.model)
    layers = sorted(loaded.model._no_split_modules or ()) if config.zero.gather_whole_layers else []
    offloaded = config.zero.offload_optimizer is not None
    optimizer = make_optimizer(model, config.optimizer, offloaded=offloaded)
    return Engine(model, settings, optimizer, whole_modules=layers)


def train_full_rows(
    engine: Engine, config: RunConfig, *, vocab: int, micro_batches: int
) -> list[float]:
    """Train on full rows for so many micro-batches; this rank's loss sums. Collective.

    To end amid a step shows what lies there while weights are at work: hpZ's second copies are
    dropped by each step and made again by the next forward and backward.
    """
    loader = full_rows(
        config.training.global_batch_rows, config.data.sequence_length, vocab,
        micro_rows=config.training.micro_batch_rows,
        rank=engine.rank, world_size=engine.world_size,
    )  # fmt: skip
    engine.train()
    losses = []
    batches = itertools.cycle(loader.batches_of_step(0))
    divisor = config.training.global_batch_rows * config.data.sequence_length
    for batch in itertools.islice(batches, micro_batches):
        result = engine(**forward_arguments(batch, WEIGHTS, engine.device))
        engine.backward(result.loss_sum * (engine.world_size / divisor))
        engine.step()
        losses.append(float(result.loss_sum.detach()))
    return losses


def state_bytes(engine: Engine) -> dict[str, int]:
    """Bytes this rank keeps between steps, from DeepSpeed's own tensors, each storage once.

    Returns:
        `weights` (partitions, whole persistent ones and second copies), `gradients`, `optimizer`
        (fp32 master weights and moments).
    """
    zero = engine._engine.optimizer
    parameters: list[Any] = list(engine.module.parameters())
    seen: set[int] = set()

    def size(tensors: list[Any]) -> int:
        total = 0
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.numel() > 1:
                storage = tensor.untyped_storage()
                if storage.nbytes() and storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    total += storage.nbytes()
        return total

    # What is only gathered for the moment is no state.
    whole = [parameter.data for parameter in parameters if parameter.ds_persist]
    second = [getattr(parameter, "ds_secondary_tensor", None) for parameter in parameters]
    weights = size([parameter.ds_tensor for parameter in parameters] + whole + second)
    gradients = size([zero.grad_partitions_flat_buffer])
    moments = [value for state in zero.optimizer.state.values() for value in state.values()]
    optimizer = size([*zero.fp32_partitioned_groups_flat, *moments])
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer}


def step_bytes(engine: Engine, config: RunConfig, *, vocab: int) -> int:
    """Bytes an optimizer step takes at its peak beside what is there before it. Collective; CPU.

    One step is trained first, so that the moments are there. The second is counted by torch's
    profiler, allocation by allocation.
    """
    accumulated = config.accumulation_steps(engine.world_size)
    train_full_rows(engine, config, vocab=vocab, micro_batches=accumulated)
    apply = engine.step
    profiler = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    )
    calls = 0

    def watched() -> None:
        nonlocal calls
        calls += 1
        with profiler if calls == accumulated else contextlib.nullcontext():
            apply()

    engine.step = watched  # type: ignore[method-assign]
    try:
        train_full_rows(engine, config, vocab=vocab, micro_batches=accumulated)
    finally:
        del engine.step
    assert profiler.profiler is not None
    seen: Any = profiler.profiler.kineto_results
    events = [event for event in seen.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes), default=0)
