"""The self-test on two real ranks: it passes where all is well, and every phase can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import selftest_faults
from pool import RankPool, free_port

ROOT = Path(__file__).resolve().parents[2]


def failed(results: list[Any]) -> list[str]:
    return [line.check for result in results for line in result.lines if not line.passed]


def run(pool: RankPool, folder: Path, names: str, fault: str) -> list[Any]:
    return pool.run(selftest_faults.phases, str(folder / fault), names.split(","), fault=fault)[0]


def test_two_good_ranks_pass(two_ranks: RankPool, tmp_path: Path) -> None:
    names = "preflight,isolation,exactness,bandwidth"
    results = run(two_ranks, tmp_path, names, "none")
    assert failed(results) == [] and all(result.passed for result in results)
    checks = [line.check for result in results for line in result.lines]
    assert len(checks) == 1 + 2 + 6 + 3 * 4 + 3 + 3
    assert "2 ranks x 2 micro-batches, float32: gradients = independent autograd" in checks
    assert "2 ranks x 1 micro-batches, float32: gradients = independent autograd" in checks


def test_a_leaking_attention_fails_isolation_and_proofs(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    isolation, exactness = run(two_ranks, tmp_path, "isolation,exactness", "leak")
    assert failed([isolation]) == ["canary in float32", "canary in bfloat16"]
    assert "neighbours" in isolation.lines[0].seen
    wrong = failed([exactness])
    for dtype in ("float32", "bfloat16"):
        for what in ("logits", "gradients"):
            assert f"packed = unpacked {what}, {dtype}" in wrong
    assert "2 ranks x 2 micro-batches, float32: gradients = independent autograd" in wrong
    assert "g_SFT - g_mSFT = G_e / D" in wrong


def test_a_lost_world_factor_fails_proofs_2_and_3(two_ranks: RankPool, tmp_path: Path) -> None:
    isolation, exactness = run(two_ranks, tmp_path, "isolation,exactness", "world")
    assert isolation.passed
    wrong = failed([exactness])
    for case in (
        "2 micro-batches, float32",
        "1 micro-batches, float32",
        "2 micro-batches, bfloat16",
    ):
        assert f"2 ranks x {case}: gradients = independent autograd" in wrong
    assert "g_SFT - g_mSFT = G_e / D" in wrong
    assert not [check for check in wrong if check.startswith("packed")]


def test_another_denominator_fails_the_identity(two_ranks: RankPool, tmp_path: Path) -> None:
    (exactness,) = run(two_ranks, tmp_path, "exactness", "trained")
    wrong = failed([exactness])
    assert "g_SFT - g_mSFT = G_e / D" in wrong
    assert "g_SFT - g_mSFT under `trained`, as predicted" not in wrong


def test_a_wrong_sum_fails_bandwidth(two_ranks: RankPool, tmp_path: Path) -> None:
    (bandwidth,) = run(two_ranks, tmp_path, "bandwidth", "sum")
    assert failed([bandwidth]) == ["all-reduce"]
    assert "wrong elements" in bandwidth.lines[0].seen


def test_a_phase_that_raises_fails_and_so_do_those_after_it(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    isolation, bandwidth = run(two_ranks, tmp_path, "isolation,bandwidth", "raise")
    assert isolation.lines[-1].seen == "RuntimeError: planted: the device is gone"
    assert not bandwidth.passed and "isolation ended the self-test" in bandwidth.lines[0].seen


@pytest.mark.launch
def test_the_script_ends_with_1_and_one_page(tmp_path: Path) -> None:
    """`bash slurm/selftest.sh` on one machine; the interpreter it is given carries the fault."""
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        "# As python, but launcher/selftest.py on ranks is replaced by its faulty double.\n"
        f'[[ $* == *--summary* && $* != *--no-summary* ]] && exec {sys.executable} "$@"\n'
        'args=("${@//launcher\\/selftest.py/' + str(selftest_faults.__file__).replace("/", "\\/")
        + '}")\n'
        f'exec {sys.executable} "${{args[@]}}"\n'
    )  # fmt: skip
    python.chmod(0o755)
    output = tmp_path / "out"
    result = subprocess.run(
        ["bash", "slurm/selftest.sh", "--ranks", "2", "--output", str(output), "--phases",
         "bandwidth"],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "PYTHON": str(python), "FAULT": "sum", "FAULT_RANK": "1",
             "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PORT": str(free_port())},
    )  # fmt: skip
    assert result.returncode == 1, result.stdout + result.stderr
    page = (output / "selftest.txt").read_text()
    assert page in result.stdout
    assert "FAIL  all-reduce: " in page and "PASS  all-gather: " in page
    assert page.rstrip().endswith("VERDICT: FAIL (2 of 3 checks)")
    assert "torch " in page and "ranks     2 on cpu" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "two"], "--ranks: is two, expected a whole number"),
        (["--phases", "preflight,speed"], "--phases: speed is none of preflight"),
        (["--fast", "1"], "--fast: unknown, expected --ranks"),
        (["--output"], "--output: expected pairs"),
        (["--output", "$(touch canary); 'x", "--phases", "a;b"], "--phases: a;b is none of"),
    ],
)
def test_bad_arguments_of_the_script_are_one_line_and_2(arguments: list[str], message: str) -> None:
    result = subprocess.run(
        ["bash", "slurm/selftest.sh", *arguments], cwd=ROOT, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line
