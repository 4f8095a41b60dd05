"""Ranks as threads, with a fake engine: what takes a real pair of ranks seconds takes these none."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nmar_ds.errors import NmarError
from nmar_ds.training.checkpoints import publish

SMALL = 200


class Died(BaseException):
    """Stands for kill -9: no handler of the code under test may see it."""


class Alone:
    rank, world_size = 0, 1

    def barrier(self) -> None: ...

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value


class Table:
    """What the peers of one run share: a real barrier, and a slot per rank."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size, timeout=20)
        self.slots: list[Any] = [None] * world_size


class ThreadPeers:
    """One rank; remembers its collectives, and takes them from its own thread alone."""

    def __init__(self, table: Table, rank: int) -> None:
        self.table, self.rank, self.world_size = table, rank, table.world_size
        self.owner = threading.current_thread()
        self.called: list[str] = []

    def barrier(self) -> None:
        assert threading.current_thread() is self.owner, "a collective in a background thread"
        try:
            self.table.barrier.wait()
        except threading.BrokenBarrierError:
            raise Died("a peer is gone") from None

    def _exchange(self, value: Any) -> list[Any]:
        self.table.slots[self.rank] = json.loads(json.dumps(value))  # nothing shared by accident
        self.barrier()
        result = list(self.table.slots)
        self.barrier()
        return result

    def gather(self, value: Any) -> list[Any]:
        self.called.append("gather")
        return self._exchange(value)

    def broadcast(self, value: Any) -> Any:
        self.called.append("broadcast")
        return self._exchange(value)[0]


def rank_of_thread() -> int:
    """Of a rank's own thread, or of one that works for it in the background."""
    found = re.search(r"rank ?(\d+)", threading.current_thread().name)
    assert found is not None
    return int(found.group(1))


def run_ranks(world: int, work: Callable[[ThreadPeers], Any]) -> list[Any]:
    """Do the work as `world` ranks in threads; what each returned or ended with.

    A rank that dies takes its peers out of their next collective. An error that all raise, each in
    its time, does not.
    """
    table = Table(world)
    ends: list[Any] = [None] * world

    def run(rank: int) -> None:
        try:
            ends[rank] = work(ThreadPeers(table, rank))
        except BaseException as error:
            ends[rank] = error
            if not isinstance(error, NmarError):
                table.barrier.abort()

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank{rank}") for rank in range(world)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank hangs"
    return ends


def content(step: int, name: str) -> bytes:
    return np.random.default_rng([step, *name.encode()]).bytes(SMALL)


def files_of(rank: int) -> list[str]:
    names = [
        f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt",
        f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
    ]
    return [*names, "mp_rank_00_shared.pt"] if rank == 0 else names


def saver(step: int, rank: int) -> Callable[[Path, str], None]:
    def save(folder: Path, tag: str) -> None:
        (folder / tag).mkdir(exist_ok=True)
        for name in files_of(rank):
            (folder / tag / name).write_bytes(content(step, name))

    return save


Save = Callable[[int, int], Callable[[Path, str], None]]


def publish_together(
    folder: Path,
    step: int,
    *,
    world: int = 2,
    keep: int = 2,
    save: Save = saver,
    verified: set[str] | None = None,
) -> list[BaseException | None]:
    """Publish as `world` ranks in threads; what each of them ended with.

    `verified` is rank 0's; without, the ranks are those of a run that has read nothing so far.
    """

    def work(peers: ThreadPeers) -> None:
        publish(
            save(step, peers.rank), folder, step=step, facts={"run": {"seed": 1}, "cursor": step},
            peers=peers, keep=keep,
            verified=set() if verified is None or peers.rank else verified,
        )  # fmt: skip

    return run_ranks(world, work)
