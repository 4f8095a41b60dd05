"""Strict reading: every bad line gives exactly one TraceError with file, line and field."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from nmar_ds.errors import TraceError
from nmar_ds.traces.records import Record, parse_line, read_records
from nmar_ds.traces.schema import Role

GOOD: list[dict[str, object]] = [
    {"prompt": "1+1=", "reference": "2"},
    {"reference": "2"},
    {"prompt": "", "reference": "2", "id": "a", "group": "g", "answer": "2"},
    {"prompt": "p", "reference": "abc", "deviations": [{"at": 0, "text": "x"}, {"at": 3, "text": "y"}]},
    {"prompt": "p", "reference": "abc", "sampled_with": "f",
     "samples": [{"ids": [1, 2]}, {"ids": [], "stopped": False}]},
    {"prompt": "p", "steps": [{"text": "a"}, {"text": "b", "depends_on": [0]}], "answer": "b"},
    {"prompt": "p", "chosen": "a", "rejected": "b"},
    {"segments": [{"role": "prompt", "text": "q"}, {"role": "prefix", "text": "a"},
                  {"role": "deviation", "text": "x"}, {"role": "deviation", "text": "z"},
                  {"role": "correction", "text": "b"}, {"role": "prompt", "text": "r"},
                  {"role": "deviation", "text": "y"}, {"role": "correction", "text": "c"}]},
    {"segments": [{"role": "prompt", "ids": [1, 2]}, {"role": "prefix", "ids": [3]},
                  {"role": "deviation", "ids": [4, 5]}, {"role": "undo", "ids": [9, 9]},
                  {"role": "correction", "ids": [6]}]},
]  # fmt: skip


def segments(*pieces: tuple[object, object], key: str = "text") -> str:
    return json.dumps({"segments": [{"role": role, key: value} for role, value in pieces]})


BAD: list[tuple[str | bytes, str, str]] = [
    # line, field, part of the message
    ('{"messages": []}', "messages", "no answer at the end"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "messages", "no answer at the end"),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "messages[0].role", "is 'assistant'"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
     "messages[1].role", "is 'user'"),
    ('{"messages": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]}',
     "messages[1].role", "is 'assistant'"),
    ('{"messages": [{"role": "tool", "content": "a"}]}', "messages[0].role", "is 'tool'"),
    ('{"messages": [{"content": "a"}]}', "messages[0].role", "is ''"),
    ('{"messages": [{"role": "user"}]}', "messages[0].content", "missing"),
    ('{"messages": [{"role": "user", "content": ""}]}', "messages[0].content", "empty"),
    ('{"messages": [{"role": "user", "content": null}]}', "messages[0].content", "is null"),
    ('{"messages": [{"role": "user", "content": "a", "name": "x"}]}', "messages[0]", "unknown field"),
    ('{"messages": [{"role": "user", "content": "a"}], "prompt": "b"}', "record", "unknown field"),
    ('{"prompt": "p", "chosen": "a"}', "rejected", "missing"),
    ('{"prompt": "p", "rejected": "a"}', "chosen", "missing"),
    ('{"prompt": "p", "chosen": "a", "rejected": "a"}', "rejected", "says what `chosen` says"),
    ('{"prompt": "p", "chosen": "a", "rejected": ""}', "rejected", "empty"),
    ('{"prompt": "p", "chosen": "a", "rejected": "b", "reference": "a"}', "record", "unknown field"),
    ('{"prompt": "p", "steps": []}', "steps", "empty"),
    ('{"prompt": "p", "steps": ["a"]}', "steps[0]", "is a string"),
    ('{"prompt": "p", "steps": [{"depends_on": []}]}', "steps[0].text", "missing"),
    ('{"prompt": "p", "steps": [{"text": ""}]}', "steps[0].text", "empty"),
    ('{"prompt": "p", "steps": [{"text": "a", "depends_on": [0]}]}', "steps[0].depends_on[0]",
     "0 is no earlier step"),
    ('{"prompt": "p", "steps": [{"text": "a"}, {"text": "b", "depends_on": [1]}]}',
     "steps[1].depends_on[0]", "1 is no earlier step"),
    ('{"prompt": "p", "steps": [{"text": "a"}, {"text": "b", "depends_on": [2]}]}',
     "steps[1].depends_on[0]", "2 is out of range"),
    ('{"prompt": "p", "steps": [{"text": "a", "needs": [0]}]}', "steps[0]", "unknown field"),
    ('{"reference": "a", "samples": [{"ids": [1]}]}', "sampled_with", "missing"),
    ('{"reference": "a", "sampled_with": "f"}', "samples", "missing"),
    ('{"reference": "a", "sampled_with": "f", "samples": []}', "samples", "empty"),
    ('{"reference": "a", "sampled_with": "f", "samples": [[1]]}', "samples[0]", "is a list"),
    ('{"reference": "a", "sampled_with": "f", "samples": [{}]}', "samples[0].ids", "missing"),
    ('{"reference": "a", "sampled_with": "f", "samples": [{"ids": [-1]}]}', "samples[0].ids[0]",
     "-1 is out of range"),
    ('{"reference": "a", "sampled_with": "f", "samples": [{"ids": [], "stopped": 1}]}',
     "samples[0].stopped", "is an integer"),
    ('{"reference": "ab", "deviations": [{"at": 1, "text": "x"}], "sampled_with": "f", '
     '"samples": [{"ids": [1]}]}', "samples", "beside `deviations`"),
    ("", "record", "blank line"),
    ("   ", "record", "blank line"),
    ("[]", "record", "is a list"),
    ("3", "record", "is an integer"),
    ("null", "record", "is null"),
    ('"text"', "record", "is a string"),
    ("{", "record", "not JSON at column"),
    ("{'prompt': 'x'}", "record", "not JSON"),
    ('{"prompt": "a", "reference": "b"} {}', "record", "not JSON"),
    ('{"prompt": "a", "reference": "b",}', "record", "not JSON"),
    ('{"reference": NaN}', "record", "NaN is not JSON"),
    ('{"reference": -Infinity}', "record", "-Infinity is not JSON"),
    ('{"reference": 1e999}', "reference", "is a fraction"),
    ('{"reference": %s}' % ("9" * 5000), "record", "too long"),
    ("[" * 100_000, "record", "too deep"),
    ('{"a":' * 100_000, "record", "too deep"),
    (b'{"reference": "\xff"}', "record", "byte 16 is not UTF-8"),
    (b'\xef\xbb\xbf{"reference": "a"}', "record", "byte order mark"),
    (b'{"reference": "\xed\xa0\x80"}', "record", "not UTF-8"),
    (b'{"reference": "\xc0\x80"}', "record", "not UTF-8"),
    ('{"reference": "\\ud800"}', "reference", "lone surrogate at character 0"),
    ('{"prompt": "ab\\udfff", "reference": "a"}', "prompt", "lone surrogate at character 2"),
    ('{"reference": "a", "\\ud800": 1}', "record", "unknown field"),
    ('{"reference": "a", "reference": "b"}', "'reference'", "given twice"),
    ('{"reference": "a", "deviations": [{"at": 0, "at": 0, "text": "x"}]}', "'at'", "given twice"),
    ("{}", "reference", "missing"),
    ('{"prompt": "a"}', "reference", "missing"),
    ('{"prompt": "a", "reference": ""}', "reference", "empty"),
    ('{"prompt": "a", "reference": null}', "reference", "is null"),
    ('{"prompt": 3, "reference": "a"}', "prompt", "is an integer"),
    ('{"prompt": ["a"], "reference": "a"}', "prompt", "is a list"),
    ('{"promt": "a", "reference": "b"}', "record", "did you mean 'prompt'"),
    ('{"reference": "b", "metadata": {}}', "record", "unknown field 'metadata'"),
    ('{"reference": "b", "id": 7}', "id", "is an integer"),
    ('{"reference": "b", "group": null}', "group", "is null"),
    ('{"reference": "b", "answer": 3.5}', "answer", "is a fraction"),
    ('{"reference": "b", "segments": []}', "record", "unknown field 'reference'"),
    ('{"reference": "b", "deviations": {}}', "deviations", "is an object"),
    ('{"reference": "b", "deviations": null}', "deviations", "is null"),
    ('{"reference": "b", "deviations": [3]}', "deviations[0]", "is an integer"),
    ('{"reference": "b", "deviations": [{"at": 0}]}', "deviations[0].text", "missing"),
    ('{"reference": "b", "deviations": [{"text": "x"}]}', "deviations[0].at", "missing"),
    ('{"reference": "b", "deviations": [{"at": 0, "text": ""}]}', "deviations[0].text", "empty"),
    ('{"reference": "b", "deviations": [{"at": -1, "text": "x"}]}', "deviations[0].at", "out of range"),
    ('{"reference": "b", "deviations": [{"at": 2, "text": "x"}]}', "deviations[0].at", "out of range"),
    ('{"reference": "b", "deviations": [{"at": true, "text": "x"}]}', "deviations[0].at", "a boolean"),
    ('{"reference": "b", "deviations": [{"at": 0.0, "text": "x"}]}', "deviations[0].at", "a fraction"),
    ('{"reference": "b", "deviations": [{"at": "0", "text": "x"}]}', "deviations[0].at", "a string"),
    ('{"reference": "bc", "deviations": [{"at": 1, "text": "x"}, {"at": 0, "text": "y"}]}',
     "deviations[1].at", "0 comes after 1"),
    ('{"reference": "b", "deviations": [{"at": 0, "txt": "x"}]}', "deviations[0]", "mean 'text'"),
    ('{"segments": []}', "segments", "empty"),
    ('{"segments": {}}', "segments", "is an object"),
    ('{"segments": ["a"]}', "segments[0]", "is a string"),
    ('{"segments": [{"role": "prefix"}]}', "segments[0].text", "missing"),
    ('{"segments": [{"text": "a"}]}', "segments[0].role", "missing"),
    ('{"segments": [{"role": "prefix", "text": "a", "ids": [1]}]}', "segments[0]", "mixes"),
    ('{"segments": [{"role": "prefix", "text": "a"}, {"role": "prefix", "ids": [1]}]}',
     "segments[1]", "mixes"),
    (segments(("prefx", "a")), "segments[0].role", "did you mean 'prefix'"),
    (segments((3, "a")), "segments[0].role", "is an integer"),
    (segments((["prefix"], "a")), "segments[0].role", "is a list"),
    (segments(("prefix", "")), "segments[0].text", "empty"),
    (segments(("prompt", "a")), "segments[0].role", "prompt at the end"),
    (segments(("correction", "a")), "segments[0].role", "correction at the start"),
    (segments(("prompt", "a"), ("prompt", "b")), "segments[1].role", "prompt after prompt"),
    (segments(("prefix", "a"), ("prefix", "b")), "segments[1].role", "prefix after prefix"),
    (segments(("prefix", "a"), ("correction", "b")), "segments[1].role", "correction after prefix"),
    (segments(("deviation", "a")), "segments[0]", "reduces to nothing"),
    (segments(("prompt", "p"), ("deviation", "a"), ("prompt", "q"), ("prefix", "b")),
     "segments[2]", "reduces to nothing"),
    (segments(("deviation", "a"), ("undo", "<UNDO>"), ("correction", "b")),
     "segments[1].role", "undos are derived"),
    (segments(("prefix", []), key="ids"), "segments[0].ids", "empty"),
    (segments(("prefix", "abc"), key="ids"), "segments[0].ids", "is a string"),
    (segments(("prefix", [1, -1]), key="ids"), "segments[0].ids[1]", "out of range"),
    (segments(("prefix", [2**31]), key="ids"), "segments[0].ids[0]", "out of range"),
    (segments(("prefix", [1, True]), key="ids"), "segments[0].ids[1]", "is a boolean"),
    (segments(("prefix", [1.0]), key="ids"), "segments[0].ids[0]", "is a fraction"),
    (segments(("prefix", [[1]]), key="ids"), "segments[0].ids[0]", "is a list"),
    (segments(("deviation", [1]), ("correction", [2]), key="ids"), "segments[1].role", "after deviation"),
    (segments(("prefix", [1]), ("undo", [9]), key="ids"), "segments[1].role", "undo after prefix"),
    (segments(("prefix", [1]), ("deviation", [2]), key="ids"), "segments[1].role", "at the end"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_line_gives_one_error_with_its_place(number: int, tmp_path: Path) -> None:
    line, field, part = BAD[number]
    raw = line if isinstance(line, bytes) else line.encode("utf-8")
    good = json.dumps(GOOD[0]).encode()
    path = tmp_path / "bad.jsonl"
    path.write_bytes(good + b"\n" + raw + b"\n" + good + b"\n")
    errors: list[TraceError] = []
    records = list(read_records(path, on_error=errors.append))
    assert [record.line for record in records] == [1, 3]
    (error,) = errors
    assert (error.path, error.line, error.field) == (str(path), 2, field)
    assert part in error.problem
    message = str(error)
    assert message.startswith(f"{path}:2: {field}: ") and ", expected " in message
    assert message.isprintable() and len(message) < 400
    with pytest.raises(TraceError, match=re.escape(f"{path}:2: {field}: ")):
        list(read_records(path))


def test_there_are_enough_bad_lines() -> None:
    assert len(BAD) >= 40 and len({line for line, *_ in BAD}) == len(BAD)


def test_good_lines() -> None:
    records = [parse_line(json.dumps(r).encode(), path="f", line=n) for n, r in enumerate(GOOD)]
    assert [len(record.turns) for record in records] == [1, 1, 1, 1, 1, 1, 1, 2, 0]
    assert [record.marked for record in records] == [
        False, False, False, True, False, False, False, True, True
    ]  # fmt: skip
    assert (records[2].id, records[2].group, records[2].answer) == ("a", "g", "2")
    assert (records[0].group, records[0].answer) == ("", None)
    assert records[3].turns[0].deviations == ((0, "x"), (3, "y"))
    assert [s.ids.tolist() for s in records[4].samples] == [[1, 2], []]
    assert [s.stopped for s in records[4].samples] == [True, False]
    assert records[5].turns[0].reference == "ab" and records[5].steps[1].depends_on == (0,)
    assert (records[6].turns[0].reference, records[6].rejected) == ("a", "b")
    first, second = records[7].turns
    assert (first.prompt, first.reference, first.deviations) == ("q", "ab", ((1, "x"), (1, "z")))
    assert (second.prompt, second.reference, second.deviations) == ("r", "c", ((0, "y"),))
    assert [segment.role for segment in records[8].segments] == list(Role)
    assert records[8].segments[2].ids.tolist() == [4, 5]


def test_last_line_may_lack_its_end_and_crlf_is_white_space(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"reference": "a"}\r\n{"reference": "b"}')
    assert [record.turns[0].reference for record in read_records(path)] == ["a", "b"]
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert list(read_records(tmp_path / "empty.jsonl")) == []


def test_long_lines_are_skipped_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    long = json.dumps({"reference": "x" * 1000})
    path.write_text('{"reference": "a"}\n' + long + '\n{"reference": "b"}\n' + long)
    errors: list[TraceError] = []
    records = list(read_records(path, max_bytes=100, on_error=errors.append))
    assert [(record.line, record.turns[0].reference) for record in records] == [(1, "a"), (3, "b")]
    assert [error.line for error in errors] == [2, 4]
    exact = len(long)
    assert len(list(read_records(path, max_bytes=exact))) == 4


@pytest.mark.parametrize("name", ["missing.jsonl", "folder.jsonl", "data.csv"])
def test_files_that_are_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(TraceError, match=r"file: .*, expected") as caught:
        list(read_records(tmp_path / name))
    assert caught.value.line is None


def test_mutated_lines_never_raise_anything_else() -> None:
    """A few thousand damaged lines: each is a record or exactly one TraceError."""
    rng = random.Random(7)
    lines = [json.dumps(record).encode() for record in GOOD]
    lines += [
        line if isinstance(line, bytes) else line.encode() for line, *_ in BAD if len(line) < 1000
    ]
    tokens = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"true", b"1e9", b"\\u0000",
              b"\\ud83d", b"\xff", b'"role"', b'"ids"', b'"segments"', b'"text"', b"-0", b"\n"]  # fmt: skip
    accepted = refused = 0
    total = 6000
    for number in range(total):
        raw = bytearray(rng.choice(lines[: len(GOOD)] if rng.random() < 0.6 else lines))
        for _ in range(rng.randint(0, 3)):
            place = rng.randint(0, len(raw))
            kind = rng.random()
            if kind < 0.3:
                raw[place:place] = rng.choice(tokens)
            elif kind < 0.6:
                del raw[place : place + rng.randint(1, 9)]
            elif kind < 0.8 and place < len(raw):
                raw[place] = rng.randrange(256)
            else:
                other = rng.choice(lines)
                raw[place : place + rng.randint(0, 20)] = other[: rng.randint(0, len(other))]
        try:
            record = parse_line(bytes(raw), path="fuzz.jsonl", line=number + 1)
        except TraceError as error:
            refused += 1
            assert str(error).startswith(f"fuzz.jsonl:{number + 1}: ") and str(error).isprintable()
        else:
            accepted += 1
            assert isinstance(record, Record) and bool(record.turns) != bool(record.segments)
    assert accepted + refused == total
    assert accepted > 300 and refused > 1000


def test_errors_survive_pickling(write_jsonl: Callable[..., Path]) -> None:
    import pickle

    with pytest.raises(TraceError) as caught:
        list(read_records(write_jsonl(["{}"])))
    copied = pickle.loads(pickle.dumps(caught.value))
    assert str(copied) == str(caught.value)
