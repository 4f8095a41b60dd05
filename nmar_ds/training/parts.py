"""What a run is put together from: engine, loaders, savers, loop, and what is said and kept of it.

Each takes what it needs of configuration, plan and ranks; `run` decides what is made when.
"""

from __future__ import annotations

import json
import platform
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nmar_ds import __version__
from nmar_ds.config import RunConfig
from nmar_ds.data.loader import Batch, RowLoader
from nmar_ds.data.store import boundary_ids_of
from nmar_ds.errors import (
    ConfigError,
)
from nmar_ds.model import backends, row_norms
from nmar_ds.model.canary import CanaryReport, run_canary
from nmar_ds.model.loading import load_model, trainable_parameters
from nmar_ds.model.training_model import UndoTrainingModel
from nmar_ds.model.vocabulary import known_rows
from nmar_ds.training import checkpoints, decodes, heldout
from nmar_ds.training.engine import (
    Engine,
    ProcessPeers,
    all_reduce,
    make_optimizer,
)
from nmar_ds.training.loop import TrainingLoop, forward_arguments
from nmar_ds.training.monitor import Monitor
from nmar_ds.training.nodes import check_same_everywhere
from nmar_ds.training.partitions import SavedPartitions
from nmar_ds.training.planning import RunPlan
from nmar_ds.training.ranks import Ranks
from nmar_ds.training.saving import BackgroundSaver, BlockingSaver, Saver, Shelf
from nmar_ds.training.stopping import (
    StopSignal,
)


def check_ranks_agree(config: RunConfig, plan: RunPlan, peers: ProcessPeers) -> None:
    """Refuse a world whose ranks would not compute the same. Collective.

    The kernel is asked for here, before anything collective is built: a node that has not the one
    that is named must end all ranks, and `auto` may find another one on each node.

    Raises:
        ConfigError: `model.attention` asks for a kernel that cannot run on every rank.
        LaunchError: the ranks' data, settings, packages or kernels differ.
    """
    with peers.share_errors():
        backend = attention_backend(config)
    facts = {**plan.facts, **library_versions(), "kernel of model.attention": backend}
    check_same_everywhere(peers.gather(facts))


def build_engine(
    config: RunConfig, plan: RunPlan, settings: dict[str, Any], peers: ProcessPeers
) -> tuple[Engine, str]:
    """The engine around the loaded model, and one line on where the undo row came from."""
    facts = plan.store.manifest["tokenizer"]
    loaded = load_model(
        config.model,
        settings,
        tokenizer_size=facts["size"],
        undo_id=facts["undo_id"],
        tokenizer_fingerprint=facts["fingerprint"],
        ids={
            "bos_token_id": facts["bos_id"],
            "eos_token_id": facts["eos_id"],
            "pad_token_id": facts["pad_id"],
        },
        seed=config.seed,
        undo_init=plan.undo_init,
        peers=peers,
    )
    longest = max(int(store.lengths.max()) for store in (plan.store, plan.heldout))
    places = getattr(loaded.model.config, "max_position_embeddings", None)
    if places is not None and longest > places:
        raise ConfigError(
            f"model.max_position_embeddings: {places}, but the longest trace has {longest} tokens"
        )
    backend = attention_backend(config)
    model = UndoTrainingModel(loaded.model, options=config.objective.options, backend=backend)
    layers = sorted(loaded.model._no_split_modules or ()) if config.zero.gather_whole_layers else []
    offloaded = config.zero.offload_optimizer is not None
    optimizer = make_optimizer(model, config.optimizer, offloaded=offloaded)
    engine = Engine(model, settings, optimizer, whole_modules=layers)
    return engine, loaded.undo_row


def attention_backend(config: RunConfig) -> str:
    """The kernel behind attention on this machine.

    Raises:
        ConfigError: `model.attention` asks for one that cannot run here.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return backends.choose(config.model.attention, device, getattr(torch, config.model.dtype))


def loader_of(part: str, config: RunConfig, plan: RunPlan, ranks: Ranks) -> RowLoader:
    """This rank's rows of the `train` or the `heldout` store."""
    store, rows = (plan.store, plan.plan) if part == "train" else (plan.heldout, plan.heldout_plan)
    pad_id = store.manifest["tokenizer"]["pad_id"]
    return RowLoader(
        store,
        rows,
        store.role_counts,
        seed=config.seed,
        global_batch_rows=config.training.global_batch_rows,
        micro_batch_rows=config.training.micro_batch_rows,
        rank=ranks.rank,
        world_size=ranks.world_size,
        pad_id=store.manifest["tokenizer"]["eos_id"] if pad_id is None else pad_id,
        trained_roles=np.flatnonzero(plan.weights).tolist(),
    )


def make_loop(
    config: RunConfig,
    plan: RunPlan,
    ranks: Ranks,
    engine: Engine,
    *,
    loader: RowLoader,
    monitor: Monitor,
    saver: Saver,
    stop: StopSignal,
    enter_phase: Callable[[str], None],
    peers: ProcessPeers,
) -> TrainingLoop:
    """The loop, given its ways to save and to measure."""
    heldout_loader = loader_of("heldout", config, plan, ranks)

    def arguments(batch: Batch) -> dict[str, Any]:
        return forward_arguments(batch, plan.weights, engine.device)

    def measure_heldout() -> dict[str, float]:
        losses = heldout.measure(
            engine,
            heldout_loader,
            num_rows=config.training.eval_rows,
            undo_id=plan.store.manifest["tokenizer"]["undo_id"],
            onsets=plan.heldout.onsets,
            arguments=arguments,
            reduce=all_reduce,
        )
        return losses | _undo_row_norms(engine, plan)

    return TrainingLoop(
        engine,
        loader,
        weights=plan.weights,
        denominator_kind=config.objective.denominator,
        options=config.objective.options,
        optimizer=config.optimizer,
        training=config.training,
        total_steps=plan.total_steps,
        monitor=monitor,
        saver=saver,
        save_every=config.checkpoint.every,
        measure_heldout=measure_heldout,
        decode_heldout=_decoder_of_heldout(config, plan, ranks, engine, peers),
        stop_requested=stop,
        enter_phase=enter_phase,
        hosts=peers.gather(socket.gethostname()),
    )


def _decoder_of_heldout(
    config: RunConfig, plan: RunPlan, ranks: Ranks, engine: Engine, peers: ProcessPeers
) -> Callable[[], str]:
    """What decodes the prompts of `training.eval_decodes`; rank 0 makes the table."""
    machine, facts = plan.heldout.machine, plan.store.manifest["tokenizer"]
    with peers.share_errors():
        chosen = decodes.choose(plan.heldout, config.training.eval_decodes, machine)
        tokenizer = plan.heldout.tokenizer() if chosen and ranks.rank == 0 else None
    if not chosen:
        return str
    lm: Any = engine.module.lm
    max_length = config.data.sequence_length
    positions = getattr(lm.config, "max_position_embeddings", None)
    max_length = min(max_length, positions or max_length)

    def decode() -> str:
        found = decodes.decode_exercises(
            engine,
            chosen,
            machine=machine,
            eos_id=facts["eos_id"],
            num_known=facts["size"],
            max_length=max_length,
            max_forwards=config.training.eval_decode_forwards,
            rank=ranks.rank,
            world_size=ranks.world_size,
            sum_over_ranks=all_reduce,
        )
        return "" if tokenizer is None else decodes.table(tokenizer, machine, chosen, found)

    return decode


def make_saver(
    config: RunConfig,
    plan: RunPlan,
    ranks: Ranks,
    engine: Engine,
    *,
    monitor: Monitor,
    peers: ProcessPeers,
    found: checkpoints.Found | None,
) -> Saver:
    """Blocking or in the background; the checkpoint resumed from counts as verified."""
    shelf = Shelf(
        folder=Path(config.output) / "checkpoints",
        peers=peers,
        facts=_manifest_facts(config, plan, ranks, engine.module),
        keep=config.checkpoint.keep,
        verified={found.folder.name} if found else set(),
    )
    if not config.checkpoint.asynchronous:
        return BlockingSaver(shelf, lambda folder, tag: engine.save_into(folder, tag, _state()))

    def report(step: int, num_failed: int, line: str) -> None:
        monitor.say(line)
        monitor.scalars(step, {"safety/failed_saves": num_failed})

    return BackgroundSaver(
        shelf,
        lambda folder, tag: engine.copy_into(folder, tag, _state()),
        max_failed=config.checkpoint.max_failed_saves,
        report=report,
    )


def load_resliced(engine: Engine, found: checkpoints.Found, peers: ProcessPeers) -> None:
    """Load a checkpoint of another number of ranks. Collective."""
    with peers.share_errors():
        with SavedPartitions(found.folder, found.manifest) as saved:
            slices = engine.prepare_resliced(saved)
    engine.take_resliced(slices)


def check_start(
    engine: Engine, loader: RowLoader, step: int, config: RunConfig, plan: RunPlan
) -> CanaryReport:
    """Run the start-up checks through the very call that trains."""

    def call(mode: str, *inputs: Any, **tensors: Any) -> Any:
        return engine(*inputs, mode=mode, **tensors)

    return run_canary(
        call,
        loader.batches_of_step(step)[0],
        weights=plan.weights,
        options=config.objective.options,
        vocab_size=plan.store.manifest["tokenizer"]["size"],
        dtype=getattr(torch, config.model.dtype),
        device=engine.device,
        backend=attention_backend(config),
    )


def introduce(
    monitor: Monitor, config: RunConfig, plan: RunPlan, engine: Engine, undo_row: str
) -> None:
    """Say what is about to be trained on what."""
    for line in plan.summary(config):
        monitor.say(line)
    num_weights = trainable_parameters(engine.module.parameters())
    monitor.say(
        f"model     {num_weights:,} weights, {config.model.dtype}, ZeRO-3 on "
        f"{engine.world_size} ranks ({engine.device.type})"
    )
    backend = attention_backend(config)
    cost = f": {backends.COSTS[backend]}" if backend in backends.COSTS else ""
    monitor.say(f"attention {backend}{cost}")
    if empty := _empty_rows(config, engine.world_size):
        monitor.say(
            f"empty     {empty} rows in every step: {config.training.global_batch_rows} do not "
            f"divide among {engine.world_size} ranks x {config.training.micro_batch_rows}"
        )
    norms = row_norms.describe(_undo_row_norms(engine, plan))
    monitor.say(f"undo row  {undo_row}; {norms}")


def _empty_rows(config: RunConfig, world_size: int) -> int:
    """Rows that fill every step up, so that all ranks run as many."""
    each = config.training.micro_batch_rows * world_size
    return config.accumulation_steps(world_size) * each - config.training.global_batch_rows


def _undo_row_norms(engine: Engine, plan: RunPlan) -> dict[str, float]:
    """Norms of the undo row beside those of the known rows, as scalars. Collective.

    Through the engine's forward, the one place where ZeRO-3 gathers the rows.
    """
    tokenizer = plan.store.manifest["tokenizer"]
    known_K = known_rows(tokenizer["size"], tokenizer["undo_id"], plan.undo_init.excluded_ids)
    with torch.no_grad():
        norms = engine(
            mode="row_norms", known_K=known_K.to(engine.device), undo_id=tokenizer["undo_id"]
        )
    return row_norms.as_scalars(norms)


def _manifest_facts(config: RunConfig, plan: RunPlan, ranks: Ranks, model: Any) -> dict[str, Any]:
    return {
        "run": plan.facts,
        "name": config.name,
        "world_size": ranks.world_size,
        "tokenizer": plan.store.manifest["tokenizer"],
        "semantics": config.undo.semantics,
        "chat": plan.store.manifest["builder"].get("chat"),
        "boundary_ids": boundary_ids_of(plan.store.manifest),
        "context": config.context,
        "undo_token": config.undo.token,
        "dtype": config.model.dtype,
        "model_config": json.loads(model.lm.config.to_json_string(use_diff=False)),
        "versions": library_versions(),
    }


def library_versions() -> dict[str, str]:
    """Versions by name; all ranks must have the same, and checkpoints keep them."""
    import deepspeed
    import transformers

    return {
        "nmar_ds": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
    }


def _state() -> dict[str, Any]:
    """Random-number state of this rank, as tensors (a safe loader refuses anything else)."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what `_state` gave."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
