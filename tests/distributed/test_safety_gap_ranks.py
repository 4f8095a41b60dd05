"""The Safety Gap study with real ranks and workers: the command users type, and its proof broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cases
import psutil
import pytest
from pool import RankPool

from nmar_ds.errors import LaunchError
from nmar_ds.theory import on_ranks

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "num_seeds=2", "records.heldout=[{path: examples/quickstart/chain_sum.heldout.jsonl, max_records: 40}]",
    "records.train=[{path: examples/quickstart/chain_sum.train.jsonl, max_records: 300}]",
    "model.config.hidden_size=32", "batch_rows=2", "start.steps=4", "curves.steps=2",
    "curves.eval_every=2", "curves.eval_rows=2", "measure.identity_traces=3",
    "measure.probe_traces=3", "timeout_seconds=120",
]  # fmt: skip


def test_the_whole_command_on_two_ranks_and_two_workers(tmp_path: Path) -> None:
    command = [sys.executable, "launcher/safety_gap.py", "--config", "configs/safety_gap.yaml",
               f"output={tmp_path}/out", *TINY]  # fmt: skip
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "out/report.json").read_text("utf-8"))
    assert found["seeds"] == [0, 1]
    zero3 = found["zero3"]
    assert (zero3["ranks"], zero3["micro_batches"]) == (2, 2)
    assert len(zero3["gaps"]) == 4 and max(zero3["gaps"].values()) < 1e-5
    assert zero3["apart"] > 0.01
    assert found["by_seed"][0]["curves"] != found["by_seed"][1]["curves"]
    assert "ZeRO-3, 2 ranks x 2 micro-batches: (b) g_SFT - g_mSFT = G_e / D" in result.stdout
    again = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert again.returncode == 0 and "zero3: kept from before" in again.stdout
    assert again.stdout.count("kept from before") == 3
    assert json.loads((tmp_path / "out/report.json").read_text("utf-8")) == found


def test_a_lost_factor_is_seen_in_every_identity(two_ranks: RankPool) -> None:
    good = two_ranks.run(cases.safety_gap_figures)[0]
    bad = two_ranks.run(cases.safety_gap_figures, break_it="world")[0]
    assert len(good["gaps"]) == 4 and max(good["gaps"].values()) < 1e-5
    assert min(bad["gaps"].values()) > 0.4


def test_ranks_that_fail_or_hang_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LaunchError, match=r"zero3.log: two ranks took over 3 s \(timeout_seconds"):
        on_ranks.start(tmp_path, timeout_seconds=3)
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [words for words in commands if str(tmp_path) in " ".join(words)], "left running"
    monkeypatch.setattr(on_ranks, "NUM_RANKS", 0)
    with pytest.raises(LaunchError, match="two ranks ended with code 1: read it"):
        on_ranks.start(tmp_path, timeout_seconds=60)
