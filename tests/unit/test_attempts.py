"""Attempts of a job: three that fail at one step end it, and nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest

from nmar_ds.errors import FolderError, NoProgressError
from nmar_ds.training import attempts

JOB = {"SLURM_JOB_ID": "12"}


def failing(folder: Path, step: int, environ: dict[str, str] = JOB) -> None:
    attempts.begin(folder, step, environ)


def test_three_failures_at_one_step_are_enough(tmp_path: Path) -> None:
    for restart in range(3):
        failing(tmp_path, 4, {**JOB, "SLURM_RESTART_COUNT": str(restart)})
    with pytest.raises(
        NoProgressError, match="3 attempts in a row of job slurm 12 began at step 4"
    ) as caught:
        attempts.begin(tmp_path, 4, JOB)
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    # The refusal is no attempt; a person who submits anew is counted afresh.
    assert len((tmp_path / attempts.ATTEMPTS).read_text().splitlines()) == 3
    attempts.begin(tmp_path, 4, {"SLURM_JOB_ID": "13"})
    with pytest.raises(NoProgressError):
        attempts.begin(tmp_path, 4, JOB)  # another job's attempt between changes nothing


def test_progress_counts_afresh(tmp_path: Path) -> None:
    for step in (0, 0, 2, 2, 4, 4, 6, 6, 0, 0):
        failing(tmp_path, step)
    failing(tmp_path, 0)
    with pytest.raises(NoProgressError):
        failing(tmp_path, 0)


def test_a_stop_that_was_asked_for_is_no_failure(tmp_path: Path) -> None:
    for _ in range(9):
        attempts.begin(tmp_path, 0, JOB)
        attempts.end(tmp_path, 0, JOB)
    for _ in range(2):
        failing(tmp_path, 0)
    attempts.begin(tmp_path, 0, JOB)
    attempts.end(tmp_path, 0, JOB)
    failing(tmp_path, 0)
    with pytest.raises(NoProgressError):  # nor does it excuse the failures around it
        failing(tmp_path, 0)


def test_starts_by_hand_are_noted_and_never_refused(tmp_path: Path) -> None:
    for _ in range(9):
        failing(tmp_path, 0, {})
        failing(tmp_path, 0, {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_MAX_RESTARTS": "0"})
    assert len((tmp_path / attempts.ATTEMPTS).read_text().splitlines()) == 18


def test_restarts_of_torchrun_are_a_job(tmp_path: Path) -> None:
    environ = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_MAX_RESTARTS": "9"}
    for _ in range(3):
        failing(tmp_path, 0, environ)
    with pytest.raises(NoProgressError, match="torchrun none"):
        failing(tmp_path, 0, environ)


def test_lines_that_a_crash_cut_short(tmp_path: Path) -> None:
    file = tmp_path / attempts.ATTEMPTS
    for _ in range(3):
        failing(tmp_path, 0)
        with file.open("a") as out:
            out.write('{"event": "be')
    with pytest.raises(NoProgressError):
        failing(tmp_path, 0)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"missing/attempts\.jsonl"):
        attempts.begin(tmp_path / "missing", 0, JOB)
