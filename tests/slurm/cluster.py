"""A Slurm of three nodes on this host: its own munged, slurmctld and slurmd, ended by pid file."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NODES = ("n1", "n2", "n3")
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def free_ports(num: int) -> list[int]:
    sockets = [socket.socket() for _ in range(num)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Cluster:
    """Started by `start`, ended by `stop`; jobs are submitted from this project's folder."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        controller, *ports = free_ports(4)
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o400)
        lines = [
            "ClusterName=tests", f"SlurmctldHost={socket.gethostname()}(127.0.0.1)",
            f"SlurmctldPort={controller}", "SlurmUser=root", "SlurmdUser=root",
            f"AuthInfo=socket={self.folder}/munge.socket,cred_expire=5", "AuthType=auth/munge",
            f"StateSaveLocation={self.folder}/state", f"SlurmdSpoolDir={self.folder}/%n",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid",
            f"SlurmdPidFile={self.folder}/slurmd-%n.pid",
            f"SlurmctldLogFile={self.folder}/slurmctld.log",
            f"SlurmdLogFile={self.folder}/slurmd-%n.log",
            "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "MpiDefault=none",
            "SelectType=select/cons_tres", "SelectTypeParameters=CR_Core",
            "SlurmdParameters=config_overrides", "ReturnToService=2", "SlurmdTimeout=15",
            "KillWait=5", "MinJobAge=3600", "SchedulerParameters=sched_interval=2",
            "InactiveLimit=0", "JobCompType=jobcomp/none", "PriorityType=priority/basic",
            *(f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 "
              f"Port={port} CPUs=2" for name, port in zip(NODES, ports, strict=True)),
            "PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP",
        ]  # fmt: skip
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        self.environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "NMAR"))
        } | {
            "SLURM_CONF": str(self.folder / "slurm.conf"), "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "NMAR_PREFLIGHT": "0",
            "NMAR_VENV": sys.prefix,
        }  # fmt: skip

    def start(self) -> None:
        self._run(
            "munged", "--force", "--key-file", str(self.folder / "munge.key"),
            "--socket", str(self.folder / "munge.socket"), "--pid-file",
            str(self.folder / "munged.pid"), "--log-file", str(self.folder / "munged.log"),
            "--seed-file", str(self.folder / "munge.seed"),
        )  # fmt: skip
        self._run("slurmctld", "-c")
        for name in NODES:
            self.start_node(name)
        end = time.monotonic() + 60
        while self._run("sinfo", "-h", "-o", "%D %t").split() != ["3", "idle"]:
            assert time.monotonic() < end, self._run("sinfo")
            time.sleep(0.5)

    def start_node(self, name: str) -> None:
        self._run("slurmd", "-N", name)

    def pid_of(self, daemon: str) -> int | None:
        path = self.folder / f"{daemon}.pid"
        return int(path.read_text()) if path.exists() and path.read_text().strip() else None

    def stop(self) -> None:
        self._run("scancel", "--user", "root", check=False)
        for daemon in (*(f"slurmd-{name}" for name in NODES), "slurmctld", "munged"):
            pid = self.pid_of(daemon)
            if pid is not None:
                try:
                    os.kill(pid, signal.SIGTERM)
                    end = time.monotonic() + 15
                    while time.monotonic() < end:
                        os.kill(pid, 0)
                        time.sleep(0.1)
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, *command: str, check: bool = True, cwd: Path = ROOT, **more: str) -> str:
        result = subprocess.run(
            command, cwd=cwd, env={**self.environment, **more}, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert not check or result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def sbatch(self, *arguments: str, **more: str) -> int:
        return int(self._run("sbatch", "--parsable", *arguments, **more).split(";")[0])

    def command(self, *arguments: str, **more: str) -> str:
        return self._run(*arguments, **more)

    def facts(self, job: int) -> dict[str, str]:
        text = self._run("scontrol", "-o", "show", "job", str(job))
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait(self, job: int, log: Path | None = None, seconds: float = 240) -> dict[str, str]:
        """Until the job is over; its facts (JobState, ExitCode, Restarts ...)."""
        end = time.monotonic() + seconds
        while (facts := self.facts(job))["JobState"] not in OVER:
            said = log.read_text(errors="replace") if log and log.exists() else ""
            assert time.monotonic() < end, f"{facts}\n{said}"
            time.sleep(0.5)
        return facts

    def ranks(self, job: int) -> list[int]:
        """Pids of a job's training processes, by the environment that Slurm gave them."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environ = (path / "environ").read_bytes().split(b"\0")
                words = (path / "cmdline").read_bytes()
            except OSError:
                continue
            mine = f"SLURM_CONF={self.folder}/slurm.conf".encode() in environ
            if mine and f"SLURM_JOB_ID={job}".encode() in environ and b"/train.py" in words:
                if any(item.startswith(b"SLURM_STEP_NUM_TASKS=") for item in environ) and (
                    b"python" in words.split(b"\0")[0]
                ):
                    found.append(int(path.name))
        return found
