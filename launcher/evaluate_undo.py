"""Examine an exported model: accuracy raw, reduced and undo-banned, and forced deviations.

    python launcher/evaluate_undo.py --model exported/ --heldout heldout.jsonl --train train.jsonl

Exit code: 0; 1 where a bar given with --require is missed; 2 for bad input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nmar_ds.errors import ConfigError, NmarError
from nmar_ds.inference.limits import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    TEMPERATURES,
    fits_temperature,
)


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
    parser.add_argument(
        "--store", type=Path,
        help="prepared held-out traces (launcher/prepare.py): losses and p(UNDO) on them",
    )  # fmt: skip
    parser.add_argument(
        "--num-traces", type=int, default=1000, metavar="N",
        help="of the store, at most and spread over it (default 1000)",
    )  # fmt: skip
    add_vote(parser)
    add_outputs(parser)
    options = parser.parse_args(argv)
    check_numbers(parser, options)
    return options


def add_vote(parser: argparse.ArgumentParser) -> None:
    """What to compare with at equal compute."""
    parser.add_argument(
        "--baseline", type=Path, metavar="MODEL",
        help="a model without undo, exported or a plain Hugging Face folder with the same "
        "tokenizer: its majority vote of as many tokens is the comparison",
    )  # fmt: skip
    parser.add_argument(
        "--vote", type=int, default=16, metavar="K",
        help="samples per problem at most in that vote (default 16)",
    )  # fmt: skip
    parser.add_argument(
        "--vote-temperature", type=float, default=1.0, metavar="T", help="of these (default 1)"
    )


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Where the report goes, and what it must say."""
    parser.add_argument("--output", type=Path, help="JSON report to write")
    parser.add_argument("--png", type=Path, metavar="FILE", help="picture of the report to write")
    parser.add_argument(
        "--tensorboard", type=Path, metavar="FOLDER", help="folder to write the report's scalars to"
    )
    parser.add_argument(
        "--step", type=int, default=0, metavar="N",
        help="their place on the axis: the step of the exported checkpoint (default 0)",
    )  # fmt: skip
    parser.add_argument(
        "--require", nargs="+", action="extend", default=[], metavar="BAR",
        help="bars each family must clear, like 'reduced>=0.95' 'false_undo<=0.05'",
    )  # fmt: skip


def check_numbers(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse numbers that cannot be meant."""
    for name in ("num_problems", "num_traces", "max_length", "batch_size", "vote"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        parser.error("--max-new-tokens must be at least 1")
    if min(options.samples, options.seed, options.step) < 0:
        parser.error("--samples, --seed and --step must not be negative")
    if options.seed >= 2**63:
        parser.error("--seed must be below 2^63")
    if not fits_temperature(options.temperature):
        parser.error(f"--temperature must be {TEMPERATURES}")
    if options.vote_temperature == 0 or not fits_temperature(options.vote_temperature):
        parser.error(
            f"--vote-temperature must be {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}; at 0 all "
            "samples would be equal"
        )


def check(options: argparse.Namespace) -> SimpleNamespace:
    """All that can be wrong and costs little, before torch is imported."""
    from nmar_ds.inference.bars import parse_bar
    from nmar_ds.inference.exported import chat_of, load_exported_tokenizer, read_settings
    from nmar_ds.inference.fitting import check_baseline, open_store
    from nmar_ds.inference.probes import count_overlap, load_problems, select

    bars = [parse_bar(text) for text in options.require]
    settings = read_settings(options.model)
    check_places(options)
    tokenizer = load_exported_tokenizer(options.model, settings)
    store = None if options.store is None else open_store(options.store, settings)
    if options.baseline is not None:
        check_baseline(options.baseline, settings, tokenizer)
    families = load_problems(options.heldout, tokenizer, chat_of(settings, tokenizer))
    chosen = select(
        families, num_problems=options.num_problems, seed=options.seed,
        allow_fewer=options.allow_fewer,
    )  # fmt: skip
    overlap = count_overlap(chosen, options.train) if options.train else {}
    for name, num in overlap.items():
        print(f"{name}: {num} of {len(chosen[name])} held-out prompts also stand in training files")
    if not options.train:
        print("overlap with training data: not checked, no --train given")
    return SimpleNamespace(
        bars=bars, settings=settings, tokenizer=tokenizer, families=families, chosen=chosen,
        overlap=overlap, store=store,
    )  # fmt: skip


def check_places(options: argparse.Namespace) -> None:
    """Refuse places that cannot be written to, before hours are spent."""
    from importlib.util import find_spec

    from nmar_ds.files import why_no_file, why_no_folder

    checks = {"output": why_no_file, "png": why_no_file, "tensorboard": why_no_folder}
    for name, check_place in checks.items():
        place = getattr(options, name)
        problem = None if place is None else check_place(place)
        if problem is not None:
            raise ConfigError(f"--{name}: {problem}")
    if options.png is not None and find_spec("matplotlib") is None:
        raise ConfigError("--png: needs matplotlib; pip install 'nmar_ds[plots]'")


def run(options: argparse.Namespace) -> int:
    """Check everything cheap first, then load the model, examine it and report."""
    checked = check(options)
    from rich.console import Console

    from nmar_ds.inference import report
    from nmar_ds.inference.bars import missed
    from nmar_ds.inference.evaluation import Examination, evaluate
    from nmar_ds.inference.exported import load_model

    examination = Examination(
        num_problems=options.num_problems,
        seed=options.seed,
        max_length=options.max_length,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        allow_fewer=options.allow_fewer,
        temperature=options.temperature,
    )
    settings, tokenizer = checked.settings, checked.tokenizer
    model = load_model(options.model)
    baseline = None if options.baseline is None else load_model(options.baseline)
    check_room(model, baseline, checked, examination, options)
    results = evaluate(model, tokenizer, settings, checked.families, examination)
    console = Console()
    report.print_samples(
        results, num=options.samples, tokenizer=tokenizer, settings=settings, console=console
    )
    print()
    report.print_table(results, console)
    traces = {} if checked.store is None else score_traces(model, checked, options)
    votes = {}
    if baseline is not None:
        votes = vote(
            model, baseline, results=results, checked=checked, examination=examination,
            options=options,
        )  # fmt: skip
    lines = missed({name: result.measures for name, result in results.items()}, checked.bars)
    for line in lines:
        print(f"MISSED {line}")
    if any(place is not None for place in (options.output, options.png, options.tensorboard)):
        about = {"model": str(options.model), "semantics": settings.semantics,
                 "num_problems": options.num_problems, "seed": options.seed,
                 "max_length": options.max_length, "temperature": options.temperature,
                 "max_new_tokens": options.max_new_tokens,
                 "require": [str(bar) for bar in checked.bars]}  # fmt: skip
        whole = report.as_json(
            results, about=about, overlap=checked.overlap, missed=lines,
            num_samples=options.samples, tokenizer=tokenizer, settings=settings,
        )  # fmt: skip
        write(whole | traces | votes, options)
    return 1 if lines else 0


def check_room(
    model: Any, baseline: Any, checked: SimpleNamespace, examination: Any,
    options: argparse.Namespace,
) -> None:  # fmt: skip
    """Refuse what comes last and is too long for a model; `evaluate` refuses the rest."""
    from nmar_ds.inference.evaluation import allowed_tokens
    from nmar_ds.inference.fitting import check_positions
    from nmar_ds.inference.teacher_forced import choose_traces

    if checked.store is not None:
        choose_traces(model, checked.store, options.num_traces)
    for problems in checked.chosen.values() if baseline is not None else ():
        num_new = allowed_tokens(problems, checked.settings, examination)
        prompts = [problem.prompt_ids for problem in problems]
        check_positions(f"--baseline: {options.baseline}", baseline, prompts, num_new)


def score_traces(
    model: Any, checked: SimpleNamespace, options: argparse.Namespace
) -> dict[str, Any]:
    """What the model makes of held-out traces, for people and for the report."""
    from nmar_ds.inference.report import print_traces
    from nmar_ds.inference.teacher_forced import measure_store

    measures = measure_store(
        model, checked.store, undo_id=checked.settings.undo_id, num_traces=options.num_traces
    )
    print()
    print_traces(measures)
    return {"teacher_forced": {"store": str(options.store), "measures": measures}}


def vote(
    model: Any, baseline: Any, *, results: Any, checked: SimpleNamespace, examination: Any,
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """The comparison at equal compute, for people and for the report."""
    from nmar_ds.inference import voting

    found = voting.equal_compute(
        results, baseline, tokenizer=checked.tokenizer, settings=checked.settings,
        examination=examination,
        vote=voting.Vote(max_k=options.vote, temperature=options.vote_temperature),
    )  # fmt: skip
    print("\nat equal compute:")
    for line in voting.lines(found):
        print(line)
    weights = {"model": model.num_parameters(), "baseline": baseline.num_parameters()}
    return {"equal_compute": {
        "baseline": str(options.baseline), "num_weights": weights, "families": found,
    }}  # fmt: skip


def write(whole: dict[str, Any], options: argparse.Namespace) -> None:
    """The report in the forms asked for."""
    if options.output is not None:
        from nmar_ds.inference.report import write_json

        write_json(whole, options.output)
    if options.png is not None:
        from nmar_ds.inference.picture import picture

        picture(whole, options.png)
    if options.tensorboard is not None:
        from nmar_ds.inference.curves import write_scalars

        write_scalars(whole, options.tensorboard, step=options.step)


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
