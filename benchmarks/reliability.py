"""The counted reliability goals: run them, count them, and put them in one table.

    python benchmarks/reliability.py [--only G1,G3] [--list]

A goal is a number of cases that must all pass. The cases are tests (each counts as one, or as many
as it says by the junit property `cases`), or a script that writes `passed` and `of` as JSON. The
number expected stands in the table here, so that a case that is missing, skipped or renamed is a
failure and never a smaller count. Results go to benchmarks/results/reliability.{json,md} after
every goal, over those of the same goal from before: a run that is cut short loses nothing.

Exit code 0 when every goal that was asked for has passed in full.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = RESULTS / "reliability.json"
PACKAGES = ("torch", "deepspeed", "transformers")


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One row.

    Attributes:
        name: as `--only` takes it.
        what: is promised.
        count: of cases that must pass.
        tests: pytest node ids.
        script: arguments of Python instead; `--output FILE` is added, FILE then has `passed`, `of`.
        result: a JSON file that another command (`command`) writes; holds a `tally` or the counts.
        command: for readers, where it is not simply pytest.
        seed: that decides the cases, as far as they are drawn.
        grows: more cases than `count` are fine (one per configuration key, say).
    """

    name: str
    what: str
    count: int
    tests: tuple[str, ...] = ()
    script: tuple[str, ...] = ()
    result: Path | None = None
    command: str = ""
    seed: str = "-"
    grows: bool = False


GOALS = (
    Goal(
        name="G1", count=20, seed="fixed places",
        what="killed or stopped before and inside every step of ten: weights, moments and random "
        "state of the resumed run are the uninterrupted one's",
        tests=("tests/faults/test_resume_points.py",),
    ),
    Goal(
        name="G2", count=16, seed="fixed places",
        what="dying at eight points of a save, either rank: the checkpoint before is found, "
        "verified, and the next save succeeds (fake engine)",
        tests=("tests/unit/test_saving.py::test_sixteen_deaths_of_a_blocking_save",),
    ),
    Goal(
        name="G2 (background)", count=16, seed="fixed places",
        what="the same while the save is written behind training's back",
        tests=("tests/unit/test_saving.py::test_sixteen_deaths_of_a_background_save",),
    ),
    Goal(
        name="G2 (DeepSpeed)", count=4, grows=True, seed="fixed places",
        what="kill -9 of real ranks in steps and saves, resumed bit-exactly",
        tests=(
            "tests/faults/test_kill.py::test_a_killed_rank_costs_nothing",
            "tests/faults/test_background_saves.py::"
            "test_a_killed_rank_costs_nothing_in_the_background_either",
        ),
    ),
    Goal(
        name="G3", count=270, grows=True, seed="0",
        what="200 flipped bytes, 50 truncations and every structural damage are refused before "
        "anything is loaded, and the older checkpoint is taken",
        tests=(
            "tests/unit/test_checkpoints.py::test_200_flipped_bytes_and_50_truncations_are_all_refused",
            "tests/unit/test_checkpoints.py::test_every_damage_is_refused_and_the_older_one_taken",
        ),
    ),
    Goal(
        name="G4", count=50, seed="0-49",
        what="random scripts of data size, seed, ranks, deaths and changes of the number of ranks: "
        "0 traces lost, 0 duplicated, the same set in every optimizer step",
        tests=("tests/unit/test_exactly_once.py::test_every_trace_exactly_once",),
    ),
    Goal(
        name="G4 (DeepSpeed)", count=4, seed="fixed places",
        what="the same with real ranks, from what their loaders handed out",
        tests=("tests/faults/test_exactly_once_ranks.py",),
    ),
    Goal(
        name="G6", count=5, grows=True, seed="fixed places",
        what="a rank that is stopped or hangs, at any of five places: all ranks are gone within "
        "the timeout and 10 s, stacks dumped; slow work is no hang",
        tests=("tests/faults/test_hang.py",),
    ),
    Goal(
        name="G7", count=20, seed="fixed",
        what="a signal at a random moment to one rank: exit 0 and no step lost",
        tests=("tests/faults/test_preemption.py",),
    ),
    Goal(
        name="G8", count=19, seed="0",
        what="a real Slurm: kill -9 (10), USR2 (5), time limit (1), a node lost (2): recovered "
        "bit-exactly; a job that always fails stops after three attempts (1)",
        script=("tests/slurm/goals.py",), command="make test-slurm ALL=1",
    ),
    Goal(
        name="G9", count=3, seed="fixed",
        what="2 -> 1, 1 -> 2 and 2 -> 3 ranks: every trace exactly once, loss within 1e-5",
        tests=("tests/faults/test_elastic.py",),
    ),
    Goal(
        name="G10", count=8, seed="fixed",
        what="NaN and Inf on either rank, one and four in a row: counted, aborted at three, "
        "weights finite, the last checkpoint loads",
        tests=("tests/faults/test_nonfinite.py",),
    ),
    Goal(
        name="G11", count=59, seed="fixed",
        what="6 pickles in checkpoints, 30 hostile paths, 20 shell strings, 3 model folders with "
        "code: nothing of it is run or written outside",
        tests=(
            "tests/faults/test_security.py",
            "tests/unit/test_job_scripts.py::test_a_hostile_string_is_a_word_and_nothing_else",
        ),
    ),
    Goal(
        name="G12", count=200, grows=True, seed="every key",
        what="every key of every file in configs/, misspelt in six ways: refused with the right "
        "one suggested",
        tests=("tests/unit/test_misspelt_keys.py",),
    ),
    Goal(
        name="G13", count=3, seed="fixed, one random hash seed",
        what="other hash seeds, clocks, time zones, locales, folders and umasks: one hash of data, "
        "weights, moments and random state",
        tests=("tests/faults/test_determinism.py",),
    ),
    Goal(
        name="G14", count=100, grows=True, seed="see soak.json",
        what="misfortunes drawn at random, recovered bit-exactly, 0 lost, 0 duplicated",
        result=RESULTS / "soak.json", command="make soak",
    ),
)  # fmt: skip


@dataclass
class Counted:
    """What came of a goal's cases; `notes` name those that failed."""

    passed: int = 0
    of: int = 0
    notes: list[str] = field(default_factory=list)


def count_junit(text: str) -> Counted:
    """Cases of a junit report. A skipped one has not passed."""
    found = Counted()
    for case in ElementTree.fromstring(text).iter("testcase"):
        cases = case.find("properties/property[@name='cases']")
        number = 1 if cases is None else int(cases.get("value", ""))
        found.of += number
        bad = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        if bad:
            found.notes.append(f"{bad[0]}: {case.get('name')}")
        else:
            found.passed += number
    return found


def run_tests(tests: tuple[str, ...]) -> Counted:
    """Run node ids; what pytest cannot even collect counts as nothing passed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        done = _python("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}",
                       "-o", "junit_family=xunit1", *tests)  # fmt: skip
        counted = count_junit(report.read_text("utf-8")) if report.exists() else Counted()
        if done.returncode not in (0, 1):
            counted.notes.append((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])
    return counted


def run_script(script: tuple[str, ...]) -> Counted:
    """Run a script that counts for itself."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "result.json"
        done = _python(*script, "--output", str(report))
        if report.exists():
            found = json.loads(report.read_text("utf-8"))
            return Counted(int(found["passed"]), int(found["of"]))
        return Counted(notes=(done.stderr.strip() or "no result").splitlines()[-1:])


def read_result(file: Path) -> Counted:
    """What a soak has left."""
    if not file.is_file():
        return Counted(notes=[f"{file.name} is not there"])
    results = [entry for entry in json.loads(file.read_text("utf-8"))["results"] if entry["exact"]]
    bad = [f"{r['name']}: {r['words']}" for r in results if not r["recovered"]]
    return Counted(len(results) - len(bad), len(results), bad)


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def run_goal(goal: Goal) -> dict[str, Any]:
    """Its row. `ok` only where every case passed and there were as many as there must be."""
    started = time.monotonic()
    if goal.result is not None:
        counted = read_result(goal.result)
    elif goal.script:
        counted = run_script(goal.script)
    else:
        counted = run_tests(goal.tests)
    missing = max(0, goal.count - counted.of)
    if missing:
        counted.notes.append(f"{missing} of {goal.count} cases are missing")
    if counted.of > goal.count and not goal.grows:
        counted.notes.append(f"{counted.of} cases, expected {goal.count}: the table is out of date")
    return {
        "goal": goal.name, "what": goal.what, "passed": counted.passed,
        "of": max(goal.count, counted.of), "ok": not counted.notes, "seed": goal.seed,
        "command": goal.command or f"make reliability ONLY={goal.name.replace(' ', '_')}",
        "seconds": round(time.monotonic() - started), **environment_facts(),
        "notes": counted.notes[:20],
    }  # fmt: skip


def environment_facts() -> dict[str, str]:
    """What was measured where: versions, commit, date."""
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {metadata.version(name)}" for name in PACKAGES]
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    return {
        "versions": ", ".join(versions),
        "commit": git.stdout.strip() or "unknown",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def write_atomically(path: Path, text: str) -> None:
    """The old or the new text, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def render(rows: dict[str, dict[str, Any]]) -> str:
    """The table, in order of the goals; one that was never run says so."""
    lines = [
        "# Reliability, counted", "",
        "Written by `make reliability`; every case is a test or a line of a script's table.", "",
        "| goal | what | passed | seed | command | seconds | date, commit |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for goal in GOALS:
        row = rows.get(goal.name)
        if row is None:
            lines.append(f"| {goal.name} | {goal.what} | not run (of {goal.count}) | | | | |")
            continue
        verdict = (
            f"{row['passed']}/{row['of']}" if row["ok"] else f"**{row['passed']}/{row['of']}**"
        )
        lines.append(
            f"| {goal.name} | {goal.what} | {verdict} | {row['seed']} | `{row['command']}` | "
            f"{row['seconds']} | {row['date']}, {row['commit']} |"
        )
    bad = [f"- {row['goal']}: {note}" for row in rows.values() for note in row["notes"]]
    versions = sorted({row["versions"] for row in rows.values()})
    return "\n".join([*lines, "", *bad, *([""] if bad else []), *versions, ""])


def load_rows() -> dict[str, dict[str, Any]]:
    """Rows of earlier runs, of goals that there still are."""
    if not TABLE.is_file():
        return {}
    names = {goal.name for goal in GOALS}
    found = json.loads(TABLE.read_text("utf-8"))["goals"]
    return {row["goal"]: row for row in found if row["goal"] in names}


def chosen(only: str | None) -> list[Goal]:
    """The goals asked for; `G2` means all its rows, `G2_(DeepSpeed)` the one."""
    if only is None:
        return list(GOALS)
    names = [name.strip().replace("_", " ") for name in only.split(",")]
    unknown = [n for n in names if not any(n in (g.name, g.name.split()[0]) for g in GOALS)]
    if unknown:
        raise SystemExit(f"--only: {', '.join(unknown)}: no such goal, see --list")
    return [goal for goal in GOALS if {goal.name, goal.name.split()[0]} & set(names)]


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--only", metavar="G1,G3", help="these goals alone")
    parser.add_argument("--list", action="store_true", help="say what there is, and stop")
    options = parser.parse_args()
    goals = chosen(options.only)
    if options.list:
        for goal in goals:
            print(f"{goal.name:16} {goal.count:>4}  {goal.what}")
        return 0
    rows, ok = load_rows(), True
    for goal in goals:
        row = run_goal(goal)
        ok = ok and row["ok"]
        rows[goal.name] = row
        ordered = [rows[other.name] for other in GOALS if other.name in rows]
        write_atomically(TABLE, json.dumps({"goals": ordered}, indent=1) + "\n")
        write_atomically(TABLE.with_suffix(".md"), render(rows))
        notes = f"  {'; '.join(row['notes'][:3])}" if row["notes"] else ""
        print(f"{goal.name:16} {row['passed']}/{row['of']}  {row['seconds']} s{notes}", flush=True)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
