"""Every end of an attempt is one line whose first word says what kind of end it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from nmar_ds.errors import (
    CheckpointError,
    DivergenceError,
    FolderError,
    HangError,
    IsolationError,
    NoProgressError,
    PeerLostError,
    SaveError,
)
from nmar_ds.training import outcome


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DivergenceError("step 7: 3 non-finite steps"), "diverged: step 7: 3 non-finite steps"),
        (HangError("rank 1 in save"), "hang: rank 1 in save"),
        (FolderError("run/STOP: is set"), "refused: run/STOP: is set"),
        (CheckpointError("belongs to another run"), "refused: belongs to another run"),
        (NoProgressError("3 attempts"), "refused: 3 attempts"),
        (PeerLostError("another rank ended"), "failed: another rank ended"),
        (SaveError("no room"), "failed: no room"),
        (IsolationError("leak"), "failed: leak"),
        (RuntimeError("two\n  lines"), "failed: RuntimeError: two lines"),
        (AssertionError(), "failed: AssertionError: AssertionError"),
    ],
)
def test_errors_in_one_line(error: Exception, line: str) -> None:
    assert outcome.of_error(error) == line
    assert line.split(":", maxsplit=1)[0] in outcome.ENDS


def test_the_first_to_fail_says_why_and_an_orderly_end_replaces_all(tmp_path: Path) -> None:
    file = tmp_path / outcome.OUTCOME
    outcome.leave(tmp_path, "failed: the cause")
    outcome.leave(tmp_path, "failed: another rank ended")
    assert file.read_text() == "failed: the cause\n"
    outcome.clear(tmp_path)
    assert not file.exists()
    outcome.leave(tmp_path, "hang: x")
    outcome.write(tmp_path, "complete step 8")
    assert [path.name for path in tmp_path.iterdir()] == [outcome.OUTCOME]
    assert file.read_text() == "complete step 8\n"
    outcome.leave(tmp_path / "gone", "failed: no folder")  # no second error over the first
