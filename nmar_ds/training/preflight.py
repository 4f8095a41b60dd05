"""Measure every node before a job is trusted with it: one bad one makes all the others wait.

Run by the ranks of a job exactly as training is, so it goes the same ways (launcher, container,
network). Each rank measures itself; rank 0 judges (`nmar_ds.acceptance.judgement`). What only a
GPU has (memory, driver, NCCL) follows torch's documented calls and has not yet run on one.
"""

# n side of a square matmul, K inner side of an exact one

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nmar_ds import __version__
from nmar_ds.acceptance.judgement import Limits, RankFacts, Row, judge, leave_out, spans
from nmar_ds.errors import FolderError, PeerLostError
from nmar_ds.files import about, free_bytes
from nmar_ds.training.checkpoints import write_atomically
from nmar_ds.training.engine import ProcessPeers, all_reduce
from nmar_ds.training.nodes import POLL_SECONDS
from nmar_ds.training.ranks import Ranks

MATMUL_SIDE = {"cpu": 512, "cuda": 8192}
MATMUL_SECONDS = 1.0
# -1, 0, 1 times -1, 0, 1 over 256 places: whole numbers up to 256, which bfloat16 holds exactly.
EXACT_SIDE = 256
EXACT_PRODUCTS = 3
LINK_BYTES = {"cpu": 2**22, "cuda": 2**28}
REPEATS = 5
CLOCK_ROUNDS = 8
PACKAGES = ("torch", "deepspeed", "transformers", "numpy")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What preflight found; the same on every rank.

    Attributes:
        rows: the table.
        facts: one per rank.
        seconds: it took.
    """

    rows: list[Row]
    facts: list[RankFacts]
    seconds: float

    @property
    def bad(self) -> list[Row]:
        """The rows that decide the exit code."""
        return [row for row in self.rows if row.verdict == "bad"]

    def table(self, *, most: int = 200) -> str:
        """One line per check; of a large job only what is not good."""
        rows = (
            self.rows if len(self.rows) <= most else [r for r in self.rows if r.verdict != "good"]
        )
        cells = [("node", "ranks", "check", "value", "verdict")]
        cells += [(r.node, spans(r.ranks), r.check, r.value, r.verdict) for r in rows]
        widths = [max(len(line[column]) for line in cells) for column in range(5)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ]
        hidden = len(self.rows) - len(rows)
        return "\n".join([*lines, *([f"({hidden} more, all good)"] if hidden else [])])

    def as_json(self) -> str:
        """Content of preflight.json."""
        return json.dumps(
            {
                "good": not self.bad,
                "seconds": round(self.seconds, 3),
                "nodes": list(dict.fromkeys(one.node for one in self.facts)),
                "world_size": len(self.facts),
                "rows": [row.as_json() for row in self.rows],
            },
            indent=1,
        )


# Tests plant faults by replacing these.
def node_name() -> str:
    """Who this machine is."""
    return socket.gethostname()


wall_clock: Callable[[], float] = time.time


class CheckIn:
    """Where ranks say that they have come so far, so that a silent one can be named.

    A collective that times out says nothing of who did not come; and NCCL's may not end at all.

    Args:
        ranks: this process among its peers.
        timeout_seconds: longest wait for the others.
    """

    def __init__(self, ranks: Ranks, *, timeout_seconds: int) -> None:
        self.ranks, self.seconds = ranks, timeout_seconds
        self.place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self._store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
            timeout=datetime.timedelta(seconds=timeout_seconds), wait_for_workers=False,
        )  # fmt: skip
        self._prefix = f"preflight/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._names: list[str] = []

    def know(self, names: Sequence[str]) -> None:
        """Host names by rank, once they are gathered."""
        self._names = list(names)

    def after(self, stage: str) -> None:
        """Say that `stage` is behind this rank, and wait until it is behind all.

        Raises:
            PeerLostError: names the ranks and nodes that have not come.
        """
        deadline = time.monotonic() + self.seconds
        missing = set(range(self.ranks.world_size))
        try:
            self._store.set(f"{self._prefix}/{stage}/{self.ranks.rank}", "")
            while True:
                for rank in list(missing):
                    if self._store.check([f"{self._prefix}/{stage}/{rank}"]):
                        missing.discard(rank)
                if not missing:
                    return
                if time.monotonic() > deadline:
                    raise self._silent(stage, sorted(missing))
                time.sleep(POLL_SECONDS / 10)
        except RuntimeError as error:
            raise PeerLostError(
                f"bad node {self._node(0)} (ranks 0): {stage}: the ranks' meeting place at "
                f"{self.place} went away ({str(error).splitlines()[0]})"
            ) from None

    def _node(self, rank: int) -> str:
        return self._names[rank] if self._names else "of unknown name"

    def _silent(self, stage: str, missing: list[int]) -> PeerLostError:
        nodes: dict[str, list[int]] = {}
        for rank in missing:
            nodes.setdefault(self._node(rank), []).append(rank)
        error = PeerLostError(
            "\n".join(
                f"bad node {node} (ranks {spans(ranks)}): {stage}: no answer within "
                f"{self.seconds} s, expected one; {leave_out(node)}"
                for node, ranks in nodes.items()
            )
        )
        present = set(range(self.ranks.world_size)) - set(missing)
        error.shared = self.ranks.rank != min(present)  # one of those who know says it
        return error


def run_preflight(
    ranks: Ranks,
    device: torch.device,
    *,
    output: Path,
    dtype: torch.dtype,
    checkpoint_bytes: int,
    limits: Limits,
    timeout_seconds: int,
) -> Report:
    """Measure and judge all nodes. Collective.

    Args:
        ranks: this process among its peers; the process group is up.
        device: of this rank.
        output: run folder; made if it is missing.
        dtype: of the matmul that is timed.
        checkpoint_bytes: of one checkpoint of the run.
        limits: what is still good.
        timeout_seconds: longest wait for a silent rank.

    Raises:
        PeerLostError: names the ranks that went silent.
    """
    started = time.monotonic()
    peers = ProcessPeers()
    checked = CheckIn(ranks, timeout_seconds=timeout_seconds)
    names = peers.gather(node_name())
    checked.know(names)
    facts = device_facts(ranks, device)
    checked.after("devices")
    facts |= folder_facts(output, peers)
    facts |= {"file_clock": file_clock(output)} if not facts["folder_problem"] else {}
    checked.after("run folder")
    firsts = [rank for rank, name in enumerate(names) if name not in names[:rank]]
    facts |= {"clock": clock_offset(firsts, peers.rank, device)}
    facts |= dict(zip(("wrong", "unstable"), wrong_products(device, dtype), strict=True))
    checked.after("products")
    facts |= {"flops": matmul_flops(device, dtype, MATMUL_SIDE[device.type])}
    checked.after("matmul")
    members = firsts if len(firsts) > 1 else list(range(ranks.world_size))
    num_bytes = LINK_BYTES[device.type]
    links = link_seconds(members, peers, device, num_bytes)
    checked.after("links")
    together = all_reduce_seconds(device, num_bytes)
    everyone: list[RankFacts] = peers.gather(RankFacts(**facts))
    rows = judge(
        everyone, links, link_bytes=num_bytes, checkpoint_bytes=checkpoint_bytes, limits=limits
    )
    if together is not None:
        rows.append(all_reduce_row(together, num_bytes, ranks.world_size))
    return Report(rows=rows, facts=everyone, seconds=time.monotonic() - started)


def all_reduce_row(seconds: float, num_bytes: int, world_size: int) -> Row:
    """The figure of all ranks together, which names nobody: all wait for the slowest."""
    bus = 2 * (world_size - 1) / world_size * num_bytes / seconds / 1e9
    return Row(
        node="all", ranks=tuple(range(world_size)), check="all-reduce", verdict="noted",
        value=f"{num_bytes / 2**20:.0f} MiB in {seconds * 1e3:.3g} ms, {bus:.3g} GB/s per rank",
    )  # fmt: skip


def write_report(report: Report, output: Path) -> None:
    """`preflight.json` in the run folder.

    Raises:
        FolderError: it cannot be written.
    """
    try:
        write_atomically(output / "preflight.json", report.as_json() + "\n")
    except OSError as error:
        raise FolderError(about(error, output)) from None


def versions(device: torch.device) -> dict[str, str]:
    """What must be the same on all nodes."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    found |= {"nmar_ds": __version__, "python": platform.python_version()}
    found["machine"] = platform.machine()
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        found["gpu"] = torch.cuda.get_device_name(device)
        driver = Path("/proc/driver/nvidia/version")
        found["driver"] = driver.read_text().splitlines()[0] if driver.exists() else "unknown"
    return found


def device_facts(ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Devices, memory, versions and room for temporary files, of this rank."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = tuple(sorted(affinity(0))) if affinity else tuple(range(os.cpu_count() or 1))
    is_gpu = device.type == "cuda"
    tmp = tempfile.gettempdir()
    return {
        "node": node_name(),
        "rank": ranks.rank,
        "local_rank": ranks.local_rank,
        "local_world_size": ranks.local_world_size,
        "device": device.type,
        "visible": torch.cuda.device_count() if is_gpu else len(cores),
        "cores": cores,
        "versions": versions(device),
        "gpu_memory": torch.cuda.mem_get_info(device) if is_gpu else None,
        "tmp": tmp,
        "tmp_free": shutil.disk_usage(tmp).free,
    }


def folder_facts(output: Path, peers: ProcessPeers) -> dict[str, Any]:
    """Whether this rank sees what rank 0 writes into the run folder, and may write there."""
    probe, problem = f".seen-{secrets.token_hex(8)}", ""
    if peers.rank == 0:
        problem = _touched(output, probe)
    probe, first_problem = peers.broadcast((probe, problem))
    sees = bool(first_problem) or (output / probe).exists()
    own = f"{probe}-{peers.rank}"
    problem = problem or _touched(output, own)
    everybody = peers.gather(sees)  # nobody removes anything before all have looked
    for name in (own, probe) if peers.rank == 0 else (own,):
        (output / name).unlink(missing_ok=True)
    return {"sees_folder": everybody[peers.rank], "folder_problem": problem,
            "free": free_bytes(output)}  # fmt: skip


def _touched(folder: Path, name: str) -> str:
    """Make an empty file; why it could not be made, or ""."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    except OSError as error:
        return about(error, folder)
    return ""


def file_clock(folder: Path) -> float:
    """Seconds that the file system's clock is ahead of this machine's."""
    before = wall_clock()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock-") as file:
        after = wall_clock()
        return os.fstat(file.fileno()).st_mtime - (before + after) / 2


def clock_offset(firsts: Sequence[int], rank: int, device: torch.device) -> float | None:
    """Seconds that this rank's clock is ahead of rank 0's; None where it is no node's first.

    As NTP does it: the answer's time belongs to the middle between question and receipt, and the
    quickest of a few rounds errs least (by half its round trip at most).
    """
    time_1 = torch.zeros(1, dtype=torch.float64, device=device)
    if rank == 0:
        for other in firsts[1:]:
            rounds = []
            for _ in range(CLOCK_ROUNDS):
                asked = wall_clock()
                dist.send(time_1, other)
                dist.recv(time_1, other)
                answer, received = float(time_1), wall_clock()
                rounds.append((received - asked, answer - (asked + received) / 2))
            dist.send(torch.full_like(time_1, min(rounds)[1]), other)
        return 0.0
    if rank not in firsts:
        return None
    for _ in range(CLOCK_ROUNDS):
        dist.recv(time_1, 0)
        dist.send(torch.full_like(time_1, wall_clock()), 0)
    dist.recv(time_1, 0)
    return float(time_1)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product that is timed and checked."""
    return a @ b


def wrong_products(device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
    """Silent data corruption: products of whole numbers that every dtype holds exactly.

    Returns:
        Elements that differ from NumPy's integer product, and elements of a large product that
        differ between two repeats on one device.
    """
    wrong = 0
    for seed in range(EXACT_PRODUCTS):
        rng = np.random.default_rng(seed)
        a, b = (rng.integers(-1, 2, size=(EXACT_SIDE, EXACT_SIDE)) for _ in range(2))
        seen = matmul(*(torch.from_numpy(x).to(device, dtype) for x in (a, b)))
        wrong += int((seen.double().cpu().numpy() != a @ b).sum())
    side = MATMUL_SIDE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a_nn = torch.randn(side, side, generator=generator, device=device).to(dtype)
    return wrong, int((matmul(a_nn, a_nn) != matmul(a_nn, a_nn)).sum())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_flops(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Median floating-point operations per second of an n x n product, over about a second."""
    a_nn = torch.ones(side, side, device=device, dtype=dtype)
    for _ in range(2):
        matmul(a_nn, a_nn)
    _synchronize(device)
    dist.barrier()  # all at once, as in training: cores and power are shared
    seconds: list[float] = []
    end = time.monotonic() + MATMUL_SECONDS
    while len(seconds) < REPEATS or time.monotonic() < end:
        started = time.perf_counter()
        matmul(a_nn, a_nn)
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / statistics.median(seconds)


def rounds_of_links(members: Sequence[int]) -> list[list[tuple[int, int]]]:
    """The ring over these ranks, in rounds in which no rank has two links."""
    num = len(members)
    ring = [(members[i], members[(i + 1) % num]) for i in range(num if num > 2 else num - 1)]
    last = [ring.pop()] if num > 2 and num % 2 else []
    return [part for part in (ring[::2], ring[1::2], last) if part]


def link_seconds(
    members: Sequence[int], peers: ProcessPeers, device: torch.device, num_bytes: int
) -> dict[tuple[int, int], float]:
    """Median round trip between neighbours of the ring; the same on every rank. Collective."""
    buffer = torch.ones(num_bytes // 4, device=device)
    mine: dict[tuple[int, int], float] = {}
    for links in rounds_of_links(members):
        dist.barrier()
        for first, second in links:
            if peers.rank == first:
                mine[first, second] = _round_trip(buffer, second, device)
            elif peers.rank == second:
                for _ in range(REPEATS + 1):
                    dist.recv(buffer, first)
                    dist.send(buffer, first)
    return {pair: seconds for part in peers.gather(mine) for pair, seconds in part.items()}


def _round_trip(buffer: torch.Tensor, other: int, device: torch.device) -> float:
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        dist.send(buffer, other)
        dist.recv(buffer, other)
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])  # the first one opens the connection


def all_reduce_seconds(device: torch.device, num_bytes: int) -> float | None:
    """Median time of an all-reduce over all ranks; None where there is but one. Collective."""
    if dist.get_world_size() == 1:
        return None
    buffer = torch.zeros(num_bytes // 4, device=device)
    seconds = []
    for _ in range(REPEATS + 1):
        dist.barrier()
        started = time.perf_counter()
        all_reduce(buffer)
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
