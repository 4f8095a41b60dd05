"""Which rank this process is, read from the environment its launcher set. No torch here.

DeepSpeed asks MPI when one of the five variables is missing, and then silently starts a world of
size one (`deepspeed/comm/comm.py::init_distributed`). Here a missing or contradictory variable
is an error in the first second.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

from nmar_ds.errors import LaunchError
from nmar_ds.training.schedulers import as_launched, number

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among its peers.

    Attributes:
        rank: index among all processes, 0 to world_size - 1.
        local_rank: index among the processes of this machine.
        world_size: number of processes, which is the ZeRO group.
        local_world_size: number of processes on this machine.
        meeting_place: host and port of rank 0, or None for a process alone.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    meeting_place: tuple[str, str] | None = field(default=None, compare=False)


def discover_ranks(environ: Mapping[str, str]) -> Ranks:
    """Read the ranks that the launcher set; none of them set means one process.

    `deepspeed` and `torchrun` come first: they also run inside jobs of Slurm and of MPI.

    Raises:
        LaunchError: some variables are set and others missing, or they contradict each other.
    """
    present = [name for name in VARIABLES if environ.get(name)]
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & set(present):
        launched = as_launched(environ)
        if launched is not None:
            return discover_ranks(launched)
        # The shell of `sbatch` or `salloc`, where no launcher has been called yet.
        if environ.get("SLURM_NTASKS", "1") not in ("", "1"):
            raise LaunchError(
                f"environment: SLURM_NTASKS: is {environ['SLURM_NTASKS']}, but RANK, LOCAL_RANK "
                "and WORLD_SIZE are not set and this is no step of the job, expected srun, "
                "deepspeed or torchrun before the command: one process would train alone"
            )
        return Ranks(rank=0, local_rank=0, world_size=1, local_world_size=1)
    missing = [name for name in VARIABLES if name not in present]
    if missing:
        raise LaunchError(
            f"environment: {', '.join(missing)}: not set although {present[0]} is; start with "
            "deepspeed or torchrun, which set all of them, or unset the others"
        )
    rank, local_rank = number(environ, "RANK"), number(environ, "LOCAL_RANK")
    world_size = number(environ, "WORLD_SIZE")
    if not 0 < number(environ, "MASTER_PORT") < 65536:
        raise LaunchError(
            f"environment: MASTER_PORT: is {environ['MASTER_PORT']}, expected 1 to 65535"
        )
    local_name = "LOCAL_WORLD_SIZE" if environ.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE"
    local_size = number(environ, local_name) if environ.get(local_name) else world_size
    if not 0 <= rank < world_size:
        raise LaunchError(
            f"environment: RANK: is {rank}, expected less than WORLD_SIZE {world_size}"
        )
    if not local_rank < local_size <= world_size:
        raise LaunchError(
            f"environment: LOCAL_RANK: is {local_rank} of {local_size} local ranks in a world of "
            f"{world_size}, expected LOCAL_RANK < {local_name} <= WORLD_SIZE"
        )
    return Ranks(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=local_size,
        meeting_place=(environ["MASTER_ADDR"], environ["MASTER_PORT"]),
    )


def complete_environment(environ: MutableMapping[str, str], ranks: Ranks) -> None:
    """Give a process the variables DeepSpeed insists on, whoever started it.

    And one for torch, which reads it at its first tensor: large blocks of host memory in pages of
    2 MB. A step's gradients and buffers are fresh memory, and 512 times fewer pages are 512 times
    fewer interruptions by the kernel (where it grants them: /sys/kernel/mm/transparent_hugepage).
    """
    environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if ranks.meeting_place is not None:
        environ["MASTER_ADDR"], environ["MASTER_PORT"] = ranks.meeting_place
    if ranks.world_size == 1 and not environ.get("MASTER_PORT"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            environ["MASTER_PORT"] = str(probe.getsockname()[1])
        environ["MASTER_ADDR"] = "127.0.0.1"
    if not environ.get("MASTER_ADDR"):
        environ["MASTER_ADDR"] = "127.0.0.1"
    environ["RANK"] = str(ranks.rank)
    environ["LOCAL_RANK"] = str(ranks.local_rank)
    environ["WORLD_SIZE"] = str(ranks.world_size)
    environ["LOCAL_SIZE"] = str(ranks.local_world_size)


def own_cpus() -> frozenset[int]:
    """The CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def threads_per_rank(own: frozenset[int], others: Sequence[frozenset[int]]) -> int:
    """CPU threads for this rank: its share of the CPUs, unless OMP_NUM_THREADS says otherwise.

    A CPU is divided among the ranks that may run on it and no others. `deepspeed` and `torchrun`
    let all ranks of a machine run everywhere; `srun` binds each to CPUs of its own, which are then
    not divided once more; `mpirun` binds few ranks to a core and more to a socket they share.

    Args:
        own: the CPUs this rank may run on.
        others: those of each other rank of this machine.
    """
    set_by_user = os.environ.get("OMP_NUM_THREADS", "")
    if set_by_user.isdecimal() and int(set_by_user) > 0:
        return int(set_by_user)
    share = sum(1 / (1 + sum(cpu in other for other in others)) for cpu in own)
    return max(1, int(share + 1e-6))
