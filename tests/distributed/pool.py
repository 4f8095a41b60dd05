"""A persistent group of real ranks for tests: processes, gloo, DeepSpeed; started once per module.

Starting two DeepSpeed ranks costs 10 to 40 seconds, so a module's tests share them. A test sends
a function by name; every rank runs it and returns its result.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_main(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
    )
    from nmar_ds.training.engine import start_process_group
    from nmar_ds.training.ranks import discover_ranks

    start_process_group(discover_ranks(os.environ), timeout_seconds=120)
    while True:
        task = pipe.recv()
        if task is None:
            return
        function, args, kwargs = task
        try:
            pipe.send((True, function(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class RankPool:
    """`world_size` ranks that wait for work."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self._pipes = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank_main, args=(rank, world_size, port, theirs), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = 180, **kwargs: Any
    ) -> list[Any]:
        """Run a module-level function on every rank; results in order of rank."""
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout):
                self.close()
                raise TimeoutError(f"rank {rank} did not answer {function.__name__} in {timeout} s")
            answers.append(pipe.recv())
        for rank, (fine, value) in enumerate(answers):
            if not fine:
                raise AssertionError(f"rank {rank} failed in {function.__name__}:\n{value}")
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except (OSError, ValueError):
                continue
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
