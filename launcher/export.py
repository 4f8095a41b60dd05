"""Export a checkpoint as a Hugging Face folder that plain transformers loads.

    python launcher/export.py --run runs/quickstart --output runs/quickstart/export

Takes the newest valid checkpoint of the run (every file's checksum is read first) unless --step
names one, whatever the number of ranks that saved it. Weights are streamed: a machine with little
memory exports any model. Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nmar_ds.errors import NmarError


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, type=Path, help="run folder (`output` of a config)")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--step", type=int, help="checkpoint to export (default: the newest valid)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export at --output"
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE",
        help="of a weight file, 5GB or 500MB (default: %(default)s); memory does not depend on it",
    )  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    arguments = parse(argv)
    try:
        from nmar_ds.training.export import export_checkpoint

        print(
            export_checkpoint(
                arguments.run,
                arguments.output,
                step=arguments.step,
                overwrite=arguments.overwrite,
                max_shard_size=arguments.max_shard_size,
            )
        )
        return 0
    except (NmarError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
