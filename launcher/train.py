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

from nmar_ds.errors import LaunchError, NmarError
from nmar_ds.training.outcome import leave_exit_code
from nmar_ds.training.ranks import complete_environment, discover_ranks
from nmar_ds.training.stopping import Launcher, end_at_once_on_interrupt


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments; `deepspeed` itself inserts --local_rank, which the environment repeats."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="run configuration (YAML)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print steps, tokens, rows and waste, and stop"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="values that replace the file's"
    )
    return parser.parse_intermixed_args(argv)


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
        expected = config.training.world_size
        if not arguments.dry_run and expected not in (None, ranks.world_size):
            raise LaunchError(
                f"training.world_size: {expected} ranks are asked for, {ranks.world_size} started"
            )
        config.accumulation_steps(ranks.world_size)
        if not arguments.dry_run:
            config.check_hpz(world_size=ranks.world_size, ranks_per_node=ranks.local_world_size)
        from nmar_ds.training.planning import plan_run

        plan = plan_run(config)
        if arguments.dry_run:
            if ranks.rank == 0:
                print("\n".join(plan.summary(config)))
            return 0
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
    # Everything is saved and closed. Native threads of the communication libraries have been seen
    # to abort the interpreter while it shuts down, which would turn a finished run into a failed
    # job; so it is not shut down.
    sys.stdout.flush()
    sys.stderr.flush()
    leave_exit_code(exit_code, os.environ)
    os._exit(exit_code)
