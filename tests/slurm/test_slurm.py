"""The shipped scripts under a real Slurm: whatever ends an attempt, the run ends in the same bits."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import ROOT, Cluster
from common import digest_of

TRAIN = str(ROOT / "slurm/train_msft.sh")
TWO_TASKS = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")


@dataclass
class Job:
    cluster: Cluster
    id: int
    log: Path
    run: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, text: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while text not in self.said():
            assert time.monotonic() < end, self.said()
            time.sleep(0.05)

    def end(self) -> dict[str, str]:
        return self.cluster.wait(self.id, self.log)


def submit(
    cluster: Cluster, config: Path, run: Path, *overrides: str, flags: tuple[str, ...] = ()
) -> Job:
    log = config.parent / f"{run.name}.log"
    job = cluster.sbatch(
        *TWO_TASKS, f"--output={log}", *flags, TRAIN, "--config", str(config), f"output={run}",
        *overrides,
    )  # fmt: skip
    return Job(cluster, job, log, run)


@pytest.fixture(scope="session")
def digest(cluster: Cluster, config_file: Path) -> str:
    """Weights of a run that nothing disturbs, on two nodes; the ranks found each other."""
    job = submit(cluster, config_file, config_file.parent / "whole")
    facts = job.end()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "0"), job.said()
    assert "outcome: complete step 8" in job.said()
    assert f"2 tasks on n[1-2], meeting at 127.0.0.1:{20000 + job.id % 10000}" in job.said()
    return digest_of(job.run)


def test_usr2_saves_and_requeues_and_ends_in_the_same_bits(
    cluster: Cluster, config_file: Path, digest: str
) -> None:
    job = submit(cluster, config_file, config_file.parent / "usr2")
    job.wait_for("canary ")
    cluster.command("scancel", "--batch", "--signal=USR2", str(job.id))
    facts = job.end()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), job.said()
    assert "outcome: interrupted step" in job.said() and ": requeued" in job.said()
    assert digest_of(job.run) == digest


def test_a_stop_file_ends_the_job_for_good(cluster: Cluster, config_file: Path) -> None:
    run = config_file.parent / "stop"
    endless = ("training.steps=4000", "checkpoint.every=4000")
    job = submit(cluster, config_file, run, *endless)
    job.wait_for("step      3/")
    (run / "STOP").touch()
    facts = job.end()
    assert (facts["ExitCode"], facts["Restarts"]) == ("6:0", "0"), job.said()
    assert "; saved" in job.said() and ": STOP" in (run / "outcome").read_text()
    # Nor does another job go on.
    again = submit(cluster, config_file, run, *endless)
    facts = again.end()
    assert (facts["ExitCode"], facts["Restarts"]) == ("2:0", "0"), again.said()
    assert f"error: {run}/STOP: the kill switch is set" in again.said()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_task_ends_all_and_the_job_goes_on(
    cluster: Cluster, config_file: Path, digest: str, victim: int
) -> None:
    job = submit(cluster, config_file, config_file.parent / f"kill{victim}")
    job.wait_for("step      2/8")
    os.kill(cluster.ranks(job.id)[victim], signal.SIGKILL)
    facts = job.end()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), job.said()
    assert "failed attempt 1 at checkpoint" in job.said()
    assert digest_of(job.run) == digest


def test_a_job_that_always_fails_stops_after_three_attempts(
    cluster: Cluster, config_file: Path
) -> None:
    # Found by the ranks, not by the configuration: a step that never becomes finite.
    job = submit(
        cluster, config_file, config_file.parent / "fails", "training.max_nonfinite_steps=1",
        "optimizer.learning_rate=1.0e+38", "optimizer.warmup_steps=0",
    )  # fmt: skip
    facts = job.end()
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "3:0"), job.said()
    assert facts["Restarts"] == "2" and "3 failed attempts in a row" in job.said()


def test_an_interpreter_that_cannot_start_ranks_stops_after_three_attempts(
    cluster: Cluster, config_file: Path, tmp_path: Path
) -> None:
    """srun's own failures leave no mark of Python's."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    python.write_text(
        f'#!/bin/sh\n[ -z "$SLURM_STEP_NUM_TASKS" ] || exit 127\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    run = config_file.parent / "no-python"
    log = config_file.parent / "no-python.log"
    job = cluster.sbatch(
        *TWO_TASKS, f"--output={log}", TRAIN, "--config", str(config_file), f"output={run}",
        NMAR_VENV=str(tmp_path),
    )  # fmt: skip
    facts = cluster.wait(job, log)
    assert (facts["ExitCode"], facts["Restarts"]) == ("3:0", "2"), log.read_text()


def test_a_bad_configuration_is_never_requeued(cluster: Cluster, config_file: Path) -> None:
    job = submit(cluster, config_file, config_file.parent / "bad", "training.stepps=3")
    facts = job.end()
    assert (facts["ExitCode"], facts["Restarts"]) == ("2:0", "0"), job.said()
    assert "stepps" in job.said() and "srun" not in job.said() and not job.run.exists()


def test_bad_input_found_by_the_ranks_is_never_requeued(
    cluster: Cluster, config_file: Path
) -> None:
    job = submit(cluster, config_file, config_file.parent / "ranks", "training.world_size=5")
    facts = job.end()
    assert (facts["ExitCode"], facts["Restarts"]) == ("2:0", "0"), job.said()
    assert "5 ranks are asked for, 2 started" in job.said()


def test_preflight_lets_good_nodes_train_and_names_a_bad_one(
    cluster: Cluster, config_file: Path, digest: str, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"  # puts the faulty double in preflight's place
    double = ROOT / "tests/distributed/preflight_faults.py"
    python.write_text(
        f'#!/usr/bin/env bash\n[[ $1 != */preflight.py ]] || set -- "{double}" "${{@:2}}"\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    ends = {}
    for name, fault in (("good", "none"), ("bad", "wrong")):
        log, run = config_file.parent / f"{name}.log", config_file.parent / f"preflight-{name}"
        job = cluster.sbatch(
            *TWO_TASKS, f"--output={log}", TRAIN, "--config", str(config_file), f"output={run}",
            NMAR_VENV=str(tmp_path), NMAR_PREFLIGHT="1", NMAR_MAX_FAILURES="1", FAULT=fault,
            FAULT_RANK="1", PYTHONPATH=str(ROOT),
        )  # fmt: skip
        facts = cluster.wait(job, log)
        ends[name] = (facts["JobState"], facts["ExitCode"], log.read_text())
        assert (run / "preflight.json").exists(), ends
    assert ends["good"][:2] == ("COMPLETED", "0:0"), ends["good"]
    assert "preflight failed" not in ends["good"][2]
    assert digest_of(config_file.parent / "preflight-good") == digest
    assert ends["bad"][:2] == ("FAILED", "3:0"), ends["bad"]
    said = ends["bad"][2]
    assert re.search(r"^bad node bad-host .*products: 3 wrong", said, re.MULTILINE), said
    assert "slurm: preflight failed with 1" in said and "model " not in said, said
    assert not (config_file.parent / "preflight-bad/checkpoints").exists()


def test_ranks_of_three_nodes_with_uneven_tasks(cluster: Cluster) -> None:
    code = (
        "import os; from nmar_ds.training.ranks import discover_ranks as d; r = d(os.environ); "
        "print(r.rank, r.local_rank, r.world_size, r.local_world_size, *r.meeting_place)"
    )
    said = cluster.command(
        "srun", "--nodes=3", "--ntasks=4", "--distribution=block", sys.executable, "-c", code,
        MASTER_ADDR="", PYTHONPATH=str(ROOT),
    )  # fmt: skip
    lines = [line.split() for line in sorted(said.splitlines())]
    assert [line[:4] for line in lines] == [
        ["0", "0", "4", "2"], ["1", "1", "4", "2"], ["2", "0", "4", "1"], ["3", "0", "4", "1"],
    ]  # fmt: skip
    assert {line[4] for line in lines} == {"n1"} and len({line[5] for line in lines}) == 1
    assert 20000 <= int(lines[0][5]) < 30000


def test_plain_python_in_a_batch_script_is_refused(cluster: Cluster, config_file: Path) -> None:
    log = config_file.parent / "plain.log"
    job = cluster.sbatch(
        *TWO_TASKS, f"--output={log}", "--wrap",
        f"{sys.executable} launcher/train.py --config {config_file}", PYTHONPATH=str(ROOT),
    )  # fmt: skip
    assert cluster.wait(job, log)["ExitCode"] == "2:0", log.read_text()
    assert log.read_text().startswith("error: environment: SLURM_NTASKS: is 2")


def test_two_jobs_on_one_folder(cluster: Cluster, config_file: Path) -> None:
    run = config_file.parent / "shared"
    first = submit(cluster, config_file, run, "training.steps=4000", flags=("--nodes=1-1",))
    first.wait_for("canary ")
    log = config_file.parent / "second.log"
    second = cluster.sbatch(
        "--nodes=1", "--ntasks=1", f"--output={log}", TRAIN, "--config", str(config_file),
        f"output={run}", "training.steps=4000",
    )  # fmt: skip
    facts = cluster.wait(second, log)
    cluster.command("scancel", str(first.id))
    assert (facts["ExitCode"], facts["Restarts"]) == ("4:0", "0"), log.read_text()
    assert f"SLURM_JOB_ID={first.id}" in log.read_text()
    # A job that its user cancels stays cancelled.
    assert first.end()["JobState"] == "CANCELLED"
    assert first.end()["Restarts"] == "0"


def test_the_chain_and_hostile_names(cluster: Cluster, config_file: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    hostile = config_file.parent / f"a b;touch {canary.name}$(touch {canary.name})`id`'\"\n*"
    ids = cluster.command(
        str(ROOT / "slurm/submit_all.sh"), *TWO_TASKS, "--", "--config", str(config_file),
        f"output={json.dumps(str(hostile))}", "--",
        "--allow-fewer", "--num-problems", "5", cwd=tmp_path,
    ).split()  # fmt: skip
    states = [cluster.wait(int(job))["JobState"] for job in ids]
    logs = "\n".join(path.read_text(errors="replace") for path in tmp_path.glob("*.log"))
    assert states == ["COMPLETED"] * 4, logs
    assert (hostile / "export/nmar.json").exists() and (hostile / "report.json").exists()
    assert not list(tmp_path.rglob("canary")) and not (ROOT / "canary").exists()


def test_a_chain_whose_training_fails_starts_nothing_after_it(
    cluster: Cluster, config_file: Path, tmp_path: Path
) -> None:
    ids = cluster.command(
        str(ROOT / "slurm/submit_all.sh"), *TWO_TASKS, "--", "--config", str(config_file),
        f"output={tmp_path / 'run'}", "training.world_size=5", cwd=tmp_path,
    ).split()  # fmt: skip
    states = [cluster.wait(int(job))["JobState"] for job in ids]
    assert states == ["COMPLETED", "FAILED", "CANCELLED", "CANCELLED"]


def test_preparation_by_tasks_on_two_nodes(cluster: Cluster, config_file: Path) -> None:
    """The same bytes as one process; one task speaks for all."""
    script, store = str(ROOT / "slurm/prepare_traces.sh"), config_file.parent / "prepared"
    asked = ("--config", str(config_file), f"data.store={store}")
    log = config_file.parent / "prepared.log"
    job = cluster.sbatch(*TWO_TASKS, f"--output={log}", script, *asked)
    assert cluster.wait(job, log)["JobState"] == "COMPLETED", log.read_text()
    for part in ("train", "heldout"):
        (alone,) = (config_file.parent / "store" / part).glob("manifest.json")
        assert (store / part / "manifest.json").read_bytes() == alone.read_bytes()
    assert log.read_text().count("train     ") == 1, "one task speaks"
    again = cluster.sbatch(*TWO_TASKS, f"--output={log}", script, *asked)
    assert cluster.wait(again, log)["JobState"] == "COMPLETED", log.read_text()
    assert log.read_text().count("up to date") == 2
    bad = cluster.sbatch(*TWO_TASKS, f"--output={log}", script, *asked, "data.train=[nowhere]")
    assert cluster.wait(bad, log)["ExitCode"] == "2:0", log.read_text()
    assert log.read_text().count("nowhere: no such file") == 1
