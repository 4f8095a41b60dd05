"""The fixtures of this folder, and a table of what was injected."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "distributed"), str(Path(__file__).parent)]

from common import TABLE  # noqa: E402
from fixtures import config_file, prepared, server  # noqa: E402

__all__ = ["config_file", "prepared", "server"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TABLE:
        terminalreporter.write_sep("-", "faults injected")
        for name, outcome in TABLE:
            terminalreporter.write_line(f"{name:58} {outcome}")
        num_exact = sum(outcome.startswith("recovered bit-exactly") for _, outcome in TABLE)
        terminalreporter.write_line(f"{len(TABLE)} injected, {num_exact} recovered bit-exactly")
