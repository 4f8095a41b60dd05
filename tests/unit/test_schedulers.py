"""Ranks under srun and mpirun, and which launcher wins where several left their variables."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nmar_ds.errors import LaunchError
from nmar_ds.training.ranks import Ranks, complete_environment, discover_ranks
from nmar_ds.training.schedulers import as_launched, port_of_job, tasks_per_node

ROOT = Path(__file__).resolve().parents[2]
BATCH = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
         "SLURM_NODEID": "0", "SLURM_TASKS_PER_NODE": "2(x3),1"}  # fmt: skip
STEP = {**BATCH, "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
        "SLURM_STEP_NODELIST": "n[1-4]", "MASTER_ADDR": "n1"}  # fmt: skip
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            "MASTER_ADDR": "a", "MASTER_PORT": "5"}  # fmt: skip
TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x",
            "MASTER_PORT": "1234", "LOCAL_WORLD_SIZE": "2"}  # fmt: skip


def four(ranks: Ranks) -> tuple[int, int, int, int]:
    return ranks.rank, ranks.local_rank, ranks.world_size, ranks.local_world_size


def at(procid: int, local: int, node: int) -> dict[str, str]:
    return {**STEP, "SLURM_PROCID": str(procid), "SLURM_LOCALID": str(local),
            "SLURM_NODEID": str(node)}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (STEP, (0, 0, 7, 2)),
        (at(5, 1, 2), (5, 1, 7, 2)),
        (at(6, 0, 3), (6, 0, 7, 1)),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": ""}, (0, 0, 7, 2)),
        ({**at(5, 1, 2), "PMI_RANK": "5", "PMI_SIZE": "7"}, (5, 1, 7, 2)),  # srun --mpi=pmi2
        (HYDRA, (1, 1, 2, 2)),
        (OPEN_MPI, (3, 1, 4, 2)),
        ({**STEP, **HYDRA}, (1, 1, 2, 2)),  # hydra starts its proxies with srun
        ({**STEP, **OPEN_MPI}, (3, 1, 4, 2)),
        ({**BATCH, **TORCHRUN}, (1, 1, 2, 2)),
        ({**STEP, **TORCHRUN}, (1, 1, 2, 2)),  # one torchrun per node, by srun
        ({**OPEN_MPI, **TORCHRUN}, (1, 1, 2, 2)),
        ({**BATCH, "SLURM_NTASKS": "1"}, (0, 0, 1, 1)),
    ],
)
def test_the_nearest_launcher_wins(
    environ: dict[str, str], expected: tuple[int, int, int, int]
) -> None:
    assert four(discover_ranks(environ)) == expected


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        (BATCH, "SLURM_NTASKS: is 7, but RANK, LOCAL_RANK and WORLD_SIZE are not set"),
        *(({k: v for k, v in STEP.items() if k != name}, f"{name}: not set although")
          for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NODEID")),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, "SLURM_NTASKS: is 7, but SLURM_STEP_NUM_TASKS is 1"),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "2(x3)"}, "6 tasks in all, expected SLURM_NTASKS 7"),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "2(x"}, "expected a list like 2(x3),1"),
        (at(7, 0, 0), "SLURM_PROCID: is 7, expected less than SLURM_NTASKS 7"),
        (at(6, 1, 3), "SLURM_LOCALID: is 1, expected less than the 1 tasks of node 3"),
        (at(6, 0, 4), "SLURM_NODEID: is 4, expected less than the 4 nodes"),
        ({**STEP, "SLURM_PROCID": "x"}, "SLURM_PROCID: is 'x', expected a whole number"),
        ({**STEP, "SLURM_JOB_ID": ""}, "SLURM_JOB_ID: not set although"),
        *(({k: v for k, v in HYDRA.items() if k != name}, f"{name}: not set although")
          for name in HYDRA),
        ({**HYDRA, "PMI_SIZE": "4"}, "MASTER_ADDR, MASTER_PORT: mpirun started ranks on several"),
        ({**HYDRA, "PMI_RANK": "2"}, "RANK: is 2, expected less than WORLD_SIZE 2"),
    ],
)  # fmt: skip
def test_contradictions_are_one_line(environ: dict[str, str], said: str) -> None:
    with pytest.raises(LaunchError, match=re.escape(said)) as caught:
        discover_ranks(environ)
    assert "\n" not in str(caught.value)


def test_the_meeting_place() -> None:
    environ = {k: v for k, v in STEP.items() if k != "MASTER_ADDR"}
    found = as_launched(environ, lambda nodes: {"n[1-4]": ["n1", "n2"]}[nodes])
    assert found is not None
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("n1", str(20000 + 4711))
    completed = dict(STEP)
    complete_environment(completed, discover_ranks(STEP))
    assert (completed["MASTER_ADDR"], completed["MASTER_PORT"]) == ("n1", "24711")
    # The one formula stands in the shell too.
    assert "$((20000 + SLURM_JOB_ID % 10000))" in (ROOT / "slurm/lib.sh").read_text()
    assert port_of_job(10**9 + 7) == 20007
    ports = {discover_ranks({**HYDRA, "PMI_RANK": r}).meeting_place for r in ("0", "1")}
    assert len(ports) == 1 and next(iter(ports))[0] == "127.0.0.1"  # type: ignore[index]
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1] and tasks_per_node("8") == [8]


def test_a_contradiction_ends_the_launcher_in_two_seconds(tmp_path: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PMI", "OMPI"))}
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "launcher/train.py", "--config", "configs/quickstart.yaml"], cwd=ROOT,
        env={**clean, **BATCH, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: environment: SLURM_NTASKS: is 7")
    assert time.monotonic() - started < 2 * 5  # promised on an idle machine: 2


def test_values_for_shell_scripts(tmp_path: Path) -> None:
    def get(key: str, *more: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-m", "nmar_ds.config", "--null", "--get", key, "--config",
             "configs/quickstart.yaml", *more],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False,
        )  # fmt: skip

    assert get("output", 'output="a b\\n$(id)"').stdout == b"a b\n$(id)\0"
    assert get("data.train", "data.train=[x, y]").stdout == b"x\0y\0"
    bad = get("output", "outptu=x")
    assert bad.returncode == 2 and bad.stdout == b"" and b"outptu" in bad.stderr
    assert get("nothing").returncode == 2
