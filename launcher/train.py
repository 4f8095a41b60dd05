"""Train a model that takes tokens back: the main job.

    deepspeed --num_gpus 2 launcher/train.py --config configs/quickstart.yaml [a.b=c ...]

Also started by torchrun, srun, mpirun, or by plain python as one rank. Continues from the newest
valid checkpoint of the run folder. Exit codes: 0 done, or stopped by a signal and saved; 1 a fault
of the run; 2 bad input or configuration; 3 the job's attempts make no progress; 4 the run folder is
in use; 5 a rank hung.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
from typing import TYPE_CHECKING

from nmar_ds.errors import LaunchError, NmarError
from nmar_ds.training.outcome import end_process, leave_exit_code
from nmar_ds.training.ranks import Ranks, complete_environment, discover_ranks
from nmar_ds.training.stopping import Launcher, end_at_once_on_interrupt

if TYPE_CHECKING:
    from nmar_ds.config import RunConfig


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments; `deepspeed` itself inserts --local_rank, which the environment repeats."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="run configuration (YAML)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print steps, tokens, rows, memory, work, hours and checkpoint size, and stop; for "
        "training.world_size ranks, where that is set",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda",
        help="for --dry-run: whose memory is reckoned",
    )  # fmt: skip
    parser.add_argument(
        "--mfu", type=_share, default=0.4, help="for --dry-run: share of the peak that is reached"
    )
    parser.add_argument(
        "--peak-tflops", type=_positive, default=989.0, help="for --dry-run: of one GPU (H100: 989)"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="values that replace the file's"
    )
    return parser.parse_intermixed_args(argv)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0 and at most 1")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0")
    return value


def dry_run(config: RunConfig, arguments: argparse.Namespace, ranks: Ranks) -> None:
    """Print what the run will be and need; as much as can be said before the data are there.

    Raises:
        NmarError: the run could not be started like this.
    """
    world_size = config.training.world_size or ranks.world_size
    config.accumulation_steps(world_size)
    config.check_hpz(world_size=world_size, ranks_per_node=config.zero.hpz_partition_size)
    from nmar_ds.training.estimate import estimate_lines
    from nmar_ds.training.planning import plan_run

    plan = None
    try:
        plan = plan_run(config)
    finally:
        if ranks.rank == 0:
            lines = estimate_lines(
                config,
                plan,
                world_size=world_size,
                device=arguments.device,
                mfu=arguments.mfu,
                peak_tflops=arguments.peak_tflops,
            )
            print("\n".join((plan.summary(config) if plan is not None else []) + lines), flush=True)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    arguments = parse(argv)
    faulthandler.enable()  # a crash in native code then says where
    end_at_once_on_interrupt()
    launcher = Launcher()
    ranks, joined = None, False
    try:
        from nmar_ds.config import load_config

        config = load_config(arguments.config, arguments.overrides)
        ranks = discover_ranks(os.environ)
        if arguments.dry_run:
            dry_run(config, arguments, ranks)
            return 0
        expected = config.training.world_size
        if expected not in (None, ranks.world_size):
            raise LaunchError(
                f"training.world_size: {expected} ranks are asked for, {ranks.world_size} started"
            )
        config.accumulation_steps(ranks.world_size)
        config.check_hpz(world_size=ranks.world_size, ranks_per_node=ranks.local_world_size)
        from nmar_ds.training.planning import plan_run

        plan = plan_run(config)
        complete_environment(os.environ, ranks)
        from nmar_ds.training.run import run_training

        joined = True
        run_training(config, plan, ranks, launcher)
        return 0
    except (NmarError, OSError) as error:
        # Once for what all ranks know; before they meet, once per machine; else by the one rank.
        alone = joined and not getattr(error, "shared", False)
        met = joined and not isinstance(error, LaunchError)
        if ranks is None or alone or (ranks.rank if met else ranks.local_rank) == 0:
            who = f"rank {ranks.rank}: " if ranks is not None and alone and ranks.rank else ""
            print(f"error: {who}{error}", file=sys.stderr, flush=True)
        return error.exit_code if isinstance(error, NmarError) else 2


if __name__ == "__main__":
    exit_code = main()
    leave_exit_code(exit_code, os.environ)
    end_process(exit_code)
