"""Prepare traces for a run: records -> ids and roles -> checked, checksummed stores.

    python launcher/prepare.py --config configs/quickstart.yaml [a.b=c ...]

Writes <data.store>/train and <data.store>/heldout; trains or extends the tokenizer first where
the configuration says so. Needs no torch and no GPU. Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys

from nmar_ds.errors import NmarError


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="run configuration (YAML)")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="values that replace the file's"
    )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    arguments = parse(argv)
    try:
        from nmar_ds.config import load_config

        config = load_config(arguments.config, arguments.overrides)
        from nmar_ds.data.prepare import prepare_run

        for line in prepare_run(config):
            print(line, flush=True)
        return 0
    except (NmarError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
