"""All ranks read a checkpoint together: each file once, one answer, whatever their number."""

from __future__ import annotations

import errno
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fake_ranks import ThreadPeers, files_of, publish_together, rank_of_thread, run_ranks

from nmar_ds.errors import CheckpointError, FolderError
from nmar_ds.training import verifying
from nmar_ds.training.verifying import Found, find_newest, first_damage, share_out, verify

WORLDS = (1, 2, 3, 5)


@pytest.fixture(params=[1, 2, 4], ids=lambda saved: f"saved-by-{saved}")
def two(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Checkpoints of steps 10 and 20."""
    for step in (10, 20):
        assert not any(publish_together(tmp_path, step, world=request.param))
    return tmp_path


def look(folder: Path, world: int) -> tuple[list[Any], list[list[str]], list[list[str]]]:
    """What each rank found, what each reported, and the collectives of each."""
    reports: list[list[str]] = [[] for _ in range(world)]
    called: list[list[str]] = [[] for _ in range(world)]

    def work(peers: ThreadPeers) -> Found | None:
        called[peers.rank] = peers.called
        return find_newest(folder, reports[peers.rank].append, peers)

    return run_ranks(world, work), reports, called


@pytest.mark.parametrize("world", WORLDS)
def test_every_file_is_read_once_and_all_find_the_same(
    world: int, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, int]] = []
    real = verifying.sha256_file

    def count(path: Path) -> str:
        read.append((path.name, rank_of_thread()))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(verifying, "sha256_file", count)
        found, reports, called = look(two, world)
    manifest = verify(two / "step-00000020")
    assert found == [Found(folder=two / "step-00000020", manifest=manifest)] * world
    assert sorted(name for name, _ in read) == sorted(manifest["files"])
    loads = Counter(rank for _, rank in read)  # the files of this test are all of one size
    assert max(loads.values()) == -(-len(read) // world)
    assert not any(reports) and all(calls == called[0] for calls in called)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("damage", ["first file", "last file", "missing", "manifest", "two files"])
def test_the_refusal_names_what_one_reader_alone_would(damage: str, world: int, two: Path) -> None:
    folder = two / "step-00000020"
    names = list(verify(folder)["files"])
    bad = {"first file": names[:1], "last file": names[-1:], "two files": names[1:3],
           "missing": names[-1:], "manifest": ["manifest.json"]}[damage]  # fmt: skip
    for name in bad:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 4
        (folder / name).write_bytes(content)
    if damage == "missing":
        (folder / bad[0]).unlink()
    with pytest.raises(CheckpointError) as alone:
        verify(folder)
    found, reports, called = look(two, world)
    assert [f.step for f in found] == [10] * world
    assert reports[0] == [f"refused step-00000020: {alone.value}"] and not any(reports[1:])
    assert bad[0] in reports[0][0]
    assert all(calls == called[0] for calls in called)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_rank_that_cannot_read_its_share_refuses_for_all(
    broken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20):
        assert not any(publish_together(tmp_path, step, world=3))
    real = verifying.sha256_file

    def fail(path: Path) -> str:
        if rank_of_thread() == broken and path.parent.name == "step-00000020":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(verifying, "sha256_file", fail)
    found, reports, _ = look(tmp_path, 3)
    assert [f.step for f in found] == [10] * 3
    assert len(reports[0]) == 1 and "Input/output error" in reports[0][0]


@pytest.mark.parametrize("world", WORLDS)
def test_nothing_valid_ends_all_ranks_with_one_line(world: int, two: Path) -> None:
    for step in (10, 20):
        (two / f"step-000000{step}" / files_of(0)[0]).write_bytes(bytes(200))
    found, reports, _ = look(two, world)
    assert {type(error) for error in found} == {CheckpointError}
    assert len({str(error) for error in found}) == 1 and all(error.shared for error in found)
    assert "none of its 2 checkpoints is valid" in str(found[0]) and len(reports[0]) == 2


def test_nothing_there_and_nothing_to_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert look(tmp_path / "none", 2)[0] == [None, None]

    def forbidden(folder: Path) -> list[Path]:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(verifying, "step_folders", forbidden)
    found, _, _ = look(tmp_path, 2)
    assert all(isinstance(error, FolderError) and error.shared for error in found)
    assert str(found[0]) == f"{tmp_path}: Permission denied"


def test_shares_are_even_whole_and_the_same_everywhere() -> None:
    sizes = {"a": 100, "b": 60, "c": 60, "d": 10, "e": 0}
    assert share_out(sizes, 2) == [["a", "d", "e"], ["b", "c"]]
    assert share_out(dict(reversed(sizes.items())), 2) == share_out(sizes, 2)
    assert share_out(sizes, 1) == [["a", "b", "c", "d", "e"]]
    assert share_out(sizes, 8)[5:] == [[], [], []]
    assert sorted(name for share in share_out(sizes, 3) for name in share) == list("abcde")


def test_only_the_own_share_is_read(two: Path) -> None:
    folder = two / "step-00000020"
    files = verify(folder)["files"]
    names = list(files)
    (folder / names[-1]).write_bytes(bytes(200))
    assert first_damage(folder, files, names[:-1]) is None
    damage = first_damage(folder, files, names[-1:])
    assert damage is not None and damage[0] == len(names) - 1 and names[-1] in damage[1]
