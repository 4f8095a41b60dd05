"""Run an experiment: one command, restartable, each run in a folder of its own.

    python examples/experiments/run.py --experiment masking --output runs/experiments
    python examples/experiments/run.py --experiment masking --output runs/experiments --list
    python examples/experiments/run.py --experiment masking --output runs/experiments --summary

A finished run whose settings are unchanged is skipped; one that was killed is done again. Several
calls may share an output: each takes the next run that nobody has. Runs use the CPU and one thread
each. Exit codes: 0 all runs are done, 1 a run failed, 2 bad input, 3 runs are left over.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from cells import UNKNOWN, Cell, claimed, code_sha256, finished, run_cell, short
from figures import read_figures
from findings import write_summary
from studies import STUDIES, Study

from nmar_ds.errors import LaunchError, NmarError


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", required=True, choices=sorted(STUDIES))
    parser.add_argument("--output", required=True, type=Path, help="folder of all runs")
    parser.add_argument("--list", action="store_true", help="say what is done, run nothing")
    parser.add_argument(
        "--summary", action="store_true", help="write the page from finished runs, run nothing"
    )
    parser.add_argument(
        "--pages", type=Path, default=Path("docs/results"), help="folder of pages (%(default)s)"
    )
    parser.add_argument(
        "--max-seconds", type=float, metavar="S", help="begin no run after so many seconds"
    )
    parser.add_argument(
        "--timeout-seconds", type=float, default=300.0, metavar="S", help="of one run (300)"
    )
    options = parser.parse_args(argv)
    if options.timeout_seconds <= 0 or (options.max_seconds or 1) <= 0:
        parser.error("--max-seconds and --timeout-seconds must be positive")
    return options


def next_cell(study: Study, output: Path, passed: set[str]) -> Cell | None:
    """The first run that is not finished and whose needs are.

    Args:
        study: of the runs.
        output: where they lie.
        passed: names that are looked at no more; those found finished are added.
    """
    for cell in study.cells:
        if cell.name in passed:
            continue
        if finished(cell, output) is not None:
            passed.add(cell.name)
        elif all(finished(need, output) is not None for need in cell.needs.values()):
            return cell
    return None


def listed(study: Study, output: Path) -> list[str]:
    """A line for each run; whether one that is done was made by other code than today's."""
    lines, today = [], code_sha256()
    for cell in study.cells:
        result = finished(cell, output)
        if result is None:
            lines.append(f"left  {cell.name}")
            continue
        code = result.get("code_sha256", UNKNOWN)
        lines.append(f"done  {cell.name}" + ("" if code == today else f"  (code: {short(code)})"))
    return lines


def run_all(study: Study, output: Path, options: argparse.Namespace) -> None:
    """Do what is to do, one run after the other.

    Raises:
        LaunchError: a run failed.
    """
    begun = time.monotonic()
    passed: set[str] = set()
    while (cell := next_cell(study, output, passed)) is not None:
        if options.max_seconds and time.monotonic() - begun > options.max_seconds:
            return
        with claimed(cell, output) as mine:
            if not mine:
                passed.add(cell.name)  # another call is at it
                continue
            if finished(cell, output) is None:  # it may have been done since it was looked at
                since = time.monotonic()
                run_cell(
                    cell, output, timeout_seconds=options.timeout_seconds,
                    read_result=read_figures,
                )  # fmt: skip
                print(f"{cell.name}: done in {time.monotonic() - since:.0f} s", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    options = parse(argv)
    study, output = STUDIES[options.experiment](), options.output.absolute()
    try:
        if not options.list and not options.summary:
            run_all(study, output, options)
        left = [cell.name for cell in study.cells if finished(cell, output) is None]
        if options.list:
            print(*listed(study, output), sep="\n")
        if options.summary:
            for file in write_summary(study, output, options.pages):
                print(file)
            return 0
        print(f"{study.name}: {len(study.cells) - len(left)} of {len(study.cells)} runs done")
        return 3 if left and not options.list else 0
    except (NmarError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, LaunchError) else 2


if __name__ == "__main__":
    sys.exit(main())
