"""How long training stands still for a checkpoint, blocking and in the background.

    python benchmarks/checkpoint_stall.py [--repeats 7] [--hidden 512] [--layers 8] [--folder DIR]
        [--no-result]

Two real ranks (gloo, DeepSpeed ZeRO-3, AdamW) train one model; the two ways of saving take turns in
the same processes, so that whatever else the machine does meets both. The stall is the time a rank
spends in its saver: for a blocking save all of it (write, sync, hash, read back, announce), in the
background the copy plus every look at a pending save and its announcement. The slowest rank counts.
What the background costs besides, training steps that share cores and disk with the writer, is
reported as the ratio of step times with and without a save under way.

Exit code 0 when the median stall in the background is at most 15 % of the blocking one. The result
goes to benchmarks/results/checkpoint_stall.json. Read the ratios: seconds are the machine's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "checkpoint_stall.json"
GOAL = 0.15
WAYS = ("blocking", "background")


def rank_main(rank: int, port: int, options: argparse.Namespace, folder: str, pipe: Any) -> None:
    """One rank: train, save by turns, report every figure."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    from nmar_ds.training.engine import ProcessPeers, start_process_group
    from nmar_ds.training.ranks import discover_ranks
    from nmar_ds.training.saving import BackgroundSaver, BlockingSaver, Shelf

    start_process_group(discover_ranks(os.environ), timeout_seconds=600)
    step_once, engine = make_run(options)
    peers = ProcessPeers()

    def shelf(way: str) -> Shelf:
        return Shelf(folder=Path(folder) / way, peers=peers, facts={}, keep=2)

    savers = {
        "blocking": BlockingSaver(shelf("blocking"), lambda *p: engine.save_into(*p, {})),
        "background": BackgroundSaver(
            shelf("background"), lambda *p: engine.copy_into(*p, {}), max_failed=1,
            report=lambda step, total, line: print(line, flush=True),
        ),
    }  # fmt: skip
    figures: dict[str, list[float]] = {"steps_alone": [], "steps_meanwhile": [], "copy": []}
    figures |= {way: [] for way in WAYS}

    def train(name: str) -> None:
        peers.gather(None)
        started = time.monotonic()
        step_once()
        figures[name].append(max(peers.gather(time.monotonic() - started)))

    def stall(call: Any) -> float:
        started = time.monotonic()
        call()
        return time.monotonic() - started

    for number in range(options.repeats + 1):
        for way in WAYS if number % 2 else reversed(WAYS):
            for _ in range(2):
                train("steps_alone")
            peers.gather(None)
            here = stall(lambda w=way, n=number: savers[w].save(n + 1))
            copied = here
            while savers[way].pending:
                train("steps_meanwhile")
                here += stall(savers[way].settle)
            figures[way].append(max(peers.gather(here)))
            if way == "background":
                figures["copy"].append(max(peers.gather(copied)))
        if number == 0:  # the first of each pages everything in
            for values in figures.values():
                values.clear()
    size = sum(f.stat().st_size for f in (Path(folder) / "blocking").glob(f"*{number + 1}/*"))
    pipe.send((figures, size))


def make_run(options: argparse.Namespace) -> tuple[Any, Any]:
    """A call that takes one training step, and the engine."""
    from nmar_ds.acceptance import step as core
    from nmar_ds.training.engine import Engine
    from nmar_ds.training.loop import forward_arguments

    keys = core.model_keys(True) | {
        "hidden_size": options.hidden, "intermediate_size": 4 * options.hidden,
        "num_hidden_layers": options.layers, "initializer_range": 0.02,
    }  # fmt: skip
    plain = core.settings

    def with_adamw(world_size: int, **rest: Any) -> Any:
        config, _ = plain(world_size, **rest)
        adamw = config.optimizer.model_copy(update={"name": "adamw"})
        config = config.model_copy(update={"optimizer": adamw})
        return config, core.deepspeed_config(config, world_size=world_size, device="cpu")

    with (
        mock.patch.object(core, "model_keys", lambda tied: keys),
        mock.patch.object(core, "settings", with_adamw),
        mock.patch.object(core, "Recording", Engine),
    ):
        tiny = core.tiny_run(global_rows=2, learning_rate=1e-4)
    engine, batch = tiny.engine, tiny.loader.batches_of_step(0)[0]
    arguments = forward_arguments(batch, core.np.array([0.0, 1.0, 0.0, 1.0, 1.0]), engine.device)
    engine.train()

    def step_once() -> None:
        loss = engine(**arguments, also_untrained=False).loss_sum
        engine.backward(loss / 100)
        engine.step()

    return step_once, engine


def file_system(folder: Path) -> str:
    """Type of the file system that holds a folder."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [(len(at), kind) for at, kind in mounts if folder.resolve().is_relative_to(at)]
    return max(holding)[1]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run both ranks and put the result together."""
    sys.path.insert(0, str(ROOT / "tests" / "distributed"))
    from pool import free_port

    folder = Path(tempfile.mkdtemp(prefix="checkpoint-stall-", dir=options.folder))
    context = multiprocessing.get_context("spawn")
    port, pipes, ranks = free_port(), [], []
    try:
        for rank in range(2):
            ours, theirs = context.Pipe()
            arguments = (rank, port, options, str(folder), theirs)
            ranks.append(context.Process(target=rank_main, args=arguments, daemon=True))
            ranks[-1].start()
            theirs.close()
            pipes.append(ours)
        (figures, size), _ = (pipe.recv() for pipe in pipes)
        kind = file_system(folder)
    finally:
        for process in ranks:
            process.join(20)
            process.kill()
        shutil.rmtree(folder)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    ratios = sorted(b / a for a, b in zip(figures["blocking"], figures["background"], strict=True))
    versions = {name: metadata.version(name) for name in ("torch", "deepspeed", "transformers")}
    return {
        "command": f"python benchmarks/checkpoint_stall.py --repeats {options.repeats} "
        f"--hidden {options.hidden} --layers {options.layers}",
        "ranks": 2, "cores": os.cpu_count(), "file_system": kind, "checkpoint_bytes": size,
        "medians_in_seconds": {name: round(value, 4) for name, value in medians.items()},
        "stall_ratio": round(medians["background"] / medians["blocking"], 4),
        "stall_ratio_of_pairs": [round(ratio, 4) for ratio in ratios],
        "step_ratio_meanwhile": round(medians["steps_meanwhile"] / medians["steps_alone"], 4),
        "goal": GOAL, "ok": medians["background"] <= GOAL * medians["blocking"],
        "seconds": {name: [round(v, 4) for v in values] for name, values in figures.items()},
        "versions": {"python": platform.python_version(), **versions},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }  # fmt: skip


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="saves of each kind")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--folder", help="where the checkpoints go; the system's temporary folder")
    parser.add_argument("--no-result", action="store_true", help="print only")
    options = parser.parse_args()
    result = measure(options)
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if not options.no_result:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(text, encoding="utf-8")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
