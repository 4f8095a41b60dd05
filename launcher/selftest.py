"""A user's acceptance of their own nodes, in about ten minutes: one page of PASS and FAIL.

    deepspeed --num_gpus 2 launcher/selftest.py [--output runs/selftest]
    sbatch slurm/selftest.sh

Started with one process per rank, exactly as training is. Phases: preflight, isolation,
exactness, resume, bandwidth (docs/acceptance.md). Needs no data and no network. Writes
`selftest.txt` and `selftest.json` to the output folder. Exit codes: 0 all passed; 1 something
failed; 2 bad input.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from nmar_ds.acceptance.verdict import PHASES, conclude
from nmar_ds.errors import LaunchError, NmarError
from nmar_ds.training.outcome import end_process
from nmar_ds.training.ranks import complete_environment, discover_ranks


def phases_of(text: str) -> list[str]:
    """Phases from a list with commas.

    Raises:
        argparse.ArgumentTypeError: one of them is none.
    """
    names = text.split(",")
    for name in names:
        if name not in PHASES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PHASES)}")
    return names


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments; `deepspeed` itself inserts --local_rank, which the environment repeats."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/selftest"), metavar="DIR",
                        help="folder that all nodes share (runs/selftest)")  # fmt: skip
    parser.add_argument("--phases", type=phases_of, default=list(PHASES), metavar="A,B",
                        help="some of the phases")  # fmt: skip
    parser.add_argument("--dtype", choices=["float32", "bfloat16"],
                        help="of the killed training (GPU bfloat16, CPU float32)")  # fmt: skip
    parser.add_argument("--min-bandwidth", type=float, default=0.0, metavar="X",
                        help="GB/s that every collective must reach (0)")  # fmt: skip
    parser.add_argument("--timeout-seconds", type=int, default=300, metavar="S",
                        help="longest wait for a silent rank (300)")  # fmt: skip
    parser.add_argument("--no-summary", action="store_true", help="leave the page to --summary")
    parser.add_argument("--summary", action="store_true",
                        help="run nothing: write the page of what --phases have left")  # fmt: skip
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> int:
    """Run phases on this rank; the exit code."""
    ranks = discover_ranks(os.environ)
    complete_environment(os.environ, ranks)
    import torch

    from nmar_ds.acceptance.selftest import run_phases
    from nmar_ds.training import engine

    try:
        device = engine.start_process_group(ranks, timeout_seconds=arguments.timeout_seconds)
    except LaunchError as error:
        if ranks.local_rank == 0 or not error.shared:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    ended = run_phases(
        arguments.phases, ranks, device, output=arguments.output,
        dtype=arguments.dtype or ("bfloat16" if torch.cuda.is_available() else "float32"),
        min_bandwidth=arguments.min_bandwidth, timeout_seconds=arguments.timeout_seconds,
    )  # fmt: skip
    if not ended:  # the group may be broken: nothing collective from here on
        return summarize(arguments) if ranks.rank == 0 else 1
    code = 0
    if ranks.rank == 0:
        code = summarize(arguments)
    code = engine.ProcessPeers().broadcast(code)
    engine.close_process_group()
    return code


def summarize(arguments: argparse.Namespace) -> int:
    """The page; or, where another process writes it, only whether these phases passed."""
    if arguments.no_summary:
        from nmar_ds.acceptance.verdict import PhaseResult

        results = [PhaseResult.load(arguments.output, phase) for phase in arguments.phases]
        return 0 if all(result.passed for result in results) else 1
    good, text = conclude(arguments.output, arguments.phases)
    print(f"\n{text}", flush=True)
    return 0 if good else 1


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    arguments = parse(argv)
    try:
        return summarize(arguments) if arguments.summary else run(arguments)
    except (NmarError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code if isinstance(error, NmarError) else 2


if __name__ == "__main__":
    end_process(main())
