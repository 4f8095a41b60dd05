"""The self-test on two real ranks: it passes where all is well, and every phase can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import selftest_faults
from pool import RankPool

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
    (exactness,) = run(two_ranks, tmp_path, "exactness", "world")
    wrong = failed([exactness])
    for case in (
        "2 micro-batches, float32",
        "1 micro-batches, float32",
        "2 micro-batches, bfloat16",
    ):
        assert f"2 ranks x {case}: gradients = independent autograd" in wrong
    assert "g_SFT - g_mSFT = G_e / D" in wrong
    assert not [check for check in wrong if check.startswith("packed")]


def test_another_denominator_fails_the_identity(two_ranks: RankPool) -> None:
    lines = two_ranks.run(selftest_faults.safety_gap, fault="trained")[0]
    assert [line.check for line in lines if not line.passed] == ["g_SFT - g_mSFT = G_e / D"]
    assert len(lines) == 3


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


def test_an_earlier_result_does_not_stand_in_for_a_phase_that_died(tmp_path: Path) -> None:
    from nmar_ds.acceptance.verdict import Line, PhaseResult

    line = Line(check="old", passed=True, seen="1", expected="1")
    PhaseResult(phase="bandwidth", lines=[line], seconds=1).save(tmp_path)
    python = tmp_path / "python"
    python.write_text(
        f'#!/usr/bin/env bash\n[[ $* == *--summary ]] || exit 3\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    result = subprocess.run(
        ["bash", "slurm/selftest.sh", "--output", str(tmp_path), "--phases", "bandwidth"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHON": str(python)},
    )  # fmt: skip
    assert result.returncode == 1
    assert "phase bandwidth ended with exit code 3" in result.stdout
    assert "left no result" in result.stdout and "VERDICT: FAIL (0 of 1 checks)" in result.stdout


def test_under_slurm_each_phase_is_a_step_whose_tasks_know_their_rank(tmp_path: Path) -> None:
    """With stand-ins for srun, scontrol and the interpreter."""
    (tmp_path / "scontrol").write_text("#!/usr/bin/env bash\nprintf 'n7\\nn8\\n'\n")
    (tmp_path / "srun").write_text(
        "#!/usr/bin/env bash\n[[ $1 == --kill-on-bad-exit=1 ]] || exit 9\nshift\n"
        'for p in 0 1 2 3; do SLURM_PROCID=$p SLURM_LOCALID=$((p % 2)) "$@"; done\n'
    )
    python = tmp_path / "py thon"
    python.write_text(
        '#!/usr/bin/env bash\necho "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR '
        f'$MASTER_PORT|$*" >>"{tmp_path}/log"\n'
    )
    for name in ("scontrol", "srun", "py thon"):
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "123", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NTASKS": "4",
             "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[7-8]"}  # fmt: skip
    spool = tmp_path / "spool.sh"  # as Slurm does: a copy of the script, elsewhere
    spool.write_text((ROOT / "slurm/selftest.sh").read_text())
    output = str(tmp_path / "a b")
    result = subprocess.run(
        ["bash", str(spool), "--output", output, "--phases", "isolation,bandwidth",
         "--min-bandwidth", "2"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, **slurm, "PYTHON": str(python),
             "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 9
    for step, phase in enumerate(("isolation", "bandwidth")):
        for rank in range(4):
            environ, words = lines[4 * step + rank].split("|")
            assert environ == f"{rank} {rank % 2} 4 2 n7 {20000 + 123 * 8 + step}"
            assert words == (
                f"launcher/selftest.py --output {output} --phases {phase} --no-summary "
                "--min-bandwidth 2"
            )
    assert lines[8].endswith("--phases isolation,bandwidth --summary")


def test_the_script_takes_the_job_scripts_interpreter(tmp_path: Path) -> None:
    """NMAR_VENV and NMAR_CONTAINER mean here what slurm/lib.sh makes of them."""
    for folder in ("slurm", "launcher"):
        (tmp_path / folder).mkdir()
    (tmp_path / "launcher/selftest.py").write_text("")
    (tmp_path / "slurm/selftest.sh").write_text((ROOT / "slurm/selftest.sh").read_text())
    (tmp_path / "slurm/lib.sh").write_text(
        'set_up() { nmar_python=(echo in "$NMAR_VENV" of "$NMAR_HOME"); }\n'
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    result = subprocess.run(
        ["bash", "slurm/selftest.sh", "--phases", "bandwidth"], cwd=tmp_path, text=True,
        capture_output=True, timeout=60, check=False, env={**environment, "NMAR_VENV": "/a b"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert last.startswith(f"in /a b of {tmp_path} launcher/selftest.py --output runs/selftest")
