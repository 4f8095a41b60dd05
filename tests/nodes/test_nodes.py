"""The same run on two nodes, started on each by `deepspeed --no_ssh` or by `torchrun`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from network import Network
from pool import free_port
from test_launch import DEEPSPEED, ROOT, environment, finish, losses, weights_of

TORCHRUN = str(Path(sys.executable).with_name("torchrun"))


def deepspeed(address: str, port: int, node: int, hosts: Path) -> list[str]:
    return [
        DEEPSPEED, "--hostfile", str(hosts), "--no_ssh", "--node_rank", str(node),
        "--master_addr", address, "--master_port", str(port),
    ]  # fmt: skip


def torchrun(address: str, port: int, node: int, hosts: Path) -> list[str]:
    return [
        TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(node),
        "--master_addr", address, "--master_port", str(port),
    ]  # fmt: skip


def start(
    network: Network, node: int, launcher: list[str], *arguments: str
) -> subprocess.Popen[str]:
    command = network.on(node, [*launcher, "launcher/train.py", *arguments])
    environ = environment()
    environ.pop("GLOO_SOCKET_IFNAME", None)
    return subprocess.Popen(
        command, cwd=ROOT, env=environ, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def hosts(prepared: Path) -> Path:
    path = prepared / "hosts"
    path.write_text("first slots=1\nsecond slots=1\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def one_node(prepared: Path) -> tuple[Path, dict[int, str]]:
    """The same two ranks on one node."""
    process = subprocess.Popen(
        [DEEPSPEED, "--num_gpus", "2", "--master_port", str(free_port()), "launcher/train.py",
         "--config", str(prepared / "config.yaml"), f"output={prepared / 'one'}"],
        cwd=ROOT, env=environment(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    output = finish(process)
    assert process.returncode == 0, output
    return prepared / "one", losses(output)


def ranks_below(parent: int) -> list[tuple[int, dict[str, str]]]:
    """Ranks among the descendants of a process: id, and environment."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], [parent]
    while todo:
        pid = todo.pop()
        todo += children.get(pid, [])
        try:
            pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        except OSError:
            continue
        environ = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        if "RANK" in environ:
            found.append((pid, environ))
    return found


def test_two_nodes_do_what_one_does_stop_together_and_continue_under_the_other_launcher(
    network: Network, prepared: Path, hosts: Path, one_node: tuple[Path, dict[int, str]]
) -> None:
    reference, whole = one_node
    arguments = ["--config", str(prepared / "config.yaml"), f"output={prepared / 'two'}",
                 "training.world_size=2"]  # fmt: skip
    port = free_port()
    nodes = [
        start(network, node, deepspeed(network.address, port, node, hosts), *arguments)
        for node in (0, 1)
    ]
    said = ""
    assert nodes[0].stdout is not None
    for line in nodes[0].stdout:
        said += line
        if re.search(r"step +3/", line):
            places = [ranks_below(node.pid) for node in nodes]
            assert [len(place) for place in places] == [1, 1]
            environs = [place[0][1] for place in places]
            assert [environ["RANK"] for environ in environs] == ["0", "1"]
            assert [environ["LOCAL_RANK"] for environ in environs] == ["0", "0"]
            assert [environ["LOCAL_SIZE"] for environ in environs] == ["1", "1"]
            if network.apart:
                namespaces = {os.readlink(f"/proc/{place[0][0]}/ns/net") for place in places}
                assert len(namespaces) == 2
            os.kill(places[1][0][0], signal.SIGTERM)  # the second node's rank alone
            break
    said += finish(nodes[0])
    second = finish(nodes[1])
    assert [node.returncode for node in nodes] == [0, 0], said + second
    stopped_at = int(re.search(r"stopped after step (\d+)", said).group(1))  # type: ignore[union-attr]
    assert 3 <= stopped_at < len(whole)
    saved = prepared / "two" / "checkpoints" / f"step-{stopped_at:08d}"
    assert {f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)} <= {
        path.name for path in saved.iterdir()
    }

    port = free_port()
    nodes = [
        start(network, node, torchrun(network.address, port, node, hosts), *arguments)
        for node in (0, 1)
    ]
    outputs = [finish(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert f"after step {stopped_at}" in outputs[0]
    resumed = losses(outputs[0])
    assert min(resumed) == stopped_at + 1
    assert {**losses(said), **resumed} == whole
    expected, got = weights_of(reference), weights_of(prepared / "two")
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(value, got[name], err_msg=name)


def test_a_whole_run_under_torchrun_on_two_nodes_equals_one_node(
    network: Network, prepared: Path, hosts: Path, one_node: tuple[Path, dict[int, str]]
) -> None:
    reference, whole = one_node
    port = free_port()
    arguments = ["--config", str(prepared / "config.yaml"), f"output={prepared / 'torchrun'}"]
    nodes = [
        start(network, node, torchrun(network.address, port, node, hosts), *arguments)
        for node in (0, 1)
    ]
    outputs = [finish(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert losses(outputs[0]) == whole
    for name, value in weights_of(reference).items():
        np.testing.assert_array_equal(value, weights_of(prepared / "torchrun")[name])


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


def test_a_first_node_that_does_not_answer_is_named_in_time(
    network: Network, prepared: Path, hosts: Path
) -> None:
    port = free_port()
    # `finish` waits shorter than the configured timeout, let alone torch's 30 minutes.
    alone = start(
        network, 1, deepspeed(network.address, port, 1, hosts),
        "--config", str(prepared / "config.yaml"), f"output={prepared / 'absent'}",
        "training.timeout_seconds=3",
    )  # fmt: skip
    output = finish(alone)
    assert alone.returncode == 2, output
    (line,) = errors(output)
    assert f"{network.address}:{port} (MASTER_ADDR:MASTER_PORT) does not answer, after 3 s" in line
    assert "Traceback" not in output
    assert not (prepared / "absent").exists()


def test_a_run_folder_that_the_nodes_do_not_share_is_refused_before_the_first_step(
    network: Network, prepared: Path, hosts: Path
) -> None:
    folder = prepared / "private"
    other = prepared / "private-of-the-second"
    port = free_port()
    common = ["--config", str(prepared / "config.yaml")]
    nodes = [
        start(network, node, deepspeed(network.address, port, node, hosts), *common,
              f"output={path}")
        for node, path in enumerate((folder, other))
    ]  # fmt: skip
    outputs = [finish(node) for node in nodes]
    assert [node.returncode for node in nodes] == [2, 2], outputs
    (line,) = errors(outputs[0] + outputs[1])
    assert f"output: {folder}: ranks 1 do not see what rank 0 writes there" in line
    assert list(folder.iterdir()) == [] and not other.exists()
    shutil.rmtree(folder)
