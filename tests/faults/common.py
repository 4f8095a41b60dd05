"""What the tests of faults share: a tiny run, its weights' digest, and real launches of it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from fork_server import ForkServer
from pool import free_port

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
STEPS = 8
SECONDS_TO_GO = 15  # after a kill
SECONDS_TO_SAVE = 60  # after a request to stop; four seconds on idle cores
PEER_LOST = "another rank ended or did not answer"
TABLE: list[tuple[str, str]] = []  # (fault, outcome), printed at the end


@dataclass(frozen=True)
class Prepared:
    """What all tests start from.

    Attributes:
        folder: with `config.yaml`, records and stores.
        config: the configuration.
        whole: run folder of the uninterrupted run.
        digest: sha256 over its final fp32 master weights.
    """

    folder: Path
    config: Path
    whole: Path
    digest: str


def prepare(folder: Path) -> Path:
    """Records, configuration and stores of a tiny run; returns the configuration."""
    for name, num, seed in (("train", 120, 1), ("heldout", 12, 2)):
        generator = random.Random(seed)
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(num):
                word = "".join(generator.choice("abcdefgh") for _ in range(generator.randint(3, 7)))
                record = {"group": "back", "prompt": f"turn {word}: ", "reference": word[::-1]}
                file.write(json.dumps(record) + "\n")
    config: dict[str, Any] = {
        "name": "faults",
        "output": str(folder / "run"),
        "tokenizer": {"path": str(folder / "tokenizer.model"), "train": {"vocab_size": 40}},
        "data": {
            "train": [str(folder / "train.jsonl")],
            "heldout": [str(folder / "heldout.jsonl")],
            "store": str(folder / "store"),
            "sequence_length": 64,
            "traces": {"builder": "hard", "clean_share": 0.3},
        },
        "model": {
            "dtype": "float32",
            "config": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
                "tie_word_embeddings": True,
            },
        },
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2, "weight_decay": 0.1},
        "training": {
            "steps": STEPS, "global_batch_rows": 4, "log_every": 1, "eval_rows": 4,
            "timeout_seconds": 60,
        },
        "checkpoint": {"every": 2},
        # Every parameter partitioned: with persistent ones an unrelated collective hides races.
        "zero": {"param_persistence_threshold": 0},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    result = python("launcher/prepare.py", "--config", str(path))
    assert result.returncode == 0, result.stderr
    return path


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT), **more}  # fmt: skip


def python(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run one of the launchers by itself."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment(**more), capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip


def newest_step(run: Path) -> int | None:
    """Step of the newest valid checkpoint; none may be refused on the way to it."""
    from nmar_ds.training.checkpoints import find_newest

    found = find_newest(run / "checkpoints", report=pytest.fail)
    return None if found is None else found.step


def digest_of(run: Path, steps: int = STEPS) -> str:
    """sha256 over the fp32 master weights after the last step, by name."""
    from nmar_ds.training.checkpoints import find_newest
    from nmar_ds.training.export import full_state

    found = find_newest(run / "checkpoints", report=pytest.fail)
    assert found is not None and found.step == steps
    digest = hashlib.sha256()
    for name, tensor in sorted(full_state(found).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def state_of(run: Path, steps: int = STEPS) -> dict[str, Any]:
    """Name, size and sha256 of every file after the last step: moments and random state too.

    Equal runs write equal bytes: nothing in these files depends on time, place or process.
    """
    from nmar_ds.training.checkpoints import folder_name, verify

    files: dict[str, Any] = verify(run / "checkpoints" / folder_name(steps))["files"]
    return files


def assert_finished_as(run: Path, digest: str) -> None:
    """The run ended with those weights and left nothing but its two last checkpoints behind."""
    assert digest_of(run) == digest
    folder = run / "checkpoints"
    kept = {"step-00000006", "step-00000008"}
    present = {path.name for path in folder.iterdir()}
    assert {name for name in present if "invalid" not in name} == {*kept, "latest"}
    assert (folder / "latest").read_text() == "step-00000008\n"


def name_of(fault: dict[str, Any]) -> str:
    """A fault in words."""
    place = fault.get("point", fault["where"])
    in_step = ("boundary", "forward", "backward", "optimizer", "nonfinite")
    kind = "step" if fault["where"] in in_step else "save"
    if fault["where"] in ("planning", "building"):
        return f"rank {fault['rank']} while {place}"
    return f"rank {fault['rank']} in {place} of {kind} {fault['step']}"


def kill_and_resume(
    fault: dict[str, Any], newest: int | None, *, prepared: Prepared, server: ForkServer, run: Path
) -> None:
    """Kill a rank there, look at what is left, resume, and compare the weights."""
    TABLE.append((f"kill -9 of {name_of(fault)}", "LOST"))
    killed = server.run(f"output={run}", fault={**fault, "how": "kill"})
    victim, other = fault["rank"], 1 - fault["rank"]
    assert killed["codes"][victim] == -9, killed
    # Nothing but its torn connections tells the other; at the very end it needs it no more.
    over = newest == STEPS
    assert killed["codes"][other] == 1 or (over and killed["codes"][other] == 0), killed
    assert killed["seconds_apart"] < SECONDS_TO_GO
    said = killed["outputs"][other]
    assert "Traceback" not in said and said.count("error: ") == said.count(PEER_LOST) <= 1, said
    assert newest_step(run) == newest
    resumed = server.run(f"output={run}")
    assert resumed["codes"] == [0, 0], resumed["outputs"]
    if over:  # a complete run writes nothing, so it leaves the leftovers where they are
        assert "already complete" in resumed["outputs"][0]
        assert digest_of(run) == prepared.digest
    else:
        assert newest is None or f"after step {newest}" in resumed["outputs"][0]
        assert_finished_as(run, prepared.digest)
    TABLE[-1] = (TABLE[-1][0], "recovered bit-exactly")


def signal_and_save(
    prepared: Prepared, run: Path, target: str, number: signal.Signals, command: str = "deepspeed"
) -> int:
    """Signal one process, or the group, of a long run; all end, and the last step is saved.

    Returns:
        The command's exit code.
    """
    launched = Launch(
        prepared.config, f"output={run}", "training.steps=4000", "checkpoint.every=4000",
        command=command,
    )  # fmt: skip
    try:
        launched.wait_for(f"step {20:>6}/")
        if target == "group":
            os.killpg(launched.process.pid, number)
        else:
            os.kill(launched.everyone[target], number)
        launched.wait_until_gone(SECONDS_TO_SAVE)
        said = launched.said()
    finally:
        launched.clean_up()
    stopped = re.findall(r"stopped after step (\d+); saved", said)
    # The deepspeed command itself answers INT with a traceback; no rank may.
    assert len(stopped) == 1 and "error: " not in said and 'train.py", line' not in said, said
    assert newest_step(run) == int(stopped[0]) >= 20
    assert not list((run / "checkpoints").glob("*.partial"))
    return launched.finish()


class Launch:
    """`deepspeed` or `torchrun` on two ranks, as a process group of its own."""

    def __init__(
        self, config: Path, *overrides: str, fault: Any = None, command: str = "deepspeed",
        more: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        script = "launcher/train.py" if fault is None else "tests/faults/train_with_fault.py"
        port = str(free_port())
        start = {
            "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", port],
            "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", port],
        }[command]
        self.log = config.parent / f"launch-{port}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*start, script, "--config", str(config), *overrides], cwd=ROOT,
                env=environment(FAULT=json.dumps(fault), **(more or {})), start_new_session=True,
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                # A shell starts what it puts in the background with Ctrl-C ignored: not so here.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
            )  # fmt: skip
        self.everyone: dict[str, int] = {}

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for_file(self, path: Path, seconds: float = 300) -> None:
        """Until a rank has made it; remembers who is who."""
        end = time.monotonic() + seconds
        while not path.exists():
            assert time.monotonic() < end and self.alive(), self.said()
            time.sleep(0.02)
        self.remember()

    def wait_for(self, text: str, seconds: float = 300) -> None:
        """Until the run has said it; remembers who is who."""
        end = time.monotonic() + seconds
        while text not in self.said():
            assert time.monotonic() < end and self.alive(), self.said()
            time.sleep(0.05)
        self.remember()

    def remember(self) -> dict[str, int]:
        """Pids of `cli`, `launch` and `rank 0`, `rank 1`, from the process tree."""
        self.everyone = {"cli": self.process.pid}
        for pid in _below(self.process.pid):
            words = _words(pid)
            if "deepspeed.launcher.launch" in words:
                self.everyone["launch"] = pid
            elif any(word.endswith(".py") and "train" in word for word in words):
                rank = _environ(pid).get("RANK")
                if rank is not None:
                    self.everyone[f"rank {rank}"] = pid
        return self.everyone

    def alive(self) -> list[str]:
        """Names of those that still run."""
        self.process.poll()
        return [name for name, pid in (self.everyone or {"cli": self.process.pid}).items()
                if _runs(pid)]  # fmt: skip

    def wait_until_gone(self, seconds: float, *names: str) -> float:
        """Seconds until every remembered process, or those named, was gone."""
        started = time.monotonic()
        while set(self.alive()) & set(names or self.everyone):
            assert time.monotonic() < started + seconds, f"{self.alive()} live\n{self.said()}"
            time.sleep(0.05)
        return time.monotonic() - started

    def finish(self, seconds: float = 200) -> int:
        """Wait for the command; its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(self.said())

    def clean_up(self) -> None:
        """End what a failed test left, by pid."""
        for pid in {*self.everyone.values(), self.process.pid}:
            if _runs(pid):
                os.kill(pid, signal.SIGKILL)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _environ(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(item.split("=", 1) for item in text.split("\0") if "=" in item)


def _below(parent: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(parent).children(recursive=True)]
