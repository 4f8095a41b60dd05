"""Saving behind training's back: the same protocol, the same deaths, and failures that are counted."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_ranks import (
    Died,
    ThreadPeers,
    content,
    files_of,
    publish_together,
    rank_of_thread,
    run_ranks,
)

from nmar_ds.errors import SaveError
from nmar_ds.training import checkpoints
from nmar_ds.training.checkpoints import find_newest, folder_name, step_folders, verify
from nmar_ds.training.saving import BackgroundSaver, BlockingSaver, Saver, Shelf, Work

FULL_DISK = OSError(errno.ENOSPC, "No space left on device")
WORKERS = "checkpoint writer of rank"


class Run:
    """One rank of a run with a fake engine, whose state is the step it has come to."""

    def __init__(
        self, peers: ThreadPeers, folder: Path, *, background: bool, max_failed: int = 3,
        disk: Callable[[int], None] = lambda step: None,
    ) -> None:  # fmt: skip
        self.peers, self.disk, self.step = peers, disk, 0
        self.lines: list[str] = []
        shelf = Shelf(folder=folder, peers=peers, facts={"run": {"seed": 1}}, keep=2)
        self.saver: Saver = BlockingSaver(shelf, lambda *place: self.copy(*place)())
        if background:
            self.saver = BackgroundSaver(
                shelf, self.copy, max_failed=max_failed,
                report=lambda step, total, line: self.lines.append(f"{total}: {line}"),
            )  # fmt: skip

    def copy(self, folder: Path, tag: str) -> Callable[[], None]:
        state = {name: content(self.step, name) for name in files_of(self.peers.rank)}
        step = self.step

        def write() -> None:
            self.disk(step)
            for name, value in state.items():
                (folder / tag / name).write_bytes(value)

        return write

    def train(self, saves: tuple[int, ...], last: int) -> None:
        """To the step `last`, with a save after each of `saves` and at the end."""
        for self.step in range(min(saves, default=1), last + 1):
            steps = self.peers.gather(self.step)  # as gradients are summed
            assert steps == [self.step] * self.peers.world_size, "ranks are at different places"
            if self.step in saves or self.step == last:
                self.saver.save(self.step)
            else:
                self.saver.settle()
        self.saver.finish()


def newest(folder: Path) -> int | None:
    """Its step; whole, and with the state that was at that step."""
    found = find_newest(folder, pytest.fail)
    for name in () if found is None else found.manifest["files"]:
        assert found is not None
        assert (found.folder / name).read_bytes() == content(found.step, name)
    return None if found is None else found.step


def wait_for_writers() -> None:
    """A process that died takes its threads along; a rank of this test does not."""
    for thread in threading.enumerate():
        if thread.name.startswith(WORKERS):
            thread.join(20)


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[str], None]], None]]:
    yield lambda replacement: monkeypatch.setattr(checkpoints, "reached", replacement)
    wait_for_writers()


# -- training goes on --------------------------------------------------------------------------


@pytest.mark.parametrize("slow", [0, 1])
def test_nothing_is_announced_before_the_slowest_rank_has_written(
    slow: int, tmp_path: Path
) -> None:
    release = threading.Event()
    trained: list[int] = []

    def work(peers: ThreadPeers) -> None:
        def disk(step: int) -> None:
            if peers.rank == slow:
                release.wait(20)

        run = Run(peers, tmp_path, background=True, disk=disk)
        run.step = 10
        run.saver.save(10)
        for run.step in range(11, 31):  # the state moves on under the copy
            run.saver.settle()
            assert newest(tmp_path) is None
            trained.append(run.step)
            time.sleep(0.005)
        assert (tmp_path / "step-00000010.partial").is_dir()
        release.set()
        while newest(tmp_path) is None:
            run.saver.settle()
            peers.gather(None)
            time.sleep(0.001)
        peers.gather(None)
        run.saver.finish()

    assert run_ranks(2, work) == [None, None]
    assert newest(tmp_path) == 10 and len(trained) == 40
    assert not list(tmp_path.glob("*.partial"))


def test_ranks_call_the_same_collectives_whatever_their_disks_do(tmp_path: Path) -> None:
    for number in range(12):
        draw = np.random.default_rng(number)
        delays = draw.uniform(0, 0.02, size=(3, 40)) * (draw.random((3, 40)) < 0.6)
        broken = draw.random((3, 40)) < 0.15
        called: list[list[str]] = [[], [], []]

        def work(
            peers: ThreadPeers, number: int = number, delays: Any = delays, broken: Any = broken,
            called: Any = called,
        ) -> list[str]:  # fmt: skip
            def disk(step: int) -> None:
                time.sleep(delays[peers.rank, step])
                if broken[peers.rank, step] and step != 20:
                    raise FULL_DISK

            called[peers.rank] = peers.called
            run = Run(peers, tmp_path / str(number), background=True, disk=disk, max_failed=99)
            run.train((2, 5, 6, 9, 15), 20)
            return run.lines

        ends = run_ranks(3, work)
        assert ends[0] == ends[1] == ends[2] and called[0] == called[1] == called[2]
        failed = [number for number in (2, 5, 6, 9, 15) if broken[:, number].any()]
        assert [line.split(" of step ")[1].split()[0] for line in ends[0]] == [
            str(s) for s in failed
        ]
        assert newest(tmp_path / str(number)) == 20


def test_a_save_that_is_due_waits_for_the_one_before(tmp_path: Path) -> None:
    def work(peers: ThreadPeers) -> None:
        run = Run(peers, tmp_path, background=True, disk=lambda step: time.sleep(0.1))
        for run.step in (1, 2, 3):
            run.saver.save(run.step)  # with no step between
            assert newest(tmp_path) == (run.step - 1 or None)
        run.saver.finish()

    assert run_ranks(2, work) == [None, None]
    assert newest(tmp_path) == 3
    assert [path.name for path in step_folders(tmp_path)] == [folder_name(3), folder_name(2)]


def test_both_ways_of_saving_write_the_same(tmp_path: Path) -> None:
    for background in (False, True):
        place = tmp_path / str(background)
        assert run_ranks(
            2, lambda peers, p=place, b=background: Run(peers, p, background=b).train((3, 6, 9), 11)
        ) == [None, None]
    for path in sorted((tmp_path / "True").rglob("*")):
        twin = tmp_path / "False" / path.relative_to(tmp_path / "True")
        assert twin.exists() and (path.is_dir() or path.read_bytes() == twin.read_bytes())
    assert [path.name for path in step_folders(tmp_path / "True")] == [
        folder_name(11),
        folder_name(9),
    ]


# -- sixteen deaths ----------------------------------------------------------------------------

DEATHS = ("before_write", "after_write", "after_hash", "read_back", "before_manifest",
          "after_manifest", "after_rename", "after_latest")  # fmt: skip
OF_RANK_0 = DEATHS[4:]  # there rank 1 waits to hear how it went, and dies waiting


def die_and_go_on(
    background: bool, victim: int, point: str, folder: Path, points: Callable[..., None]
) -> None:
    """Die in the second save; the first is found, verified, and the next attempt saves."""

    def first(peers: ThreadPeers) -> None:
        Run(peers, folder, background=background).train((), 10)

    def second(peers: ThreadPeers) -> None:
        ranks.append(peers)
        Run(peers, folder, background=background).train((20,), 23)

    def look(at: str) -> None:
        if at != point or not ranks:
            return
        if rank_of_thread() == victim:
            raise Died(point)
        if point in OF_RANK_0:
            ranks[0].table.barrier.abort()

    ranks: list[ThreadPeers] = []
    assert run_ranks(2, first) == [None, None]
    points(look)
    assert all(isinstance(end, Died) for end in run_ranks(2, second))
    wait_for_writers()
    # A rank 0 that lives until it hears of the death has finished what it was about.
    renamed = point in ("after_rename", "after_latest") or (point in OF_RANK_0 and victim == 1)
    assert newest(folder) == (20 if renamed else 10)
    points(lambda at: None)
    assert run_ranks(2, second) == [None, None]
    assert newest(folder) == 23 and not list(folder.glob("*.partial"))


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("point", DEATHS)
def test_sixteen_deaths_of_a_blocking_save(
    victim: int, point: str, tmp_path: Path, points: Callable[..., None]
) -> None:
    die_and_go_on(False, victim, point, tmp_path, points)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("point", DEATHS)
def test_sixteen_deaths_of_a_background_save(
    victim: int, point: str, tmp_path: Path, points: Callable[..., None]
) -> None:
    die_and_go_on(True, victim, point, tmp_path, points)


# -- a write that fails ------------------------------------------------------------------------


def fail_at(*steps: int, rank: int) -> Callable[[int], None]:
    def disk(step: int) -> None:
        if step in steps and rank_of_thread() == rank:
            raise FULL_DISK

    return disk


@pytest.mark.parametrize("broken", [0, 1])
def test_a_failed_write_is_counted_said_and_survived(broken: int, tmp_path: Path) -> None:
    def work(peers: ThreadPeers) -> list[str]:
        run = Run(peers, tmp_path, background=True, disk=fail_at(4, 6, 10, 12, rank=broken))
        run.train((2, 4, 6, 8, 10, 12), 14)
        return run.lines

    lines, others = run_ranks(2, work)
    assert lines == others and len(lines) == 4
    for line, (total, step, in_a_row) in zip(
        lines, [(1, 4, 1), (2, 6, 2), (3, 10, 1), (4, 12, 2)], strict=True
    ):
        assert line.startswith(f"{total}: save      of step {step} failed ({in_a_row} in a row, 3 ")
        assert f"rank {broken} could not write" in line and "No space left" in line
        assert "\n" not in line and f"step-{step:08d}.partial" in line
    assert newest(tmp_path) == 14 and not list(tmp_path.glob("*.partial"))
    assert [path.name for path in step_folders(tmp_path)] == [folder_name(14), folder_name(8)]


@pytest.mark.parametrize("broken", [0, 1])
def test_too_many_in_a_row_end_all_ranks(broken: int, tmp_path: Path) -> None:
    reached: list[int] = []

    def work(peers: ThreadPeers) -> None:
        run = Run(peers, tmp_path, background=True, disk=fail_at(4, 6, 8, rank=broken))
        try:
            run.train((2, 4, 6, 8, 10), 14)
        finally:
            reached.append(run.step)

    ends = run_ranks(2, work)
    for end in ends:
        assert isinstance(end, SaveError) and end.shared and end.exit_code == 1
        assert "3 saves in a row failed (checkpoint.max_failed_saves)" in str(end)
        assert f"rank {broken}" in str(end)
    assert reached[0] == reached[1] and 9 <= reached[0] <= 10
    assert newest(tmp_path) == 2


@pytest.mark.parametrize("broken", [0, 1])
def test_the_last_save_must_succeed(broken: int, tmp_path: Path) -> None:
    ends = run_ranks(2, lambda peers: Run(
        peers, tmp_path, background=True, disk=fail_at(14, rank=broken)).train((2, 8), 14))  # fmt: skip
    assert all(isinstance(end, SaveError) and end.shared for end in ends)
    assert newest(tmp_path) == 8


@pytest.mark.parametrize("broken", [0, 1])
def test_a_copy_for_which_there_is_no_memory_is_a_failed_save(broken: int, tmp_path: Path) -> None:
    def work(peers: ThreadPeers) -> list[str]:
        run = Run(peers, tmp_path, background=True)
        plain = run.copy

        def copy(folder: Path, tag: str) -> Callable[[], None]:
            if run.step == 4 and peers.rank == broken:
                raise SaveError("x.pt: no host memory")
            return plain(folder, tag)

        run.saver._snapshot = copy  # type: ignore[attr-defined]
        run.train((2, 4), 7)
        return run.lines

    lines, others = run_ranks(2, work)
    assert lines == others and len(lines) == 1 and "no host memory" in lines[0]
    assert newest(tmp_path) == 7 and not list(tmp_path.glob("*.partial"))


def test_a_folder_that_cannot_be_made_is_a_failed_save_and_loud_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    ends = run_ranks(2, lambda peers: Run(peers, tmp_path / "file", background=True).train((), 3))
    assert all(isinstance(end, SaveError) for end in ends)


def test_retention_waits_for_the_announcement(tmp_path: Path) -> None:
    """Two checkpoints are there at every moment of the third save."""
    verified: set[str] = set()
    for step in (1, 2):
        assert not any(publish_together(tmp_path, step, verified=verified))

    def disk(step: int) -> None:
        assert [path.name for path in step_folders(tmp_path)] == [folder_name(2), folder_name(1)]

    def work(peers: ThreadPeers) -> None:
        Run(peers, tmp_path, background=True, disk=disk).train((), 3)

    assert run_ranks(2, work) == [None, None]
    # The new run has read its own alone, so the older ones stay until it has two.
    assert [verify(path)["step"] for path in step_folders(tmp_path)] == [3, 2, 1]


def test_work_keeps_what_came_of_it() -> None:
    release = threading.Event()
    work = Work(lambda: release.wait(20) and 7, "a worker")
    assert not work.done()
    release.set()
    assert work.result() == 7 and work.done()

    def die() -> None:
        raise Died("here")

    with pytest.raises(Died):
        Work(die, "a worker").result()
