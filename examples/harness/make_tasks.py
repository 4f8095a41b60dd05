"""Write the data of the tasks in this folder: held-out sums with wrong solutions beside the right.

    python examples/harness/make_tasks.py --problems examples/quickstart/chain_sum.heldout.jsonl \
        --output examples/harness/chain_sum.jsonl

A problem keeps its prompt and reference. Three wrong solutions stand beside the right one: at a
random step a wrong result, and everything after it worked out rightly from there. All four have
the same number of characters, so that no choice is likelier for being shorter, and none begins
another. The result depends on the problems and the seed alone.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from pathlib import Path

NUM_WRONG = 3
MAX_OFF = 9  # how far a wrong result is from the right one
STEP = re.compile(r"(-?\d+)([+-])(\d+)=(-?\d+)")


def solution(first: int, terms: list[tuple[str, int]], wrong: int, off: int) -> str:
    """Worked steps, the result of step `wrong` (0-based) off by `off`."""
    total, steps = first, []
    for number, (sign, term) in enumerate(terms):
        result = total + term if sign == "+" else total - term
        result += off if number == wrong else 0
        steps.append(f"{total}{sign}{term}={result}")
        total = result
    return ", ".join(steps)


def wrong_solutions(reference: str) -> list[str]:
    """All that go wrong at one step, are as long as the reference, and end wrong."""
    steps = [STEP.fullmatch(step) for step in reference.split(", ")]
    if not all(steps):
        sys.exit(f"{reference!r}: not worked steps like '4-1=3, 3-7=-4'")
    first = int(steps[0][1])  # type: ignore[index]
    terms = [(step[2], int(step[3])) for step in steps]  # type: ignore[index]
    if solution(first, terms, 0, 0) != reference:
        sys.exit(f"{reference!r}: wrong itself")
    offs = [off for off in range(-MAX_OFF, MAX_OFF + 1) if off]
    found = [solution(first, terms, step, off) for step in range(len(terms)) for off in offs]
    return sorted({text for text in found if len(text) == len(reference)})


def document(record: dict[str, str], seed: int) -> dict[str, object]:
    """One document of the tasks."""
    rng = random.Random(f"{seed} {record['id']}")
    wrong = wrong_solutions(record["reference"])
    if len(wrong) < NUM_WRONG:
        sys.exit(f"{record['id']}: only {len(wrong)} wrong solutions of its length")
    choices = [record["reference"], *rng.sample(wrong, NUM_WRONG)]
    rng.shuffle(choices)
    return {
        "id": record["id"],
        "prompt": record["prompt"],
        "reference": record["reference"],
        "choices": choices,
        "right": choices.index(record["reference"]),
    }


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=Path, required=True, help="records of worked sums")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args(argv)
    try:
        lines = arguments.problems.read_text(encoding="utf-8").splitlines()
        documents = [document(json.loads(line), arguments.seed) for line in lines]
        text = "".join(json.dumps(entry) + "\n" for entry in documents)
        arguments.output.write_text(text, encoding="utf-8")
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {arguments.problems}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
