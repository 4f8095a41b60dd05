"""Full disks, folders that cannot be written or read, other jobs: one line each, nothing lost."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from common import (
    ROOT,
    TABLE,
    Launch,
    Prepared,
    assert_finished_as,
    digest_of,
    environment,
    newest_step,
    python,
)
from fork_server import ForkServer

KILOBYTES = 1024
CHECKPOINT = 302 * KILOBYTES  # of the tiny run, measured
NOBODY = 65534


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted(
        (str(p.relative_to(folder)), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()
    )


def one_line(outputs: list[str], *parts: str) -> str:
    """All ranks together say one error, on one line, without a traceback."""
    text = "\n".join(outputs)
    assert "Traceback" not in text, text
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    for part in parts:
        assert part in lines[0], lines[0]
    return lines[0]


class SmallDisk:
    """A file system of its own, of so many bytes, that can be made larger or read-only."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self._mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))

    def _mount(self, *words: str) -> None:
        subprocess.run(["mount", *words], check=True, capture_output=True)

    def remount(self, options: str) -> None:
        self._mount("-o", f"remount,{options}", str(self.folder))

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., SmallDisk]]:
    made: list[SmallDisk] = []

    def make(size: int, place: Path | None = None) -> SmallDisk:
        folder = place or tmp_path / f"disk{len(made)}"
        folder.mkdir(parents=True)
        made.append(SmallDisk(folder, size))
        return made[-1]

    yield make
    for disk in made:
        disk.close()


# -- a full disk -----------------------------------------------------------------------------


def test_a_disk_that_fills_up_during_a_save(
    prepared: Prepared, server: ForkServer, small_disk: Callable[[int], SmallDisk]
) -> None:
    TABLE.append(("disk full in the third save", "LOST"))
    disk = small_disk(int(2.7 * CHECKPOINT))  # two are kept while a third is written
    run = disk.folder / "run"
    result = server.run(f"output={run}")
    assert result["codes"] == [1, 1] and result["seconds_apart"] < 10, result
    line = one_line(result["outputs"], "No space left on device", str(run / "checkpoints"))
    assert re.search(r"it needs [\d,]+ bytes, [\d,]+ are free", line), line
    assert newest_step(run) == 4
    assert not list((run / "checkpoints").glob("*.partial"))
    disk.remount("size=8m")
    assert server.run(f"output={run}")["codes"] == [0, 0]
    assert_finished_as(run, prepared.digest)
    TABLE[-1] = (TABLE[-1][0], "recovered bit-exactly")


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_alone_that_cannot_write(
    rank: int, prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    """Its peers come through DeepSpeed's barriers and hear of it, long before the timeout."""
    run = tmp_path / "run"
    TABLE.append((f"write of rank {rank} alone fails in save 4", "LOST"))
    fault = {"where": "half_file", "how": "full", "step": 4, "rank": rank}
    result = server.run(f"output={run}", fault=fault)
    assert result["codes"] == [1, 1] and result["seconds_apart"] < 10, result
    one_line(result["outputs"], f"rank {rank} could not write", "No space left on device")
    assert newest_step(run) == 2 and not list((run / "checkpoints").glob("*.partial"))
    assert server.run(f"output={run}")["codes"] == [0, 0]
    assert_finished_as(run, prepared.digest)
    TABLE[-1] = (TABLE[-1][0], "recovered bit-exactly")


def test_no_room_for_one_checkpoint_is_seen_before_the_first_step(
    prepared: Prepared, server: ForkServer, small_disk: Callable[[int], SmallDisk]
) -> None:
    disk = small_disk(200 * KILOBYTES)
    result = server.run(f"output={disk.folder / 'run'}")
    assert result["codes"] == [2, 2], result
    line = one_line(result["outputs"], str(disk.folder / "run"))
    assert re.search(r"a checkpoint needs [\d,]+ bytes and [\d,]+ are free", line), line
    left = {path.name for path in (disk.folder / "run").iterdir()}
    assert left == {"run.lock", "attempts.jsonl", "outcome"}
    assert (disk.folder / "run/outcome").read_text().startswith("refused: ")
    disk.remount(f"size={int(1.6 * CHECKPOINT)}")
    result = server.run(f"output={disk.folder / 'run'}", "checkpoint.every=100")
    assert result["codes"] == [0, 0] and "room for one" in result["outputs"][0], result


def test_curves_that_find_no_room_do_not_end_a_run(
    prepared: Prepared, server: ForkServer, small_disk: Callable[..., SmallDisk], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    disk = small_disk(8 * KILOBYTES, run / "tensorboard")
    (disk.folder / "ballast").write_bytes(bytes(4 * KILOBYTES))
    result = server.run(f"output={run}")
    assert result["codes"] == [0, 0], result["outputs"]
    assert result["outputs"][0].count("curves    stop at step") == 1
    assert_finished_as(run, prepared.digest)


def test_preparing_into_a_full_disk(
    prepared: Prepared, small_disk: Callable[[int], SmallDisk]
) -> None:
    disk = small_disk(400 * KILOBYTES)  # pages of 4
    arguments = ("launcher/prepare.py", "--config", str(prepared.config),
                 f"data.store={disk.folder / 'store'}")  # fmt: skip
    assert python(*arguments).returncode == 0
    before = listing(disk.folder / "store" / "train")
    room = shutil.disk_usage(disk.folder).free - 12 * KILOBYTES
    (disk.folder / "ballast").write_bytes(bytes(room))
    result = python(*arguments, "seed=5")
    assert result.returncode == 2
    line = one_line([result.stderr], "No space left on device", str(disk.folder / "store"))
    assert re.search(r"[\d,]+ bytes are free.* keeps what is done", line), line
    assert listing(disk.folder / "store" / "train") == before
    assert not list((disk.folder / "store").glob("*.partial"))
    (disk.folder / "ballast").unlink()
    assert python(*arguments, "seed=5").returncode == 0
    assert listing(disk.folder / "store" / "train") != before
    assert not list((disk.folder / "store").glob("*.work"))


def test_exporting_into_a_full_disk(
    prepared: Prepared, small_disk: Callable[[int], SmallDisk]
) -> None:
    disk = small_disk(60 * KILOBYTES)
    output = disk.folder / "export"
    result = python("launcher/export.py", "--run", str(prepared.whole), "--output", str(output))
    assert result.returncode == 2
    line = one_line([result.stderr], str(output), "No space left on device")
    assert re.search(r"it needs [\d,]+ bytes, [\d,]+ are free", line), line
    assert list(disk.folder.iterdir()) == []


# -- folders that cannot be written or read ---------------------------------------------------


def test_a_read_only_run_folder(
    prepared: Prepared, server: ForkServer, small_disk: Callable[[int], SmallDisk]
) -> None:
    disk = small_disk(8 * KILOBYTES * KILOBYTES)
    shutil.copytree(prepared.whole, disk.folder / "old")
    disk.remount("ro")
    before = listing(disk.folder)
    for name in ("new", "old"):
        result = server.run(f"output={disk.folder / name}")
        assert result["codes"] == [2, 2], result
        one_line(result["outputs"], str(disk.folder / name), "Read-only file system")
    assert listing(disk.folder) == before
    # Reading is another matter: an export needs no right to write to the run.
    with tempfile.TemporaryDirectory() as other:
        result = python(
            "launcher/export.py", "--run", str(disk.folder / "old"), "--output", f"{other}/export"
        )
        assert result.returncode == 0, result.stderr
    disk.remount("rw")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that an unprivileged user can enter (pytest's own are private to root)."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def give(folder: Path) -> None:
    """Make the unprivileged user the owner of a tree."""
    if os.getuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, NOBODY, NOBODY)


def test_a_run_folder_without_permission(
    prepared: Prepared, server: ForkServer, open_folder: Path
) -> None:
    run = open_folder / "run"
    open_folder.chmod(0o555)
    result = server.run(f"output={run}", user=NOBODY)
    assert result["codes"] == [2, 2], result
    one_line(result["outputs"], str(run), "Permission denied")
    assert not run.exists()
    open_folder.chmod(0o755)


@pytest.mark.parametrize("name", ["manifest.json", "shard-00000.ids.bin"])
def test_an_unreadable_store(
    name: str, prepared: Prepared, server: ForkServer, open_folder: Path
) -> None:
    shutil.copytree(prepared.folder / "store", open_folder / "store")
    give(open_folder)
    victim = open_folder / "store" / "train" / name
    victim.chmod(0)
    result = server.run(
        f"output={open_folder / 'run'}", f"data.store={open_folder / 'store'}", user=NOBODY
    )
    assert all(code != 0 for code in result["codes"]) and result["seconds_apart"] < 10, result
    one_line(result["outputs"], str(victim), "Permission denied")


def test_an_unreadable_checkpoint_is_refused_and_the_older_one_used(
    prepared: Prepared, server: ForkServer, open_folder: Path
) -> None:
    run = open_folder / "run"
    shutil.copytree(prepared.whole, run)
    give(run)
    (run / "checkpoints/step-00000008/zero_pp_rank_1_mp_rank_00_optim_states.pt").chmod(0)
    result = server.run(f"output={run}", user=NOBODY)
    assert result["codes"] == [0, 0], result
    assert "refused step-00000008" in result["outputs"][0]
    assert "Permission denied" in result["outputs"][0]
    assert digest_of(run) == prepared.digest
    for folder in (run / "checkpoints").glob("step-*"):
        (folder / "manifest.json").chmod(0)
    result = server.run(f"output={run}", user=NOBODY)
    assert result["codes"] == [2, 2], result
    one_line(result["outputs"], "none of its", "Permission denied")


# -- the wrong folder ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name=other", "name was 'faults', is 'other'"),
        ("seed=5", "seed"),
        ("optimizer.learning_rate=0.02", "optimizer.learning_rate was 0.01, is 0.02"),
        ("training.global_batch_rows=8", "training.global_batch_rows was 4, is 8"),
    ],
)
def test_a_run_folder_of_another_run(
    override: str, message: str, prepared: Prepared, server: ForkServer
) -> None:
    def kept() -> list[Any]:
        of_the_attempt = ("run.lock", "outcome")  # how the latest one ended
        return [entry for entry in listing(prepared.whole) if entry[0] not in of_the_attempt]

    before = kept()
    result = server.run(f"output={prepared.whole}", override)
    assert result["codes"] == [2, 2], result
    one_line(result["outputs"], message)
    assert kept() == before


def test_an_output_that_is_a_file(prepared: Prepared, server: ForkServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        result = server.run(f"output={output}")
        assert result["codes"] == [2, 2], result
        one_line(result["outputs"], str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious"


def test_swapped_files_of_two_ranks_are_refused_by_name(
    prepared: Prepared, server: ForkServer, tmp_path: Path
) -> None:
    """The same names and sizes: only the checksums tell."""
    run = tmp_path / "run"
    TABLE.append(("two ranks' optimizer files swapped", "LOST"))
    shutil.copytree(prepared.whole, run)
    newest = run / "checkpoints" / "step-00000008"
    first, second = (newest / f"zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in (0, 1))
    assert first.stat().st_size == second.stat().st_size
    first.rename(newest / "x")
    second.rename(first)
    (newest / "x").rename(second)
    result = server.run(f"output={run}")
    assert result["codes"] == [0, 0], result
    assert "refused step-00000008" in result["outputs"][0] and first.name in result["outputs"][0]
    assert "after step 6" in result["outputs"][0]
    assert_finished_as(run, prepared.digest)
    TABLE[-1] = (TABLE[-1][0], "recovered bit-exactly")


# -- a run folder in use ---------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from nmar_ds.training.run_folder import RunLock
lock = RunLock(Path(sys.argv[1]))
print(lock.claim(), flush=True)
time.sleep(300)
"""


def test_two_jobs_on_one_run_folder(prepared: Prepared, server: ForkServer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(prepared.whole, run)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)],
        cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "None\n"
        before = listing(run)
        result: dict[str, Any] = server.run(f"output={run}")
        assert result["codes"] == [4, 4], result
        one_line(result["outputs"], str(run), f"pid {holder.pid} on ", " since ")
        launched = Launch(prepared.config, f"output={run}")
        try:
            assert launched.finish() == 4, launched.said()
        finally:
            launched.clean_up()
        one_line([launched.said()], f"pid {holder.pid} on ")
        assert listing(run) == before
        # Reading is no second job.
        exported = python(
            "launcher/export.py", "--run", str(run), "--output", str(tmp_path / "export")
        )
        assert exported.returncode == 0, exported.stderr
    finally:
        holder.kill()
        holder.wait(10)
    assert server.run(f"output={run}")["codes"] == [0, 0]
