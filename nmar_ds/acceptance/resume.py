"""Save, kill -9, resume: real training, started rank by rank, must end in the same bits.

Every rank of the self-test is the parent of one rank of `launcher/train.py` and gives it its own
rank and another port; so the training goes the way that this job's launcher made, on all nodes.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nmar_ds.acceptance.tiny import model_keys
from nmar_ds.acceptance.verdict import Line
from nmar_ds.training.engine import ProcessPeers

STEPS, EVERY, KILLED_AFTER = 40, 8, 18
LAUNCHERS = Path(__file__).resolve().parents[2] / "launcher"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What happened to the three runs.

    Attributes:
        whole: exit codes of the run that was let alone.
        killed: exit codes of the one that was killed.
        saved: step of its newest valid checkpoint then, or None.
        refused: what was said against newer ones.
        resumed: exit codes of its continuation.
        said: what the continuation's rank 0 printed.
        digests: of the final weights, of the first run and of the continued one.
    """

    whole: Sequence[int]
    killed: Sequence[int]
    saved: int | None
    refused: Sequence[str]
    resumed: Sequence[int]
    said: str
    digests: tuple[str, str]


def judge(outcome: Outcome) -> list[Line]:
    """Verdicts on the three runs."""
    found = re.search(r"resumed +from .* after step (\d+)", outcome.said)
    refused = [*outcome.refused, *re.findall(r".*refused.*", outcome.said)]
    first = f"after step {found[1]}" if found else "from the start"
    same = outcome.digests[0] == outcome.digests[1] != ""
    return [
        _exits("a run that is let alone ends well", outcome.whole, 0),
        Line(
            check=f"a run killed (kill -9) after step {KILLED_AFTER} ends at once",
            passed=outcome.killed[0] == -signal.SIGKILL and all(c for c in outcome.killed),
            seen=f"exit codes {_codes(outcome.killed)}", expected="killed, or its peer lost",
            advice="it was over before it could be killed, or ended otherwise: see its log",
        ),
        Line(
            check="it left a valid checkpoint", passed=outcome.saved is not None,
            seen="none" if outcome.saved is None else f"step {outcome.saved}",
            expected=f"one every {EVERY} steps", advice="the run folder's file system loses files",
        ),
        _exits("its continuation ends well", outcome.resumed, 0),
        Line(
            check="it goes on from the newest checkpoint",
            passed=found is not None and int(found[1]) == outcome.saved and not refused,
            seen=refused[0] if refused else first,
            expected=f"after step {outcome.saved}",
            advice="a file was changed after it was written: suspect the file system or memory",
        ),
        Line(
            check="both end in the same weights, bit by bit", passed=same,
            seen=" and ".join(digest[:12] or "none" for digest in outcome.digests),
            expected="one sha256", advice="resuming is not exact here: its kernels may not be "
            "deterministic; compare two runs that are let alone",
        ),
    ]  # fmt: skip


def _codes(codes: Sequence[int]) -> str:
    return ", ".join(str(code) for code in sorted(set(codes)))


def _exits(check: str, codes: Sequence[int], expected: int) -> Line:
    return Line(
        check=check, passed=set(codes) == {expected}, seen=f"exit codes {_codes(codes)}",
        expected=f"{expected} on every rank", advice="see resume/*.log in the self-test's folder",
    )  # fmt: skip


def check_resume(peers: ProcessPeers, folder: Path, *, dtype: str, timeout: int) -> list[Line]:
    """Prepare, train, kill and resume under `folder`. Collective."""
    with peers.share_errors():
        if peers.rank == 0:
            prepare(folder, world_size=peers.world_size, dtype=dtype)
    whole = _train(peers, folder, "whole", kill=False, timeout=timeout)
    killed = _train(peers, folder, "killed", kill=True, timeout=timeout)
    refused: list[str] = []
    saved = newest(folder / "killed", refused) if peers.rank == 0 else None
    resumed = _train(peers, folder, "killed", kill=False, timeout=timeout, attempt=2)
    lines: list[Line] | None = None
    if peers.rank == 0:
        said = (folder / "killed-2-rank0.log").read_text(errors="replace")
        digests = (digest_of(folder / "whole"), digest_of(folder / "killed"))
        lines = judge(
            Outcome(whole=whole, killed=killed, saved=saved, refused=refused, resumed=resumed,
                    said=said, digests=digests)
        )  # fmt: skip
    result: list[Line] = peers.broadcast(lines)
    return result


def prepare(folder: Path, *, world_size: int, dtype: str) -> None:
    """Records, configuration and stores of a tiny run.

    Raises:
        OSError: the folder cannot be written.
        RuntimeError: the records could not be prepared; holds what was printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, num, seed in (("train", max(120, 60 * world_size), 1), ("heldout", 12, 2)):
        generator = random.Random(seed)
        lines = []
        for _ in range(num):
            word = "".join(generator.choice("abcdefgh") for _ in range(generator.randint(3, 7)))
            lines.append(json.dumps({"prompt": f"turn {word}: ", "reference": word[::-1]}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "config.yaml").write_text(yaml.safe_dump(_config(folder, world_size, dtype)))
    done = subprocess.run(
        [sys.executable, str(LAUNCHERS / "prepare.py"), "--config", str(folder / "config.yaml")],
        env=os.environ | {"PYTHONPATH": _path()}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"launcher/prepare.py: {done.stderr.strip()}")


def _config(folder: Path, world_size: int, dtype: str) -> dict[str, Any]:
    return {
        "name": "selftest",
        "output": str(folder / "whole"),
        "tokenizer": {"path": str(folder / "tokenizer.model"), "train": {"vocab_size": 40}},
        "data": {
            "train": [str(folder / "train.jsonl")],
            "heldout": [str(folder / "heldout.jsonl")],
            "store": str(folder / "store"),
            "sequence_length": 64,
            "traces": {"builder": "hard", "clean_share": 0.3},
        },
        "model": {"dtype": dtype, "config": model_keys(True)},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2, "weight_decay": 0.1},
        "training": {
            "steps": STEPS, "global_batch_rows": max(4, 2 * world_size), "log_every": 1,
            "eval_rows": 4, "timeout_seconds": 60,
        },
        "checkpoint": {"every": EVERY},
        # Every parameter partitioned: with persistent ones an unrelated collective hides races.
        "zero": {"param_persistence_threshold": 0},
    }  # fmt: skip


def _path() -> str:
    """The package this process runs, for its children."""
    rest = os.environ.get("PYTHONPATH", "")
    return str(LAUNCHERS.parent) + (os.pathsep + rest if rest else "")


def start(folder: Path, name: str, attempt: int, *, rank: int, port: int) -> subprocess.Popen[str]:
    """This rank of the training run `name`; its log lies beside the run."""
    environment = {
        key: value for key, value in os.environ.items()
        # A child has its own meeting place, not that of torchrun's agent.
        if not key.startswith("TORCHELASTIC_")
    } | {"MASTER_PORT": str(port), "PYTHONPATH": _path()}  # fmt: skip
    command = [
        sys.executable, str(LAUNCHERS / "train.py"), "--config", str(folder / "config.yaml"),
        f"output={folder / name}",
    ]  # fmt: skip
    with (folder / f"{name}-{attempt}-rank{rank}.log").open("w") as log:
        return subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, text=True,
        )  # fmt: skip


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _train(
    peers: ProcessPeers, folder: Path, name: str, *, kill: bool, timeout: int, attempt: int = 1
) -> list[int]:
    """Run one training; exit codes by rank. With `kill` all ranks get it after KILLED_AFTER."""
    port = peers.broadcast(_free_port() if peers.rank == 0 else None)
    process = start(folder, name, attempt, rank=peers.rank, port=port)
    try:
        if kill:
            if peers.rank == 0:
                _wait_for_step(folder / f"{name}-{attempt}-rank0.log", process, timeout)
                process.kill()
            peers.broadcast("rank 0 has been killed")
            process.kill()
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        pass  # its code says that it was killed
    finally:
        process.kill()
        code = process.wait()
    return peers.gather(code)


def _wait_for_step(log: Path, process: subprocess.Popen[str], timeout: int) -> None:
    deadline = time.monotonic() + timeout
    wanted = re.compile(rf"^step +{KILLED_AFTER}/", re.MULTILINE)
    while process.poll() is None and time.monotonic() < deadline:
        if wanted.search(log.read_text(errors="replace")):
            return
        time.sleep(0.01)


def newest(run: Path, refused: list[str]) -> int | None:
    """Step of the newest valid checkpoint; what is said against newer ones goes to `refused`."""
    from nmar_ds.training.checkpoints import find_newest

    found = find_newest(run / "checkpoints", report=refused.append)
    return None if found is None else found.step


def digest_of(run: Path) -> str:
    """sha256 over the fp32 master weights after the last step, by name; "" before it."""
    from nmar_ds.training.checkpoints import find_newest
    from nmar_ds.training.export import full_state

    found = find_newest(run / "checkpoints", report=lambda text: None)
    if found is None or found.step != STEPS:
        return ""
    digest = hashlib.sha256()
    for name, tensor in sorted(full_state(found).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
