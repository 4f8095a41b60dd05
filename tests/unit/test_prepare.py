"""From records to a store in one call; all counts add up."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_stores import prepare_store
from tiny_tokenizers import sums

from nmar_ds.data.store import Store
from nmar_ds.errors import ConfigError, TraceError
from nmar_ds.traces import reduction
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.schema import Role

Write = Callable[..., Path]


def assert_counts_add_up(manifest: dict[str, object], per_record: int = 1) -> None:
    counts = manifest["counts"]
    assert isinstance(counts, dict)
    assert (counts["read"] - counts["refused"]) * per_record == counts["built"]
    assert counts["built"] == counts["stored"] + counts["dropped"]
    assert 0 <= counts["clean"] <= counts["stored"]


def rows(store: Store, tokenizer: Tokenizer) -> list[list[tuple[str, object]]]:
    return [
        [
            (
                s.role.label,
                len(s.ids) if s.role == Role.UNDO else tokenizer.decode(s.ids, continuation=True),
            )
            for s in store.trace(index).segments()
        ]
        for index in range(store.num_traces)
    ]


def test_given(write_jsonl: Write, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write_jsonl([
        {"prompt": "1+2?", "reference": " 3.", "deviations": [{"at": 1, "text": "4"}]},
        {"prompt": "3?", "reference": "3"},
        {"segments": [{"role": "prefix", "ids": [5]}, {"role": "deviation", "ids": [6, 7]},
                      {"role": "undo", "ids": [small_tokenizer.undo_id] * 2},
                      {"role": "correction", "ids": [8]}]},
    ])  # fmt: skip
    manifest = prepare_store(
        [source], tmp_path / "s", small_tokenizer, builder="given", max_length=99
    )
    store = Store(tmp_path / "s")
    first, second, third = rows(store, small_tokenizer)
    assert [role for role, _ in first] == ["prompt", "prefix", "deviation", "undo", "correction"]
    assert first[0][1] == "1+2?" and first[2] == ("deviation", "4") and first[3][1] == 1
    assert [text for role, text in second] == ["3?", "3"]
    assert [role for role, _ in third] == ["prefix", "deviation", "undo", "correction"]
    assert [store.line(n) for n in range(3)] == [1, 2, 3]
    assert manifest["counts"]["deviations"] == 2 and manifest["counts"]["clean"] == 1
    assert_counts_add_up(manifest)


@pytest.mark.parametrize("builder", ["random", "hard"])
def test_made(builder: str, write_jsonl: Write, sp_tokenizer: Tokenizer, tmp_path: Path) -> None:
    first, second = sums(120, seed=1), sums(80, seed=2)
    sources = [write_jsonl(first, "a.jsonl"), write_jsonl(second, "b.jsonl")]
    asked = dict(builder=builder, max_length=200, traces_per_record=3, clean_share=0.25,
                 max_deviations=2, max_deviation_length=4, seed=7)  # fmt: skip
    ticks: list[tuple[int, int]] = []
    manifest = prepare_store(
        sources, tmp_path / "s", sp_tokenizer, progress=lambda *tick: ticks.append(tick), **asked
    )
    assert_counts_add_up(manifest, 3)
    counts = manifest["counts"]
    assert counts["stored"] == 600 and ticks[-1] == (200, 200) and counts["read"] == 200
    assert 0.18 < counts["clean"] / 600 < 0.34
    store = Store(tmp_path / "s")
    order = [(store.source(n), store.line(n)) for n in range(600)]
    assert order == sorted(order) and Counter(order) == {key: 3 for key in set(order)}
    shapes = set()
    for index, (source, line) in enumerate(order):
        trace = store.trace(index)
        reduced = reduction.reduce(trace.ids, store.machine, reduction.bases_of(trace.roles))
        record = (first, second)[source][line - 1]
        assert sp_tokenizer.decode(reduced) == record["prompt"] + record["reference"]
        shapes.add(trace.ids.tobytes())
    assert len(shapes) > 450  # copies differ
    again = prepare_store(sources, tmp_path / "again", sp_tokenizer, **asked)
    assert again == manifest
    for file in (tmp_path / "s").rglob("*.*"):
        assert (
            tmp_path / "again" / file.relative_to(tmp_path / "s")
        ).read_bytes() == file.read_bytes()
    other = prepare_store(sources, tmp_path / "other", sp_tokenizer, **{**asked, "seed": 8})
    assert other["files"]["shard-00000.ids.bin"] != manifest["files"]["shard-00000.ids.bin"]


@pytest.mark.parametrize("builder", ["random", "hard"])
def test_marked_records_need_the_given_builder(
    builder: str, write_jsonl: Write, sp_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for record, field in (
        ({"reference": "12", "deviations": [{"at": 0, "text": "3"}]}, "deviations"),
        ({"segments": [{"role": "prefix", "ids": [260]}]}, "segments"),
        ({"segments": [{"role": "prompt", "text": "1"}, {"role": "prefix", "text": "2"},
                       {"role": "prompt", "text": "1"}, {"role": "prefix", "text": "2"}]}, "segments"),
    ):  # fmt: skip
        source = write_jsonl([record])
        with pytest.raises(TraceError, match=f"jsonl:1: {field}: the record says itself"):
            prepare_store([source], tmp_path / "s", sp_tokenizer, builder=builder, max_length=99)
    assert not (tmp_path / "s").exists()


def test_overlong(write_jsonl: Write, sp_tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write_jsonl([{"reference": "1" * n} for n in (3, 9, 8, 20)])
    asked = dict(builder="given", max_length=10)  # BOS and the stop token count
    with pytest.raises(
        TraceError, match=r"jsonl:2: trace: trace 0 has 11 tokens, expected at most 10"
    ):
        prepare_store([source], tmp_path / "s", sp_tokenizer, **asked)
    assert not (tmp_path / "s").exists()
    manifest = prepare_store([source], tmp_path / "s", sp_tokenizer, overlong="drop", **asked)
    assert (manifest["counts"]["stored"], manifest["counts"]["dropped"]) == (2, 2)
    assert_counts_add_up(manifest)
    listed = [
        json.loads(line) for line in (tmp_path / "s" / "dropped.jsonl").read_text().splitlines()
    ]
    assert [(row["line"], row["length"]) for row in listed] == [(2, 11), (4, 22)]
    assert Store(tmp_path / "s").lengths.tolist() == [5, 10]


@pytest.mark.parametrize("builder", ["given", "hard"])
def test_refused_records(
    builder: str, write_jsonl: Write, sp_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    good = sums(5)
    source = write_jsonl([good[0], "{", good[1], {"reference": "a\u2581b"}, good[2], {"x": 1}])
    asked = dict(builder=builder, max_length=200)
    with pytest.raises(TraceError, match="jsonl:2: record: not JSON"):
        prepare_store([source], tmp_path / "s", sp_tokenizer, **asked)
    manifest = prepare_store([source], tmp_path / "s", sp_tokenizer, refused="drop", **asked)
    assert (manifest["counts"]["read"], manifest["counts"]["refused"]) == (6, 3)
    assert_counts_add_up(manifest)
    listed = [
        json.loads(line) for line in (tmp_path / "s" / "refused.jsonl").read_text().splitlines()
    ]
    assert [row["line"] for row in listed] == [2, 4, 6]
    assert all(row["message"].startswith(f"{source}:{row['line']}: ") for row in listed)


def test_undo_count_of_id_records_is_checked(
    write_jsonl: Write, sp_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for count in (1, 3):
        source = write_jsonl([{"segments": [
            {"role": "deviation", "ids": [270, 271]},
            {"role": "undo", "ids": [sp_tokenizer.undo_id] * count},
            {"role": "correction", "ids": [272]},
        ]}])  # fmt: skip
        with pytest.raises(
            TraceError, match=f"{count} undos after a deviation of 2 tokens, expected 2"
        ):
            prepare_store([source], tmp_path / "s", sp_tokenizer, builder="given", max_length=99)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"semantics": "spam"}, "undo.semantics: 'spam', expected one of token, span, reset"),
        ({"semantics": "span"}, "undo.boundaries: 0 boundary ids under semantics 'span'"),
        ({"boundaries": ["."]}, "boundary ids under semantics 'token', expected"),
        ({"semantics": "span", "boundaries": [".", "1\n1"]}, "undo.boundaries: '1\\n1': no token"),
        ({"context": "pruned"}, "context: 'pruned', expected linear"),
        ({"builder": "on_policie"}, "builder: 'on_policie', expected given or random"),
        ({"builder": "retry", "retry_rate": 0.0}, "retry_rate: 0.0, expected above 0"),
        ({"builder": "retry", "delay": (3, 2)}, "delay: [3, 2], expected [from, to]"),
        ({"builder": "hard", "delay": (0, 2)}, "delay: with builder 'hard', expected pairs, retry"),
        ({"builder": "pairs", "verify": True}, "verify: with builder 'pairs', expected on_policy"),
        ({"overlong": "cut"}, "overlong: 'cut', expected error or drop"),
        ({"clean_share": 1.5}, "clean_share: 1.5, expected 0 to 1"),
        ({"clean_share": float("nan")}, "clean_share: nan"),
        ({"max_length": 0}, "max_length: 0, expected at least 1"),
        ({"max_deviations": 0}, "max_deviations: 0"),
        ({"max_deviation_length": 0}, "max_deviation_length: 0"),
        ({"traces_per_record": 2}, "would store equal traces"),
        ({"undo_token": "<BACK>"}, "undo.token: '<BACK>', expected '<UNDO>'"),
    ],
)
def test_settings_are_checked(
    change: dict[str, object],
    error: str,
    write_jsonl: Write,
    sp_tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    source = write_jsonl(sums(1))
    asked: dict[str, object] = {"builder": "given", "max_length": 99, **change}
    with pytest.raises(ConfigError) as caught:
        prepare_store([source], tmp_path / "s", sp_tokenizer, **asked)  # type: ignore[arg-type]
    assert error in str(caught.value)


def test_missing_sources(sp_tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="file: No such file"):
        prepare_store(
            [tmp_path / "no.jsonl"], tmp_path / "s", sp_tokenizer, builder="given", max_length=9
        )


def test_a_record_without_group_is_in_the_empty_one(
    write_jsonl: Write, sp_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    records = [{k: v for k, v in record.items() if k != "group"} for record in sums(30)]
    records.append({"prompt": "1?", "reference": " the answer is 12", "group": "alone"})
    manifest = prepare_store(
        [write_jsonl(records)], tmp_path / "s", sp_tokenizer, builder="hard", max_length=200
    )
    store = Store(tmp_path / "s")
    has = [bool(len(store.onsets(n))) for n in range(31)]
    assert all(has[:30]) and not has[30]  # nobody else in that group
    assert manifest["counts"]["without_donor"] == 1


@pytest.mark.parametrize("name", ["torch", "transformers", "mpi4py"])
def test_nothing_here_imports_torch(name: str) -> None:
    import subprocess
    import sys

    code = f"import sys, nmar_ds.traces.prepare, nmar_ds.data.prepare, nmar_ds.traces.sentencepiece_vocabulary, nmar_ds.traces.json_vocabulary, nmar_ds.traces.conversion; sys.exit({name!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
