"""Preparation: what a second process brings, and megabytes a second beside `datasets.map`.

    python benchmarks/preparation.py [--megabytes 144] [--repeats 3]

The records have given deviations; the tokenizer is a byte-level one trained here.
`launcher/prepare.py --workers 1` and `2` are timed whole, start and all, in turn with a pure
computation by one and by two processes: what the machine itself gives for a second process is the
measure (goal: at least 0.9 of it). `datasets` reads the same file and maps it with two processes
to ids and roles in its cache, through the same tokenizer and span logic written straight down,
without any of our checks (goal: two of our workers have 2 x its megabytes a second); and, for
comparison, through our own builder. Its times are without imports and starts. All traces are
compared. Result: benchmarks/results/preparation.json. Exit code 0 when the goals are met.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import peers  # noqa: E402

from nmar_ds.training.checkpoints import write_atomically  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "preparation.json"
SCALING, TIMES = 0.9, 2.0
WORDS = (
    "so",
    "the",
    "sum",
    "carries",
    "one",
    "therefore",
    "we",
    "take",
    "away",
    "half",
    "of",
    "it",
)
COMPUTE = "t = 0\nfor n in range({num}):\n    t += n * n % 7"
COMPUTATION = 40_000_000


def write_records(path: Path, size: int) -> int:
    """Records with one or two deviations each, up to `size` bytes; how many there are."""
    rng, num = random.Random(1), 0
    with path.open("w", encoding="ascii") as file:
        while file.tell() < size:
            numbers = [rng.randint(10, 999) for _ in range(12)]
            steps = [f" {' '.join(rng.choices(WORDS, k=5))}: {a} + {b} = {a + b}."
                     for a, b in itertools.pairwise(numbers)]  # fmt: skip
            places = sorted(rng.sample(range(1, len(steps)), rng.randint(1, 2)))
            deviations = [{"at": len("".join(steps[:place])), "text": f"?{rng.choice(steps)}"}
                          for place in places]  # fmt: skip
            prompt = "Add neighbours: " + ", ".join(map(str, numbers))
            record = {"prompt": prompt, "reference": "".join(steps), "deviations": deviations}
            file.write(json.dumps(record) + "\n")
            num += 1
    return num


def write_tokenizer(records: Path, folder: Path) -> None:
    """A byte-level tokenizer.json with the undo token."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from nmar_ds.traces.encoding import add_undo

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<pad>"], show_progress=False,
    )  # fmt: skip
    with records.open() as lines:
        texts = [json.loads(line)["reference"] for line, _ in zip(lines, range(3000), strict=False)]
    tokenizer.train_from_iterator(texts, trainer)
    plain = folder / "plain"
    plain.mkdir()
    tokenizer.save(str(plain / "tokenizer.json"))
    named = {"eos_token": "</s>", "pad_token": "<pad>", "bos_token": "<s>"}
    (plain / "tokenizer_config.json").write_text(json.dumps(named))
    add_undo(plain, folder / "tokenizer")


def configuration(folder: Path) -> Path:
    """Of a run whose training records these are."""
    (folder / "heldout.jsonl").write_text('{"reference": "one"}\n')
    path = folder / "run.yaml"
    path.write_text(json.dumps({
        "name": "bench", "output": str(folder / "run"),
        "tokenizer": {"path": str(folder / "tokenizer")},
        "data": {"train": [str(folder / "train.jsonl")], "heldout": [str(folder / "heldout.jsonl")],
                 "store": str(folder / "store"), "sequence_length": 4096},
        "model": {"config": {"model_type": "llama"}}, "optimizer": {"learning_rate": 0.1},
        "training": {"steps": 1, "global_batch_rows": 1},
    }))  # fmt: skip
    return path


class Time(NamedTuple):
    """Seconds: on the wall, and of all processes' work."""

    wall: float
    work: float


def work_seconds(who: int) -> float:
    """CPU time so far: others on the machine stretch the wall's time, not this."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def seconds_of(*commands: list[str]) -> Time:
    """Time of processes that run beside each other."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    started, worked = time.perf_counter(), work_seconds(resource.RUSAGE_CHILDREN)
    running = [subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
               for command in commands]  # fmt: skip
    for process in running:
        process.communicate()
        if process.returncode:
            sys.exit(f"{process.args}: ended with {process.returncode}")
    return Time(time.perf_counter() - started, work_seconds(resource.RUSAGE_CHILDREN) - worked)


def computation(num: int) -> Time:
    """The same computation by `num` processes, a share each."""
    code = COMPUTE.format(num=COMPUTATION // num)
    return seconds_of(*[[sys.executable, "-c", code]] * num)


def preparation(folder: Path, num: int) -> Time:
    """The stores by `num` workers; whole, with starting them."""
    command = [sys.executable, str(ROOT / "launcher/prepare.py"), "--config",
               str(folder / "run.yaml"), "--workers", str(num),
               f"data.store={folder / f'store{num}'}"]  # fmt: skip
    subprocess.run(["rm", "-rf", str(folder / f"store{num}")], check=True)
    return seconds_of(command)


def mapped(folder: Path, how: str) -> Time:
    """`datasets` in a process of its own; it times itself."""
    out = folder / "mapped.json"
    seconds_of([sys.executable, __file__, "--map", how, str(folder), str(out)])
    return Time(*json.loads(out.read_text()))


def plain_builder(folder: Path) -> Callable[[dict[str, Any], int], dict[str, Any]]:
    """The span logic written straight down over the tokenizer's library, without any check."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    undo, stop = tokenizer.token_to_id("<UNDO>"), tokenizer.token_to_id("</s>")

    def encode(text: str) -> Any:
        return tokenizer.encode(text, add_special_tokens=False)

    def build(row: dict[str, Any], line: int) -> dict[str, Any]:
        prompt, encoded = encode(row["prompt"]).ids, encode(row["reference"])
        reference = encoded.ids
        starts = [start for start, _ in encoded.offsets]
        ids, roles, done, role = list(prompt), [0] * len(prompt), 0, 1
        for deviation in row["deviations"] or ():
            at = deviation["at"]
            cut, where = len(reference), at
            if at < len(row["reference"]):
                cut = bisect.bisect_right(starts, at) - 1
                where = starts[cut]
            text = row["reference"][where:at] + deviation["text"]
            whole = encode(row["reference"][:where] + text).ids
            wrong = whole[cut:] if whole[:cut] == reference[:cut] else encode(text).ids
            right = reference[done:cut]
            ids += right + wrong + [undo] * len(wrong)
            roles += [role] * len(right) + [2] * len(wrong) + [3] * len(wrong)
            done, role = cut, 4
        right = [*reference[done:], stop]
        return {"input_ids": ids + right, "roles": roles + [role] * len(right)}

    return build


def own_builder(folder: Path) -> Callable[[dict[str, Any], int], dict[str, Any]]:
    """Ours, record by record."""
    from nmar_ds.traces.boundaries import machine_of
    from nmar_ds.traces.building import BuilderSettings, TraceBuilder
    from nmar_ds.traces.encoding import load_tokenizer
    from nmar_ds.traces.record_forms import record_of

    tokenizer = load_tokenizer(folder / "tokenizer")
    builder = TraceBuilder(
        BuilderSettings(name="given"), tokenizer, machine_of(tokenizer, "token", ())
    )

    def build(row: dict[str, Any], line: int) -> dict[str, Any]:
        (trace,) = builder.traces(record_of(row, "train.jsonl", line + 1), 0)
        return {"input_ids": trace.ids, "roles": trace.roles}

    return build


BUILDERS = {"plain": plain_builder, "own": own_builder}


def map_records(how: str, folder: Path, out: Path) -> None:
    """The other side: load, map with two processes, and check against our store."""
    peers.install_datasets()
    import datasets

    from nmar_ds.data.store import Store

    build = BUILDERS[how](folder)

    def both() -> float:
        return sum(map(work_seconds, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        started, worked = time.perf_counter(), both()
        rows = datasets.load_dataset("json", data_files=str(folder / "train.jsonl"), split="train",
                                     cache_dir=cache)  # fmt: skip
        made = rows.map(build, with_indices=True, num_proc=2, remove_columns=rows.column_names)
        took = Time(time.perf_counter() - started, both() - worked)
        store = Store(folder / "store2" / "train")
        assert len(made) == len(store)
        for index in range(0, len(made), 97):
            assert made[index]["input_ids"] == store.ids(index).tolist(), index
            assert made[index]["roles"] == store.roles(index).tolist(), index
    out.write_text(json.dumps(took))


def measure(folder: Path, size: int, repeats: int) -> dict[str, Any]:
    """All figures, interleaved."""
    num = write_records(folder / "train.jsonl", size)
    write_tokenizer(folder / "train.jsonl", folder)
    configuration(folder)
    seconds: dict[str, list[Time]] = {}
    for _ in range(repeats):
        for name, run in (
            ("prepare, 1 process", lambda: preparation(folder, 1)),
            ("computation, 1 process", lambda: computation(1)),
            ("prepare, 2 processes", lambda: preparation(folder, 2)),
            ("computation, 2 processes", lambda: computation(2)),
            ("datasets.map(num_proc=2)", lambda: mapped(folder, "plain")),
            ("datasets.map(num_proc=2), our builder", lambda: mapped(folder, "own")),
        ):
            seconds.setdefault(name, []).append(run())
    median = {name: statistics.median(t.wall for t in times) for name, times in seconds.items()}
    work = {name: statistics.median(t.work for t in times) for name, times in seconds.items()}
    megabytes = (folder / "train.jsonl").stat().st_size / 1e6
    ours = median["prepare, 1 process"] / median["prepare, 2 processes"]
    machine = median["computation, 1 process"] / median["computation, 2 processes"]
    speed = {name: megabytes / took for name, took in median.items() if "computation" not in name}
    return {
        "records": num, "megabytes": megabytes, "seconds": seconds, "median_seconds": median,
        "median_cpu_seconds": work,
        "cpu_share_kept_by_two": work["prepare, 1 process"] / work["prepare, 2 processes"],
        "megabytes_per_second": speed, "scaling": {"prepare": ours, "computation": machine},
        "scaling_of_possible": ours / machine,
        "times_datasets": speed["prepare, 2 processes"] / speed["datasets.map(num_proc=2)"],
        "times_datasets_with_our_builder": speed["prepare, 2 processes"]
        / speed["datasets.map(num_proc=2), our builder"],
    }  # fmt: skip


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=144)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--map", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.map:
        how, folder, out = options.map
        map_records(how, Path(folder), Path(out))
        return 0
    peers.install_datasets()
    with tempfile.TemporaryDirectory(prefix="preparation-") as place:
        found = measure(Path(place), int(options.megabytes * 1e6), options.repeats)
    met = {"scaling": found["scaling_of_possible"] >= SCALING,
           "times datasets": found["times_datasets"] >= TIMES}  # fmt: skip
    table = {
        "command": " ".join(["python benchmarks/preparation.py", *sys.argv[1:]]),
        "goals": {"scaling_of_possible": SCALING, "times_datasets": TIMES}, "met": met, **found,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared",
        "versions": {"python": platform.python_version(), "datasets": peers.WITH_DEPENDENCIES[0],
                     **{name: version(name) for name in ("numpy", "tokenizers", "pyarrow")}},
    }  # fmt: skip
    write_atomically(RESULT, json.dumps(table, indent=1) + "\n")
    scaling = found["scaling"]
    print(
        f"scaling   {scaling['prepare']:.2f} x by a second process, the machine gives "
        f"{scaling['computation']:.2f}: {found['scaling_of_possible']:.2f} of it"
    )
    print(f"work      {found['cpu_share_kept_by_two']:.2f}: CPU of one process over that of two")
    for name, speed in found["megabytes_per_second"].items():
        print(f"{speed:8.2f} MB/s  {name}")
    print(f"datasets  {found['times_datasets']:.2f} x, with our builder "
          f"{found['times_datasets_with_our_builder']:.2f} x")  # fmt: skip
    print("met" if all(met.values()) else f"not met: {[n for n, good in met.items() if not good]}")
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
