"""Which rank this process is, read from the environment its launcher set. No torch here.

DeepSpeed asks MPI when one of the five variables is missing, and then silently starts a world of
size one (`deepspeed/comm/comm.py::init_distributed`). Here a missing or contradictory variable
is an error in the first second.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from nmar_ds.errors import LaunchError

# Sizes that other launchers announce.
OTHER_LAUNCHERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among its peers.

    Attributes:
        rank: index among all processes, 0 to world_size - 1.
        local_rank: index among the processes of this machine.
        world_size: number of processes, which is the ZeRO group.
        local_world_size: number of processes on this machine.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name]
    if not text.isdecimal():
        raise LaunchError(f"environment: {name}: is {text!r}, expected a whole number")
    return int(text)


def discover_ranks(environ: Mapping[str, str]) -> Ranks:
    """Read the ranks that `deepspeed` or `torchrun` set; none of them set means one process.

    Raises:
        LaunchError: some variables are set and others missing, or they contradict each other.
    """
    present = [name for name in VARIABLES if environ.get(name)]
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & set(present):
        for name in OTHER_LAUNCHERS:
            if environ.get(name, "1") not in ("", "1"):
                raise LaunchError(
                    f"environment: {name}: is {environ[name]}, but RANK, LOCAL_RANK and "
                    "WORLD_SIZE are not set, expected all of them: every process would train alone"
                )
        return Ranks(rank=0, local_rank=0, world_size=1, local_world_size=1)
    missing = [name for name in VARIABLES if name not in present]
    if missing:
        raise LaunchError(
            f"environment: {', '.join(missing)}: not set although {present[0]} is; start with "
            "deepspeed or torchrun, which set all of them, or unset the others"
        )
    rank, local_rank = _number(environ, "RANK"), _number(environ, "LOCAL_RANK")
    world_size = _number(environ, "WORLD_SIZE")
    if not 0 < _number(environ, "MASTER_PORT") < 65536:
        raise LaunchError(
            f"environment: MASTER_PORT: is {environ['MASTER_PORT']}, expected 1 to 65535"
        )
    local_name = "LOCAL_WORLD_SIZE" if environ.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE"
    local_size = _number(environ, local_name) if environ.get(local_name) else world_size
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
        rank=rank, local_rank=local_rank, world_size=world_size, local_world_size=local_size
    )


def complete_environment(environ: MutableMapping[str, str], ranks: Ranks) -> None:
    """Give a process started on its own the variables DeepSpeed insists on."""
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


def threads_per_rank(ranks: Ranks) -> int:
    """CPU threads for this rank: its share of the cores, unless OMP_NUM_THREADS says otherwise."""
    set_by_user = os.environ.get("OMP_NUM_THREADS", "")
    if set_by_user.isdecimal() and int(set_by_user) > 0:
        return int(set_by_user)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // ranks.local_world_size)
