"""One cluster for all tests of this folder, and one uninterrupted run under it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [
    str(Path(__file__).parents[1] / name) for name in ("distributed", "faults", "slurm")
]

from cluster import Cluster  # noqa: E402
from fixtures import config_file  # noqa: E402

__all__ = ["config_file"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    install = subprocess.run(
        [str(Path(__file__).with_name("install.sh"))], capture_output=True, text=True, check=False
    )
    if install.returncode == 3 and not (os.environ.get("CI") and os.geteuid() == 0):
        pytest.skip(install.stderr.strip())
    assert install.returncode == 0 and shutil.which("slurmctld"), install.stdout + install.stderr
    started = Cluster()
    try:
        started.start()
        yield started
    finally:
        started.stop()
