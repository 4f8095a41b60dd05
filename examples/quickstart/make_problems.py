"""Write the quickstart's problems: reasoning-gym questions, one JSON record a line.

    pip install '.[problems]'      # reasoning-gym; its dependency pycosat compiles C
    python examples/quickstart/make_problems.py --output examples/quickstart

The result depends on the seed, the counts and reasoning-gym's version alone. `prompt` is the
question to the letter plus a line break, `reference` the one right response:

* spell_backward: reasoning-gym's own answer;
* chain_sum: its running totals as worked steps ("6-0=6, 6-2=4"), the answer last.

Every reference's answer must score 1.0 with reasoning-gym's own verifier, or nothing is written.
No prompt occurs twice, and no held-out word of spell_backward is a training word in other letter
case. Problems are shuffled before they are split: there are few short sums, and drawn in turn
they would all end up on one side.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from importlib.metadata import metadata, version
from pathlib import Path
from typing import Any

# What differs from reasoning-gym's defaults, which are 3 to 10 letters, and 2 to 6 terms of 1 to
# 4 digits: sizes that a model of 0.9M weights learns in minutes.
SHARES = {"spell_backward": 0.4, "chain_sum": 0.6}  # of the training problems; sums learn slower
FAMILIES: dict[str, dict[str, int]] = {
    "spell_backward": {"min_word_len": 3, "max_word_len": 7},
    "chain_sum": {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 1},
}


def worked_steps(expression: str) -> str:
    """'4 - 1 - 7' -> '4-1=3, 3-7=-4': left to right, every running total written out."""
    words = expression.split(" ")
    total = int(words[0])
    steps = []
    for sign, term in zip(words[1::2], words[2::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        steps.append(f"{total}{sign}{term}={result}")
        total = result
    return ", ".join(steps)


def problem(family: str, entry: dict[str, Any]) -> tuple[str, str, str]:
    """What makes it unique, its reference, and the reference's answer."""
    if family == "chain_sum":
        reference = worked_steps(entry["metadata"]["expression"])
        return entry["question"], reference, reference.rsplit("=", 1)[-1]
    return entry["metadata"]["word"].lower(), entry["answer"], entry["answer"]


def make(family: str, seed: int, num: int) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """`num` different records, and what they were made with."""
    import reasoning_gym

    settings = {**FAMILIES[family], "seed": seed, "size": 20 * num}
    data = reasoning_gym.create_dataset(family, **settings)
    records: dict[str, dict[str, str]] = {}
    for index in range(len(data)):
        entry = data[index]
        key, reference, answer = problem(family, entry)
        if key in records:
            continue
        if data.score_answer(answer, entry) != 1.0:
            sys.exit(f"{family} {index}: the verifier does not accept {answer!r}")
        records[key] = {
            "id": f"{family}-{seed}-{index}",
            "group": family,
            "prompt": entry["question"].rstrip("\n") + "\n",
            "reference": reference,
        }
        if len(records) == num:
            break
    else:
        sys.exit(f"{family}: gives only {len(records)} different problems, {num} are wanted")
    shuffled = list(records.values())
    random.Random(seed).shuffle(shuffled)
    return shuffled, {"dataset": type(data).__name__, "settings": settings}


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--train", type=int, default=20_000, help="training problems in all")
    parser.add_argument("--heldout", type=int, default=400, help="held-out problems per family")
    arguments = parser.parse_args()
    about: dict[str, Any] = {
        "package": "reasoning-gym",
        "version": version("reasoning-gym"),
        "licence": "Apache-2.0",
        "homepage": metadata("reasoning-gym").get("Home-page")
        or "https://github.com/open-thought/reasoning-gym",
        "command": f"python examples/quickstart/make_problems.py --output examples/quickstart "
        f"--seed {arguments.seed} --train {arguments.train} --heldout {arguments.heldout}",
        "families": {},
        "files": {},
    }
    contents: dict[str, bytes] = {}
    for family in FAMILIES:
        num_train = round(SHARES[family] * arguments.train)
        records, made_with = make(family, arguments.seed, arguments.heldout + num_train)
        about["families"][family] = made_with
        parts = {"heldout": records[: arguments.heldout], "train": records[arguments.heldout :]}
        for part, chosen in parts.items():
            name = f"{family}.{part}.jsonl"
            contents[name] = "".join(json.dumps(record) + "\n" for record in chosen).encode()
            digest = hashlib.sha256(contents[name]).hexdigest()
            about["files"][name] = {"records": len(chosen), "sha256": digest}
    for name, content in contents.items():
        (arguments.output / name).write_bytes(content)
    text = json.dumps(about, indent=1, sort_keys=True) + "\n"
    (arguments.output / "provenance.json").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
