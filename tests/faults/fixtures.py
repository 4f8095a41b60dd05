"""One prepared store and one uninterrupted run for every fault."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import common
import pytest
from common import Prepared
from fork_server import ForkServer


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
