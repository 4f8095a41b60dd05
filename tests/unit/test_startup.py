"""Every launcher settles its arguments and configuration before anything slow is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/quickstart.yaml"
SLOW = {"torch", "transformers", "deepspeed", "numba", "sentencepiece", "tokenizers", "tensorboard"}
# The libraries that settling a configuration takes; what they cost is the measure, because seconds
# differ from machine to machine. CPU time does not count waiting for a core, and the fastest of
# several runs comes near to that on an idle machine; the first pair within the bound ends it.
NEEDED = "import argparse, json, numpy, psutil, pydantic.main, yaml"
TIMES_NEEDED = 1.5
MAX_RUNS = 20

CASES = [
    ("train", ["--help"], 0),
    ("train", ["--config", "nowhere.yaml"], 2),
    ("train", ["--config", CONFIG, "optimizer.learning_rat=1"], 2),
    ("train", ["--config", CONFIG, "--dry-run", "data.store=nowhere"], 2),
    ("preflight", ["--help"], 0),
    ("preflight", ["--config", "nowhere.yaml"], 2),
    ("selftest", ["--help"], 0),
    ("selftest", ["--phases", "exactnes"], 2),
    ("prepare", ["--help"], 0),
    ("prepare", ["--config", "nowhere.yaml"], 2),
    ("prepare", ["--config", CONFIG, "optimizer.learning_rat=1"], 2),
    ("sample", ["--help"], 0),
    ("sample", ["--config", "nowhere.yaml", "--model", "m", "--records", "r", "--output", "o"], 2),
    ("show", ["--help"], 0),
    ("show", ["--store", "nowhere"], 2),
    ("show", ["--stor", "nowhere", "--rows", "0"], 2),
    ("export", ["--help"], 0),
    ("export", ["--run", "nowhere", "--output", "nowhere/export"], 2),
    ("generate", ["--help"], 0),
    ("generate", ["--model", "nowhere", "--prompt", "1 + 1 ="], 2),
    ("generate", ["--model", "nowhere", "--promt", "1 + 1 ="], 2),
    ("evaluate_undo", ["--help"], 0),
    ("evaluate_undo", ["--model", "nowhere", "--heldout", "nowhere.jsonl"], 2),
    ("evaluate_undo", ["--model", "nowhere", "--heldout", "x.jsonl", "--require", "reduce>=1"], 2),
    ("evaluate_harness", ["--help"], 0),
    ("evaluate_harness", ["--model", "nowhere", "--tasks", "nmar_chain_sum"], 2),
    ("evaluate_harness", ["--model", "nowhere", "--tasks", "x", "--limit", "0"], 2),
    ("safety_gap", ["--help"], 0),
    ("safety_gap", ["--config", "nowhere.yaml"], 2),
    ("safety_gap", ["--config", "configs/safety_gap.yaml", "curves.step=9"], 2),
]


def test_every_launcher_is_measured() -> None:
    launchers = {path.stem for path in (ROOT / "launcher").glob("*.py")}
    assert {launcher for launcher, *_ in CASES} == launchers


def cpu_seconds(command: list[str], code: int) -> float:
    """CPU time of one run, user and system, of the child and what it waited for."""
    quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=quiet)
    _, status, usage = os.wait4(pid, 0)
    assert os.waitstatus_to_exitcode(status) == code
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    ("launcher", "arguments", "code"), CASES, ids=[f"{name} {' '.join(a)}" for name, a, _ in CASES]
)
def test_arguments_and_configuration_are_settled_in_a_moment(
    launcher: str, arguments: list[str], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    script = f"launcher/{launcher}.py"
    traced = subprocess.run(
        [sys.executable, "-X", "importtime", script, *arguments],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert traced.returncode == code, traced.stderr
    imported = re.findall(r"^import time: .*\| +([\w.]+)$", traced.stderr, re.MULTILINE)
    assert "argparse" in imported, "the list is read at all"
    assert not SLOW & {name.partition(".")[0] for name in imported}
    needed, own = [], []
    while not own or (min(own) > TIMES_NEEDED * min(needed) and len(own) < MAX_RUNS):
        needed.append(cpu_seconds([sys.executable, "-c", NEEDED], 0))
        own.append(cpu_seconds([sys.executable, script, *arguments], code))
    assert min(own) <= TIMES_NEEDED * min(needed), (own, needed)
