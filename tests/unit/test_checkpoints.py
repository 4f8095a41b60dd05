"""Checkpoints: dying anywhere leaves a good one, damage anywhere is refused, retention is safe."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_ranks
import numpy as np
import pytest
from fake_ranks import (
    SMALL,
    Alone,
    Died,
    Table,
    ThreadPeers,
    content,
    files_of,
    publish_together,
    rank_of_thread,
    saver,
)

from nmar_ds.errors import CheckpointError, SaveError
from nmar_ds.files import sha256_file
from nmar_ds.training import checkpoints, verifying
from nmar_ds.training.checkpoints import (
    LATEST,
    MANIFEST,
    Found,
    check_same_run,
    find_newest,
    folder_name,
    publish,
    retain,
    step_folders,
    verify,
    write_atomically,
)

RANK_0_POINTS = [
    "before_manifest", "written_aside:manifest.json", "after_manifest", "after_rename",
    "written_aside:latest", "after_latest",
]  # fmt: skip
OWN_POINTS = ["before_write", "after_write", "after_hash", "read_back"]
RENAMED_POINTS = ["after_rename", "written_aside:latest", "after_latest", "committed", "retained"]


def publish_alone(
    folder: Path, step: int, keep: int = 2, verified: set[str] | None = None, **facts: Any
) -> Path:
    return publish(
        saver(step, 0), folder, step=step, facts=facts, peers=Alone(), keep=keep,
        verified=set() if verified is None else verified,
    )  # fmt: skip


def newest(folder: Path) -> tuple[int | None, list[str]]:
    said: list[str] = []
    found = find_newest(folder, said.append)
    if found is None:
        return None, said
    assert verify(found.folder) == found.manifest
    for name in found.manifest["files"]:
        assert (found.folder / name).read_bytes() == content(found.step, name)
    return found.step, said


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[str], None]], None]]:
    yield lambda replacement: monkeypatch.setattr(checkpoints, "reached", replacement)


# -- publishing ------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
def test_a_published_checkpoint_is_whole_and_found(world: int, tmp_path: Path) -> None:
    for step in (10, 20):
        assert publish_together(tmp_path, step, world=world) == [None] * world
    assert newest(tmp_path) == (20, [])
    manifest = verify(tmp_path / "step-00000020")
    assert (manifest["step"], manifest["cursor"], manifest["run"]) == (20, 20, {"seed": 1})
    assert set(manifest["files"]) == {name for rank in range(world) for name in files_of(rank)}
    assert (tmp_path / LATEST).read_text() == "step-00000020\n"
    # DeepSpeed's scripts are gone, and nothing else is left over.
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000010", "step-00000020", LATEST}
    for name, entry in manifest["files"].items():
        path = tmp_path / "step-00000020" / name
        assert entry == {"size": SMALL, "sha256": sha256_file(path)}


def test_publish_returns_the_folder_and_a_run_without_peers_works(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "er"
    assert find_newest(folder, pytest.fail) is None
    folder.mkdir(parents=True)
    assert find_newest(folder, pytest.fail) is None
    assert publish_alone(folder, 3) == folder / folder_name(3)
    assert newest(folder) == (3, [])


def test_the_order_is_the_contract(
    tmp_path: Path, points: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on disk at each point, and that all of it is synced before the next step."""
    publish_alone(tmp_path, 10)
    final, partial = tmp_path / "step-00000020", tmp_path / "step-00000020.partial"
    events: list[str] = []
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        events.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_fsync(descriptor)

    def look(point: str) -> None:
        events.append(point)
        state = (
            partial.exists(),
            (partial / MANIFEST).exists(),
            final.exists(),
            (tmp_path / LATEST).read_text().strip(),
        )
        assert (
            state
            == {
                "cleared": (True, False, False, "step-00000010"),
                "before_write": (True, False, False, "step-00000010"),
                "after_write": (True, False, False, "step-00000010"),
                "after_hash": (True, False, False, "step-00000010"),
                "read_back": (True, False, False, "step-00000010"),
                "before_manifest": (True, False, False, "step-00000010"),
                "written_aside:manifest.json": (True, False, False, "step-00000010"),
                "after_manifest": (True, True, False, "step-00000010"),
                "after_rename": (False, False, True, "step-00000010"),
                "written_aside:latest": (False, False, True, "step-00000010"),
                "after_latest": (False, False, True, "step-00000020"),
                "committed": (False, False, True, "step-00000020"),
                "retained": (False, False, True, "step-00000020"),
            }[point]
        )

    monkeypatch.setattr(os, "fsync", fsync)
    points(look)
    publish_alone(tmp_path, 20)
    assert events == [
        "cleared",
        "before_write",
        "after_write",
        *[f"sync {name}" for name in sorted(files_of(0))],
        "after_hash",
        "read_back",
        "before_manifest",
        "sync manifest.json.tmp",
        "written_aside:manifest.json",
        "sync step-00000020.partial",
        "after_manifest",
        f"sync {tmp_path.name}",
        "after_rename",
        "sync latest.tmp",
        "written_aside:latest",
        f"sync {tmp_path.name}",
        "after_latest",
        "committed",
        "retained",
    ]


@pytest.mark.parametrize("slow", [0, 1])
def test_the_manifest_waits_for_the_slowest_rank(
    slow: int, tmp_path: Path, points: Callable[..., None]
) -> None:
    order: list[tuple[int, str]] = []

    def look(point: str) -> None:
        if rank_of_thread() == slow and point in ("before_write", "after_write"):
            time.sleep(0.1)
        order.append((rank_of_thread(), point))

    points(look)
    assert publish_together(tmp_path, 10) == [None, None]
    assert newest(tmp_path) == (10, [])
    written = [order.index((rank, "after_write")) for rank in (0, 1)]
    hashed = [order.index((rank, "after_hash")) for rank in (0, 1)]
    assert max(written) < min(hashed) and max(hashed) < order.index((0, "before_manifest"))
    assert [point for rank, point in order if rank == 0] == [
        "cleared", *OWN_POINTS, *RANK_0_POINTS, "committed", "retained",
    ]  # fmt: skip
    assert [point for rank, point in order if rank == 1] == [*OWN_POINTS, "committed"]


@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
@pytest.mark.parametrize(
    ("victim", "point"),
    [(0, point) for point in ["cleared", *OWN_POINTS, *RANK_0_POINTS]]
    + [(1, point) for point in OWN_POINTS],
)
def test_dying_anywhere_leaves_the_newest_whole_checkpoint(
    victim: int, point: str, first: bool, tmp_path: Path, points: Callable[..., None]
) -> None:
    if not first:
        assert publish_together(tmp_path, 10) == [None, None]

    def die(at: str) -> None:
        if at == point and rank_of_thread() == victim:
            raise Died(point)

    for _ in range(3):  # dying there again and again
        points(die)
        ends = publish_together(tmp_path, 20)
        assert all(isinstance(end, Died) for end in ends)
        renamed = point in RENAMED_POINTS
        expected = 20 if renamed else None if first else 10
        assert newest(tmp_path) == (expected, [])
        points(lambda _: None)
    assert publish_together(tmp_path, 20) == [None, None]
    assert newest(tmp_path) == (20, [])
    assert (tmp_path / LATEST).read_text() == "step-00000020\n"
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("point", RANK_0_POINTS)
def test_a_peer_that_dies_while_rank_0_commits_does_no_harm(
    point: str, tmp_path: Path, points: Callable[..., None]
) -> None:
    assert publish_together(tmp_path, 10) == [None, None]
    peers: list[ThreadPeers] = []

    class Recorded(ThreadPeers):
        def __init__(self, table: Table, rank: int) -> None:
            super().__init__(table, rank)
            peers.append(self)

    def die(at: str) -> None:
        if at == point:
            peers[0].table.barrier.abort()  # rank 1 waits in the broadcast

    points(die)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_ranks, "ThreadPeers", Recorded)
        ends = publish_together(tmp_path, 20)
    assert all(isinstance(end, Died) for end in ends)
    assert newest(tmp_path) == (20, [])


def test_leftovers_of_saves_that_died_are_removed_by_the_next(
    tmp_path: Path, points: Callable[..., None]
) -> None:
    def die(at: str) -> None:
        if at == "after_write":
            raise Died(at)

    points(die)
    with pytest.raises(Died):
        publish_alone(tmp_path, 20)
    assert [path.name for path in tmp_path.glob("*.partial")] == ["step-00000020.partial"]
    with pytest.raises(Died):
        publish_alone(tmp_path, 30)
    assert [path.name for path in tmp_path.glob("*.partial")] == ["step-00000030.partial"]
    # A rank file of a larger world, and one that nobody writes any more.
    stale = tmp_path / "step-00000030.partial"
    (stale / "zero_pp_rank_7_mp_rank_00_model_states.pt").write_bytes(b"old")
    (stale / "older.pt").write_bytes(b"old")
    points(lambda _: None)
    publish_alone(tmp_path, 30)
    assert newest(tmp_path) == (30, [])
    assert not list(tmp_path.glob("*.partial"))


def test_files_nobody_answers_for_are_not_published(tmp_path: Path) -> None:
    publish_alone(tmp_path, 10)

    def save(folder: Path, tag: str) -> None:
        saver(20, 0)(folder, tag)
        (folder / tag / "zero_pp_rank_1_mp_rank_00_model_states.pt").write_bytes(b"x")

    with pytest.raises(CheckpointError, match=r"zero_pp_rank_1_.* appeared or vanished"):
        publish(save, tmp_path, step=20, facts={}, peers=Alone(), keep=2, verified=set())
    assert newest(tmp_path) == (10, [])


# -- a rank that cannot write ----------------------------------------------------------------

FULL_DISK = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("error", [FULL_DISK, SaveError("x.pt: No space left on device")])
def test_a_full_disk_on_one_rank_is_everyones_error_and_costs_nothing(
    broken: int, error: Exception, tmp_path: Path
) -> None:
    assert publish_together(tmp_path, 10) == [None, None]

    def save(step: int, rank: int) -> Callable[[Path, str], None]:
        def write(folder: Path, tag: str) -> None:
            saver(step, rank)(folder, tag)
            if rank == broken:
                raise error

        return write

    ends = publish_together(tmp_path, 20, save=save)
    for end in ends:
        assert isinstance(end, CheckpointError)
        assert f"rank {broken}" in str(end) and "No space left on device" in str(end)
        assert "x.pt" in str(end) or "step-00000020.partial" in str(end)
    assert not (tmp_path / "step-00000020.partial").exists()
    assert newest(tmp_path) == (10, [])
    assert publish_together(tmp_path, 20) == [None, None]  # and the next one succeeds
    assert newest(tmp_path) == (20, [])


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("function", ["sync", "sha256_file"])
def test_an_error_while_hashing_is_everyones_error(
    broken: int, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert publish_together(tmp_path, 10) == [None, None]

    def fail(_: Path) -> str:
        if rank_of_thread() == broken:
            raise OSError(errno.EIO, "Input/output error")
        return ""

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, function, fail)
        ends = publish_together(tmp_path, 20)
    assert all(isinstance(end, CheckpointError) and f"rank {broken}" in str(end) for end in ends)
    assert newest(tmp_path) == (10, []) and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("point", ["before_manifest", "after_manifest"])
def test_an_error_while_committing_is_everyones_error(
    point: str, tmp_path: Path, points: Callable[..., None]
) -> None:
    assert publish_together(tmp_path, 10) == [None, None]

    def fail(at: str) -> None:
        if at == point:
            raise FULL_DISK

    points(fail)
    ends = publish_together(tmp_path, 20)
    assert all(isinstance(end, CheckpointError) and "No space left" in str(end) for end in ends)
    assert newest(tmp_path) == (10, []) and not list(tmp_path.glob("*.partial"))


def test_a_place_that_cannot_be_made_is_everyones_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        ends = publish_together(folder, 10)
        assert all(isinstance(end, CheckpointError) for end in ends), ends


def test_a_save_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="rank 0 could not write"):
        publish(lambda *_: None, tmp_path, step=1, facts={}, peers=Alone(), keep=2, verified=set())


@pytest.mark.parametrize("broken", [0, 1])
def test_bytes_that_the_disk_does_not_give_back_are_not_announced(
    broken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's memory holds what was written, the disk something else."""
    assert publish_together(tmp_path, 10) == [None, None]

    def drop(path: Path) -> None:
        if rank_of_thread() == broken and "optim" in path.name:
            path.write_bytes(path.read_bytes()[:-1] + b"?")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "drop_cached", drop)
        ends = publish_together(tmp_path, 20)
    for end in ends:
        assert isinstance(end, SaveError) and "reads back other than it was written" in str(end)
        assert f"rank {broken}" in str(end) and files_of(broken)[1] in str(end)
    assert newest(tmp_path) == (10, []) and not list(tmp_path.glob("*.partial"))


# -- damage ----------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Checkpoints of steps 10 and 20 by two ranks."""
    for step in (10, 20):
        assert publish_together(tmp_path, step) == [None, None]
    return tmp_path


def refused(folder: Path) -> str:
    """The newest is refused and the older one taken; why."""
    with pytest.raises(CheckpointError):
        verify(folder / "step-00000020")
    step, said = newest(folder)
    assert step == 10
    assert len(said) == 1 and said[0].startswith("refused step-00000020: ")
    return said[0]


def test_200_flipped_bytes_and_50_truncations_are_all_refused(
    two: Path, record_property: Callable[[str, Any], None]
) -> None:
    record_property("cases", 250)
    rng = np.random.default_rng(0)
    paths = sorted((two / "step-00000020").iterdir())
    assert len(paths) == 6
    for index in range(250):
        path = paths[index % len(paths)]
        good = path.read_bytes()
        at = int(rng.integers(len(good)))
        if index < 200:
            flipped = good[at] ^ int(rng.integers(1, 256))
            path.write_bytes(good[:at] + bytes([flipped]) + good[at + 1 :])
        else:
            path.write_bytes(good[:at])
        assert path.name in refused(two)
        path.write_bytes(good)
    assert newest(two) == (20, [])


def test_every_byte_of_the_manifest_is_vouched_for(two: Path) -> None:
    path = two / "step-00000020" / MANIFEST
    good = path.read_bytes()
    for at in range(len(good)):
        mask = (1, 0x20, 0x2A)[at % 3]  # 1 -> 0 in a cursor, A -> a, a blank to a newline ...
        path.write_bytes(good[:at] + bytes([good[at] ^ mask]) + good[at + 1 :])
        with pytest.raises(CheckpointError, match=MANIFEST):
            verify(path.parent, checksums=False)
    path.write_bytes(good + b"\n")
    assert MANIFEST in refused(two)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and seal it again, as a program that knows the format could."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["manifest_sha256"]
    change(manifest)
    path.write_text(checkpoints.seal(manifest))


def test_sealing_again_is_what_publishing_wrote(two: Path) -> None:
    before = (two / "step-00000020" / MANIFEST).read_bytes()
    rewrite(two / "step-00000020", lambda manifest: None)
    assert (two / "step-00000020" / MANIFEST).read_bytes() == before


def damages() -> dict[str, Callable[[Path], None]]:
    table: dict[str, Callable[[Path], None]] = {}
    for rank in (0, 1):
        for name in files_of(rank):
            table[f"deleted {name}"] = lambda folder, name=name: (folder / name).unlink()
    zero, one = files_of(0), files_of(1)

    def swap(folder: Path, first: str, second: str) -> None:
        (folder / first).rename(folder / "aside")
        (folder / second).rename(folder / first)
        (folder / "aside").rename(folder / second)

    def entry(name: str, value: Any) -> Callable[[Path], None]:
        return lambda folder: rewrite(
            folder, lambda manifest: manifest["files"].update({name: value})
        )

    def fact(name: str, value: Any) -> Callable[[Path], None]:
        return lambda folder: rewrite(folder, lambda manifest: manifest.update({name: value}))

    def link(folder: Path) -> None:
        (folder / one[0]).rename(folder.parent / "elsewhere")
        (folder / one[0]).symlink_to(folder.parent / "elsewhere")

    def link_manifest(folder: Path) -> None:
        (folder / MANIFEST).rename(folder.parent / "elsewhere")
        (folder / MANIFEST).symlink_to(folder.parent / "elsewhere")

    def link_folder(folder: Path) -> None:
        folder.rename(folder.parent / "elsewhere")
        folder.symlink_to(folder.parent / "elsewhere")

    def as_folder(folder: Path) -> None:
        (folder / one[0]).unlink()
        (folder / one[0]).mkdir()

    def manifest_folder(folder: Path) -> None:
        (folder / MANIFEST).unlink()
        (folder / MANIFEST).mkdir()

    def plain_file(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.write_text("not a folder")

    def stale(folder: Path) -> None:
        shutil.copy(folder.parent / "step-00000010" / MANIFEST, folder / MANIFEST)

    def renamed(folder: Path) -> None:
        shutil.rmtree(folder)
        shutil.copytree(folder.parent / "step-00000010", folder)

    def nothing(folder: Path) -> None:
        for rank in (0, 1):
            for name in files_of(rank):
                (folder / name).unlink()
        rewrite(folder, lambda manifest: manifest.update(files={}))

    outside = {"size": 1, "sha256": "0" * 64}
    table |= {
        "swapped ranks (model)": lambda folder: swap(folder, zero[0], one[0]),
        "swapped ranks (optimizer)": lambda folder: swap(folder, zero[1], one[1]),
        "extra file": lambda folder: (folder / "extra.pt").write_bytes(b"x"),
        "extra hidden file": lambda folder: (folder / ".extra").write_bytes(b""),
        "extra folder": lambda folder: (folder / "extra").mkdir(),
        "script": lambda folder: (folder / "zero_to_fp32.py").write_text("import os"),
        "no manifest": lambda folder: (folder / MANIFEST).unlink(),
        "empty manifest": lambda folder: (folder / MANIFEST).write_text(""),
        "manifest of the older one": stale,
        "manifest is a list": lambda folder: (folder / MANIFEST).write_text("[]"),
        "manifest is not UTF-8": lambda folder: (folder / MANIFEST).write_bytes(b'"\xff"'),
        "manifest is a bomb": lambda folder: (folder / MANIFEST).write_text("[" * 100_000),
        "manifest is a folder": manifest_folder,
        "older one under the newer's name": renamed,
        "symlink": link,
        "manifest is a symlink": link_manifest,
        "folder is a symlink": link_folder,
        "a folder for a file": as_folder,
        "a file for the folder": plain_file,
        "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()] and None,
        "relative traversal": entry("../latest", outside),
        "absolute traversal": entry("/etc/passwd", outside),
        "dot": entry(".", outside),
        "missing entry": entry("zero_pp_rank_2_mp_rank_00_model_states.pt", outside),
        "wrong size": entry(one[0], {"size": SMALL + 1, "sha256": "0" * 64}),
        "size is text": entry(one[0], {"size": str(SMALL), "sha256": "0" * 64}),
        "no size": entry(one[0], {"sha256": "0" * 64}),
        "entry is a number": entry(one[0], 3),
        "files is a list": fact("files", []),
        "no files": fact("files", {}),
        "no files, as it says": nothing,
        "other version": fact("format_version", 2),
        "step is text": fact("step", "20"),
        "step is a fraction": fact("step", 20.0),
        "step is a list": fact("step", [20]),
        "other step": fact("step", 21),
    }
    return table


DAMAGES = damages()


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_refused_and_the_older_one_taken(damage: str, two: Path) -> None:
    DAMAGES[damage](two / "step-00000020")
    said = refused(two)
    assert "\n" not in said and str(two / "step-00000020") in said
    # The run goes on from 10 and publishes 20 again.
    assert publish_together(two, 20) == [None, None]
    assert newest(two)[0] == 20


def test_an_unreadable_disk_falls_back_too(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = verifying.sha256_file

    def fail(path: Path) -> str:
        if path.parent.name == "step-00000020":
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(verifying, "sha256_file", fail)
    assert "Input/output error" in refused(two)


def test_nothing_valid_is_an_error_and_nothing_at_all_is_none(two: Path, tmp_path: Path) -> None:
    for step in (10, 20):
        (two / folder_name(step) / files_of(0)[0]).unlink()
    said: list[str] = []
    with pytest.raises(CheckpointError, match=r"none of its 2 checkpoints is valid.*step-00000020"):
        find_newest(two, said.append)
    assert [text.partition(":")[0] for text in said] == [
        "refused step-00000020",
        "refused step-00000010",
    ]
    for name in ("step-1", "step-00000020.partial", "step-00000020.invalid-0", "xstep-00000020",
                 "step-00000020x", "Step-00000020", "latest"):  # fmt: skip
        (tmp_path / "other" / name).mkdir(parents=True)
    assert step_folders(tmp_path / "other") == []
    assert find_newest(tmp_path / "other", pytest.fail) is None


def test_checksums_may_be_left_out_but_are_the_default(two: Path) -> None:
    path = two / "step-00000020" / files_of(1)[0]
    path.write_bytes(bytes(SMALL))
    verify(path.parent, checksums=False)
    with pytest.raises(CheckpointError, match=path.name):
        verify(path.parent)


def test_newest_means_the_highest_step_not_the_latest_hint(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        publish_alone(tmp_path, step, keep=5)
    assert (tmp_path / LATEST).read_text() == "step-00000020\n"
    assert newest(tmp_path) == (100, [])
    found = find_newest(tmp_path, pytest.fail)
    assert found == Found(
        folder=tmp_path / "step-00000100", manifest=verify(tmp_path / "step-00000100")
    )


# -- retention -------------------------------------------------------------------------------


def test_retention_never_drops_below_keep_whole_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    templates = tmp_path / "templates"
    for script in range(60):
        folder = tmp_path / str(script)
        keep = int(rng.integers(2, 5))
        steps = sorted(
            rng.choice(range(1, 30), size=int(rng.integers(0, 9)), replace=False).tolist()
        )
        whole: dict[int, bool] = {}
        folder.mkdir()
        for step in steps:
            template = templates / folder_name(step)
            if not template.exists():
                publish_alone(templates, step, keep=100)
            shutil.copytree(template, folder / folder_name(step))
            damage = rng.choice(["", "", "", "truncated", "deleted", "manifest"])
            victim = folder / folder_name(step) / files_of(0)[int(rng.integers(3))]
            if damage == "truncated":
                victim.write_bytes(b"")
            elif damage == "deleted":
                victim.unlink()
            elif damage == "manifest":
                (folder / folder_name(step) / MANIFEST).unlink()
            whole[step] = damage == ""
        (folder / "step-00000099.partial").mkdir()
        read = [step for step in steps if rng.random() < 0.6]
        verified = {folder_name(step) for step in read}
        retain(folder, keep=keep, verified=verified)
        left = sorted(int(path.name[5:]) for path in step_folders(folder))
        good = [step for step in steps if whole[step]]
        sure = [step for step in good if step in read]
        # Whatever is not older than both the `keep`-th whole and the second verified one.
        bound = min(good[-keep], sure[-2]) if len(good) >= keep and len(sure) >= 2 else 0
        assert left == [step for step in steps if step >= bound], (steps, whole, keep)
        assert len([step for step in left if step in sure]) >= min(2, len(sure))
        assert (folder / "step-00000099.partial").is_dir()
        before = left
        retain(folder, keep=keep, verified=verified)
        assert sorted(int(path.name[5:]) for path in step_folders(folder)) == before


def test_publishing_retains(tmp_path: Path) -> None:
    verified: set[str] = set()
    for step in range(1, 8):
        publish_alone(tmp_path, step, keep=3, verified=verified)
    assert [path.name for path in step_folders(tmp_path)] == [folder_name(s) for s in (7, 6, 5)]


def test_a_run_that_resumes_deletes_nothing_on_the_strength_of_names(tmp_path: Path) -> None:
    """Right names and sizes, wrong bytes: the older ones are all that is left."""
    for step in (1, 2, 3):
        publish_alone(tmp_path, step, keep=3)
    for step in (2, 3):
        (tmp_path / folder_name(step) / files_of(0)[0]).write_bytes(bytes(SMALL))
    step, said = newest(tmp_path)
    assert step == 1 and len(said) == 2
    verified = {folder_name(1)}  # the one resumed from
    (tmp_path / folder_name(2)).rename(tmp_path / folder_name(4))  # nobody has read it
    publish_alone(tmp_path, 5, verified=verified)
    assert (tmp_path / folder_name(1)).exists()
    publish_alone(tmp_path, 6, verified=verified)
    assert [path.name for path in step_folders(tmp_path)] == [folder_name(6), folder_name(5)]
    assert verified >= {folder_name(5), folder_name(6)}


@pytest.mark.parametrize("keep", [1, 2])
def test_two_verified_ones_stay_whatever_keep_says(keep: int, tmp_path: Path) -> None:
    verified: set[str] = set()
    for step in range(1, 6):
        publish_alone(tmp_path, step, keep=keep, verified=verified)
        left = [path.name for path in step_folders(tmp_path)]
        assert left == [folder_name(s) for s in (step, step - 1) if s]


def test_few_of_the_damaged_ones_that_were_moved_aside_stay(tmp_path: Path) -> None:
    for name in ("step-00000003.invalid-0", "step-00000020.invalid-2", "step-00000020.invalid-10"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "step-00000004.invalid-0").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "step-00000005.invalid-0").write_text("a file")
    (tmp_path / "step-00000001.invalid-x").mkdir()  # not ours
    publish_alone(tmp_path, 30)
    left = {path.name for path in tmp_path.iterdir()}
    assert {name for name in left if "invalid" in name} == {
        "step-00000020.invalid-2", "step-00000020.invalid-10", "step-00000001.invalid-x",
    }  # fmt: skip
    assert (tmp_path / "elsewhere").is_dir()


def test_a_folder_that_cannot_be_deleted_whole_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified: set[str] = set()
    publish_alone(tmp_path, 1, verified=verified)
    publish_alone(tmp_path, 2, verified=verified)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    publish_alone(tmp_path, 3, verified=verified)
    with pytest.raises(CheckpointError, match=MANIFEST):
        verify(tmp_path / folder_name(1))


def test_retention_spares_everything_when_the_save_failed(tmp_path: Path) -> None:
    for step in (1, 2):
        publish_alone(tmp_path, step)
    with pytest.raises(CheckpointError):
        publish(lambda *_: None, tmp_path, step=3, facts={}, peers=Alone(), keep=2, verified=set())
    assert [path.name for path in step_folders(tmp_path)] == [folder_name(2), folder_name(1)]


# -- small ones ------------------------------------------------------------------------------


def test_check_same_run_names_every_difference(tmp_path: Path) -> None:
    saved = {"seed": 1, "plan": "abc", "optimizer.betas": [0.9, 0.95], "gone": 3}
    check_same_run(saved, dict(saved), tmp_path)
    check_same_run({}, {}, tmp_path)
    current = {"seed": 1, "plan": "abd", "optimizer.betas": [0.9, 0.99], "new": 4}
    with pytest.raises(CheckpointError) as caught:
        check_same_run(saved, current, tmp_path)
    text = str(caught.value)
    assert str(tmp_path) in text and "seed" not in text
    for part in ("gone was 3, is None", "new was None, is 4", "plan was 'abc', is 'abd'",
                 "optimizer.betas was [0.9, 0.95], is [0.9, 0.99]"):  # fmt: skip
        assert part in text


def test_write_atomically_replaces_or_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old \u00e9")
    assert path.read_text(encoding="utf-8") == "old \u00e9"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(FULL_DISK))
        with pytest.raises(OSError, match="No space"):
            write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old \u00e9"
    write_atomically(path, "new")
    assert path.read_text() == "new" and [item.name for item in tmp_path.iterdir()] == ["file"]


def test_folder_names_sort_as_their_steps() -> None:
    names = [folder_name(step) for step in (0, 9, 10, 99_999_999)]
    assert names == sorted(names) and names[0] == "step-00000000"
