"""Fifty random lives of a run: it dies, is stopped, changes its ranks, and reads every trace once.

Each script draws data, seed, batch and ranks; the real loader hands the rows out to every rank, the
real protocol publishes checkpoints (and dies at its named places), and `find_newest` says where the
next attempt begins. tests/faults/history.py, which the soak judges real runs by, plays it back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from history import Attempt, Plan, covers_every_epoch, lost_and_duplicated, surviving

from nmar_ds.data.loader import RowLoader, count_targets
from nmar_ds.data.packing import pack
from nmar_ds.training import checkpoints

POINTS = ("cleared", "before_write", "after_write", "after_hash", "read_back",
          "before_manifest", "written_aside:manifest.json", "after_manifest", "after_rename", "written_aside:latest",
          "after_latest", "committed")  # fmt: skip
NUM_SCRIPTS = 50


class Died(BaseException):
    """Stands for kill -9."""


class Alone:
    rank, world_size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value


class Traces:
    """Only lengths matter here; ids and roles are zeros."""

    def __init__(self, lengths: np.ndarray[Any, Any]) -> None:
        self.lengths = lengths

    def ids(self, index: int) -> np.ndarray[Any, Any]:
        return np.zeros(self.lengths[index], dtype=np.int32)

    def roles(self, index: int) -> np.ndarray[Any, Any]:
        return np.zeros(self.lengths[index], dtype=np.uint8)


class Script:
    """A run's data and settings, drawn."""

    def __init__(self, number: int, folder: Path) -> None:
        self.draw = draw = np.random.default_rng([4, number])
        self.folder = folder
        capacity = int(draw.integers(4, 40))
        self.lengths = draw.integers(1, capacity + 1, size=int(draw.integers(1, 500)))
        self.traces = Traces(self.lengths)
        self.packed = pack(self.lengths, capacity)
        self.counts = count_targets(len(self.lengths), self.traces.roles)
        self.seed, self.batch = int(draw.integers(2**31)), int(draw.choice([12, 24]))
        self.every = int(draw.integers(1, 6))
        steps_per_epoch = self.loader(0, 1).steps_per_epoch
        # From a part of an epoch to four of them.
        self.steps = max(3, min(30, int(draw.uniform(0.5, 4) * steps_per_epoch)))
        self.attempts: list[Attempt] = []
        self.verified: set[str] = set()

    def loader(self, rank: int, world_size: int, micro: int = 1) -> RowLoader:
        return RowLoader(
            self.traces, self.packed, self.counts, seed=self.seed, global_batch_rows=self.batch,
            micro_batch_rows=micro, rank=rank, world_size=world_size, pad_id=0,
        )  # fmt: skip

    def attempt(self, reached: Callable[[Callable[[str], None]], None]) -> bool:
        """One start with ranks of its own; returns whether the run is complete."""
        draw = self.draw
        world_size, micro = int(draw.integers(1, 8)), int(draw.choice([1, 2, 5]))
        micro = micro if -(-self.batch // micro) >= world_size else 1
        loaders = [self.loader(rank, world_size, micro) for rank in range(world_size)]
        attempt = Attempt(world_size)
        self.attempts.append(attempt)
        found = checkpoints.find_newest(self.folder, report=pytest.fail)
        first = 0 if found is None else found.step
        self.verified = set() if found is None else {found.folder.name}
        last = first + int(draw.integers(0, 9))  # of this attempt, or beyond the run's end
        end = draw.choice(["dies in a step", "dies in a save", "stops"])
        for step in range(first, self.steps):
            dies = step == last and end == "dies in a step"
            for rank in draw.permutation(world_size):
                if dies and draw.random() < 0.5:
                    continue
                batches = loaders[rank].batches_of_step(step)
                attempt.began(step + 1, [int(t) for b in batches for t in b.trace_ids if t >= 0])
                # Some ranks may be through the optimizer's step when another dies.
                if not dies or draw.random() < 0.5:
                    attempt.finished(step + 1)
            if dies:
                return False
            done, stops = step + 1, step == last and end == "stops"
            if done == self.steps or stops or done % self.every == 0:
                dying = str(draw.choice(POINTS)) if end == "dies in a save" and step >= last else ""
                if not self.save(done, dying, reached):
                    return False
            if stops and done < self.steps:
                return False
        return True

    def save(self, step: int, dying: str, reached: Callable[..., None]) -> bool:
        def reach(point: str) -> None:
            if point == dying:
                raise Died(point)

        def write(folder: Path, tag: str) -> None:
            (folder / tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"state")

        reached(reach)
        try:
            checkpoints.publish(
                write,
                self.folder,
                step=step,
                facts={},
                peers=Alone(),
                keep=2,
                verified=self.verified,
            )
        except Died:
            return False
        return True


@pytest.mark.parametrize("number", range(NUM_SCRIPTS))
def test_every_trace_exactly_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(number, tmp_path)
    # What one rank reads that nothing interrupts.
    alone, plan = script.loader(0, 1), {}
    for step in range(script.steps):
        batches = alone.batches_of_step(step)
        plan[step + 1] = [int(t) for batch in batches for t in batch.trace_ids if t >= 0]
    assert covers_every_epoch(
        plan, num_traces=len(script.lengths), steps_per_epoch=alone.steps_per_epoch
    )
    for _ in range(200):
        if script.attempt(lambda reach: monkeypatch.setattr(checkpoints, "reached", reach)):
            break
    else:
        pytest.fail("the run does not end")
    assert lost_and_duplicated(script.attempts, plan) == (0, 0)
    assert sorted(surviving(script.attempts)) == sorted(plan)


def test_the_scripts_are_eventful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the fifty prove little: attempts, changes of ranks, replayed steps, filled-up epochs."""
    attempts = changes = replayed = epochs = 0
    for number in range(NUM_SCRIPTS):
        script = Script(number, tmp_path / str(number))
        while not script.attempt(lambda reach: monkeypatch.setattr(checkpoints, "reached", reach)):
            pass
        attempts += len(script.attempts)
        sizes = [attempt.world_size for attempt in script.attempts]
        changes += sum(a != b for a, b in pairwise(sizes))
        replayed += sum(len(attempt.traces) for attempt in script.attempts) - script.steps
        epochs += script.steps > script.loader(0, 1).steps_per_epoch
    assert attempts > 100 and changes > 60 and replayed > 60 and epochs > 20, (
        attempts,
        changes,
        replayed,
        epochs,
    )


# -- the judge -------------------------------------------------------------------------------

PLAN: Plan = {1: [0, 1], 2: [2, 3], 3: [4, 5]}


def lived(world_size: int, steps: dict[int, list[int]], *unfinished: int) -> Attempt:
    attempt = Attempt(world_size)
    for step, traces in steps.items():
        for rank in range(world_size):
            attempt.began(step, traces[rank::world_size])
            if step not in unfinished or rank == 0:
                attempt.finished(step)
    return attempt


@pytest.mark.parametrize(
    ("attempts", "expected"),
    [
        ([lived(2, PLAN)], (0, 0)),
        ([lived(1, {1: [0, 1]}), lived(2, {2: [2, 3], 3: [4, 5]})], (0, 0)),
        # A step that was taken back and done again, and one that one rank had finished.
        ([lived(2, {1: [0, 1], 2: [2, 3]}), lived(2, {2: [3, 2], 3: [4, 5]})], (0, 0)),
        ([lived(2, {1: [0, 1], 2: [2, 3]}, 2), lived(2, {2: [2, 3], 3: [4, 5]})], (0, 0)),
        ([Attempt(2), lived(2, PLAN), Attempt(2)], (0, 0)),
        # One that was begun, never finished, and not done again.
        ([lived(2, {1: [0, 1], 2: [2, 3]}, 2), lived(2, {3: [4, 5]})], (2, 0)),
        ([lived(2, {1: [0, 1]}), lived(2, {3: [4, 5]})], (2, 0)),
        ([lived(2, {1: [0, 1], 2: [2, 3]})], (2, 0)),
        ([lived(2, {1: [0, 1], 2: [2, 2], 3: [4, 5]})], (1, 1)),
        ([lived(2, {1: [0, 2], 2: [1, 3], 3: [4, 5]})], (2, 2)),  # another set in two steps
        ([lived(2, {1: [0, 1], 2: [2, 3], 3: [4, 5, 6]})], (0, 1)),
        ([lived(2, {**PLAN, 4: [6, 7]})], (0, 2)),
        ([lived(2, PLAN), lived(2, {2: [2, 3]})], (2, 0)),
        ([], (6, 0)),
    ],
)
def test_the_judge(attempts: list[Attempt], expected: tuple[int, int]) -> None:
    assert lost_and_duplicated(attempts, PLAN) == expected


def test_the_judge_knows_the_checkpoint_an_attempt_began_with() -> None:
    """Steps after it are taken back also where the attempt skips them; those before are done twice."""
    for begins, expected in ((2, (0, 0)), (3, (2, 0)), (1, (0, 2))):
        resumed = lived(2, {step: PLAN[step] for step in range(begins, 4)})
        resumed.resumed(1)
        assert lost_and_duplicated([lived(2, {1: [0, 1], 2: [2, 3]}), resumed], PLAN) == expected


def test_the_judge_of_epochs() -> None:
    assert covers_every_epoch({1: [1, 0], 2: [2], 3: [0]}, num_traces=3, steps_per_epoch=2)
    assert not covers_every_epoch({1: [1, 0], 2: [1], 3: [2]}, num_traces=3, steps_per_epoch=2)
    assert not covers_every_epoch({1: [0, 1], 3: [2]}, num_traces=3, steps_per_epoch=2)
