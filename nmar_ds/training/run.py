"""One training run from start to end: folder, checkpoint, engine, canary, loop, outcome."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from nmar_ds.config import RunConfig, deepspeed_config
from nmar_ds.errors import (
    CheckpointError,
    DivergenceError,
    PeerLostError,
    SaveError,
)
from nmar_ds.model.loading import trainable_parameters
from nmar_ds.training import attempts, checkpoints, elastic, outcome
from nmar_ds.training.engine import (
    Engine,
    ProcessPeers,
    close_process_group,
    device_kind,
    naming_lost_peers,
    start_process_group,
)
from nmar_ds.training.monitor import Monitor
from nmar_ds.training.nodes import check_shared_folder
from nmar_ds.training.parts import (
    build_engine,
    check_ranks_agree,
    check_start,
    introduce,
    load_resliced,
    loader_of,
    make_loop,
    make_saver,
    restore_random_state,
)
from nmar_ds.training.plain_data import check_plain_data
from nmar_ds.training.planning import RunPlan
from nmar_ds.training.ranks import Ranks
from nmar_ds.training.run_folder import RunLock, check_space, checkpoint_bytes
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
    check_ranks_agree(config, plan, peers)
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
    settings = deepspeed_config(config, world_size=ranks.world_size, device=device_kind())
    with peers.share_errors():
        engine, undo_row = build_engine(config, plan, settings, peers)
    # Every rank draws the same numbers before this line; dropout and the like must differ after.
    torch.manual_seed(config.seed + 1 + ranks.rank)
    origin = ""
    if found and found.manifest["world_size"] == ranks.world_size:
        restore_random_state(engine.load_from(found.folder.parent, found.folder.name))
    elif found:
        origin = f", saved by {found.manifest['world_size']} ranks and re-sliced for "
        origin += f"{ranks.world_size}"
        load_resliced(engine, found, peers)
        torch.manual_seed(elastic.seed_of(config.seed, first_step, ranks.rank, ranks.world_size))
    with peers.share_errors():
        if peers.rank == 0:
            _prepare_folder(output, config, plan, engine, fresh=found is None)
    loader = loader_of("train", config, plan, ranks)
    with Monitor(
        output / "tensorboard",
        is_writer=peers.rank == 0,
        total_steps=plan.total_steps,
        first_step=first_step,
    ) as monitor:
        introduce(monitor, config, plan, engine, undo_row)
        # As in training: activation checkpointing, for one, is off in evaluation mode.
        engine.train()
        with peers.share_errors():
            report = check_start(engine, loader, first_step, config, plan)
        notes = "".join(f"; {note}" for note in report.notes)
        monitor.say(
            f"canary    {len(report.checks)} checks passed: other traces change no bit, packed = "
            f"alone, loss = naive cross-entropy{notes}"
        )
        if found:
            monitor.say(f"resumed   from {found.folder} after step {first_step}{origin}")
        if told_to_stop(stop, peers, first_step):
            return False
        saver = make_saver(config, plan, ranks, engine, monitor=monitor, peers=peers, found=found)
        loop = make_loop(
            config, plan, ranks, engine, loader=loader, monitor=monitor, saver=saver, stop=stop,
            enter_phase=enter_phase, peers=peers,
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
