"""Ranks on several machines: they meet, or one line says who is missing and where to look.

Left alone, torch waits for the whole timeout when a node was started with a wrong rank or another
hostfile, and then speaks of sockets; gloo takes the address that the host name resolves to, which
is 127.0.0.1 on many machines. Here every rank first writes down at the meeting place who it is.
The first that sees a contradiction writes that down too, so that all stop at once.
"""

from __future__ import annotations

import datetime
import json
import secrets
import socket
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch.distributed.distributed_c10d import PrefixStore

from nmar_ds.errors import ConfigError, LaunchError
from nmar_ds.training.ranks import Ranks, own_cpus

POLL_SECONDS = 0.1
# How long the host of the meeting place stays to let its peers read why it goes.
LINGER_SECONDS = 2.0
CHECKS = "check MASTER_ADDR, MASTER_PORT, the firewall and what the other nodes print"


def choose_interface(environ: MutableMapping[str, str], ranks: Ranks) -> None:
    """Let gloo use the network that leads to MASTER_ADDR, unless GLOO_SOCKET_IFNAME is set.

    gloo's own choice is the address of this machine's host name, often 127.0.0.1, where no other
    machine can reach it.

    Raises:
        LaunchError: GLOO_SOCKET_IFNAME names no interface with an address, or MASTER_ADDR no host.
    """
    addresses = {
        name: {entry.address.partition("%")[0] for entry in entries if entry.family in _IP}
        for name, entries in psutil.net_if_addrs().items()
    }
    chosen = environ.get("GLOO_SOCKET_IFNAME")
    if chosen:
        for name in chosen.split(","):
            if not addresses.get(name):
                usable = ", ".join(sorted(n for n, a in addresses.items() if a)) or "none"
                raise LaunchError(
                    f"environment: GLOO_SOCKET_IFNAME: {name} is no network interface with an "
                    f"address on {socket.gethostname()}, expected one of: {usable}"
                )
        return
    if ranks.world_size == ranks.local_world_size:
        return
    own = _address_towards(environ["MASTER_ADDR"], int(environ["MASTER_PORT"]))
    for name, values in addresses.items():
        if own in values:
            environ["GLOO_SOCKET_IFNAME"] = name
            return
    raise LaunchError(
        f"environment: MASTER_ADDR: {environ['MASTER_ADDR']} is reached from {own}, which no "
        "network interface holds; set GLOO_SOCKET_IFNAME to the one that joins the nodes"
    )


_IP = (socket.AF_INET, socket.AF_INET6)


def _address_towards(host: str, port: int) -> str:
    """This machine's address on the way to a host. A UDP connect sends nothing."""
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise LaunchError(
            f"environment: MASTER_ADDR: {host}: {error.strerror or error}, expected the name or "
            "address of the first node, reachable from this one"
        ) from None


class Meeting(NamedTuple):
    """What `meet` found.

    Attributes:
        store: where the ranks met. Keep it until the process group is made, which meets there
            again.
        cpus_of_others: the CPUs that each other rank of this machine may run on.
    """

    store: Any
    cpus_of_others: list[frozenset[int]]


def meet(ranks: Ranks, environ: MutableMapping[str, str], *, timeout_seconds: int) -> Meeting:
    """Wait until every rank of the world has come to MASTER_ADDR:MASTER_PORT.

    Args:
        ranks: from `discover_ranks`.
        environ: complete; see `complete_environment`.
        timeout_seconds: longest wait for the others.

    Raises:
        LaunchError: nobody answers there, ranks are missing, two claim one rank, or they were
            started for worlds of different sizes.
    """
    place = f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}"
    deadline = time.monotonic() + timeout_seconds
    # Under torchrun the agent of the first node is the host, and outlives the ranks' attempts.
    hosted = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_host = ranks.rank == 0 and not hosted
    try:
        store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
            environ["MASTER_ADDR"],
            int(environ["MASTER_PORT"]),
            is_master=is_host,
            timeout=datetime.timedelta(seconds=timeout_seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        raise _no_place(place, is_host, timeout_seconds, error) from None
    prefix = f"nmar/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/"
    book = PrefixStore(prefix, store)
    try:
        _sign(book, ranks, place)
        _wait_for_all(book, ranks, place, deadline, timeout_seconds)
        return Meeting(store, _cpus_of_others(book, ranks))
    except RuntimeError:
        gone = LaunchError(f"the ranks' meeting place at {place} went away; {CHECKS}")
        gone.shared = True
        raise gone from None
    except LaunchError:
        if is_host:
            time.sleep(LINGER_SECONDS)
        raise


def _no_place(place: str, is_host: bool, seconds: int, error: RuntimeError) -> LaunchError:
    if is_host:
        return LaunchError(
            f"{place} cannot be opened on this node ({str(error).splitlines()[0]}); expected an "
            "address of the node with rank 0 and a free port: another run may use it, or two "
            "nodes were given the same rank"
        )
    result = LaunchError(
        f"{place} (MASTER_ADDR:MASTER_PORT) does not answer, after {seconds} s "
        f"(training.timeout_seconds); {CHECKS}"
    )
    result.shared = True  # as all ranks of this node
    return result


def _sign(book: Any, ranks: Ranks, place: str) -> None:
    """Write down who this rank is. Of two that claim one rank the second reports it."""
    mine = {"host": socket.gethostname(), "world_size": ranks.world_size}
    if book.add(f"claims/{ranks.rank}", 1) > 1:
        _fail(
            book,
            f"two processes at {place} are rank {ranks.rank}, one of them on {mine['host']}; "
            "expected another --node_rank on every node",
        )
    book.set(f"cpus/{mine['host']}/{ranks.local_rank}", json.dumps(sorted(own_cpus())))
    book.set(f"rank/{ranks.rank}", json.dumps(mine))


def _cpus_of_others(book: Any, ranks: Ranks) -> list[frozenset[int]]:
    """After all have signed. Where LOCAL_WORLD_SIZE counts ranks of other machines, those here."""
    places = [f"cpus/{socket.gethostname()}/{local}" for local in range(ranks.local_world_size)]
    del places[ranks.local_rank]
    return [frozenset(json.loads(book.get(place))) for place in places if book.check([place])]


def _wait_for_all(book: Any, ranks: Ranks, place: str, deadline: float, seconds: int) -> None:
    missing = set(range(ranks.world_size))
    while True:
        if book.check(["problem"]):
            error = LaunchError(book.get("problem").decode())
            error.shared = True
            raise error
        for rank in [rank for rank in missing if book.check([f"rank/{rank}"])]:
            missing.discard(rank)
            theirs = json.loads(book.get(f"rank/{rank}"))
            if theirs["world_size"] != ranks.world_size:
                _fail(
                    book,
                    f"rank {rank} on {theirs['host']} was started for {theirs['world_size']} "
                    f"ranks, rank {ranks.rank} on {socket.gethostname()} for {ranks.world_size}; "
                    "expected the same hostfile, or --nnodes and --nproc_per_node, on every node",
                )
        if not missing:
            return
        if time.monotonic() > deadline:
            names = ", ".join(str(rank) for rank in sorted(missing)[:16])
            _fail(
                book,
                f"of {ranks.world_size} ranks these have not come to {place} within {seconds} s "
                f"(training.timeout_seconds): {names}; {CHECKS}",
            )
        time.sleep(POLL_SECONDS)


def _fail(book: Any, problem: str) -> None:
    """Tell all ranks; the first to do so reports its own words, the others repeat them."""
    error = LaunchError(problem)
    if book.add("failures", 1) == 1:
        book.set("problem", problem)
    else:
        book.wait(["problem"], datetime.timedelta(seconds=LINGER_SECONDS))
        error = LaunchError(book.get("problem").decode())
        error.shared = True
    raise error


def check_same_everywhere(all_facts: list[dict[str, Any]]) -> None:
    """Refuse a world whose nodes read different data, settings or library versions.

    Args:
        all_facts: what decides the result, flat, by dotted name; one table per rank, in order of
            rank, the same list on every rank.

    Raises:
        LaunchError: names the first fact that differs, and the two ranks.
    """
    for rank, theirs in enumerate(all_facts):
        for name in sorted(all_facts[0].keys() | theirs.keys()):
            first, other = all_facts[0].get(name), theirs.get(name)
            if first != other:
                error = LaunchError(
                    f"{name}: is {first!r} on rank 0 and {other!r} on rank {rank}; expected the "
                    "same configuration, stores, packages and GPUs on every node"
                )
                error.shared = True
                raise error


def check_shared_folder(folder: Path, peers: Any) -> None:
    """Refuse a run folder that only some nodes see, before the first step rather than at a save.

    Raises:
        ConfigError: names the ranks that do not see what rank 0 has written.
        OSError: rank 0 cannot write there.
    """
    probe, problem = "", None
    if peers.rank == 0:
        probe = f".seen-{secrets.token_hex(8)}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / probe).touch()
        except OSError as error:
            problem = ConfigError(f"output: {folder}: {error.strerror or error}")
    probe, problem = peers.broadcast((probe, problem))
    seen = problem is not None or (folder / probe).exists()
    blind = [str(rank) for rank, sees in enumerate(peers.gather(seen)) if not sees]
    if peers.rank == 0 and problem is None:
        (folder / probe).unlink(missing_ok=True)
    if blind:
        problem = ConfigError(
            f"output: {folder}: ranks {', '.join(blind)} do not see what rank 0 writes there, "
            "expected a folder on a file system that all nodes share"
        )
    if problem is not None:
        problem.shared = True
        raise problem
