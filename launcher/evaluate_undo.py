"""Examine an exported model: accuracy raw, reduced and undo-banned, and forced deviations.

    python launcher/evaluate_undo.py --model exported/ --heldout heldout.jsonl --train train.jsonl

Exit code: 0; 1 where a bar given with --require is missed; 2 for bad input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nmar_ds.errors import ConfigError, NmarError


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Examine a model on held-out problems and on forced deviations.",
        epilog="The measures and their definitions are listed in docs/evaluation.md.",
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="folder made by launcher/export.py"
    )
    parser.add_argument(
        "--heldout", type=Path, nargs="+", required=True, metavar="JSONL",
        help="held-out records: prompt, reference and, where there is one, answer",
    )  # fmt: skip
    parser.add_argument(
        "--train", type=Path, nargs="+", default=[], metavar="JSONL",
        help="training records; held-out prompts that stand in them are counted and reported",
    )  # fmt: skip
    parser.add_argument(
        "--num-problems", type=int, default=200, metavar="N",
        help="problems per family (default 200); fewer in the files is an error",
    )  # fmt: skip
    parser.add_argument(
        "--allow-fewer", action="store_true", help="accept families with fewer problems"
    )
    parser.add_argument(
        "--max-length", type=int, default=6, metavar="TOKENS",
        help="forced deviations have 1 to this many wrong tokens (default 6)",
    )  # fmt: skip
    parser.add_argument(
        "--max-new-tokens", type=int, default=None, metavar="TOKENS",
        help="per response (default: twice the family's longest reference and some more; four "
        "times under span and reset)",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T",
        help="responses are drawn at this temperature, one per problem; 0 (default) is greedy",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=256, help="sequences side by side")
    parser.add_argument("--seed", type=int, default=0, help="of problems, deviations and draws")
    parser.add_argument(
        "--samples", type=int, default=3, metavar="N",
        help="decodes shown per family, free and forced each (default 3)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="JSON report to write")
    parser.add_argument(
        "--require", nargs="+", action="extend", default=[], metavar="BAR",
        help="bars each family must clear, like 'reduced>=0.95' 'false_undo<=0.05'",
    )  # fmt: skip
    options = parser.parse_args(argv)
    for name in ("num_problems", "max_length", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.samples < 0 or options.seed < 0:
        parser.error("--samples and --seed must not be negative")
    if not 0 <= options.temperature < float("inf"):
        parser.error("--temperature must be a number of at least 0")
    return options


def run(options: argparse.Namespace) -> int:
    """Check everything cheap first, then load the model, examine it and report."""
    from nmar_ds.inference.bars import missed, parse_bar
    from nmar_ds.inference.exported import (
        chat_of,
        load_exported_tokenizer,
        load_model,
        read_settings,
    )
    from nmar_ds.inference.probes import count_overlap, load_problems, select

    bars = [parse_bar(text) for text in options.require]
    settings = read_settings(options.model)
    if options.output is not None and not options.output.absolute().parent.is_dir():
        raise ConfigError(f"--output: no folder {options.output.parent}, expected an existing one")
    tokenizer = load_exported_tokenizer(options.model, settings)
    families = load_problems(options.heldout, tokenizer, chat_of(settings, tokenizer))
    wanted = {"num_problems": options.num_problems, "seed": options.seed}
    chosen = select(families, **wanted, allow_fewer=options.allow_fewer)
    overlap = count_overlap(chosen, options.train) if options.train else {}
    for name, num in overlap.items():
        print(f"{name}: {num} of {len(chosen[name])} held-out prompts also stand in training files")
    if not options.train:
        print("overlap with training data: not checked, no --train given")

    from rich.console import Console

    from nmar_ds.inference import report
    from nmar_ds.inference.evaluation import Examination, evaluate

    examination = Examination(
        **wanted,
        max_length=options.max_length,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        allow_fewer=options.allow_fewer,
        temperature=options.temperature,
    )
    results = evaluate(load_model(options.model), tokenizer, settings, families, examination)
    console = Console()
    report.print_samples(
        results, num=options.samples, tokenizer=tokenizer, settings=settings, console=console
    )
    print()
    report.print_table(results, console)
    lines = missed({name: result.measures for name, result in results.items()}, bars)
    for line in lines:
        print(f"MISSED {line}")
    if options.output is not None:
        about = {"model": str(options.model), "semantics": settings.semantics, **wanted,
                 "max_length": options.max_length, "temperature": options.temperature,
                 "require": [str(bar) for bar in bars]}  # fmt: skip
        whole = report.as_json(
            results, about=about, overlap=overlap, missed=lines, num_samples=options.samples,
            tokenizer=tokenizer, settings=settings,
        )  # fmt: skip
        report.write_json(whole, options.output)
    return 1 if lines else 0


def main(argv: list[str] | None = None) -> int:
    """Run; bad input is one line on stderr."""
    options = parse(argv)
    try:
        return run(options)
    except NmarError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
