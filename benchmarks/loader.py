"""The loader at ten million traces: opening, resuming, the next batch, memory over an epoch.

    python benchmarks/loader.py [--quick]

Writes a store of 10 M short traces (benchmarks/data.py's seed; about 900 MB, removed afterwards)
and a second one of 20,000 traces of the trace law. Goals: opening within 1 s; a loader that resumes
at 99 % of 10 M rows within 1 s; the next batch within 2 % of the forward and backward that it feeds
(a 4-layer Llama of width 256 with a vocabulary of 32,000, one process); memory of its own (RssAnon)
that does not grow over an epoch. Exit code 0 when all are met; the result goes to
benchmarks/results/loader.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "unit")]

import data  # noqa: E402
from tiny_tokenizers import corpus  # noqa: E402

from nmar_ds.data.loader import RowLoader  # noqa: E402
from nmar_ds.data.packing import pack  # noqa: E402
from nmar_ds.data.store import Store, write_store  # noqa: E402
from nmar_ds.traces.encoding import Tokenizer, train_sentencepiece  # noqa: E402
from nmar_ds.traces.schema import Role, Trace  # noqa: E402
from nmar_ds.training.checkpoints import write_atomically  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "loader.json"
NUM, LENGTH = 10_000_000, 16
REPEATS = 5
GOALS = {"open_seconds": 1.0, "resume_seconds": 1.0, "batch_share_of_step": 0.02,
         "growth_megabytes": 1.0}  # fmt: skip


def traces_of(lengths: Iterator[int], rng: np.random.Generator, highest: int) -> Iterator[Trace]:
    """Prompt, prefix, deviation, undo and correction in fixed shares of each length."""
    for line, length in enumerate(lengths, 1):
        edges = np.array([0, length // 8, length // 2, length // 2 + 2, length // 2 + 4, length])
        roles = np.repeat(np.arange(5, dtype=np.uint8), np.diff(edges))
        ids = rng.integers(3, highest, length).astype(np.int32)
        yield Trace(ids=ids, roles=roles, onsets=(int(edges[2]),), line=line)


def large_store(folder: Path, tokenizer: Tokenizer, num: int) -> None:
    """A store of traces of one length."""
    rng = np.random.default_rng(data.SEED)
    trace = next(traces_of(iter([LENGTH]), rng, tokenizer.size - 1))
    write_store(folder, (trace for _ in range(num)), tokenizer=tokenizer,
                builder={"max_length": LENGTH})  # fmt: skip


def loader_of(store: Store, capacity: int, rows: int) -> RowLoader:
    """One process, `rows` rows a step."""
    return RowLoader(
        store, pack(store.lengths, capacity), store.role_counts, seed=0,
        global_batch_rows=rows, micro_batch_rows=1, rank=0, world_size=1, pad_id=0,
        trained_roles=(Role.PREFIX, Role.UNDO, Role.CORRECTION),
    )  # fmt: skip


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def own_megabytes() -> float:
    """Memory that is this process's own: maps of the store's files do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def opening_and_resuming(folder: Path) -> dict[str, Any]:
    """Medians: opening the store, and the first rows of a resumed loader."""
    opened = [seconds(lambda: Store(folder)) for _ in range(REPEATS)]
    store = Store(folder)
    first_use = seconds(lambda: (store.lengths, store.role_counts))
    made = time.perf_counter()
    loader = loader_of(store, LENGTH, 16)
    made = time.perf_counter() - made
    step = int(loader.steps_per_epoch * 0.99)
    resumed = []
    for _ in range(REPEATS):
        loader._epoch = -1  # as a new process begins: no epoch's order is known
        resumed.append(seconds(lambda: loader.batches_of_step(step)))
    return {"rows": loader.plan.num_rows, "open": opened, "lengths_first_use": first_use,
            "plan_and_loader": made, "resume": resumed}  # fmt: skip


def batch_and_step(folder: Path) -> dict[str, Any]:
    """The next batch beside the forward and backward that it feeds; interleaved."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=32_000, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
    ))  # fmt: skip
    loader = loader_of(Store(folder), 2048, 1)
    batches, steps = [], []
    for step in range(REPEATS):
        started = time.perf_counter()
        (batch,) = loader.batches_of_step(step)
        batches.append(time.perf_counter() - started)
        ids = torch.from_numpy(batch.input_ids)
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        steps.append(time.perf_counter() - started)
    return {"batch": batches, "forward_and_backward": steps}


def memory(folder: Path) -> dict[str, Any]:
    """Own memory after a tenth of an epoch and at its end."""
    loader = loader_of(Store(folder), 2048, 4)
    tenth = loader.steps_per_epoch // 10
    early = 0.0
    for step in range(loader.steps_per_epoch):
        loader.batches_of_step(step)
        if step == tenth:
            early = own_megabytes()
    return {"after_a_tenth": early, "at_the_end": own_megabytes(),
            "steps": loader.steps_per_epoch}  # fmt: skip


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a hundredth of the traces, not kept")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory(dir=ROOT) as place:
        folder = Path(place)
        tokenizer = train_sentencepiece(corpus(), folder / "t", vocab_size=400, seed=1)
        large_store(folder / "large", tokenizer, NUM // 100 if quick else NUM)
        lengths = data.draw("trace", 20_000, 2048).tokens.tolist()
        rng = np.random.default_rng(data.SEED)
        write_store(folder / "small", traces_of(iter(lengths), rng, tokenizer.size - 1),
                    tokenizer=tokenizer, builder={"max_length": 2048})  # fmt: skip
        large = opening_and_resuming(folder / "large")
        flat = memory(folder / "small")
        step = batch_and_step(folder / "small")
    median = statistics.median
    figures = {
        "open_seconds": median(large["open"]), "resume_seconds": median(large["resume"]),
        "batch_share_of_step": median(step["batch"]) / median(step["forward_and_backward"]),
        "growth_megabytes": flat["at_the_end"] - flat["after_a_tenth"],
    }  # fmt: skip
    met = {name: figures[name] <= goal for name, goal in GOALS.items()}
    for name, goal in GOALS.items():
        print(f"{name:20} {figures[name]:10.4f}  goal <= {goal:g}: "
              f"{'met' if met[name] else 'MISSED'}")  # fmt: skip
    print(f"plan and loader of {large['rows']:,} rows: {large['plan_and_loader']:.1f} s")
    if not quick:
        facts = {"command": "python benchmarks/loader.py", "date": time.strftime("%Y-%m-%d"),
                 "machine": f"{platform.machine()}, shared, 2 cores", "seed": data.SEED,
                 "figures": figures, "goals": GOALS, "met": met, "large": large, "step": step,
                 "memory": flat, "python": platform.python_version(),
                 "versions": {name: version(name) for name in ("numpy", "numba", "torch",
                                                               "transformers")}}  # fmt: skip
        write_atomically(RESULT, json.dumps(facts, indent=1) + "\n")
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
