"""When a rank is late, what it leaves, and that nothing keeps it from ending."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nmar_ds.training import watchdog
from nmar_ds.training.watchdog import MARK, SLOW_PHASES, Watchdog, myself


class Left(BaseException):
    """This process would have ended."""


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def leave(code: int) -> None:
    raise Left(code)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Watchdog]:
    monkeypatch.setattr(watchdog, "SECONDS_FOR_OTHERS", 0.3)
    monkeypatch.setattr(watchdog, "SECONDS_ONCE_CONTINUED", 1.0)
    monkeypatch.setattr(watchdog, "SECONDS_TO_REPORT", 4.0)
    monkeypatch.delenv("NMAR_EXIT_CODES", raising=False)

    def made(rank: int = 0) -> Watchdog:
        return Watchdog(
            rank, tmp_path, timeout_seconds=10, slow_timeout_seconds=60, clock=clock, leave=leave
        )

    return made


def test_each_phase_has_its_limit_and_a_new_one_starts_it_anew(
    make: Callable[..., Watchdog], clock: Clock
) -> None:
    dog = make()
    clock.now += 60
    assert dog.late() is None  # the start is slow
    for phase in ("forward", "backward", "optimizer", *SLOW_PHASES):
        limit = 60 if phase in SLOW_PHASES else 10
        dog.enter(phase)
        clock.now += limit
        assert dog.late() is None
        dog.enter(phase)  # as good as progress: the next micro-batch
        clock.now += limit
        assert dog.late() is None
        clock.now += 0.5
        key = "slow_timeout_seconds" if phase in SLOW_PHASES else "timeout_seconds"
        late = dog.late()
        assert late is not None and f"in phase '{phase}' for" in late
        assert f"(training.{key}: {limit})" in late


def test_a_process_that_stood_still_as_a_whole_is_not_late(
    make: Callable[..., Watchdog], clock: Clock
) -> None:
    dog = make()
    dog.enter("forward")
    clock.now += 3600  # suspended with its job, or a laptop that slept
    dog.look(3600)
    clock.now += 9
    dog.look(0.5)
    clock.now += 2
    with pytest.raises(Left):
        dog.look(0.5)


def test_a_late_rank_leaves_stacks_a_mark_an_outcome_and_code_5(
    make: Callable[..., Watchdog], clock: Clock, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("NMAR_EXIT_CODES", str(tmp_path))
    dog = make()
    dog.meet("attempt", [dog.me])
    dog.enter("backward")
    clock.now += 12
    with pytest.raises(Left, match="5"):
        dog.look(0.5)
    stacks = (tmp_path / "stacks/attempt/rank-0.txt").read_text()
    assert "no progress in phase 'backward' for 12 s (training.timeout_seconds: 10)" in stacks
    assert "test_a_late_rank_leaves_stacks" in stacks  # the main thread, from another
    assert (tmp_path / "stacks/attempt" / MARK).exists() and (tmp_path / "5").exists()
    line = (tmp_path / "outcome").read_text()
    assert line.startswith("hang: rank 0: no progress in phase 'backward'") and "stacks in" in line
    said = capfd.readouterr().err
    assert f"error: {line.removeprefix('hang: ')}" in said and "most recent call first" in said


def test_a_mark_ends_ranks_that_are_not_late(make: Callable[..., Watchdog], tmp_path: Path) -> None:
    dog = make(rank=1)
    dog.end_if_told()  # nothing is known of any attempt yet
    dog.meet("attempt", [dog.me])
    dog.end_if_told()  # a connection that was lost for another reason
    (tmp_path / "stacks/attempt").mkdir(parents=True)
    (tmp_path / "stacks/attempt" / MARK).touch()
    with pytest.raises(Left, match="5"):
        dog.end_if_told()
    assert "another rank saw a hang" in (tmp_path / "stacks/attempt/rank-1.txt").read_text()


def test_a_disk_that_hangs_does_not_keep_a_rank(
    make: Callable[..., Watchdog], clock: Clock, tmp_path: Path
) -> None:
    dog = make()
    dog.meet("attempt", [dog.me])
    (tmp_path / "stacks/attempt").mkdir(parents=True)
    os.mkfifo(tmp_path / "stacks/attempt/rank-0.txt")  # opening it waits for ever
    dog.enter("forward")
    clock.now += 11
    started = time.monotonic()
    with pytest.raises(Left, match="5"):
        dog.look(0.5)
    assert time.monotonic() - started < watchdog.SECONDS_TO_REPORT + 2


SLEEPER = "import time; print('up', flush=True); time.sleep(60)"


@pytest.mark.parametrize("stopped", [True, False])
def test_a_rank_that_leaves_no_stacks_is_killed_where_it_can_be_reached(
    stopped: bool, make: Callable[..., Watchdog], clock: Clock, tmp_path: Path
) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE) for _ in range(3)
    ]
    try:
        members = []
        for rank, process in enumerate(ranks, start=1):
            assert process.stdout is not None and process.stdout.readline() == b"up\n"
            started = watchdog.psutil.Process(process.pid).create_time()
            members.append(replace(myself(rank), pid=process.pid, started=started))
        if stopped:
            os.kill(ranks[0].pid, signal.SIGSTOP)
        members[1] = replace(members[1], place="elsewhere")
        members[2] = replace(members[2], started=members[2].started - 60)  # its pid is another's
        dog = make()
        dog.meet("attempt", [dog.me, *members])
        dog.enter("forward")
        clock.now += 11
        with pytest.raises(Left):
            dog.look(0.5)
        assert ranks[0].wait(5) == -signal.SIGKILL
        assert [process.poll() for process in ranks[1:]] == [None, None]
        line = (tmp_path / "outcome").read_text()
        what = "had been stopped" if stopped else "did not answer"
        assert f"rank 1 (pid {ranks[0].pid} on {members[0].host}) {what}" in line
    finally:
        for process in ranks:
            process.kill()
            process.wait(5)


ALONE = """
import sys, time
from pathlib import Path
from nmar_ds.training.watchdog import Watchdog
seconds = {"timeout_seconds": 1, "slow_timeout_seconds": 60}
with Watchdog(0, Path(sys.argv[1]), **seconds) as dog:
    dog.meet("attempt", [dog.me])
    for _ in range(20):
        dog.enter("forward")
        time.sleep(0.1)
    if sys.argv[2] == "hang":
        time.sleep(60)
dog.enter("forward")
time.sleep(2)
"""


@pytest.mark.parametrize(("end", "code"), [("hang", 5), ("well", 0)])
def test_a_real_process(end: str, code: int, tmp_path: Path) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path), end], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, timeout=50, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert time.monotonic() - started < 20
    assert (tmp_path / "outcome").exists() == (end == "hang")


def test_what_has_been_declared_over_does_not_go_on(
    make: Callable[..., Watchdog], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main thread, freed from its wait meanwhile, begins no further phase and does not end."""
    dog = make()
    going, ended, at_it = [threading.Event() for _ in range(3)]
    monkeypatch.setattr(dog, "_report", lambda problem: (at_it.set(), ended.wait(3)))

    def main() -> None:
        at_it.wait(3)
        dog.enter("optimizer")
        going.set()

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    clock.now += 100
    dog.enter("forward")
    clock.now += 100

    def end() -> None:
        with pytest.raises(Left):
            dog.look(0.0)

    ender = threading.Thread(target=end, daemon=True)
    ender.start()
    assert at_it.wait(3)
    assert not going.wait(0.5), "held still while the end is reported"
    ended.set()
    ender.join(3)
    assert dog._phase == "forward"
