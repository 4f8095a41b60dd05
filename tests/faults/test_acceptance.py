"""The self-test as users start it, with faults in what only real launches have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import selftest_faults
from pool import free_port

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("fault", ["none", "corrupt"])
def test_a_killed_run_resumes_exactly_or_the_self_test_fails(tmp_path: Path, fault: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
         "--master_port", str(free_port()), str(selftest_faults.__file__),
         "--output", str(tmp_path), "--phases", "resume"],
        cwd=ROOT, capture_output=True, text=True, timeout=500, check=False,
        env={**os.environ, "FAULT": fault, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
             "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    page = (tmp_path / "selftest.txt").read_text()
    failures = [line for line in page.splitlines() if "FAIL  " in line]
    if fault == "none":
        assert result.returncode == 0, page
        assert failures == [] and page.rstrip().endswith("VERDICT: PASS (6 of 6 checks)")
        assert not (tmp_path / "resume").exists(), "what passed is cleaned up"
        return
    assert result.returncode == 1, page
    assert len(failures) == 1 and "it goes on from the newest checkpoint: refused" in failures[0]
    assert (tmp_path / "resume" / "killed-2-rank1.log").exists()


def script(folder: Path, phases: str, *, fault: str) -> tuple[int, str]:
    """`bash slurm/selftest.sh` with a fault on rank 1; its exit code and page.

    The interpreter that it is given puts the faulty double in the place of launcher/selftest.py.
    """
    python = folder / "python"
    double = str(selftest_faults.__file__).replace("/", "\\/")
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'[[ $* == *--summary* && $* != *--no-summary* ]] && exec {sys.executable} "$@"\n'
        f'exec {sys.executable} "${{@//launcher\\/selftest.py/{double}}}"\n'
    )
    python.chmod(0o755)
    result = subprocess.run(
        ["bash", "slurm/selftest.sh", "--ranks", "2", "--output", str(folder / "out"),
         "--phases", phases],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHON": str(python), "FAULT": fault, "FAULT_RANK": "1",
             "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    page = (folder / "out" / "selftest.txt").read_text()
    assert page in result.stdout
    return result.returncode, page


def test_the_script_ends_with_1_and_one_page(tmp_path: Path) -> None:
    code, page = script(tmp_path, "bandwidth", fault="sum")
    assert code == 1
    assert "FAIL  all-reduce: " in page and "PASS  all-gather: " in page
    assert page.rstrip().endswith("VERDICT: FAIL (2 of 3 checks)")
    assert "torch " in page and "ranks     2 on cpu" in page


def test_a_rank_that_dies_in_one_phase_takes_no_other_with_it(tmp_path: Path) -> None:
    code, page = script(tmp_path, "isolation,bandwidth", fault="raise")
    assert code == 1
    assert page.count("FAIL  ") == 1 and "FAIL  the phase itself: " in page
    assert page.rstrip().endswith("VERDICT: FAIL (3 of 4 checks)")
