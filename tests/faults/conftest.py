"""One prepared store and one uninterrupted run for every fault; a table of what was injected."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "distributed"), str(Path(__file__).parent)]

import common  # noqa: E402
from common import TABLE, Prepared  # noqa: E402
from fork_server import ForkServer  # noqa: E402


@pytest.fixture(scope="session")
def config_file() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    folder.chmod(0o755)  # pytest's own folders are closed to the unprivileged user of some tests
    yield common.prepare(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def server(config_file: Path) -> Iterator[ForkServer]:
    started = ForkServer(config_file)
    yield started
    started.close()


@pytest.fixture(scope="session")
def prepared(config_file: Path, server: ForkServer) -> Prepared:
    whole = config_file.parent / "whole"
    result = server.run(f"output={whole}")
    assert result["codes"] == [0, 0], result["outputs"]
    return Prepared(config_file.parent, config_file, whole, common.digest_of(whole))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TABLE:
        terminalreporter.write_sep("-", "faults injected")
        for name, outcome in TABLE:
            terminalreporter.write_line(f"{name:58} {outcome}")
        num_exact = sum(outcome.startswith("recovered bit-exactly") for _, outcome in TABLE)
        terminalreporter.write_line(f"{len(TABLE)} injected, {num_exact} recovered bit-exactly")
