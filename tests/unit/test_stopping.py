"""Launchers are told from other parents, their end is noticed, and a run folder holds one job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nmar_ds.errors import FolderError, LockedError
from nmar_ds.training import run_folder, stopping
from nmar_ds.training.run_folder import LOCK, RunLock, check_space, checkpoint_bytes
from nmar_ds.training.stopping import (
    STOP_FILE,
    STOP_SIGNALS,
    Launcher,
    StopSignal,
    is_launcher,
    refuse_stopped,
    stop_reason,
)

ROOT = Path(__file__).resolve().parents[2]

# -- the launcher ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/venv/bin/python3 /venv/bin/deepspeed --num_gpus 2 launcher/train.py", True),
        ("/usr/bin/python -u -m deepspeed.launcher.launch --world_info=x launcher/train.py", True),
        ("python3.11 -m torch.distributed.run --nproc_per_node 2 launcher/train.py", True),
        ("/venv/bin/python /venv/bin/torchrun launcher/train.py", True),
        ("python launcher/train.py --config deepspeed", False),
        ("python -m pytest torchrun", False),
        ("bash -c deepspeed launcher/train.py", False),
        ("vim deepspeed", False),
        ("srun deepspeed", False),
        ("mpirun -n 2 python launcher/train.py", False),
        ("", False),
    ],
)
def test_only_launchers_are_watched(command: str, expected: bool) -> None:
    assert is_launcher(command.split()) is expected


CHILD = """
import sys, time
from nmar_ds.training.stopping import Launcher, StopSignal
stop = StopSignal(Launcher())
print("ready", flush=True)
for _ in range(600):
    if stop():
        break
    time.sleep(0.05)
print(stop.reason, flush=True)
"""
# Started as `python deepspeed`, it starts `python -m deepspeed.launcher.launch`, and that a rank.
OUTER = """
import subprocess, sys, time
inner = subprocess.Popen([sys.executable, "-m", "deepspeed.launcher.launch"])
print(inner.pid, flush=True)
time.sleep(60)
"""
INNER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "rank.py"])
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, int]]]:
    """A process tree shaped as DeepSpeed's, with the rank's StopSignal at its end."""
    package = tmp_path / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (tmp_path / "deepspeed" / "__init__.py").touch()
    (package / "launch.py").write_text(INNER)
    (tmp_path / "rank.py").write_text(CHILD)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "deepspeed").write_text(OUTER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    outer = subprocess.Popen(
        [sys.executable, "bin/deepspeed"], cwd=tmp_path, env=environment, text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert outer.stdout is not None
    pids = {"cli": outer.pid}
    try:
        numbers = [int(outer.stdout.readline()) for _ in range(2)]
        pids["launch"], pids["rank"] = numbers
        assert outer.stdout.readline() == "ready\n"
        yield outer, pids
    finally:
        for pid in pids.values():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        outer.wait(10)


@pytest.mark.parametrize(
    ("victim", "name"), [("launch", "deepspeed.launcher.launch"), ("cli", "deepspeed (pid")]
)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_the_end_of_a_launcher_is_a_request_to_stop(
    victim: str, name: str, number: signal.Signals,
    chain: tuple[subprocess.Popen[str], dict[str, int]],
) -> None:  # fmt: skip
    outer, pids = chain
    os.kill(pids[victim], number)  # the CLI stays a zombie: nobody waits for it here
    assert outer.stdout is not None
    assert outer.stdout.readline().startswith(f"the end of {name}")


def test_a_signal_is_remembered_with_its_name_and_a_second_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        for first, second in ((signal.SIGTERM, signal.SIGINT), (signal.SIGUSR2, signal.SIGUSR2)):
            stop = StopSignal(Launcher())
            assert not stop() and stop.reason is None
            os.kill(os.getpid(), first)
            os.kill(os.getpid(), second)
            assert stop() and stop.reason == f"a signal ({first.name})"
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        StopSignal(Launcher())
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ancestors_are_looked_at_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    looks = []
    monkeypatch.setattr(Launcher, "lost", lambda self: looks.append(1))
    now = [100.0]
    try:
        stop = StopSignal(Launcher(), clock=lambda: now[0])
        for _ in range(50):  # five seconds in tenths
            stop()
            now[0] += 0.1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert 4 <= len(looks) <= 6 and stopping.SECONDS_BETWEEN_LOOKS == 1.0


class Reasons:
    """Peers that were told to stop by these."""

    rank = 0

    def __init__(self, *others: str | None) -> None:
        self.others = others

    def gather(self, value: str | None) -> list[str | None]:
        return [value, *self.others]


def test_the_kill_switch_is_seen_within_a_second_and_goes_before_signals(tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    now = [100.0]
    try:
        looking, other = (
            StopSignal(Launcher(), file, clock=lambda: now[0])
            for file in (tmp_path / STOP_FILE, None)
        )
        refuse_stopped(tmp_path)
        assert not looking()
        (tmp_path / STOP_FILE).touch()
        assert not looking()  # the last look was in this very second
        now[0] += 1.0
        assert looking() and looking.reason == STOP_FILE
        assert not other()  # one rank looks; all obey
        assert stop_reason(other, Reasons("a signal (SIGTERM)", STOP_FILE)) == STOP_FILE
        assert stop_reason(other, Reasons("a signal (SIGTERM)")) == "a signal (SIGTERM) on rank 1"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    with pytest.raises(FolderError, match=r"STOP: the kill switch is set.*remove it"):
        refuse_stopped(tmp_path)
    assert (tmp_path / STOP_FILE).exists()


# -- the lock --------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from nmar_ds.training.run_folder import RunLock
lock, rank = RunLock(Path(sys.argv[1])), int(sys.argv[2])
print(lock.claim() if rank == 0 else lock.join(rank), flush=True)
time.sleep(60)
"""


class Holder:
    """Another process that holds a rank's share of a folder's lock."""

    def __init__(self, folder: Path, rank: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "77"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder), str(rank)],
            env=environment, text=True, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "None\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


def test_a_second_job_is_refused_by_name_and_writes_nothing(tmp_path: Path) -> None:
    holder = Holder(tmp_path, 0)
    try:
        before = (tmp_path / LOCK).read_text()
        with pytest.raises(LockedError) as caught:
            RunLock(tmp_path).claim()
        text = str(caught.value)
        facts = json.loads(before)
        assert "\n" not in text and str(tmp_path) in text
        for part in (f"pid {holder.process.pid}", facts["host"], facts["since"], "SLURM_JOB_ID=77"):
            assert part in text
        assert (tmp_path / LOCK).read_text() == before
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    finally:
        holder.kill()
    lock = RunLock(tmp_path)  # killed with -9: nothing stale stands in the way
    assert not lock.held and lock.claim() is None and lock.held
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()


def test_the_folder_is_in_use_as_long_as_any_rank_lives(tmp_path: Path) -> None:
    first = Holder(tmp_path, 0)
    second = Holder(tmp_path, 1)
    first.kill()
    try:
        with pytest.raises(LockedError):
            RunLock(tmp_path).claim()
    finally:
        second.kill()
    lock = RunLock(tmp_path)
    assert lock.claim() is None
    lock.release()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FolderError, match=str(tmp_path / "file")):
        RunLock(tmp_path / "file" / "run").claim()
    (tmp_path / "run" / LOCK).mkdir(parents=True)
    with pytest.raises(FolderError, match=LOCK):
        RunLock(tmp_path / "run").claim()


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_folder.fcntl, "lockf", unsupported)
    lock = RunLock(tmp_path)
    note = lock.claim()
    assert note is not None and "nothing keeps a second job out" in note and LOCK in note
    RunLock(tmp_path).join(1)


# -- the room --------------------------------------------------------------------------------


def test_room_for_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"bytes": 0}
    usage = type("Usage", (), {"free": property(lambda self: free["bytes"])})
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: usage())
    assert (checkpoint_bytes(100, "adamw"), checkpoint_bytes(100, "sgd")) == (1200, 400)
    for bytes_free, outcome in ((2400, "fine"), (2399, "warned"), (1200, "warned"), (1199, "no")):
        free["bytes"] = bytes_free
        if outcome == "no":
            with pytest.raises(FolderError, match=r"needs 1,200 bytes and 1,199 are free"):
                check_space(tmp_path, 1200)
        else:
            warning = check_space(tmp_path, 1200)
            assert (warning is not None) == (outcome == "warned")
            assert warning is None or f"1,200 bytes and {bytes_free:,} are free" in warning


# -- the output ------------------------------------------------------------------------------

TALKER = """
import sys, time
from pathlib import Path
from nmar_ds.training.monitor import Monitor
with Monitor(Path(sys.argv[1]), is_writer=True, total_steps=9) as monitor:
    monitor.say("hello")
    time.sleep(1)
    for step in range(5):
        monitor.say("x" * 100_000)
Path(sys.argv[1], "saved").touch()
"""


def test_a_run_goes_on_when_nobody_reads_its_output(tmp_path: Path) -> None:
    talker = subprocess.Popen(
        [sys.executable, "-c", TALKER, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert talker.stdout is not None and talker.stderr is not None
    assert talker.stdout.readline() == "hello\n"
    talker.stdout.close()  # as `tee` does when Ctrl-C ends it
    said = talker.stderr.read()
    assert talker.wait(60) == 0 and said == "" and (tmp_path / "saved").exists(), said
