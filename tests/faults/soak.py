"""One misfortune after another, drawn at random; every run must end as if nothing had happened.

    python tests/faults/soak.py --faults 100 --seed 0

Each misfortune (soak_faults.py) befalls a run of its own, which is then resumed until it is
complete. It has recovered bit-exactly when the sha256 of its final fp32 weights, and of every file
of its final checkpoint (moments and random state too), is the uninterrupted run's; and when what
the ranks consumed, replays of rolled-back steps taken away, is the plan step by step: 0 lost, 0
duplicated. A tenth as many misfortunes that change the numbers by their nature (a skipped step,
another number of ranks) are counted beside them. Finished ones are kept in `state.jsonl` and
skipped by the next start, as long as the code is the same; `--seed` and the number decide a
misfortune alone, so any one of them can be had again (`--only 17`).

Exit code 0 when all have recovered, 1 otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE), str(HERE.parent / "distributed")]

import common  # noqa: E402
import history  # noqa: E402
from fork_server import ForkServer  # noqa: E402
from soak_faults import DAMAGES, OTHERS, OVERRIDES, STEPS, Act, draw_misfortune, in_words  # noqa: E402

from nmar_ds.errors import CheckpointError  # noqa: E402
from nmar_ds.training.checkpoints import find_newest, step_folders, verify  # noqa: E402

Result = dict[str, Any]
RESULTS = ROOT / "benchmarks" / "results"


class Soak:
    """Carries misfortunes out on runs of one prepared configuration.

    Args:
        folder: for the data and the runs; its own.
        server: started with the configuration that `common.prepare` wrote there.
        broken: a name of `broken.BREAKS`, for the tests that see a soak fail.
    """

    def __init__(self, folder: Path, server: ForkServer, *, broken: str | None = None) -> None:
        self.folder, self.server, self.broken = folder, server, broken
        whole = folder / "soak-whole"
        for _ in range(2):  # the first compiles things; the second says how long a run takes
            shutil.rmtree(whole, ignore_errors=True)
            shutil.rmtree(folder / "soak-history", ignore_errors=True)
            started = time.monotonic()
            watched = (folder / "soak-history", 0)
            done = server.run(f"output={whole}", *OVERRIDES, watch=watched)
            assert done["codes"] == [0, 0], done["outputs"]
            self.seconds = time.monotonic() - started
        self.digest, self.state = common.digest_of(whole, STEPS), common.state_of(whole, STEPS)
        self.plan = history.surviving(history.read(folder / "soak-history", [2]))
        self._check_plan()
        self.world_sizes: list[int] = []
        self.problems: list[str] = []

    def _check_plan(self) -> None:
        """The uninterrupted run itself reads every trace once an epoch, as the plan says."""
        from nmar_ds.config import load_config
        from nmar_ds.training.planning import plan_run

        plan = plan_run(load_config(self.server.config, list(OVERRIDES)))
        assert history.covers_every_epoch(
            self.plan, num_traces=plan.store.num_traces, steps_per_epoch=plan.steps_per_epoch
        ), self.plan

    def suffer(self, acts: list[Act], *, exact: bool = True) -> Result:
        """One run, its misfortune, and its recovery.

        Args:
            acts: see soak_faults.py.
            exact: whether its end must be the uninterrupted run's in every bit.

        Returns:
            `recovered`, `problems`, `lost` and `duplicated` traces, `attempts`, `seconds`.
        """
        started = time.monotonic()
        # Where a strike from outside came after the end of the run, it comes earlier.
        earlier = (0.7, 0.5, 0.3, 0.1) if any("struck" in act for act in acts) else ()
        for narrower in (1.0, *earlier):
            if narrower < 1:
                shutil.rmtree(self.run)
            self.run = Path(tempfile.mkdtemp(prefix="run-", dir=self.folder))
            self.world_sizes, self.problems = [], []
            if all([self._act(act, narrower) for act in acts]):
                break
        else:
            self.problems.append("the misfortune did not happen")
        self._complete()
        attempts = history.read(self.run / "history", self.world_sizes)
        lost, duplicated = history.lost_and_duplicated(attempts, self.plan)
        if lost or duplicated:
            self.problems.append(f"{lost} traces lost, {duplicated} duplicated")
        self._compare(exact)
        if not self.problems:
            shutil.rmtree(self.run)
        return {
            "recovered": not self.problems, "problems": self.problems, "lost": lost,
            "duplicated": duplicated, "attempts": len(self.world_sizes),
            "seconds": round(time.monotonic() - started, 1),
        }  # fmt: skip

    def _act(self, act: Act, narrower: float) -> bool:
        """Returns whether it happened."""
        if act["do"] == "damage":
            self._damage(act)
            return True
        if act["do"] == "launch":
            self._launch(act)
            return True
        mark = self.run / f"struck-{len(self.world_sizes)}"
        fault, struck = act.get("fault"), act.get("struck")
        if fault is not None:
            fault = {**fault, "struck": str(mark)}
        if struck is not None:
            struck = {**struck, "seconds": struck["share"] * narrower * self.seconds}
        result = self._start(
            *act.get("overrides", ()), fault=fault, struck=struck,
            num_ranks=act.get("num_ranks", 2), impatient=act.get("impatient", False),
        )  # fmt: skip
        if result["overdue"]:
            self.problems.append("the ranks did not end")
        # A stopped rank that is woken may finish the last step before it is ended: then all is done.
        if any(result["codes"]) and result["codes"] != act.get("codes", result["codes"]):
            self.problems.append(f"codes {result['codes']}, expected {act['codes']}")
        if fault is None:
            return struck is None or bool(result["struck"])
        if fault["where"] == "nonfinite":
            return "non-finite gradient" in "".join(result["outputs"])
        return mark.exists()

    def _start(self, *overrides: str, num_ranks: int = 2, **more: Any) -> Result:
        watched = (self.run / "history", len(self.world_sizes))
        self.world_sizes.append(num_ranks)
        # Only a resume is broken: the first attempt makes good checkpoints.
        broken = self.broken if len(self.world_sizes) > 1 else None
        return self.server.run(
            f"output={self.run / 'run'}", *OVERRIDES, *overrides, watch=watched, broken=broken,
            num_ranks=num_ranks, **more,
        )  # fmt: skip

    def _launch(self, act: Act) -> None:
        """Under a real launcher, which dies in the middle of a step."""
        mark = self.run / f"struck-{len(self.world_sizes)}"
        watched = [str(self.run / "history"), len(self.world_sizes)]
        self.world_sizes.append(2)
        launched = common.Launch(
            self.server.config, f"output={self.run / 'run'}", *OVERRIDES,
            fault={**act["fault"], "mark": str(mark)}, command=act["command"],
            more={"WATCH": json.dumps(watched)},
        )  # fmt: skip
        try:
            launched.wait_for_file(mark)
            os.kill(launched.everyone[act["victim"]], 9)
            launched.wait_until_gone(90)
        finally:
            launched.clean_up()

    def _damage(self, act: Act) -> None:
        """Spoil files; what is spoilt must be refused, and an older checkpoint found."""
        checkpoints = self.run / "run" / "checkpoints"
        damage, refused = DAMAGES[act["what"]]
        before = find_newest(checkpoints, report=self.problems.append)
        if before is None or not all(map(_is_valid, step_folders(checkpoints)[:2])):
            self.problems.append("there were no two valid checkpoints to spoil one of")
            return
        damage(self.run / "run", act["at"])
        said: list[str] = []
        after = find_newest(checkpoints, report=said.append)
        assert after is not None
        if (after.step < before.step) != refused or bool(said) != refused:
            self.problems.append(f"{act['what']}: the newest is {after.folder.name}, said {said}")

    def _complete(self) -> None:
        """In one attempt: a resume that fails once and succeeds later is a fault of its own."""
        result = self._start(num_ranks=self.world_sizes[-1])
        if any(result["codes"]):
            self.problems.append(f"{result['codes']} {''.join(result['outputs'])[-2000:]}")

    def _compare(self, exact: bool) -> None:
        """With the uninterrupted run; or, where that is not to be expected, for a sane end."""
        run = self.run / "run"
        newest = step_folders(run / "checkpoints")[:1]
        if not newest or newest[0].name != f"step-{STEPS:08d}" or not _is_valid(newest[0]):
            self.problems.append(f"no valid checkpoint of step {STEPS} at the end")
        elif not exact:
            found = find_newest(run / "checkpoints", report=self.problems.append)
            from nmar_ds.training.export import full_state

            assert found is not None
            if not all(bool(tensor.isfinite().all()) for tensor in full_state(found).values()):
                self.problems.append("weights are not finite")
        elif common.digest_of(run, STEPS) != self.digest:
            self.problems.append("other weights")
        elif common.state_of(run, STEPS) != self.state:
            self.problems.append("the same weights, another state of optimizer or random numbers")


def _is_valid(folder: Path) -> bool:
    try:
        verify(folder)
    except CheckpointError:
        return False
    return True


# -- many of them ----------------------------------------------------------------------------


def code_digest() -> str:
    """sha256 over the code under test and the soak's own: results of other code do not count."""
    digest = hashlib.sha256()
    for part in ("nmar_ds", "launcher", "tests/faults"):
        for file in sorted((ROOT / part).rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()


class Ledger:
    """Finished misfortunes, one JSON line each; a torn last line is as none."""

    def __init__(self, file: Path) -> None:
        self.file, self.code = file, code_digest()
        self.done: dict[str, Result] = {}
        for line in file.read_text().splitlines() if file.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry["code"] == self.code:
                self.done[entry["name"]] = entry

    def add(self, name: str, entry: Result) -> None:
        """Keep a result; it is on the disk when this returns."""
        self.done[name] = {"name": name, "code": self.code, **entry}
        with self.file.open("a") as file:
            file.write("\n" + json.dumps(self.done[name]))
            file.flush()
            os.fsync(file.fileno())


def misfortunes(num: int, seed: int) -> list[tuple[str, str, list[Act]]]:
    """(name, kind, acts): the exact ones, and a tenth as many others."""
    import random

    found = [(str(number), *draw_misfortune(seed, number)) for number in range(num)]
    kinds = [kind for kind in OTHERS if is_built(kind)]
    for number in range(max(1, num // 10)):
        kind = kinds[number % len(kinds)]
        acts = OTHERS[kind](random.Random(f"other {seed} {number}"))
        found.append((f"other {number}", kind, acts))
    return found


def is_built(kind: str) -> bool:
    """A change of the number of ranks needs its conversion."""
    if kind != "another number of ranks":
        return True
    return importlib.util.find_spec("nmar_ds.training.elastic") is not None


def tally(results: list[Result]) -> str:
    """The line the soak is for."""
    exact = [r for r in results if r["exact"]]
    recovered = sum(r["recovered"] for r in exact)
    lost, duplicated = (sum(r[key] for r in results) for key in ("lost", "duplicated"))
    return (f"{len(exact)} injected, {recovered} recovered bit-exactly, {lost} lost, "
            f"{duplicated} duplicated")  # fmt: skip


def report(results: list[Result], *, seed: int, command: str, seconds: float) -> None:
    """Write soak.json and soak.md."""
    import statistics

    from benchmarks.reliability import environment_facts, write_atomically

    kinds: dict[str, list[Result]] = {}
    for result in results:
        kinds.setdefault(result["kind"], []).append(result)
    others = [r for r in results if not r["exact"]]
    rows = [
        f"| {kind} | {sum(r['recovered'] for r in found)}/{len(found)} | "
        f"{statistics.median(r['seconds'] for r in found):.1f} | "
        f"{max(r['attempts'] for r in found)} |"
        for kind, found in sorted(kinds.items())
    ]
    facts = environment_facts()
    text = "\n".join([
        "# Soak", "", f"**{tally(results)}**", "",
        f"Beside them, of kinds that change the numbers by their nature: {len(others)} injected, "
        f"{sum(r['recovered'] for r in others)} recovered.", "",
        f"`{command}`, seed {seed}, {seconds:.0f} s, {facts['date']}, {facts['versions']}. Lost and "
        "duplicated count traces in the history that made the final weights.", "",
        "| misfortune | recovered | median seconds, recovery included | most attempts |",
        "|---|---|---|---|", *rows, "",
    ])  # fmt: skip
    entry = {"tally": tally(results), "seed": seed, "command": command, "seconds": round(seconds),
             **facts, "results": results}  # fmt: skip
    write_atomically(RESULTS / "soak.json", json.dumps(entry, indent=1) + "\n")
    write_atomically(RESULTS / "soak.md", text)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--faults", type=int, default=100, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="NAME", help="one misfortune by its number")
    parser.add_argument("--state", type=Path, help="folder; default runs/soak/seed-<seed>")
    options = parser.parse_args()
    state = options.state or ROOT / "runs" / "soak" / f"seed-{options.seed}"
    state.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(state / "state.jsonl")
    drawn = misfortunes(options.faults, options.seed)
    if options.only is not None:
        drawn = [entry for entry in drawn if entry[0] == options.only]
        ledger.done.pop(options.only, None)
    todo = [entry for entry in drawn if entry[0] not in ledger.done]
    print(f"{len(drawn)} misfortunes, {len(drawn) - len(todo)} of them done before", flush=True)
    if todo:
        suffer_all(todo, state, ledger, total=len(drawn))
    results = [ledger.done[name] for name, _, _ in drawn]
    if options.only is None:
        command = f"make soak N={options.faults} SEED={options.seed}"
        report(results, seed=options.seed, command=command, seconds=sum(r["seconds"] for r in results))  # fmt: skip
    for result in results:
        if not result["recovered"]:
            print(f"NOT RECOVERED {result['name']}: {result['words']}: {result['problems']}")
    others = [r for r in results if not r["exact"]]
    print(f"beside them {len(others)} of other kinds, {sum(r['recovered'] for r in others)} recovered: "
          f"{dict(Counter(r['kind'] for r in others))}")  # fmt: skip
    print(tally(results))
    return 0 if all(r["recovered"] for r in results) else 1


def suffer_all(
    todo: list[tuple[str, str, list[Act]]], state: Path, ledger: Ledger, *, total: int
) -> None:
    """One after the other, with a line each."""
    work = state / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    server = ForkServer(common.prepare(work))
    try:
        soak, began = Soak(work, server), time.monotonic()
        for number, (name, kind, acts) in enumerate(todo, 1):
            exact = kind not in OTHERS
            result = soak.suffer(acts, exact=exact)
            words = in_words(acts)
            ledger.add(name, {"kind": kind, "words": words, "acts": acts, "exact": exact, **result})
            pace = (time.monotonic() - began) / number
            failed = sum(not entry["recovered"] for entry in ledger.done.values())
            left = math.ceil(pace * (len(todo) - number) / 60)
            verdict = "recovered" if result["recovered"] else f"NOT RECOVERED: {result['problems']}"
            print(f"[{total - len(todo) + number:>3}/{total}] {words}: {verdict} ({result['seconds']} s) | "
                  f"{failed} not recovered, {left} min left", flush=True)  # fmt: skip
    finally:
        server.close()


if __name__ == "__main__":
    sys.exit(main())
