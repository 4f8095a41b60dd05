"""Measure what masking the deviations does: SPEC section 4 on one page, in minutes on two cores.

    python launcher/safety_gap.py --config configs/safety_gap.yaml [output=DIR a.b=c ...]

Writes report.txt, report.json and report.png (matplotlib) to the output folder: the identities in
float64 and under ZeRO-3 on two ranks, one SGD step against its prediction, curves of SFT and mSFT
from a common start, and how the gradients lie to each other. Needs no GPU. What was stopped goes on
with the next seed when it is started again. Exit codes: 0 the exact part holds, 1 it does not or a
process was lost, 2 bad input.
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
    parser.add_argument("--config", required=True, metavar="FILE", help="study (YAML)")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="values that replace the file's"
    )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    arguments = parse(argv)
    try:
        from nmar_ds.theory.settings import load_settings

        config = load_settings(arguments.config, arguments.overrides)
        from nmar_ds.theory.safety_gap import run_study

        return 0 if run_study(config) else 1
    except (NmarError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return getattr(error, "exit_code", 2)


if __name__ == "__main__":
    sys.exit(main())
