"""Two sides that train the same model on the same packed traces: this package, and TRL.

Each side lives in processes of its own and takes one optimizer step when told to, so that steps of
both can be taken in turns; sides that do not fit in memory together take all their steps apart, one
after the other, twice over. TRL's trainer runs unmodified: a callback waits at the beginning of a
step and tells its time at the end (its data loading and logging are outside). Our time includes the
making of the batch. Both sides: AdamW, learning rate 1e-4, no decay, clipping at 1, one row per
micro-batch; no activation checkpointing, unless `recomputes` leaves it to TRL, whose default it is.
The loss is the mean over trained tokens.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import data  # noqa: E402

ROUNDS = 2  # of sides that do not fit in memory together
NUM_TRACES = 1000  # one batch of TRL's packer
LEARNING_RATE = 1e-4
TINY = {
    "vocab_size": 32_000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
}  # fmt: skip
SMOLLM2 = ROOT / "runs" / "smollm2_135m_instruct"
MODELS = ("tiny", "smollm2")
Row = tuple[list[int], list[int], list[int]]  # ids, labels, lengths of the traces


def model_folder(model: str, place: Path) -> Path:
    """A folder of the model's weights in float32; the tiny one is made, the same each time."""
    import torch
    import transformers

    if model == "smollm2":
        if not SMOLLM2.exists():
            sys.exit(f"{SMOLLM2}: missing; python examples/smollm2/convert.py --output {SMOLLM2}")
        return SMOLLM2
    torch.manual_seed(data.SEED)
    folder = place / "tiny"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).save_pretrained(folder)
    return folder


def traces(vocab: int, capacity: int) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of `NUM_TRACES` traces: random ids, lengths and trained shares of `data`."""
    drawn = data.draw("trace", NUM_TRACES, capacity)
    rng = np.random.default_rng(data.SEED)
    made = []
    for tokens, trained in zip(*drawn, strict=True):
        ids = rng.integers(5, vocab, tokens)
        labels = ids.copy()
        # a prompt, then what is trained with a deviation in its middle
        untrained = int(tokens - 1 - trained)
        prompt = 1 + untrained // 2
        labels[:prompt] = -100
        at = prompt + int(trained) // 2
        labels[at : at + untrained - untrained // 2] = -100
        made.append((ids.tolist(), labels.tolist()))
    return made


def chosen_rows(num_packed: int, num: int) -> list[int]:
    """Rows of the packed thousand, at random; a packer's first rows hold the longest traces."""
    return np.random.default_rng(data.SEED).permutation(num_packed)[:num].tolist()


# --- TRL ----------------------------------------------------------------------------------------


def trl_worker(pipe: Connection, job: dict[str, Any], env: dict[str, str]) -> None:
    """Send the packed rows; then a step's seconds and its loss for every message."""
    os.environ.update(env)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import peers

    peers.install()
    import datasets
    import tokenizers
    import torch
    import transformers
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({"[p]": 0, "[e]": 1})),
        pad_token="[p]", eos_token="[e]",
    )  # fmt: skip
    made = traces(job["vocab"], job["capacity"])
    dataset = datasets.Dataset.from_dict(
        {"input_ids": [ids for ids, _ in made], "labels": [labels for _, labels in made]}
    )
    config = SFTConfig(
        output_dir=job["folder"] + "/trl", max_steps=job["steps"], packing=True,
        packing_strategy="bfd", max_length=job["capacity"], per_device_train_batch_size=1,
        gradient_accumulation_steps=job["accumulation"], learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, warmup_steps=0,
        gradient_checkpointing=job["recomputes"], bf16=job["autocast"], use_cpu=True,
        report_to="none",
        save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_num_workers=0,
        train_sampling_strategy="sequential", dataset_num_proc=1,
        deepspeed=job["deepspeed"],
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=getattr(torch, job["dtype"]), attn_implementation="sdpa"
    )

    class Turns(transformers.TrainerCallback):  # type: ignore[misc]
        """Waits for its turn, and tells how long it took."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            assert pipe.recv() == "step"
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.started

        def on_log(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            logged = state.log_history[-1]
            if "loss" in logged:
                pipe.send((self.seconds, logged["loss"]))

    trainer = SFTTrainer(model, args=config, train_dataset=dataset, processing_class=tokenizer,
                         callbacks=[Turns()])  # fmt: skip
    packed = trainer.train_dataset
    trainer.train_dataset = packed.select(chosen_rows(len(packed), job["rows"]))
    pipe.send([(r["input_ids"], r["labels"], r["seq_lengths"]) for r in trainer.train_dataset])
    trainer.train()


# --- ours ---------------------------------------------------------------------------------------


class Rows:
    """Given packed rows as the training loop's loader and its source of traces."""

    def __init__(self, rows: list[Row], job: dict[str, Any], rank: int, world_size: int) -> None:
        from nmar_ds.traces.schema import NUM_ROLES, Role

        self.job, self.rank, self.world_size = job, rank, world_size
        self._ids: list[Any] = []
        self._roles: list[Any] = []
        self.rows: list[Any] = []
        self.counts: list[Any] = []
        for ids, labels, lengths in rows:
            self.rows.append(np.arange(len(self._ids), len(self._ids) + len(lengths)))
            self.counts.append(np.zeros(NUM_ROLES, dtype=np.int64))
            for end, length in zip(np.cumsum(lengths), lengths, strict=True):
                at = slice(end - length, end)
                untrained = np.array(labels[at]) == -100
                roles = np.where(untrained, Role.DEVIATION, Role.PREFIX).astype(np.uint8)
                self._ids.append(np.array(ids[at]))
                self._roles.append(roles)
                self.counts[-1] += np.bincount(roles[1:], minlength=NUM_ROLES)

    def ids(self, index: int) -> Any:
        """Of a trace."""
        return self._ids[index]

    def roles(self, index: int) -> Any:
        """Of a trace."""
        return self._roles[index]

    def _of_step(self, step: int) -> list[int]:
        num = self.job["accumulation"] * self.world_size
        return list(range(step * num, (step + 1) * num))

    def counts_of_step(self, step: int) -> tuple[Any, int]:
        """Targets by role, and traces."""
        rows = self._of_step(step)
        return sum(self.counts[r] for r in rows), sum(len(self.rows[r]) for r in rows)

    def batches_of_step(self, step: int) -> list[Any]:
        """This rank's micro-batches, dealt as a distributed sampler does."""
        from nmar_ds.data.loader import make_batch

        mine = self._of_step(step)[self.rank :: self.world_size]
        return [make_batch(self, [self.rows[r]], length=self.job["capacity"], pad_id=0)
                for r in mine]  # fmt: skip


def run_config(job: dict[str, Any], world_size: int) -> Any:
    """The run configuration of our side."""
    from nmar_ds.config import RunConfig

    rows = world_size * job["accumulation"]
    return RunConfig.model_validate(
        {
            "name": "bench", "output": "unused", "tokenizer": {"path": "unused"},
            "data": {"train": ["x"], "heldout": ["x"], "store": "x",
                     "sequence_length": job["capacity"]},
            "model": {"path": job["model"], "dtype": job["dtype"]},
            "objective": {"denominator": "trained"},
            "optimizer": {"learning_rate": LEARNING_RATE, "weight_decay": 0.0,
                          "max_grad_norm": 1.0, "final_learning_rate_ratio": 1.0,
                          "warmup_steps": 0},
            "training": {"steps": job["steps"], "global_batch_rows": rows, "micro_batch_rows": 1},
            **job.get("sections", {}),
        }
    )  # fmt: skip


def ours_worker(pipe: Connection, job: dict[str, Any], env: dict[str, str]) -> None:
    """Take the packed rows; then a step for every message."""
    os.environ.update(env)
    os.environ["DS_ACCELERATOR"] = "cpu"
    from nmar_ds.training.ranks import complete_environment, discover_ranks

    ranks = discover_ranks(os.environ)
    complete_environment(os.environ, ranks)  # before torch, as launcher/train.py does it
    from nmar_ds.training.engine import close_process_group, start_process_group

    start_process_group(ranks, timeout_seconds=300)
    import torch

    if job["threads"]:
        torch.set_num_threads(job["threads"])
    loop = ours_loop(job, pipe.recv(), ranks.rank, ranks.world_size)
    loop.engine.train()
    pipe.send("ready")
    for step in range(job["steps"]):
        assert pipe.recv() == "step"
        started = time.perf_counter()
        sums = loop.forward_backward(step, also_untrained=False)
        loop._agree(step + 1, sums, loop.engine.step_was_applied())
        pipe.send((time.perf_counter() - started, sums.loss))
    del loop
    close_process_group()


def ours_loop(job: dict[str, Any], rows: list[Row], rank: int, world_size: int) -> Any:
    """The training loop over given rows."""
    import torch
    import transformers

    from nmar_ds.acceptance.step import Quiet, Unsaved
    from nmar_ds.config import deepspeed_config
    from nmar_ds.model.training_model import UndoTrainingModel
    from nmar_ds.training.engine import Engine, make_optimizer
    from nmar_ds.training.loop import TrainingLoop

    config = run_config(job, world_size)
    lm = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=getattr(torch, job["dtype"])
    )
    model = UndoTrainingModel(lm)
    settings = deepspeed_config(config, world_size=world_size, device="cpu")
    optimizer = make_optimizer(model, config.optimizer)
    engine = Engine(model, settings, optimizer, whole_modules=["LlamaDecoderLayer"])
    return TrainingLoop(
        engine, Rows(rows, job, rank, world_size),  # type: ignore[arg-type]
        weights=np.array([0.0, 1.0, 0.0, 1.0, 1.0]), denominator_kind="trained",
        optimizer=config.optimizer, training=config.training, total_steps=job["steps"],
        monitor=Quiet(), saver=Unsaved(), save_every=None,  # type: ignore[arg-type]
        measure_heldout=dict, stop_requested=lambda: False,
    )  # fmt: skip


def plain_worker(pipe: Connection, job: dict[str, Any], env: dict[str, str]) -> None:
    """Our model and loss without an engine: one process, gradients summed, clipped, AdamW."""
    os.environ.update(env)
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # memory as our other side has it
    import torch

    from nmar_ds.training.cpu_step import keep_freed_memory

    keep_freed_memory()
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    step_of = plain_step(job, pipe.recv())
    pipe.send("ready")
    for step in range(job["steps"]):
        assert pipe.recv() == "step"
        started = time.perf_counter()
        loss = step_of(step)
        pipe.send((time.perf_counter() - started, loss))


def plain_step(job: dict[str, Any], rows: list[Row]) -> Any:
    """Takes the 0-based step and returns its loss."""
    import torch
    import transformers

    from nmar_ds.model.training_model import UndoTrainingModel
    from nmar_ds.training.engine import make_optimizer
    from nmar_ds.training.loop import forward_arguments

    weights, device = np.array([0.0, 1.0, 0.0, 1.0, 1.0]), torch.device("cpu")
    lm = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=getattr(torch, job["dtype"])
    )
    model = UndoTrainingModel(lm).train()
    optimizer = make_optimizer(model, run_config(job, 1).optimizer)
    loader = Rows(rows, job, 0, 1)

    def step_of(step: int) -> float:
        counts, _ = loader.counts_of_step(step)
        divisor, total = float(counts @ weights), 0.0
        for batch in loader.batches_of_step(step):
            arguments = forward_arguments(batch, weights, device)
            loss = model(**arguments).loss_sum / divisor
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step_of


def own_rows(job: dict[str, Any]) -> list[Row]:
    """Rows of this package's packer, where TRL takes no part."""
    from nmar_ds.data.packing import pack

    made = traces(job["vocab"], job["capacity"])
    plan = pack([len(ids) for ids, _ in made], job["capacity"])
    rows = []
    for row in chosen_rows(plan.num_rows, job["rows"]):
        parts = [made[int(index)] for index in plan.row(row)]
        ids = [one for part, _ in parts for one in part]
        labels = [one for _, part in parts for one in part]
        rows.append((ids, labels, [len(part) for part, _ in parts]))
    return rows


# --- taking turns -------------------------------------------------------------------------------


class Gone(RuntimeError):
    """A side's process ended before its work."""


class Side:
    """The processes of one side, one per rank."""

    def __init__(self, worker: Any, job: dict[str, Any], world_size: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        for rank in range(world_size):
            env = {"TOKENIZERS_PARALLELISM": "false"}
            if world_size > 1:
                env |= {"OMP_NUM_THREADS": "1"}
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port,
                        "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
                        "LOCAL_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
            ours, theirs = context.Pipe()
            process = context.Process(target=worker, args=(theirs, job, env), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def tell(self, message: Any) -> None:
        """To all ranks.

        Raises:
            Gone: a process has ended.
        """
        try:
            for pipe in self.pipes:
                pipe.send(message)
        except BrokenPipeError:
            raise self._gone() from None

    def hear(self) -> list[Any]:
        """From all ranks, in order.

        Raises:
            Gone: a process ended instead.
        """
        try:
            return [pipe.recv() for pipe in self.pipes]
        except (EOFError, ConnectionResetError):
            raise self._gone() from None

    def _gone(self) -> Gone:
        for process in self.processes:
            process.join(5)
        return Gone(f"ended with exit codes {[process.exitcode for process in self.processes]}")

    def step(self) -> tuple[float, list[float]]:
        """One optimizer step: the slowest rank's seconds, and the ranks' losses."""
        self.tell("step")
        answers = self.hear()
        return max(seconds for seconds, _ in answers), [loss for _, loss in answers]

    def peak_bytes(self) -> int:
        """The most resident memory that each process has had, summed; 0 for one that has ended."""
        peak = 0
        for process in self.processes:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                status = Path(f"/proc/{process.pid}/status").read_text("utf-8")
                found = re.search(r"VmHWM:\s*(\d+) kB", status)  # missing where it has just ended
                peak += int(found[1]) * 1024 if found else 0
        return peak

    def close(self) -> None:
        """End what still runs."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.kill()


def job_of(model: str, place: str, **settings: Any) -> dict[str, Any]:
    """What a side is to do; `rows` covers all steps of all ranks."""
    folder = model_folder(model, Path(place))
    job = {
        "model": str(folder), "folder": place, "dtype": "float32", "autocast": False,
        "accumulation": 1, "threads": None, "recomputes": False, "deepspeed": None,
        "world_size": 1,
        "vocab": TINY["vocab_size"] if model == "tiny" else 49_152, **settings,
    }  # fmt: skip
    job["rows"] = job["steps"] * job["accumulation"] * job["world_size"]
    return job


class Turn(NamedTuple):
    """One optimizer step of one side."""

    side: str
    step: int  # 0-based
    tokens: int  # not padding, of all ranks
    seconds: float
    losses: list[float]  # by rank
    peak_bytes: int


def start_trl(job: dict[str, Any]) -> tuple[Side, list[Row]]:
    """Its processes, and the rows that it packed."""
    side = Side(trl_worker, job, job["world_size"])
    return side, side.hear()[0]


def start_ours(job: dict[str, Any], rows: list[Row]) -> Side:
    """Our processes, ready for their first step."""
    side = Side(ours_worker, job, job["world_size"])
    side.tell(rows)
    side.hear()
    return side


def take(name: str, side: Side, job: dict[str, Any], rows: list[Row], step: int) -> Turn:
    """One step of a side."""
    num = job["accumulation"] * job["world_size"]
    tokens = sum(len(ids) for ids, _, _ in rows[step * num : (step + 1) * num])
    seconds, losses = side.step()
    return Turn(name, step, tokens, seconds, losses, side.peak_bytes())


def in_turns(job: dict[str, Any]) -> Iterator[Turn]:
    """A step of each, and the next of each; both stay in memory."""
    with contextlib.ExitStack() as running:
        theirs, rows = start_trl(job)
        running.callback(theirs.close)
        ours = start_ours(job, rows)
        running.callback(ours.close)
        for step in range(job["steps"]):
            for name, side in (("trl", theirs), ("ours", ours)):
                yield take(name, side, job, rows, step)


def apart(job: dict[str, Any]) -> Iterator[Turn]:
    """All steps of one side, then the same of the other, `ROUNDS` times; one side in memory."""
    for _ in range(ROUNDS):
        theirs, rows = start_trl(job)
        with contextlib.closing(theirs):
            for step in range(job["steps"]):
                yield take("trl", theirs, job, rows, step)
        with contextlib.closing(start_ours(job, rows)) as ours:
            for step in range(job["steps"]):
                yield take("ours", ours, job, rows, step)


def race(
    model: str, *, world_size: int = 1, alone: bool = False, **settings: Any
) -> dict[str, Any]:
    """Steps of both sides, `apart` where one is to be alone in memory; first ones are not timed."""
    seconds: dict[str, list[float]] = {"ours": [], "trl": []}
    losses: dict[str, list[float]] = {"ours": [], "trl": []}
    rates: dict[str, list[float]] = {"ours": [], "trl": []}
    peaks: dict[str, int] = {}
    found: dict[str, Any] = {"order": apart.__name__ if alone else in_turns.__name__}
    with tempfile.TemporaryDirectory(prefix="sides-") as place:
        job = job_of(model, place, world_size=world_size, **settings)
        try:
            for turn in (apart if alone else in_turns)(job):
                name = turn.side
                # our ranks' losses are shares of the whole; TRL's is reduced already
                losses[name].append(sum(turn.losses) if name == "ours" else turn.losses[0])
                peaks[name] = max(turn.peak_bytes, peaks.get(name, 0))
                if turn.step:
                    seconds[name].append(turn.seconds)
                    rates[name].append(turn.tokens / turn.seconds)
                print(turn, flush=True)
        except Gone as gone:
            found["ended"] = str(gone)
    if all(rates.values()):
        found["tokens per second"] = {k: statistics.median(v) for k, v in rates.items()}
        pairs = zip(rates["ours"], rates["trl"], strict=False)
        found["ratio"] = statistics.median(a / b for a, b in pairs)
        first = [losses[k][0] for k in ("ours", "trl")]
        found["first loss, relative difference"] = abs(first[0] - first[1]) / abs(first[1])
    found["peak GB, all ranks"] = {name: peak / 1e9 for name, peak in peaks.items()}
    return found | {"seconds": seconds, "losses": losses}
