"""One training run, put together: plan, model, engine, canary, resume, loop."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from nmar_ds import __version__
from nmar_ds.config import RunConfig, deepspeed_config
from nmar_ds.data.loader import Batch, RowLoader
from nmar_ds.data.store import boundary_ids_of
from nmar_ds.errors import (
    CheckpointError,
    ConfigError,
    DivergenceError,
    PeerLostError,
    SaveError,
)
from nmar_ds.model import row_norms
from nmar_ds.model.attention import check_supported
from nmar_ds.model.canary import CanaryReport, run_canary
from nmar_ds.model.loading import load_model, trainable_parameters
from nmar_ds.model.training_model import UndoTrainingModel
from nmar_ds.model.vocabulary import known_rows
from nmar_ds.training import attempts, checkpoints, elastic, heldout, outcome
from nmar_ds.training.engine import (
    Engine,
    ProcessPeers,
    all_reduce,
    close_process_group,
    make_optimizer,
    naming_lost_peers,
    start_process_group,
)
from nmar_ds.training.loop import TrainingLoop, forward_arguments
from nmar_ds.training.monitor import Monitor
from nmar_ds.training.nodes import check_same_everywhere, check_shared_folder
from nmar_ds.training.partitions import SavedPartitions
from nmar_ds.training.plain_data import check_plain_data
from nmar_ds.training.planning import RunPlan
from nmar_ds.training.ranks import Ranks
from nmar_ds.training.run_folder import RunLock, check_space, checkpoint_bytes
from nmar_ds.training.saving import BackgroundSaver, BlockingSaver, Saver, Shelf
from nmar_ds.training.stopping import (
    STOP_FILE,
    Launcher,
    StopSignal,
    refuse_stopped,
    stop_reason,
    told_to_stop,
)
from nmar_ds.training.watchdog import Watchdog


def run_training(config: RunConfig, plan: RunPlan, ranks: Ranks, launcher: Launcher) -> bool:
    """Train, resuming where a former attempt left off.

    Returns:
        True when the run is complete, False when a signal stopped it (and it was saved).

    Raises:
        NmarError: anything a user can mend, the same on all ranks.
    """
    training = config.training
    with Watchdog(
        ranks.rank,
        Path(config.output),
        timeout_seconds=training.timeout_seconds,
        slow_timeout_seconds=training.slow_timeout_seconds,
    ) as watchdog:
        start_process_group(
            ranks,
            timeout_seconds=training.timeout_seconds,
            # The watchdog comes first: it tells a slow save from a hung step, and leaves stacks.
            collective_seconds=training.slow_timeout_seconds + 60,
        )
        return _run_watched(config, plan, ranks, launcher, watchdog)


def _run_watched(
    config: RunConfig, plan: RunPlan, ranks: Ranks, launcher: Launcher, watchdog: Watchdog
) -> bool:
    """Whatever the end, it leaves its line, and the folder and the group are given back."""
    output = Path(config.output)
    # One rank looks for the kill switch: a thousand would ask the file server every second.
    stop = StopSignal(launcher, output / STOP_FILE if ranks.rank == 0 else None)
    lock = RunLock(output)
    try:
        with naming_lost_peers():
            return _run(config, plan, ranks, stop=stop, lock=lock, watchdog=watchdog)
    except Exception as error:
        if isinstance(error, PeerLostError):
            watchdog.end_if_told()
        if lock.held:  # else the folder is another job's
            outcome.leave(output, outcome.of_error(error))
        raise
    finally:
        watchdog.enter("end")
        close_process_group()
        lock.release()


def _run(
    config: RunConfig,
    plan: RunPlan,
    ranks: Ranks,
    *,
    stop: StopSignal,
    lock: RunLock,
    watchdog: Watchdog,
) -> bool:
    peers = ProcessPeers()
    output = Path(config.output)
    check_same_everywhere(peers.gather({**plan.facts, **_versions()}))
    if ranks.world_size > ranks.local_world_size:
        check_shared_folder(output, peers)
    _take_folder(lock, peers)
    with peers.share_errors():
        if peers.rank == 0:
            outcome.clear(output)
            refuse_stopped(output)
    attempt = peers.broadcast(f"{time.strftime('%Y%m%dT%H%M%S')}-{watchdog.me.pid}")
    watchdog.meet(attempt, peers.gather(watchdog.me))
    found = _find_checkpoint(config, plan, peers, output / "checkpoints")
    with peers.share_errors():
        if found and peers.rank == 0:
            check_plain_data(found.folder)
    first_step = found.step if found else 0
    with peers.share_errors():
        if peers.rank == 0:
            attempts.begin(output, first_step, os.environ)
    complete = _attempt(
        config, plan, ranks, stop=stop, peers=peers, found=found, enter_phase=watchdog.enter
    )
    watchdog.enter("end")
    with peers.share_errors():
        if peers.rank == 0:
            attempts.end(output, first_step, os.environ)
            if complete:
                outcome.write(output, f"complete step {plan.total_steps}")
    if not complete:
        reason = stop_reason(stop, peers)
        with peers.share_errors():
            if peers.rank == 0:
                latest = output / "checkpoints" / "latest"  # saved a moment ago, or nothing new
                step = int(latest.read_text().removeprefix("step-")) if latest.exists() else 0
                end = "stopped" if reason == STOP_FILE else "interrupted"
                outcome.write(output, f"{end} step {step}: {reason}")
    return complete


def _attempt(
    config: RunConfig,
    plan: RunPlan,
    ranks: Ranks,
    *,
    stop: StopSignal,
    peers: ProcessPeers,
    found: checkpoints.Found | None,
    enter_phase: Callable[[str], None],
) -> bool:
    """Train from a checkpoint, or the start, to the end or to a stop; see `run_training`."""
    output, first_step = Path(config.output), found.step if found else 0
    if found and first_step >= plan.total_steps:
        if peers.rank == 0:
            print(f"already complete: {found.folder} is after the last step", flush=True)
        return True
    if told_to_stop(stop, peers, first_step):
        return False
    settings = deepspeed_config(config, world_size=ranks.world_size)
    with peers.share_errors():
        engine, undo_row = _build_engine(config, plan, settings, peers)
    # Every rank draws the same numbers before this line; dropout and the like must differ after.
    torch.manual_seed(config.seed + 1 + ranks.rank)
    origin = ""
    if found and found.manifest["world_size"] == ranks.world_size:
        _restore(engine.load_from(found.folder.parent, found.folder.name))
    elif found:
        origin = f", saved by {found.manifest['world_size']} ranks and re-sliced for "
        origin += f"{ranks.world_size}"
        _reslice(engine, found, peers)
        torch.manual_seed(elastic.seed_of(config.seed, first_step, ranks.rank, ranks.world_size))
    with peers.share_errors():
        if peers.rank == 0:
            _prepare_folder(output, config, plan, engine, fresh=found is None)
    loader = _loader_of("train", config, plan, ranks)
    with Monitor(
        output / "tensorboard",
        is_writer=peers.rank == 0,
        total_steps=plan.total_steps,
        first_step=first_step,
    ) as monitor:
        _introduce(monitor, config, plan, engine, undo_row)
        # As in training: activation checkpointing, for one, is off in evaluation mode.
        engine.train()
        with peers.share_errors():
            report = _canary(engine, loader, first_step, config, plan)
        notes = "".join(f"; {note}" for note in report.notes)
        monitor.say(
            f"canary    {len(report.checks)} checks passed: other traces change no bit, packed = "
            f"alone, loss = naive cross-entropy{notes}"
        )
        if found:
            monitor.say(f"resumed   from {found.folder} after step {first_step}{origin}")
        if told_to_stop(stop, peers, first_step):
            return False
        saver = _make_saver(config, plan, ranks, engine, monitor=monitor, peers=peers, found=found)
        loop = _make_loop(
            config, plan, ranks, engine, loader=loader, monitor=monitor, saver=saver, stop=stop,
            enter_phase=enter_phase, hosts=peers.gather(socket.gethostname()),
        )  # fmt: skip
        try:
            complete = loop.run(first_step)
        except DivergenceError:
            # What was saved before the weights went astray is wanted more than ever. All ranks
            # are here; a save that fails has said so in its line.
            enter_phase("save")
            with contextlib.suppress(SaveError):
                saver.finish()
            raise
        if not complete:
            monitor.say(f"stopped by {stop_reason(stop, peers)}")
        return complete


def _take_folder(lock: RunLock, peers: ProcessPeers) -> None:
    """Hold the run folder from now on, or refuse to start."""
    with peers.share_errors():
        if peers.rank == 0:
            note = lock.claim()
            if note is not None:
                print(f"lock      {note}", flush=True)
    with peers.share_errors():  # rank 0 has it; the others add their part
        if peers.rank != 0:
            lock.join(peers.rank)


def _prepare_folder(
    output: Path, config: RunConfig, plan: RunPlan, engine: Engine, *, fresh: bool
) -> None:
    """Rank 0: see that checkpoints will fit, and give a new run what their readers need."""
    size = checkpoint_bytes(trainable_parameters(engine.module.parameters()), config.optimizer.name)
    warning = check_space(output, size)
    if warning is not None:
        print(f"space     {warning}", flush=True)
    if fresh:
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        checkpoints.write_atomically(output / "config.yaml", text)
        _copy_tokenizer(plan.store.folder / "tokenizer", output / "tokenizer")


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """Over what a former start has left, but through no link that stands there."""
    folder.mkdir(exist_ok=True)
    for file in sorted(source.iterdir()):
        (folder / file.name).unlink(missing_ok=True)
        shutil.copyfile(file, folder / file.name)


def _introduce(
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


def _loader_of(part: str, config: RunConfig, plan: RunPlan, ranks: Ranks) -> RowLoader:
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


def _reslice(engine: Engine, found: checkpoints.Found, peers: ProcessPeers) -> None:
    """Load a checkpoint of another number of ranks. Collective."""
    with peers.share_errors():
        with SavedPartitions(found.folder, found.manifest) as saved:
            slices = engine.prepare_resliced(saved)
    engine.take_resliced(slices)


def _make_saver(
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


def _make_loop(
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
    hosts: list[str],
) -> TrainingLoop:
    """The loop, given its ways to save and to measure."""
    heldout_loader = _loader_of("heldout", config, plan, ranks)

    def arguments(batch: Batch) -> dict[str, Any]:
        return forward_arguments(batch, plan.weights, engine.device)

    def measure_heldout() -> dict[str, float]:
        losses = heldout.measure(
            engine,
            heldout_loader,
            num_rows=config.training.eval_rows,
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
        stop_requested=stop,
        enter_phase=enter_phase,
        hosts=hosts,
    )


def _canary(
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
    )


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


def _build_engine(
    config: RunConfig, plan: RunPlan, settings: dict[str, Any], peers: ProcessPeers
) -> tuple[Engine, str]:
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
    check_supported(loaded.model.config, longest=longest)
    places = getattr(loaded.model.config, "max_position_embeddings", None)
    if places is not None and longest > places:
        raise ConfigError(
            f"model.max_position_embeddings: {places}, but the longest trace has {longest} tokens"
        )
    model = UndoTrainingModel(loaded.model, options=config.objective.options)
    layers = sorted(loaded.model._no_split_modules or ()) if config.zero.gather_whole_layers else []
    offloaded = config.zero.offload_optimizer is not None
    optimizer = make_optimizer(model, config.optimizer, in_host_memory=offloaded)
    engine = Engine(model, settings, optimizer, whole_modules=layers)
    return engine, loaded.undo_row


def _find_checkpoint(
    config: RunConfig, plan: RunPlan, peers: ProcessPeers, folder: Path
) -> checkpoints.Found | None:
    """The checkpoint to resume from, or None. All read it; rank 0 says whether it belongs here."""
    found = checkpoints.find_newest(folder, lambda text: print(text, flush=True), peers)
    with peers.share_errors():
        if peers.rank == 0 and found is not None:
            if config.checkpoint.resume == "never":
                raise CheckpointError(
                    f"{folder}: already holds checkpoints, and checkpoint.resume is never; "
                    "choose another `output` or resume: auto"
                )
            checkpoints.check_same_run(
                {**found.manifest["run"], "name": found.manifest["name"]},
                {**plan.facts, "name": config.name},
                found.folder,
            )
    return found


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
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
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


def _restore(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
