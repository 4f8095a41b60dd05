"""Evaluate an exported model on tasks of lm-eval, with undos carried out.

    python launcher/evaluate_harness.py --model exported/ --tasks nmar_chain_sum \
        --tasks-path examples/harness --output results.json

lm-eval comes with `pip install 'nmar_ds[harness]'`. Exit code: 0; 2 for bad input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from nmar_ds.errors import ConfigError, NmarError
from nmar_ds.inference.limits import TEMPERATURES, fits_temperature


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Evaluate an exported model on tasks of lm-eval; texts are reduced on ids.",
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="folder made by launcher/export.py"
    )
    parser.add_argument("--tasks", nargs="+", required=True, metavar="NAME")
    parser.add_argument(
        "--tasks-path", type=Path, metavar="FOLDER", help="tasks of your own, in lm-eval's YAML"
    )
    parser.add_argument("--output", type=Path, metavar="JSON", help="results, samples among them")
    parser.add_argument("--limit", type=int, metavar="N", help="documents per task (default all)")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences side by side")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N",
        help="tokens a response may take, undone ones and undos too (default: as the task says)",
    )  # fmt: skip
    parser.add_argument(
        "--undo", choices=["allow", "ban"], default="allow",
        help="ban: <UNDO> can be neither written nor scored",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="instead of what the tasks say; 0 is greedy"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    options = parser.parse_args(argv)
    for name in ("limit", "batch_size", "max_new_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.seed < 0:
        parser.error("--seed must not be negative")
    if options.temperature is not None and not fits_temperature(options.temperature):
        parser.error(f"--temperature must be {TEMPERATURES}")
    return options


def run(options: argparse.Namespace) -> None:
    """Check the folder and lm-eval, then evaluate and write."""
    from nmar_ds.files import why_no_file
    from nmar_ds.inference.exported import read_settings

    read_settings(options.model)
    problem = None if options.output is None else why_no_file(options.output)
    if problem is not None:
        raise ConfigError(f"--output: {problem}")

    from nmar_ds.inference.harness_run import HarnessRun, print_and_write, run_harness

    model_args: dict[str, Any] = {"undo": options.undo, "seed": options.seed}
    if options.max_new_tokens is not None:
        model_args["max_new_tokens"] = options.max_new_tokens
    results = run_harness(
        HarnessRun(
            model=options.model,
            tasks=options.tasks,
            tasks_path=options.tasks_path,
            limit=options.limit,
            batch_size=options.batch_size,
            temperature=options.temperature,
            model_args=model_args,
        )
    )
    print_and_write(results, options.output)


def main(argv: list[str] | None = None) -> int:
    """Run; bad input is one line on stderr."""
    options = parse(argv)
    try:
        run(options)
    except NmarError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
