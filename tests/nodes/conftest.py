from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))

from network import Network
from test_launch import prepared  # noqa: F401

KINDS: list[str] = []


@pytest.fixture(scope="session")
def network() -> Iterator[Network]:
    built = Network()
    KINDS.append(built.kind)
    yield built
    built.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for kind in KINDS:
        terminalreporter.write_line(f"the two nodes of tests/nodes had {kind}")
