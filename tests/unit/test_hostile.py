"""Hostile input at large: ten thousand damaged lines and every bad line by hand, in one preparation.

Nothing but a listed refusal comes of any of them, every line is accounted for, and no text whatever
becomes an undo.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from test_records import BAD, GOOD
from tiny_stores import prepare_store
from tiny_tokenizers import sums

from nmar_ds.data.audit import audit
from nmar_ds.data.store import Store
from nmar_ds.traces.arithmetic import problem
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.schema import Role

NUM_MUTATED = 10_000
SPLINTERS = (
    b"<UNDO>", b"\\u003cUNDO\\u003e", b"<UN", b"DO>", "\uff1cUNDO\uff1e".encode(), b"<s>", b"</s>",
    b"\x00", b"\\u0000", b"\xff", b"\xed\xa0\x80", b"\\ud800", "\u200b".encode(), "e\u0301".encode(),
    b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"null", b"true", b"NaN", b"-1", b"1e999",
    b"9" * 30, b'"undo"', b'"ids"', b'"role"', b"\xef\xbb\xbf", b"\r", b"\t", b" ", b"",
)  # fmt: skip


def seeds(tokenizer: Tokenizer) -> list[bytes]:
    """Good lines of every form, in the words of the tokenizer's corpus."""
    ids = tokenizer.encode(" so 12", continuation=True).tolist()
    rows: list[object] = [*GOOD, *sums(40, seed=9)]
    rows += [problem(0, number, operations=(1, 3)) for number in range(10)]
    for row in sums(20, seed=4):
        text = row["reference"]
        rows += [
            {**row, "deviations": [{"at": 3, "text": "12 <UNDO>"}, {"at": len(text), "text": " no"}]},
            {"prompt": row["prompt"], "chosen": text, "rejected": text[:8] + " no"},
            {"prompt": row["prompt"], "reference": text, "sampled_with": tokenizer.fingerprint,
             "samples": [{"ids": ids}, {"ids": [], "stopped": False}]},
            {"segments": [{"role": "prompt", "text": row["prompt"]}, {"role": "prefix", "text": text},
                          {"role": "deviation", "text": " no"}]},
            {"segments": [{"role": "prefix", "ids": ids}, {"role": "deviation", "ids": ids[:1]},
                          {"role": "undo", "ids": [tokenizer.undo_id]},
                          {"role": "correction", "ids": ids}]},
        ]  # fmt: skip
    return [
        json.dumps(row, ensure_ascii=number % 2 == 0).encode() for number, row in enumerate(rows)
    ]


def mutated(line: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A line with one to four wounds; never a line break, which would make it two."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(line))
        to = min(len(line), at + rng.randint(0, 12))
        how = rng.randrange(7)
        if how == 0:
            line = line[:at] + bytes([rng.randrange(256)]) + line[at + 1 :]
        elif how == 1:
            line = line[:at] + line[to:]
        elif how == 2:
            line = line[:at] + line[at:to] * rng.randint(2, 5) + line[to:]
        elif how == 3:
            line = line[:at] + rng.choice(SPLINTERS) + line[at:]
        elif how == 4:
            line = line[:at] + rng.choice(SPLINTERS) + line[to:]
        elif how == 5:
            other = rng.choice(others)
            line = line[:at] + other[rng.randint(0, len(other)) :]
        else:
            line = line[: rng.randint(0, len(line))]
    return line.replace(b"\n", b" ")


@pytest.fixture(scope="module")
def hostile(sp_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A file of good, handwritten bad and mutated lines; and how many lines it has."""
    good, rng = seeds(sp_tokenizer), random.Random(20261125)
    by_hand = [text.encode() if isinstance(text, str) else text for text, *_ in BAD]
    assert len(by_hand) >= 40
    lines = [*good, *(line.replace(b"\n", b" ") for line in by_hand)]
    lines += [mutated(rng.choice(good), good, rng) for _ in range(NUM_MUTATED)]
    path = tmp_path_factory.mktemp("hostile") / "hostile.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path, len(lines)


@pytest.mark.parametrize(
    "builder", ["given", "random", "hard", "pairs", "retry", "weak_retry", "on_policy"]
)
def test_every_line_is_stored_or_listed_and_no_text_becomes_an_undo(
    builder: str, hostile: tuple[Path, int], sp_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path, num_lines = hostile
    manifest = prepare_store(
        [path], tmp_path / "s", sp_tokenizer, builder=builder, max_length=300, overlong="drop",
        refused="drop", max_deviations=2, seed=1,
    )  # fmt: skip
    counts = manifest["counts"]
    assert counts["read"] == num_lines
    assert counts["read"] == counts["refused"] + counts["stored"] + counts["dropped"]
    listed = (tmp_path / "s" / "refused.jsonl").read_text().splitlines()
    assert len(listed) == counts["refused"]
    for line in map(json.loads, listed):
        assert line["path"] == str(path) and 1 <= line["line"] <= num_lines
        assert "\n" not in line["message"] and ", expected " in line["message"]
    store = Store(tmp_path / "s")
    audit(store)
    # Every undo is one that a deviation asked for: none came out of a text.
    for _, arrays in store.shards():
        assert np.array_equal(arrays["ids"] == sp_tokenizer.undo_id, arrays["roles"] == Role.UNDO)
    assert manifest["counts"]["tokens"]["undo"] == manifest["counts"]["tokens"]["deviation"]
    if builder in ("given", "random", "hard"):
        assert counts["stored"] > 300, "mutations that leave a line good are stored"
