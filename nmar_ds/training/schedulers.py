"""Ranks as `srun` and `mpirun` announce them, in the names that `deepspeed` and `torchrun` use.

No torch here. Where the two disagree about who started a process, the nearer launcher wins:
mpirun's own variables, then those of a job step. The shell of a batch script is in no step although
it has SLURM_PROCID=0 and SLURM_NTASKS, so a plain `python` there is not rank 0 of SLURM_NTASKS.
Sources: the "OUTPUT ENVIRONMENT VARIABLES" of srun(1); Open MPI, "Environment variables set by
mpirun"; MPICH's hydra, `proxy/pmip_cb.c`.
"""

from __future__ import annotations

import os
import re
import subprocess
import zlib
from collections.abc import Callable, Mapping
from typing import Literal

from nmar_ds.errors import LaunchError

FIRST_PORT, NUM_PORTS = 20000, 10000  # below Linux's ephemeral range; slurm/lib.sh has the same
STEP_VARIABLES = ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST")
_OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
             "OMPI_COMM_WORLD_LOCAL_SIZE")  # fmt: skip
_HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


def number(environ: Mapping[str, str], name: str) -> int:
    """A variable as a whole number, or a LaunchError that names it."""
    text = environ[name]
    if not (text.isascii() and text.isdecimal()):
        raise LaunchError(f"environment: {name}: is {text!r}, expected a whole number")
    return int(text)


def tasks_per_node(text: str, name: str = "SLURM_STEP_TASKS_PER_NODE") -> list[int]:
    """`2(x3),1` as [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part)
        if match is None:
            raise LaunchError(f"environment: {name}: is {text!r}, expected a list like 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def port_of_job(job: int) -> int:
    """Where the ranks of a job meet: the same on all nodes, another for the next job."""
    return FIRST_PORT + job % NUM_PORTS


def host_names(nodes: str) -> list[str]:
    """`n[1-3]` as ["n1", "n2", "n3"], by Slurm itself."""
    try:
        result = subprocess.run(
            ["scontrol", "show", "hostnames", "--", nodes],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise LaunchError(
            f"environment: MASTER_ADDR: is not set, and `scontrol show hostnames {nodes}` failed "
            f"({str(error).splitlines()[0]}); set MASTER_ADDR to the first node's name"
        ) from None
    return result.stdout.split()


def as_launched(
    environ: Mapping[str, str], names_of: Callable[[str], list[str]] = host_names
) -> dict[str, str] | None:
    """The variables of `torchrun` for a process of `srun` or `mpirun`, or None for any other.

    Args:
        environ: of this process.
        names_of: expands a node list.

    Raises:
        LaunchError: some of the launcher's variables are missing or contradict each other.
    """
    if (names := _mpirun_names(environ)) is not None:
        return _from_mpirun(environ, names)
    if _in_a_step(environ):
        return _from_srun(environ, names_of)
    return None


def launcher_of(environ: Mapping[str, str]) -> Literal["mpirun", "srun"] | None:
    """Which of both started this process, if one did."""
    if _mpirun_names(environ) is not None:
        return "mpirun"
    return "srun" if _in_a_step(environ) else None


def _in_a_step(environ: Mapping[str, str]) -> bool:
    return any(environ.get(name) for name in STEP_VARIABLES)


def _mpirun_names(environ: Mapping[str, str]) -> tuple[str, ...] | None:
    """The names of the mpirun that started this process."""
    for names in (_OPEN_MPI, _HYDRA):
        # Open MPI and hydra set all four; srun with PMI-2 sets PMI_RANK and PMI_SIZE alone.
        ours = [name for name in names if environ.get(name)]
        if ours and not (_in_a_step(environ) and set(ours) <= {"PMI_RANK", "PMI_SIZE"}):
            return names
    return None


def _insist(environ: Mapping[str, str], names: tuple[str, ...], launcher: str) -> None:
    missing = [name for name in names if not environ.get(name)]
    if missing:
        present = next(name for name in (*names, *STEP_VARIABLES) if environ.get(name))
        raise LaunchError(
            f"environment: {', '.join(missing)}: not set although {present} is; {launcher} sets "
            "all of them: start with it, or unset the others"
        )


def _from_mpirun(environ: Mapping[str, str], names: tuple[str, ...]) -> dict[str, str]:
    _insist(environ, names, "mpirun")
    rank, size, local, local_size = names
    found = {"RANK": environ[rank], "WORLD_SIZE": environ[size], "LOCAL_RANK": environ[local],
             "LOCAL_WORLD_SIZE": environ[local_size]}  # fmt: skip
    found |= {n: environ[n] for n in ("MASTER_ADDR", "MASTER_PORT") if environ.get(n)}
    one_host = number(environ, size) == number(environ, local_size)
    if not one_host and len({"MASTER_ADDR", "MASTER_PORT"} & set(found)) < 2:
        raise LaunchError(
            "environment: MASTER_ADDR, MASTER_PORT: mpirun started ranks on several hosts and does "
            "not say where they meet; set both (`mpirun -genv` or `-x`): the first host, a free "
            "port"
        )
    found.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in found:
        # All ranks have the same of these, and two jobs of a host have not. A batch job may start
        # several mpiruns, one after the other.
        job = next((environ[n] for n in ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid",
                    "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID") if environ.get(n)), None)  # fmt: skip
        # Hydra's proxy is the parent of all ranks of its host.
        found["MASTER_PORT"] = str(port_of_job(zlib.crc32(job.encode()) if job else os.getppid()))
    return found


def _from_srun(environ: Mapping[str, str], names_of: Callable[[str], list[str]]) -> dict[str, str]:
    needed = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NODEID")
    _insist(environ, needed, "srun")
    size = number(environ, "SLURM_NTASKS")
    rank, node = number(environ, "SLURM_PROCID"), number(environ, "SLURM_NODEID")
    name = "SLURM_STEP_TASKS_PER_NODE"
    if not environ.get(name):
        name = "SLURM_TASKS_PER_NODE"
        _insist(environ, (name,), "srun")
    counts = tasks_per_node(environ[name], name)
    announced = environ.get("SLURM_STEP_NUM_TASKS") or environ["SLURM_NTASKS"]
    if announced != environ["SLURM_NTASKS"]:
        raise LaunchError(
            f"environment: SLURM_NTASKS: is {size}, but SLURM_STEP_NUM_TASKS is {announced}, "
            "expected the same; start the ranks with srun, and pass no SLURM_* on by hand"
        )
    if sum(counts) != size:
        raise LaunchError(
            f"environment: {name}: is {environ[name]}, {sum(counts)} tasks in all, expected "
            f"SLURM_NTASKS {size}"
        )
    if not rank < size:
        raise LaunchError(
            f"environment: SLURM_PROCID: is {rank}, expected less than SLURM_NTASKS {size}"
        )
    if not node < len(counts):
        raise LaunchError(
            f"environment: SLURM_NODEID: is {node}, expected less than the {len(counts)} nodes of "
            f"{name}"
        )
    if not number(environ, "SLURM_LOCALID") < counts[node]:
        raise LaunchError(
            f"environment: SLURM_LOCALID: is {environ['SLURM_LOCALID']}, expected less than the "
            f"{counts[node]} tasks of node {node} in {name}"
        )
    found = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(counts[node]),
             "LOCAL_RANK": environ["SLURM_LOCALID"]}  # fmt: skip
    if not environ.get("MASTER_PORT"):
        _insist(environ, ("SLURM_JOB_ID",), "srun")
        found["MASTER_PORT"] = str(port_of_job(number(environ, "SLURM_JOB_ID")))
    else:
        found["MASTER_PORT"] = environ["MASTER_PORT"]
    if environ.get("MASTER_ADDR"):
        found["MASTER_ADDR"] = environ["MASTER_ADDR"]
    elif len(counts) == 1:
        found["MASTER_ADDR"] = "127.0.0.1"
    else:
        _insist(environ, ("SLURM_STEP_NODELIST",), "srun")
        found["MASTER_ADDR"] = (names_of(environ["SLURM_STEP_NODELIST"]) or [""])[0]
    return found
