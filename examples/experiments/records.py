"""Write the records of an experiment, one JSON object a line.

    python examples/experiments/records.py first --records FILE --num 5000 --output FILE
    python examples/experiments/records.py wrong --records FILE --choices 3 --share 0.5 \
        --num 5000 --output FILE
    python examples/experiments/records.py steps --num 400 --seed 2 --operations 1 2 --output FILE

`first` takes the first records of a file. `wrong` marks errors in worked sums ("7-9=-2, -2+8=6"):
each result is, with probability `share`, first written as one of `choices` wrong values, all
equally likely: given which result is wrong, its value has an entropy of exactly log2(choices) bits.
The deviation written begins at the first character that differs; given that place, which tells
something of the value, its entropy is lower. `steps` writes dependency arithmetic. The same
arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nmar_ds.errors import ConfigError, NmarError
from nmar_ds.traces.arithmetic import OPERATORS, problem

RESULT = re.compile(r"(?<==)-?\d+")
MAX_CHOICES = 32


def wrong_values(right: str, choices: int) -> list[str]:
    """The nearest wrong integers: 1 more, 1 less, 2 more ...

    One that begins the right value, or that the right value begins, is passed over: where it goes
    wrong could not be told from where it ends.
    """
    found = []
    for distance in itertools.count(1):
        for value in (int(right) + distance, int(right) - distance):
            text = str(value)
            if not (text.startswith(right) or right.startswith(text)):
                found.append(text)
            if len(found) == choices:
                return found
    raise AssertionError("numbers do not end")


def marked(record: dict[str, Any], *, choices: int, share: float, seed: int) -> dict[str, Any]:
    """The record with `deviations`: from the letter on in which a wrong result departs.

    Which results are wrong depends on the seed and the record alone, not on `choices`.

    Args:
        record: with `id`, `prompt` and a `reference` of worked sums.
        choices: number of equally likely wrong values.
        share: probability that a result is first written wrong.
        seed: of the draws.
    """
    rng = random.Random(f"{seed} {record['id']}")
    deviations = []
    for match in RESULT.finditer(record["reference"]):
        is_wrong, place = rng.random() < share, rng.random()
        if not is_wrong:
            continue
        values = wrong_values(match[0], choices)
        text = values[int(place * choices)]
        same = next(i for i, (a, b) in enumerate(zip(text, match[0], strict=False)) if a != b)
        deviations.append({"at": match.start() + same, "text": text[same:]})
    return {**record, "deviations": deviations} if deviations else record


def read(path: Path, num: int) -> Iterator[dict[str, Any]]:
    """The first `num` records of a JSON-lines file.

    Raises:
        ConfigError: it has fewer.
    """
    with path.open(encoding="utf-8") as file:
        lines = list(itertools.islice(file, num))
    if len(lines) < num:
        raise ConfigError(f"{path}: has {len(lines)} records, expected at least {num} (--num)")
    yield from map(json.loads, lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in ("first", "wrong", "steps"):
        one = kinds.add_parser(kind)
        one.add_argument("--num", type=int, required=True)
        one.add_argument("--output", type=Path, required=True)
        if kind != "steps":
            one.add_argument("--records", type=Path, required=True)
        if kind != "first":
            one.add_argument("--seed", type=int, default=0)
        if kind == "wrong":
            one.add_argument("--choices", type=int, required=True)
            one.add_argument("--share", type=float, required=True)
        if kind == "steps":
            one.add_argument("--operations", type=int, nargs=2, required=True)
            one.add_argument("--distractors", type=int, nargs=2, default=[0, 1])
            one.add_argument("--operators", nargs="+", choices=OPERATORS, default=[*OPERATORS])
    options = parser.parse_args(argv)
    if options.num < 1:
        parser.error("--num must be at least 1")
    if options.kind == "wrong" and not 1 <= options.choices <= MAX_CHOICES:
        parser.error(f"--choices must be from 1 to {MAX_CHOICES}")
    if options.kind == "wrong" and not 0 <= options.share <= 1:
        parser.error("--share must be from 0 to 1")
    return options


def records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The records that are asked for."""
    if options.kind == "steps":
        for number in range(options.num):
            yield problem(
                options.seed, number, operations=tuple(options.operations),
                distractors=tuple(options.distractors), operators=options.operators,
            )  # fmt: skip
        return
    for record in read(options.records, options.num):
        if options.kind == "wrong":
            record = marked(  # noqa: PLW2901
                record, choices=options.choices, share=options.share, seed=options.seed
            )
        yield record


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input."""
    options = parse(argv)
    try:
        lines = [json.dumps(record, ensure_ascii=False) for record in records(options)]
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return 0
    except (NmarError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
