"""A process that has imported everything and forks the ranks of one run after another.

Two fresh DeepSpeed ranks spend 10 to 30 seconds on imports and compilation before they train; a
matrix of some fifty kills and resumes cannot. The ranks here are forks that run
`launcher.train.main` to its exit code as the command does; what the launcher itself adds is tested
by real launches beside this. One JSON request per line on stdin, one answer per line on stdout.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [str(ROOT), str(ROOT / "tests/faults"), str(ROOT / "tests/distributed")]
LONGEST = 120.0
PATIENCE = 3.0  # of a launcher with the other ranks, once one has failed


class ForkServer:
    """The client's side."""

    def __init__(
        self, config: Path, *, cwd: Path = ROOT, umask: int = -1, more: dict[str, str] | None = None
    ) -> None:
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
                       "PYTHONPATH": os.pathsep.join(FOLDERS), **(more or {})}  # fmt: skip
        self.config = config
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(config)], encoding="utf-8", umask=umask,
            cwd=cwd, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(
        self,
        *overrides: str,
        fault: dict[str, Any] | None = None,
        num_ranks: int = 2,
        user: int | None = None,
        watch: tuple[Path, int] | None = None,
        broken: str | None = None,
        struck: dict[str, Any] | None = None,
        impatient: bool = False,
    ) -> dict[str, Any]:
        """Run `launcher/train.py` once; root can do it as another user.

        Args:
            overrides: of the configuration.
            fault: for one rank to suffer, see `injected`.
            num_ranks: to start.
            user: id to become, where this process is root.
            watch: folder and number of the attempt, for `history`.
            broken: a name of `broken.BREAKS`, to see a proof fail.
            struck: `signal` by name, to `ranks`, after `seconds`, from outside; `after` is a file
                whose appearance starts the clock.
            impatient: end the other ranks some seconds after the first that failed, as launchers
                do; always so where they are struck.

        Returns:
            codes: exit code of each rank, negative for a signal; seconds_apart: from the first
            rank's end to the last's; outputs: what each rank said; overdue: whether the ranks had
            to be killed because they did not end; struck: whether they were, from outside.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"overrides": overrides, "fault": fault, "num_ranks": num_ranks, "user": user,
                   "watch": watch and [str(watch[0]), watch[1]], "broken": broken,
                   "struck": struck, "impatient": impatient or struck is not None}  # fmt: skip
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the fork server died"
        result: dict[str, Any] = json.loads(answer)
        return result

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)


def _rank(rank: int, request: dict[str, Any], port: int, config: str, said: Path) -> None:
    """Never returns."""
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 70
    try:
        import broken
        import history
        import injected

        from launcher import train

        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request["num_ranks"]),
            LOCAL_SIZE=str(request["num_ranks"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        injected.install(request["fault"], rank)
        if request["watch"] is not None:
            history.watch(*request["watch"], rank)
        if request["broken"] is not None:
            broken.BREAKS[request["broken"]]()
        if request["user"] is not None and os.getuid() == 0:  # root may read and write anything
            os.setgroups([])
            os.setgid(request["user"])
            os.setuid(request["user"])
        code = train.main(["--config", config, *request["overrides"]])
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(request: dict[str, Any], config: str, folder: Path) -> dict[str, Any]:
    from pool import free_port

    port, ranks = free_port(), range(request["num_ranks"])
    said = [folder / f"rank{rank}.log" for rank in ranks]
    pids = []
    for rank in ranks:
        pid = os.fork()
        if pid == 0:
            _rank(rank, request, port, config, said[rank])
        pids.append(pid)
    codes: dict[int, int] = {}
    started, ends = time.monotonic(), []
    struck, hit, overdue = request["struck"], False, False
    since = None if struck is not None and "after" in struck else started
    while len(codes) < len(pids):
        now = time.monotonic()
        left = [rank for rank in ranks if rank not in codes]
        if since is None and Path(struck["after"]).exists():
            since = now
        if struck is not None and since is not None and now - since > struck["seconds"]:
            for rank in set(left) & set(struck["ranks"]):
                os.kill(pids[rank], signal.Signals[struck["signal"]])
                hit = True
            struck = None
        failed = request["impatient"] and any(codes.values())
        overdue = overdue or now - started > LONGEST
        for rank in left:
            if overdue or (failed and now - ends[0] > PATIENCE):
                os.kill(pids[rank], signal.SIGKILL)
            done, status = os.waitpid(pids[rank], os.WNOHANG)
            if done:
                codes[rank] = os.waitstatus_to_exitcode(status)
                ends.append(time.monotonic())
        time.sleep(0.01)
    return {
        "codes": [codes[rank] for rank in ranks],
        "seconds_apart": ends[-1] - ends[0],
        "outputs": [path.read_text("utf-8", errors="replace") for path in said],
        "overdue": overdue,
        "struck": hit,
    }


def main() -> None:
    """Serve until stdin ends."""
    import tempfile

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    config = sys.argv[1]
    import gc

    import clock

    clock.shift_as_told()
    # The imports are the point; the first loads torch's compiler, which costs each rank seconds.
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import nmar_ds.training.run  # noqa: F401
    from nmar_ds.config import load_config
    from nmar_ds.training.planning import plan_run

    torch.set_num_threads(1)
    plan_run(load_config(config, []))  # compiles what packing needs
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            answers.write(json.dumps(_run(json.loads(line), config, Path(folder))) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
