"""How ranks of several nodes find each other, with threads for ranks: who is missing, who is wrong."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest

from nmar_ds.errors import ConfigError, LaunchError
from nmar_ds.training import nodes
from nmar_ds.training.nodes import (
    check_same_everywhere,
    check_shared_folder,
    choose_interface,
    meet,
)
from nmar_ds.training.ranks import Ranks

Entry = namedtuple("Entry", "family address")


def ranks(rank: int, world: int, local_world: int = 1) -> Ranks:
    return Ranks(rank=rank, local_rank=0, world_size=world, local_world_size=local_world)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def gather(*all_ranks: Ranks, seconds: int = 20) -> list[Any]:
    """Let these ranks meet; what each got: a store, or the error."""
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    results: list[Any] = [None] * len(all_ranks)

    def come(place: int, one: Ranks) -> None:
        try:
            results[place] = meet(one, environ, timeout_seconds=seconds)
        except Exception as error:
            results[place] = error

    threads = [
        threading.Thread(target=come, args=(place, one)) for place, one in enumerate(all_ranks)
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.3)  # rank 0 first, so that which of two comes second is known
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def said_by(results: list[Any], words: str) -> None:
    """All ranks stopped with these words, in one line, one of them as its own."""
    for result in results:
        assert isinstance(result, LaunchError), result
        assert words in str(result) and "\n" not in str(result)
    assert [result.shared for result in results].count(False) == 1


def test_all_ranks_meet() -> None:
    for meeting in gather(*(ranks(rank, 3) for rank in range(3))):
        assert hasattr(meeting.store, "get") and meeting.cpus_of_others == []


def test_ranks_of_one_machine_learn_of_each_other_s_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks of this machine and one of another; each rank's thread has CPUs of its own."""
    here, plain = threading.local(), meet
    monkeypatch.setattr(nodes.socket, "gethostname", lambda: f"node{here.rank // 2}")

    def meet_as(one: Ranks, *arguments: Any, **more: Any) -> Any:
        here.rank = one.rank
        return plain(one, *arguments, **more)

    monkeypatch.setitem(globals(), "meet", meet_as)
    monkeypatch.setattr(nodes, "own_cpus", lambda: frozenset({here.rank, 8}))
    world = [
        Ranks(rank=rank, local_rank=rank % 2, world_size=3, local_world_size=local)
        for rank, local in enumerate((2, 2, 3))  # the last was not told its machine's number
    ]
    found = [meeting.cpus_of_others for meeting in gather(*world)]
    assert found == [[{1, 8}], [{0, 8}], []]


def test_two_nodes_with_one_rank_are_told_at_once() -> None:
    started = time.monotonic()
    results = gather(ranks(0, 3), ranks(1, 3), ranks(1, 3), seconds=60)
    said_by(results, "are rank 1, one of them on")
    assert "--node_rank" in str(results[0])
    assert time.monotonic() - started < 30, "long before the timeout"


@pytest.mark.parametrize("worlds", [(2, 3), (3, 2)])
def test_worlds_of_different_sizes_are_told_at_once(worlds: tuple[int, int]) -> None:
    started = time.monotonic()
    results = gather(ranks(0, worlds[0]), ranks(1, worlds[1]), seconds=60)
    said_by(results, "the same hostfile, or --nnodes and --nproc_per_node")
    assert re.search(
        r"rank 1 on \S+ was started for|rank 0 on \S+ was started for", str(results[0])
    )
    assert {str(world) for world in worlds} <= set(re.findall(r"\d+", str(results[0])))
    assert time.monotonic() - started < 30


def test_ranks_that_do_not_come_are_named() -> None:
    results = gather(ranks(0, 4), ranks(2, 4), seconds=2)
    said_by(results, "of 4 ranks these have not come to 127.0.0.1:")
    assert "within 2 s (training.timeout_seconds): 1, 3; check MASTER_ADDR" in str(results[0])


def test_nobody_at_the_meeting_place() -> None:
    (error,) = gather(ranks(1, 2), seconds=1)
    assert isinstance(error, LaunchError) and error.shared and "\n" not in str(error)
    assert re.search(r"127\.0\.0\.1:\d+ \(MASTER_ADDR:MASTER_PORT\) does not answer", str(error))


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with pytest.raises(LaunchError, match=rf"127\.0\.0\.1:{port} cannot be opened") as caught:
            meet(ranks(0, 2), environ, timeout_seconds=2)
    assert "another run may use it" in str(caught.value) and "\n" not in str(caught.value)


def test_gloo_takes_the_network_that_leads_to_the_master(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        psutil,
        "net_if_addrs",
        lambda: {
            "down": [],
            "eth0": [Entry(socket.AF_INET, "192.0.2.7")],
            "inside": [Entry(socket.AF_PACKET, "127.0.0.1"), Entry(socket.AF_INET, "127.0.0.1")],
        },
    )
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    choose_interface(environ, ranks(1, 2, local_world=2))
    assert "GLOO_SOCKET_IFNAME" not in environ, "one node: gloo's own choice will do"
    choose_interface(environ, ranks(1, 2))
    assert environ["GLOO_SOCKET_IFNAME"] == "inside"
    environ["GLOO_SOCKET_IFNAME"] = "eth0"
    choose_interface(environ, ranks(1, 2))
    assert environ["GLOO_SOCKET_IFNAME"] == "eth0", "the user's choice stands"
    for wrong in ("down", "eth9", "eth0,eth9"):
        environ["GLOO_SOCKET_IFNAME"] = wrong
        with pytest.raises(LaunchError, match=r"GLOO_SOCKET_IFNAME: .* expected one of: eth0, ins"):
            choose_interface(environ, ranks(1, 2))


def test_a_master_that_cannot_be_reached_is_named() -> None:
    environ = {"MASTER_ADDR": "no host", "MASTER_PORT": "29500"}
    with pytest.raises(LaunchError, match=r"MASTER_ADDR: no host: .*address of the first node"):
        choose_interface(environ, ranks(1, 2))


def test_nodes_with_other_data_or_packages_are_refused() -> None:
    facts = {"data": "abc", "seed": 1, "torch": "2.13.0"}
    check_same_everywhere([facts, dict(facts), dict(facts)])
    for name, value in (("data", "abd"), ("torch", "2.12.0"), ("new", 1)):
        with pytest.raises(LaunchError, match=rf"^{name}: is .* on rank 0 and .* rank 2") as caught:
            check_same_everywhere([facts, dict(facts), {**facts, name: value}])
        assert caught.value.shared


class OtherNode:
    """Rank 0 of two; the other rank sees the folder or does not."""

    rank, world_size = 0, 2

    def __init__(self, sees: bool) -> None:
        self.sees = sees

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value, self.sees]


def test_a_run_folder_must_be_shared_and_is_left_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    check_shared_folder(folder, OtherNode(True))
    assert list(folder.iterdir()) == []
    with pytest.raises(ConfigError, match=r"ranks 1 do not see .* file system that all") as caught:
        check_shared_folder(folder, OtherNode(False))
    assert caught.value.shared and list(folder.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"output: {tmp_path / 'file'}: ") as caught:
        check_shared_folder(tmp_path / "file", OtherNode(True))
    assert caught.value.shared


class SecondNode:
    """Rank 1 of two; rank 0 has written a file of this name."""

    rank, world_size = 1, 2

    def broadcast(self, value: Any) -> Any:
        return ".seen-0", None

    def gather(self, value: Any) -> list[Any]:
        return [True, value]


def test_another_node_looks_for_what_rank_0_wrote(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ranks 1 do not see"):
        check_shared_folder(tmp_path / "run", SecondNode())
    assert not (tmp_path / "run").exists()
    (tmp_path / ".seen-0").touch()
    check_shared_folder(tmp_path, SecondNode())
    assert (tmp_path / ".seen-0").exists(), "rank 0 wrote it and takes it away"
