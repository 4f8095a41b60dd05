"""Show packed rows of a trace store: roles, weights, borders and positions of every token.

python launcher/show.py --store store/train --rows 2 --sequence-length 512 | less -S
python launcher/show.py --store store/train --verify --audit --png statistics.png
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from nmar_ds.errors import NmarError


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Show packed rows of a trace store: coloured on a terminal, letters elsewhere.",
    )
    parser.add_argument(
        "--store", type=Path, required=True, help="folder made by launcher/prepare.py"
    )
    parser.add_argument("--rows", type=int, default=2, metavar="N", help="rows (or traces) shown")
    parser.add_argument(
        "--sequence-length", type=int, metavar="L",
        help="tokens per row (default: 512, or the longest trace if that is longer)",
    )  # fmt: skip
    parser.add_argument(
        "--objective", choices=["msft", "sft"], default="msft", help="whose weights are marked"
    )
    parser.add_argument(
        "--seed", type=int, help="draw rows at random (default: the first ones of the plan)"
    )
    parser.add_argument("--traces", action="store_true", help="show single traces, not packed rows")
    parser.add_argument(
        "--verify", action="store_true", help="first check every file against its checksum"
    )
    parser.add_argument(
        "--audit", action="store_true",
        help="replay every trace and print the statistics page instead of rows",
    )  # fmt: skip
    parser.add_argument("--png", type=Path, metavar="FILE", help="with --audit: the same drawn")
    options = parser.parse_args(argv)
    if options.png is not None and not options.audit:
        parser.error("--png needs --audit")
    if options.rows < 1 or (options.sequence_length or 1) < 1:
        parser.error("--rows and --sequence-length must be at least 1")
    if options.seed is not None and options.seed < 0:
        parser.error("--seed must not be negative")
    return options


def run(options: argparse.Namespace) -> None:
    """Open the store, check it if asked to, and print."""
    from nmar_ds.data.store import Store

    store = Store(options.store)
    if options.verify:
        store.verify()
        print(f"{options.store}: every file matches its checksum")
    if options.audit:
        from nmar_ds.data import statistics
        from nmar_ds.data.audit import audit

        found = audit(store, capacity=options.sequence_length)
        if options.png is not None:
            statistics.picture(found, str(options.store), options.png)
        print(statistics.page(found, f"{options.store}: audited, no fault"))
        return
    from nmar_ds.data.view import print_store
    from nmar_ds.model.weighting import role_weights

    print_store(
        store,
        num_shown=options.rows,
        sequence_length=options.sequence_length,
        weights=role_weights(options.objective),
        seed=options.seed,
        single=options.traces,
    )


def main(argv: list[str] | None = None) -> int:
    """Run; bad input is one line on stderr."""
    options = parse(argv)
    try:
        run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (NmarError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
