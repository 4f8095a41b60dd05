"""The shipped problems are what their provenance says, and no held-out one is in training."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "quickstart"
FAMILIES = ("spell_backward", "chain_sum")


def records(family: str, part: str) -> list[dict[str, str]]:
    lines = (FOLDER / f"{family}.{part}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_files_are_those_of_the_provenance() -> None:
    about = json.loads((FOLDER / "provenance.json").read_text("utf-8"))
    files = {path.name for path in FOLDER.glob("*.jsonl")}
    assert set(about["files"]) == files and len(files) == 4
    for name, entry in about["files"].items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == entry["sha256"]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_heldout_problem_is_in_training(family: str) -> None:
    train, heldout = records(family, "train"), records(family, "heldout")
    assert len(heldout) >= 200
    prompts = [record["prompt"].lower() for record in train + heldout]
    assert len(set(prompts)) == len(prompts)
    assert all(record["group"] == family for record in train + heldout)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_and_heldout_problems_are_equally_long(family: str) -> None:
    """Few short sums exist; a split in order of drawing put nearly all of them on one side."""
    shares = []
    for part in ("train", "heldout"):
        lengths = [len(record["reference"].split(", ")) for record in records(family, part)]
        if family == "spell_backward":
            lengths = [len(record["reference"]) for record in records(family, part)]
        shares.append({n: lengths.count(n) / len(lengths) for n in range(1, 10)})
    for length, share in shares[0].items():
        assert abs(share - shares[1][length]) < 0.08, (length, share, shares[1][length])


def test_references_are_right() -> None:
    """Checked here without reasoning-gym; its verifier accepted them when they were made."""
    for part in ("train", "heldout"):
        for record in records("spell_backward", part):
            word = re.search(r"nus\): (\w+)\n$", record["prompt"]).group(1)  # type: ignore[union-attr]
            assert record["reference"] == word[::-1]
        for record in records("chain_sum", part):
            problem = re.search(r"problem: (.*) =\n$", record["prompt"]).group(1)  # type: ignore[union-attr]
            words = problem.split(" ")
            total = int(words[0])
            for sign, term in zip(words[1::2], words[2::2], strict=True):
                total += int(term) if sign == "+" else -int(term)
            assert record["reference"].rsplit("=", 1)[1] == str(total)
