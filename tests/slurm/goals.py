"""The full counts under a real Slurm, as one JSON table: `make test-slurm ALL=1`.

    python tests/slurm/goals.py [--kills 10] [--signals 5] [--seed 0] [--output FILE]

Recovery is measured from the fault to the end of the job, which has then trained its remaining
steps. Exit code 1 where a job did not end as it must.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).parents[1] / name) for name in ("distributed", "faults", "slurm")
]

from cluster import Cluster  # noqa: E402
from common import digest_of, prepare  # noqa: E402
from test_slurm import Job, submit  # noqa: E402


def processes_of_node(cluster: Cluster, job: int, node: str) -> list[int]:
    """A job's processes on a node, and the parents Slurm gave them (slurmstepd)."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environ = (path / "environ").read_bytes().split(b"\0")
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            parent_is = Path(f"/proc/{parent}/comm").read_text()
        except OSError:
            continue
        wanted = {f"SLURM_JOB_ID={job}", f"SLURMD_NODENAME={node}",
                  f"SLURM_CONF={cluster.folder}/slurm.conf"}  # fmt: skip
        if {text.encode() for text in wanted} <= set(environ):
            # The stepd first, or it reports the end of its task like a healthy node.
            found = ([parent] if "slurmstepd" in parent_is else []) + found + [int(path.name)]
    return list(dict.fromkeys(found))


def end_all(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


class Goals:
    def __init__(self, cluster: Cluster, config: Path, seed: int) -> None:
        self.cluster, self.config, self.random = cluster, config, random.Random(seed)
        self.rows: list[dict[str, object]] = []
        whole = submit(cluster, config, config.parent / "whole")
        assert whole.end()["JobState"] == "COMPLETED", whole.said()
        self.digest = digest_of(whole.run)

    def recovered(
        self, name: str, fault: Callable[[Job], float], *overrides: str,
        flags: tuple[str, ...] = (), at_step: int | None = None,
    ) -> None:  # fmt: skip
        job = submit(
            self.cluster, self.config, self.config.parent / f"run-{len(self.rows)}", *overrides,
            flags=flags,
        )  # fmt: skip
        step = self.random.randint(1, 6) if at_step is None else at_step
        job.wait_for(f"step {step:>6}/8")
        since = fault(job)
        facts = job.end()
        same = facts["JobState"] == "COMPLETED" and digest_of(job.run) == self.digest
        row = {"fault": name, "at_step": step, "restarts": int(facts["Restarts"]),
               "seconds": round(time.monotonic() - since, 1),
               "bit_exact": same, "passed": same and int(facts["Restarts"]) >= 1}  # fmt: skip
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if not row["passed"]:
            print(job.said(), file=sys.stderr)

    def kill(self, job: Job) -> float:
        os.kill(self.random.choice(self.cluster.ranks(job.id)), signal.SIGKILL)
        return time.monotonic()

    def usr2(self, job: Job) -> float:
        self.cluster.command("scancel", "--batch", "--signal=USR2", str(job.id))
        return time.monotonic()

    def time_limit(self, job: Job) -> float:
        """Hold a rank until Slurm's warning has come: the tiny run would be over before."""
        held = self.cluster.ranks(job.id)[-1]
        os.kill(held, signal.SIGSTOP)
        job.wait_for("got SIGUSR2")
        os.kill(held, signal.SIGCONT)
        return time.monotonic()

    def lose_node(self, node: str) -> Callable[[Job], float]:
        def fault(job: Job) -> float:
            daemon = self.cluster.pid_of(f"slurmd-{node}")
            assert daemon is not None
            end_all([daemon, *processes_of_node(self.cluster, job.id, node)])
            return time.monotonic()

        return fault

    def always_failing(self) -> None:
        job = submit(
            self.cluster, self.config, self.config.parent / "fails",
            "training.max_nonfinite_steps=1", "optimizer.learning_rate=1.0e+38",
            "optimizer.warmup_steps=0",
        )  # fmt: skip
        facts = job.end()
        passed = (facts["ExitCode"], facts["Restarts"]) == ("3:0", "2")
        row = {"fault": "always failing", "restarts": int(facts["Restarts"]),
               "exit_code": facts["ExitCode"], "passed": passed}  # fmt: skip
        self.rows.append(row)
        print(json.dumps(row), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--signals", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    cluster = Cluster()
    try:
        cluster.start()
        config = prepare(Path(tempfile.mkdtemp(prefix="slurm-goals-")))
        goals = Goals(cluster, config, options.seed)
        for _ in range(options.kills):
            goals.recovered("kill -9 of a task", goals.kill)
        for _ in range(options.signals):
            goals.recovered("USR2", goals.usr2, at_step=1)
        goals.recovered(
            "time limit", goals.time_limit, "training.timeout_seconds=300", at_step=1,
            flags=("--time=1", "--signal=B:USR2@20"),
        )  # fmt: skip
        for node in ("n1", "n2"):  # the batch script's own node, and another
            goals.recovered(f"slurmd and all of {node} killed", goals.lose_node(node), at_step=1)
            cluster.start_node(node)
        goals.always_failing()
    finally:
        cluster.stop()
    by_fault: dict[str, list[float]] = {}
    for row in goals.rows:
        if "seconds" in row:
            by_fault.setdefault(str(row["fault"]), []).append(float(str(row["seconds"])))
    table = {
        "seed": options.seed,
        "passed": sum(bool(row["passed"]) for row in goals.rows),
        "of": len(goals.rows),
        "median_seconds": {name: statistics.median(times) for name, times in by_fault.items()},
        "rows": goals.rows,
    }
    text = json.dumps(table, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    return 0 if table["passed"] == table["of"] else 1


if __name__ == "__main__":
    sys.exit(main())
