"""Look at every node of a job before it trains there, and name the bad ones.

    deepspeed --num_gpus 2 launcher/preflight.py --config configs/quickstart.yaml [a.b=c ...]

Started with one process per rank, exactly as training is (srun and torchrun do too). Writes
`preflight.json` to the run folder. Exit codes: 0 good; 1 a bad node, named in a line of its own;
2 bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from nmar_ds.acceptance.judgement import Limits
from nmar_ds.errors import LaunchError, NmarError, PeerLostError
from nmar_ds.training.outcome import end_process
from nmar_ds.training.ranks import complete_environment, discover_ranks

LIMITS = {
    "slow-factor": "a rank is slow below the median matmul rate / this (CPU 3, GPU 1.3)",
    "slow-link-factor": "a link is slow beyond the usual time * this (CPU 4, GPU 2)",
    "min-bandwidth": "GB/s that every link must reach (0)",
    "max-skew-seconds": "between clocks (1)",
    "min-free-gpu-memory": "share of a GPU's memory (0.9)",
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments; `deepspeed` itself inserts --local_rank, which the environment repeats."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="run configuration (YAML)")
    parser.add_argument(
        "--timeout-seconds", type=int, default=60, metavar="S",
        help="longest wait for a silent rank (60)",
    )  # fmt: skip
    for name, meaning in LIMITS.items():
        parser.add_argument(f"--{name}", type=float, metavar="X", help=meaning)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="values that replace the file's"
    )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    arguments = parse(argv)
    ranks, joined = None, False
    try:
        from nmar_ds.config import load_config

        config = load_config(arguments.config, arguments.overrides)
        ranks = discover_ranks(os.environ)
        complete_environment(os.environ, ranks)
        from nmar_ds.acceptance.sizes import expected_checkpoint_bytes

        size = expected_checkpoint_bytes(config)
        import torch

        from nmar_ds.training import engine, preflight

        joined = True
        device = engine.start_process_group(ranks, timeout_seconds=arguments.timeout_seconds)
        chosen = {
            name.replace("-", "_"): value
            for name in LIMITS
            if (value := getattr(arguments, name.replace("-", "_"))) is not None
        }
        with engine.naming_lost_peers():
            report = preflight.run_preflight(
                ranks, device, output=Path(config.output),
                dtype=getattr(torch, config.model.dtype), checkpoint_bytes=size,
                limits=dataclasses.replace(Limits.of_device(device.type), **chosen),
                timeout_seconds=arguments.timeout_seconds,
            )  # fmt: skip
        if ranks.rank == 0:
            print(report.table(), flush=True)
            for row in report.bad:
                print(row.sentence(), file=sys.stderr, flush=True)
            preflight.write_report(report, Path(config.output))
        engine.close_process_group()
        return 1 if report.bad else 0
    except (NmarError, OSError) as error:
        # Once for what all ranks know; before they meet, once per machine; else by the one rank.
        alone = joined and not getattr(error, "shared", False)
        met = joined and not isinstance(error, LaunchError)
        first = ranks is None or (ranks.rank if met else ranks.local_rank) == 0
        if alone or (first and not isinstance(error, PeerLostError)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code if isinstance(error, NmarError) else 2


if __name__ == "__main__":
    end_process(main())
