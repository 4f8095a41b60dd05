"""Which traces a run really consumed, over all its attempts, and whether each step's are its own.

`watch` makes a rank write down what its loader hands to every training step, and which steps it
has finished; a line is one system call, so `kill -9` loses none. `lost_and_duplicated` then plays
the attempts one after the other: an attempt that begins at step f takes back everything from f on.
What is left is the history that made the final weights, and must be the plan, step by step.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Attempt:
    """One start of a run.

    Attributes:
        first: first step (1-based) whose rows are not in the weights it began with: the one after
            its checkpoint, or the first that any rank began where that is not known; None where it
            did not get that far.
        traces: indices that all ranks together were given, by step.
        done: how many ranks finished each step.
        world_size: number of ranks.
    """

    world_size: int
    first: int | None = None
    traces: dict[int, list[int]] = field(default_factory=dict)
    done: Counter[int] = field(default_factory=Counter)
    knows_first: bool = False

    def resumed(self, step: int) -> None:
        """A rank took weights that `step` steps have made; 0 for a fresh start."""
        self.first, self.knows_first = step + 1, True

    def began(self, step: int, traces: list[int]) -> None:
        """A rank was given its share of a step."""
        if not self.knows_first:
            self.first = step if self.first is None else min(self.first, step)
        self.traces.setdefault(step, []).extend(traces)

    def finished(self, step: int) -> None:
        """A rank has done its share of a step, the optimizer's part included."""
        self.done[step] += 1


Plan = dict[int, list[int]]


def surviving(attempts: list[Attempt]) -> Plan:
    """Traces by step, as far as no later attempt took the step back. Unfinished steps don't count."""
    history: Plan = {}
    for attempt in attempts:
        if attempt.first is None:
            continue
        history = {step: traces for step, traces in history.items() if step < attempt.first}
        for step, traces in attempt.traces.items():
            if attempt.done[step] >= attempt.world_size:
                # One before `first` is in the weights already, and now a second time.
                history[step] = history.get(step, []) + traces
    return history


def lost_and_duplicated(attempts: list[Attempt], plan: Plan) -> tuple[int, int]:
    """Traces of the plan that the surviving history lacks, and those it has too often."""
    history = surviving(attempts)
    lost = duplicated = 0
    for step in plan.keys() | history.keys():
        wanted, got = Counter(plan.get(step, [])), Counter(history.get(step, []))
        lost += (wanted - got).total()
        duplicated += (got - wanted).total()
    return lost, duplicated


def covers_every_epoch(plan: Plan, *, num_traces: int, steps_per_epoch: int) -> bool:
    """Whether every whole epoch of a plan holds every trace exactly once."""
    steps = sorted(plan)
    if steps != list(range(1, len(steps) + 1)):
        return False
    for start in range(0, len(steps) - steps_per_epoch + 1, steps_per_epoch):
        epoch = steps[start : start + steps_per_epoch]
        if sorted(trace for step in epoch for trace in plan[step]) != list(range(num_traces)):
            return False
    return True


# -- files -----------------------------------------------------------------------------------


def _file(folder: Path, attempt: int, rank: int) -> Path:
    return folder / f"attempt-{attempt:03d}.rank-{rank}.jsonl"


def read(folder: Path, world_sizes: list[int]) -> list[Attempt]:
    """What the ranks of each attempt wrote down; `world_sizes` says how many they were."""
    attempts = []
    for number, world_size in enumerate(world_sizes):
        attempt = Attempt(world_size)
        for rank in range(world_size):
            file = _file(folder, number, rank)
            for line in file.read_text().splitlines() if file.exists() else ():
                entry = json.loads(line)
                if "done" in entry:
                    attempt.finished(entry["done"])
                elif "resumed" in entry:
                    attempt.resumed(entry["resumed"])
                else:
                    attempt.began(entry["step"], entry["traces"])
        attempts.append(attempt)
    return attempts


def watch(folder: str | Path, attempt: int, rank: int) -> None:
    """Make this process, a rank that has not begun to train, write its history down.

    It also draws a random number per step, as dropout would: else no final state could tell whether
    the state of the generator was restored.
    """
    import torch

    from nmar_ds.data.loader import RowLoader
    from nmar_ds.training import checkpoints
    from nmar_ds.training.loop import TrainingLoop

    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(_file(Path(folder), attempt, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    training: dict[str, bool] = {"now": False}

    def write(**entry: Any) -> None:
        os.write(descriptor, (json.dumps(entry) + "\n").encode())

    find_newest = checkpoints.find_newest

    def find(*args: Any, **kwargs: Any) -> Any:
        found = find_newest(*args, **kwargs)
        write(resumed=0 if found is None else found.step)
        return found

    checkpoints.find_newest = find
    batches_of_step, forward_backward = RowLoader.batches_of_step, TrainingLoop.forward_backward

    def batches(self: Any, step: int) -> Any:
        found = batches_of_step(self, step)
        if training["now"]:  # the canary looks at a step's rows too
            write(
                step=step + 1,
                traces=[int(t) for batch in found for t in batch.trace_ids if t >= 0],
            )
        return found

    def forward(self: Any, step: int, **kwargs: Any) -> Any:
        training["now"] = True
        try:
            result = forward_backward(self, step, **kwargs)
        finally:
            training["now"] = False
        torch.rand(())
        write(done=step + 1)
        return result

    RowLoader.batches_of_step = batches  # type: ignore[method-assign]
    TrainingLoop.forward_backward = forward  # type: ignore[method-assign]
