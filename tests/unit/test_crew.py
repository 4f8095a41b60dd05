"""Who prepares together: never two writers, and a contradiction is one line."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from nmar_ds.data.crew import Crew, Started, Tasks, crew_of
from nmar_ds.errors import LaunchError

HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "3",
}  # fmt: skip


def crew(tmp_path: Path, environ: dict[str, str], **asked: Any) -> Crew:
    return crew_of(
        **{"workers": None, "mpi": False, **asked}, meeting=tmp_path, command=["x"], environ=environ
    )


def test_alone_unless_asked(tmp_path: Path) -> None:
    # A batch script's shell has these, and is in no step.
    batch = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "3", "SLURM_PROCID": "0"}
    for environ, asked in (({}, {}), ({}, {"workers": 1}), (batch, {}),
                           ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, {})):  # fmt: skip
        found = crew(tmp_path, environ, **asked)
        assert type(found) is Crew and (found.rank, found.size) == (0, 1)
    found = crew(tmp_path, {}, workers=3)
    assert isinstance(found, Started) and found.size == 3


@pytest.mark.parametrize(
    ("environ", "asked", "message"),
    [
        (HYDRA, {"workers": 2}, "--workers 2: with mpirun, which starts the processes itself"),
        (OPEN_MPI, {"workers": 2}, "--workers 2: with mpirun"),
        (SRUN, {"workers": 2}, "--workers 2: with srun"),
        ({}, {"workers": 2, "mpi": True}, "--workers 2: with --mpi"),
        ({}, {"workers": 0}, "--workers: 0, expected at least 1"),
        ({**SRUN, "SLURM_PROCID": "3"}, {}, "SLURM_PROCID: is 3, expected less than 3"),
        ({**SRUN, "SLURM_JOB_ID": ""}, {}, "environment: SLURM_JOB_ID: not set"),
    ],
)
def test_contradictions_are_one_line(
    environ: dict[str, str], asked: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(LaunchError) as caught:
        crew(tmp_path, environ, **asked)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_without_mpi4py_and_with_that_of_another_mpi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(LaunchError, match=r"mpi4py cannot be imported .*--workers N"):
        crew(tmp_path, HYDRA)

    class World:
        Get_rank = staticmethod(lambda: 0)
        Get_size = staticmethod(lambda: 1)

    class Module:
        class MPI:
            COMM_WORLD = World()

    monkeypatch.setitem(sys.modules, "mpi4py", Module)
    for environ in (HYDRA, OPEN_MPI):  # each would be the one that writes
        with pytest.raises(LaunchError, match="started 2 processes, mpi4py sees 1"):
            crew(tmp_path, environ)
    with pytest.raises(LaunchError, match="started 3 processes, mpi4py sees 1"):
        crew(tmp_path, SRUN, mpi=True)
    assert crew(tmp_path, {}, mpi=True).size == 1


def test_tasks_of_srun_meet_in_a_file_of_their_step(tmp_path: Path) -> None:
    (tmp_path / "srun-6-0-0.json").write_text('"of another step"')
    heard: list[Any] = []
    others = [crew(tmp_path, {**SRUN, "SLURM_PROCID": rank}) for rank in ("1", "2")]
    threads = [threading.Thread(target=lambda one=one: heard.append(one.share(None)))
               for one in others]  # fmt: skip
    for thread in threads:
        thread.start()
    refused = crew(tmp_path, {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_ID": "1"})
    assert refused.share(None) is None  # which leaves others' messages alone
    assert (tmp_path / "srun-6-0-0.json").exists()
    first = crew(tmp_path, {**SRUN, "SLURM_PROCID": "0"})
    assert isinstance(first, Tasks) and first.size == 3
    assert first.share({"x": 1}) == {"x": 1}
    for thread in threads:
        thread.join(10)
    assert heard == [{"x": 1}] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["srun-7-0-0.json"]
