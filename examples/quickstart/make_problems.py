#!/usr/bin/env python3
"""Write the quickstart's problems: real reasoning-gym questions, one JSON object a line.

    make_problems.py --out DIR [--families spell_backward chain_sum ...] [--seed 7] [--train N] [--heldout N]

Needs `reasoning-gym` (Apache-2.0).  Deterministic in (--seed, --families, counts, reasoning-gym version).
Each line: {"id", "group", "prompt": question verbatim + "\\n", "reference", "answer"}.

* `answer` is reasoning-gym's own answer; the reference's final answer (`final_answer`) must score exactly 1.0 with the
  dataset's own `score_answer`, or the script stops.
* `reference` is the answer itself, except for chain_sum, where the running totals are written out as worked steps
  ("4-1=3, 3-7=-4"); the final answer is what follows the last "=".
* Prompts are unique over train and held-out together.  For spell_backward no held-out word is a training word either
  (compared without regard to case).  Held-out problems are drawn first.
"""
import argparse
import hashlib
import json
import os
import sys
from importlib.metadata import metadata, version

import reasoning_gym

# family -> reasoning-gym configuration; every key left out has reasoning-gym's default
FAMILIES = {
    "spell_backward": dict(min_word_len=3, max_word_len=7),
    "chain_sum": dict(min_terms=2, max_terms=4, min_digits=1, max_digits=1),
    "number_filtering": dict(min_numbers=3, max_numbers=6, min_decimals=0, max_decimals=0),
    "word_sequence_reversal": dict(min_words=3, max_words=5),
}


def worked_chain_sum(expression: str) -> str:
    """'4 - 1 - 7' -> '4 - 1 = 3, 3 - 7 = -4' (left to right, every running total written out)."""
    parts = expression.split(" ")
    total, steps = int(parts[0]), []
    for op, term in zip(parts[1::2], parts[2::2]):
        new = total + int(term) if op == "+" else total - int(term)
        steps.append(f"{total}{op}{term}={new}")
        total = new
    return ", ".join(steps)


def reference_of(family: str, entry: dict) -> str:
    return worked_chain_sum(entry["metadata"]["expression"]) if family == "chain_sum" else entry["answer"]


def final_answer(family: str, reference: str) -> str:
    """What a verifier scores, taken out of a response."""
    return reference.rsplit("=", 1)[-1] if family == "chain_sum" else reference


def key_of(family: str, entry: dict) -> str:
    return entry["metadata"]["word"].lower() if family == "spell_backward" else entry["question"]


def make(family: str, seed: int, n_heldout: int, n_train: int):
    config = dict(FAMILIES[family], seed=seed, size=20 * (n_heldout + n_train))
    data = reasoning_gym.create_dataset(family, **config)
    rows, seen = [], set()
    for i in range(config["size"]):
        entry = data[i]
        key = key_of(family, entry)
        if key in seen:
            continue
        reference = reference_of(family, entry)
        if data.score_answer(final_answer(family, reference), entry) != 1.0:
            sys.exit(f"{family} {i}: reference does not score 1.0: {reference!r}")
        if family == "number_filtering" and not entry["metadata"]["result"]:
            continue    # an empty list has nothing to go wrong in
        seen.add(key)
        rows.append({"id": f"{family}-{seed}-{i}", "group": family, "prompt": entry["question"].rstrip("\n") + "\n",
                     "reference": reference, "answer": entry["answer"]})
        if len(rows) == n_heldout + n_train:
            break
    else:
        sys.exit(f"{family}: only {len(rows)} different problems")
    assert len({r["prompt"] for r in rows}) == len(rows)
    full = {k: v for k, v in vars(data.config).items() if isinstance(v, (int, float, str, bool, type(None)))}
    return rows[:n_heldout], rows[n_heldout:], type(data).__name__, full


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", required=True)
    ap.add_argument("--families", nargs="+", default=["spell_backward", "chain_sum"], choices=sorted(FAMILIES))
    ap.add_argument("--seed", type=int, default=7)
    ap.add_argument("--train", type=int, default=10000, help="training problems per family")
    ap.add_argument("--heldout", type=int, default=400, help="held-out problems per family")
    args = ap.parse_args()
    os.makedirs(args.out, exist_ok=True)
    meta = metadata("reasoning-gym")
    prov = {"package": "reasoning-gym", "version": version("reasoning-gym"),
            "licence": meta.get("License-Expression") or meta.get("License"), "seed": args.seed,
            "command": "python " + " ".join([os.path.basename(sys.argv[0])] + sys.argv[1:]), "families": {}, "files": {}}
    for family in args.families:
        heldout, train, cls, config = make(family, args.seed, args.heldout, args.train)
        prov["families"][family] = {"dataset_class": cls, "config": config, "train": len(train), "heldout": len(heldout)}
        for part, rows in (("train", train), ("heldout", heldout)):
            name = f"{family}.{part}.jsonl"
            blob = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
            with open(os.path.join(args.out, name), "wb") as f:
                f.write(blob)
            prov["files"][name] = {"sha256": hashlib.sha256(blob).hexdigest(), "bytes": len(blob), "lines": len(rows)}
    with open(os.path.join(args.out, "provenance.json"), "w") as f:
        json.dump(prov, f, indent=1, sort_keys=True)
        f.write("\n")


if __name__ == "__main__":
    main()
