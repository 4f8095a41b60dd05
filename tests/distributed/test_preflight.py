"""Preflight on two real ranks, each a node of its own, with faults planted on one of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import preflight_faults
import pytest
from pool import RankPool, free_port

from nmar_ds.training.preflight import rounds_of_links

ROOT = Path(__file__).resolve().parents[2]


def test_two_good_ranks_are_good_and_quick(two_ranks: RankPool, tmp_path: Path) -> None:
    results = two_ranks.run(
        preflight_faults.measured, str(tmp_path / "run"), fault="none", on_rank=1
    )
    for rows, error, seconds in results:
        assert rows == [] and error is None
        assert seconds < 20
    assert list((tmp_path / "run").iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize(
    ("fault", "check", "on_rank"),
    [("slow", "matmul", 0), ("slow", "matmul", 1), ("wrong", "products", 0),
     ("unstable", "products", 1), ("versions", "versions", 1)],
)  # fmt: skip
def test_a_planted_fault_names_the_node(
    two_ranks: RankPool, tmp_path: Path, fault: str, check: str, on_rank: int
) -> None:
    results = two_ranks.run(
        preflight_faults.measured, str(tmp_path / "run"), fault=fault, on_rank=on_rank
    )
    for rows, error, _ in results:
        assert error is None
        assert [(r.node, r.ranks, r.check) for r in rows] == [("bad-host", (on_rank,), check)], rows


def test_a_clock_ahead_and_a_folder_of_its_own_are_seen(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    skewed = two_ranks.run(preflight_faults.measured, str(tmp_path / "a"), fault="skew", on_rank=1)
    assert [(r.node, r.check) for r in skewed[0][0]] == [
        ("bad-host", "clock"), ("bad-host", "file times"),
    ]  # fmt: skip
    assert 4.9 < float(skewed[0][0][0].value.split()[0]) < 5.1, "its round trip is taken out"
    blind = two_ranks.run(preflight_faults.measured, str(tmp_path / "b"), fault="folder", on_rank=1)
    assert [(r.node, r.check) for r in blind[0][0]] == [("bad-host", "run folder")]


def test_a_silent_rank_is_named_within_the_timeout(two_ranks: RankPool, tmp_path: Path) -> None:
    results = two_ranks.run(
        preflight_faults.measured, str(tmp_path / "run"), fault="hang", on_rank=1,
        timeout_seconds=2,
    )  # fmt: skip
    said = results[0][1]
    assert said is not None
    assert said.startswith("bad node bad-host (ranks 1): products: no answer within 2 s"), said
    assert "--exclude=bad-host" in said


@pytest.mark.parametrize("num", range(1, 10))
def test_the_ring_has_every_rank_and_no_rank_twice_at_a_time(num: int) -> None:
    members = [3 * i for i in range(num)]
    rounds = rounds_of_links(members)
    for links in rounds:
        busy = [rank for link in links for rank in link]
        assert len(busy) == len(set(busy))
    links = [link for part in rounds for link in part]
    assert len(links) == len(set(links)) == (num if num > 2 else num - 1)
    assert {rank for link in links for rank in link} == (set(members) if num > 1 else set())


def launch(*arguments: str, fault: str | None = None) -> subprocess.CompletedProcess[str]:
    script = "launcher/preflight.py" if fault is None else str(preflight_faults.__file__)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": str(ROOT), "FAULT": fault or "", "FAULT_RANK": "1"}  # fmt: skip
    start = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2",
             "--master_port", str(free_port())]  # fmt: skip
    return subprocess.run(
        [*start, script, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip


@pytest.mark.launch
def test_the_command_ends_with_1_and_names_the_bad_node(tmp_path: Path) -> None:
    result = launch(
        "--config", "configs/quickstart.yaml", f"output={tmp_path / 'run'}", "--slow-factor", "5",
        fault="slow",
    )  # fmt: skip
    # The deepspeed command passes the ranks' exit code on.
    assert result.returncode == 1, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if "bad node" in line]
    assert len(lines) == 1 and lines[0].startswith("bad node bad-host (ranks 1): matmul: "), lines
    assert "GFLOP/s measured, expected at least" in lines[0] and "sbatch --exclude=" in lines[0]
    assert "bad-host" in result.stdout and "all-reduce" in result.stdout
    report = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert report["good"] is False and report["world_size"] == 2
    assert [row["node"] for row in report["rows"] if row["verdict"] == "bad"] == ["bad-host"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
        (["--config", "configs/quickstart.yaml", "model={path: nowhere, config: null}"],
         "model.path: nowhere: no such folder"),
        (["--config", "configs/quickstart.yaml", "tokenizer.train=null", "data.store=nowhere"],
         "run launcher/prepare.py first"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_2(arguments: list[str], message: str) -> None:
    result = subprocess.run(
        [sys.executable, "launcher/preflight.py", *arguments], cwd=ROOT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=100, check=False,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line
