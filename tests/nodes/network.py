"""Two nodes on one machine: network namespaces joined by a cable of two virtual ends.

The namespaces belong to a process of ours and vanish with it. Without root they live in a user
namespace. Where the machine allows neither, both nodes share its network; `Network.kind` says
which it was, and the test session prints it.
"""

from __future__ import annotations

import os
import shutil
import subprocess

SETUP = """
set -e
mount -t tmpfs tmpfs /run
ip netns add one
ip netns add two
ip -n one link add cable type veth peer name cable netns two
ip -n one addr add 10.77.1.1/24 dev cable
ip -n two addr add 10.77.1.2/24 dev cable
for node in one two; do
    ip -n $node link set lo up
    ip -n $node link set cable up
done
echo ready
exec cat
"""
APART = "two network namespaces joined by a veth pair"
TOGETHER = "one shared network (no namespaces: {reason})"


class Network:
    """Where the two nodes run.

    Attributes:
        kind: what was built, for people.
        address: of the first node.
    """

    def __init__(self) -> None:
        self._holder: subprocess.Popen[str] | None = None
        reason = self._build()
        self.apart = reason is None
        self.kind = APART if reason is None else TOGETHER.format(reason=reason)
        self.address = "10.77.1.1" if self.apart else "127.0.0.1"

    def _build(self) -> str | None:
        """Returns why it can't be done, or None."""
        for tool in ("ip", "unshare", "nsenter"):
            if shutil.which(tool) is None:
                return f"no {tool} command"
        self._user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        self._holder = subprocess.Popen(
            ["unshare", *self._user, "--mount", "--net", "sh", "-c", SETUP],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._holder.stdout is not None and self._holder.stderr is not None
        if self._holder.stdout.readline().strip() == "ready":
            return None
        reason = self._holder.stderr.read().strip().splitlines() or ["no answer"]
        self.close()
        return reason[-1]

    def on(self, node: int, command: list[str]) -> list[str]:
        """The command, as it is run on node 0 or 1."""
        if not self.apart:
            return command
        assert self._holder is not None
        user = ["--user", "--preserve-credentials"] if self._user else []
        enter = ["nsenter", "--target", str(self._holder.pid), *user, "--mount"]
        return [
            *enter,
            f"--wd={os.getcwd()}",
            "ip",
            "netns",
            "exec",
            ("one", "two")[node],
            *command,
        ]

    def close(self) -> None:
        """Unplug: the namespaces go with their last process."""
        if self._holder is not None:
            self._holder.communicate()
