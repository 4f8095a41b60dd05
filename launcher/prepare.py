"""Prepare traces for a run: records -> ids and roles -> checked, checksummed stores.

    python launcher/prepare.py --config configs/quickstart.yaml [--workers N] [a.b=c ...]
    mpirun -n K python launcher/prepare.py --config ...      (needs mpi4py)
    srun -n K python launcher/prepare.py --config ...        (needs no MPI)

Writes <data.store>/train and <data.store>/heldout, the same bytes however many processes take
part; trains or extends the tokenizer first where the configuration says so. What was killed goes
on when it is started again. Needs no torch and no GPU. Exit codes: 0 done, 1 a worker was lost (run
it again), 2 bad input, 4 another preparation is writing there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nmar_ds.errors import NmarError

if TYPE_CHECKING:
    from nmar_ds.config import RunConfig
    from nmar_ds.data.crew import Crew

QUIET_SECONDS = 30.0  # between two lines of progress where no terminal would overwrite them


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="run configuration (YAML)")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes on this machine (default: one)"
    )
    parser.add_argument(
        "--mpi", action="store_true", help="take rank and size from mpi4py; mpirun needs no flag"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="values that replace the file's"
    )
    return parser.parse_intermixed_args(argv)


def bars(part: str) -> Callable[[int, int], None]:
    """One bar for a store, over all processes; it appears where there is something to wait for."""
    from tqdm import tqdm

    pause = 0.5 if sys.stderr.isatty() else QUIET_SECONDS
    bar = tqdm(desc=part, unit=" records", unit_scale=True, mininterval=pause, delay=pause)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show


def work(config: RunConfig, crew: Crew) -> tuple[int, bool]:
    """This process's exit code, and whether the others find out about it by themselves."""
    from nmar_ds.data.prepare import prepare_run

    try:
        for line in prepare_run(config, crew, bars):
            print(line, flush=True)
        return 0, True
    except (NmarError, OSError) as error:
        known = crew.rank == 0 or getattr(error, "shared", False)
        if crew.rank == 0 or not known:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return getattr(error, "exit_code", 2), known


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    arguments = parse(argv)
    try:
        from nmar_ds.config import load_config

        config = load_config(arguments.config, arguments.overrides)
        from nmar_ds.data.crew import crew_of

        crew = crew_of(
            workers=arguments.workers, mpi=arguments.mpi, meeting=Path(config.data.store),
            command=[sys.executable, *sys.orig_argv[1:]],
        )  # fmt: skip
    except (NmarError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    code, known = 1, False
    try:
        code, known = work(config, crew)
    finally:
        code = crew.end(code, known=known)
    return code


if __name__ == "__main__":
    sys.exit(main())
