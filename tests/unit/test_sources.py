"""The same records out of every kind of source, in chunks that depend on the source alone."""

from __future__ import annotations

import copy
import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from pyarrow import parquet
from tiny_stores import prepare_store
from tiny_tokenizers import sums

from nmar_ds.config import load_config
from nmar_ds.data.prepare import prepare_run, source_settings
from nmar_ds.data.store import Store
from nmar_ds.errors import ConfigError, StoreError, TraceError
from nmar_ds.traces import sources
from nmar_ds.traces.arithmetic import problem
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.records import Record
from nmar_ds.traces.sources import SourceSettings, open_source, opened

Write = Callable[..., Path]
ROWS: list[dict[str, Any]] = [
    {**record, "deviations": [{"at": 0, "text": "x"}] * (n % 3)} for n, record in enumerate(sums(30))
]  # fmt: skip


def saved_dataset(rows: list[dict[str, Any]], folder: Path, parts: int = 2) -> Path:
    """As save_to_disk of `datasets` lays a folder out: Arrow streams, named in state.json."""
    folder.mkdir()
    table = pyarrow.Table.from_pylist(rows)
    names = [f"data-{n:05d}-of-{parts:05d}.arrow" for n in range(parts)]
    size = -(-len(rows) // parts)
    for n, name in enumerate(names):
        part = table.slice(n * size, size)
        with pyarrow.OSFile(str(folder / name), "wb") as file:
            with pyarrow.ipc.new_stream(file, table.schema) as stream:
                for batch in part.to_batches(max_chunksize=7):
                    stream.write_batch(batch)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def every_kind(tmp_path: Path, rows: list[dict[str, Any]]) -> dict[str, Path]:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    plain = tmp_path / "a.jsonl"
    plain.write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=11)
    return {
        "lines": plain, "gz": tmp_path / "a.jsonl.gz", "zst": tmp_path / "a.jsonl.zst",
        "parquet": tmp_path / "a.parquet", "datasets": saved_dataset(rows, tmp_path / "saved"),
    }  # fmt: skip


def read(path: Path, tmp_path: Path, **settings: Any) -> list[Record]:
    with opened([SourceSettings(path=path, **settings)], tmp_path / "work") as (source,):
        return list(source.all_records())


def told(record: Record) -> tuple[Any, ...]:
    return (record.line, record.group, record.turns, record.steps, record.rejected)


def test_every_kind_of_source_gives_the_same_records(tmp_path: Path) -> None:
    kinds = every_kind(tmp_path, ROWS)
    expected = [told(record) for record in read(kinds["lines"], tmp_path)]
    assert len(expected) == 30 and [line for line, *_ in expected] == list(range(1, 31))
    for path in kinds.values():
        found = read(path, tmp_path)
        assert [told(record) for record in found] == expected
        assert {record.path for record in found} == {str(path)}
    assert not list((tmp_path / "work").iterdir()), "what was unpacked is gone"


def test_steps_samples_and_messages_in_columns(tmp_path: Path) -> None:
    """Structs whose fields differ from row to row: a column's null is a field not given."""
    rows = [problem(0, number, operations=(1, 4)) for number in range(20)]
    for row in rows:
        row["steps"] = [{k: v for k, v in step.items() if v} for step in row["steps"]]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parted = [told(r) for r in read(tmp_path / "a.parquet", tmp_path)]
    assert parted == [told(r) for r in read(tmp_path / "a.jsonl", tmp_path)]


@pytest.mark.parametrize("kind", ["lines", "gz", "parquet", "datasets"])
def test_chunks_read_alone_and_in_any_order_are_the_whole(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 300)
    monkeypatch.setattr(sources, "CHUNK_ROWS", 4)
    path = every_kind(tmp_path, ROWS)[kind]
    with opened([SourceSettings(path=path)], tmp_path) as (source,):
        chunks = source.chunks()
        whole = [told(record) for record in source.all_records()]
    assert len(chunks) > 6 and len(whole) == 30
    order = chunks.copy()
    random.Random(0).shuffle(order)
    parts = {}
    for chunk in order:  # each by a reader of its own, as in another process
        with opened([SourceSettings(path=path)], tmp_path) as (source,):
            parts[chunk.first_line] = [told(r) for r in source.records(chunk, pytest.fail)]
    assert [record for first in sorted(parts) for record in parts[first]] == whole
    assert all(len(parts[chunk.first_line]) == chunk.num_lines for chunk in chunks)


def test_a_line_much_longer_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 64)
    texts = ["a", "b" * 1000, "c", "d" * 64]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"reference": text}) for text in texts))  # no last break
    records = read(path, tmp_path)
    assert [record.turns[0].reference for record in records] == texts
    assert [record.line for record in records] == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["lines", "zst", "parquet", "datasets"])
def test_the_first_so_many(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 300)
    monkeypatch.setattr(sources, "CHUNK_ROWS", 4)
    path = every_kind(tmp_path, ROWS)[kind]
    for most in (1, 4, 17, 30, 99):
        found = read(path, tmp_path, max_records=most)
        assert [record.line for record in found] == list(range(1, min(most, 30) + 1))


@pytest.mark.parametrize("kind", ["lines", "gz", "parquet", "datasets"])
def test_columns(kind: str, tmp_path: Path) -> None:
    rows = [
        {"question": r["prompt"], "solution": r["reference"], "url": "x", "n": 1.5} for r in ROWS
    ]
    path = every_kind(tmp_path, rows)[kind]
    columns = {"prompt": "question", "reference": "solution"}
    found = read(path, tmp_path, columns=columns)
    assert [r.turns[0].prompt for r in found] == [r["prompt"] for r in ROWS]
    with pytest.raises(TraceError, match=r":1: record: unknown field '(question|n)'"):
        read(path, tmp_path)
    message = r":1: reference: missing, expected column 'solutoin' \(there are: n, question, sol"
    with pytest.raises(TraceError, match=message):
        read(path, tmp_path, columns={"prompt": "question", "reference": "solutoin"})
    with pytest.raises(TraceError, match=r":1: answer: is a fraction, expected a string"):
        read(path, tmp_path, columns={**columns, "answer": "n"})


def test_bad_rows_are_named_by_file_and_row(tmp_path: Path) -> None:
    rows = [dict(row) for row in ROWS]
    rows[12]["reference"] = ""
    for path in every_kind(tmp_path, rows).values():
        with pytest.raises(TraceError, match=rf"{re.escape(str(path))}:13: reference: empty"):
            read(path, tmp_path)


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    kinds = every_kind(tmp_path, ROWS)
    for name in ("gz", "zst", "parquet"):
        path = kinds[name]
        content = path.read_bytes()
        path.write_bytes(content[:-40])
        with pytest.raises(TraceError, match=rf"{re.escape(str(path))}: file: .*expected a "):
            read(path, tmp_path)
        path.write_bytes(b"no such format" + content[14:])
        with pytest.raises(TraceError, match=rf"{re.escape(str(path))}: file: .*expected a "):
            read(path, tmp_path)
    (tmp_path / "saved/state.json").write_text("{}")
    with pytest.raises(TraceError, match=r"state\.json: _data_files: unusable"):
        read(kinds["datasets"], tmp_path)
    (tmp_path / "saved/state.json").unlink()
    with pytest.raises(TraceError, match=r"saved: file: No such file"):
        read(kinds["datasets"], tmp_path)
    with pytest.raises(TraceError, match=r"a\.csv: file: unknown kind '\.csv', expected a \.jsonl"):
        (tmp_path / "a.csv").write_text("a")
        read(tmp_path / "a.csv", tmp_path)


def test_a_state_file_names_only_files_of_its_folder(tmp_path: Path) -> None:
    folder = saved_dataset(ROWS, tmp_path / "saved", parts=1)
    (name,) = [file.name for file in folder.glob("*.arrow")]
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": f"../../{name}"}]}))
    assert len(read(folder, tmp_path)) == 30


def test_fingerprints_are_of_the_content(tmp_path: Path) -> None:
    prints = {}
    for name, path in every_kind(tmp_path, ROWS).items():
        prints[name] = open_source(SourceSettings(path=path)).fingerprint()
        assert open_source(SourceSettings(path=path)).fingerprint() == prints[name]
    assert len(set(prints.values())) == 5
    (file, _) = sorted((tmp_path / "saved").glob("*.arrow"))
    file.write_bytes(file.read_bytes() + b"\0")
    assert open_source(SourceSettings(path=tmp_path / "saved")).fingerprint() != prints["datasets"]


def test_weights_take_records_so_often(
    write_jsonl: Write, sp_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write_jsonl(sums(400))
    counts: dict[float, Counter[int]] = {}
    for weight in (1.0, 2.0, 0.25, 1.5):
        manifest = prepare_store(
            [SourceSettings(path=path, weight=weight)], tmp_path / f"{weight}", sp_tokenizer,
            builder="random", max_length=300, seed=3,
        )  # fmt: skip
        store = Store(tmp_path / f"{weight}")
        counts[weight] = Counter(store.line(index) for index in range(len(store)))
        read_counts = manifest["counts"]
        assert read_counts["read"] == 400
        assert read_counts["passed_over"] == 400 - len(counts[weight])
        assert read_counts["stored"] == counts[weight].total()
    assert set(counts[1.0].values()) == {1} and set(counts[2.0].values()) == {2}
    assert len(counts[2.0]) == 400 and set(counts[0.25].values()) == {1}
    assert 70 < len(counts[0.25]) < 130
    assert set(counts[1.5].values()) == {1, 2} and 550 < counts[1.5].total() < 650
    twice = Store(tmp_path / "2.0")
    pairs = [(twice.ids(n).tolist(), twice.ids(n + 1).tolist()) for n in range(0, 800, 2)]
    assert sum(a != b for a, b in pairs) > 390, "each time with deviations of its own"


def config_of(tmp_path: Path, train: Any, heldout: Any, **data: Any) -> Path:
    """A configuration that trains a tokenizer on its sources."""
    path = tmp_path / "run.yaml"
    values = {
        "name": "a", "output": str(tmp_path / "run"),
        "tokenizer": {"path": str(tmp_path / "t.model"), "train": {"vocab_size": 70}},
        "data": {"train": train, "heldout": heldout, "store": str(tmp_path / "store"),
                 "sequence_length": 900, **data},
        "model": {"config": {"model_type": "llama"}},
        "optimizer": {"learning_rate": 0.1}, "training": {"steps": 1, "global_batch_rows": 1},
    }  # fmt: skip
    path.write_text(json.dumps(values))
    return path


MADE = {"generator": {"name": "dependency_arithmetic", "num": 60, "operations": [1, 3]}}


def test_generated_and_packed_sources_end_to_end(tmp_path: Path) -> None:
    heldout = tmp_path / "held.jsonl.gz"
    rows = [problem(1, number, operations=(1, 3)) for number in range(10)]
    heldout.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    traces = {"builder": "retry", "retry_rate": 0.5}
    config = load_config(config_of(tmp_path, [MADE], [str(heldout)], traces=traces))
    lines = list(prepare_run(config))
    assert any("read 60" in line and "stored 60" in line for line in lines)
    store = Store(tmp_path / "store/train")
    assert store.manifest["sources"][0]["path"] == "dependency_arithmetic(num=60, seed=0)"
    assert store.manifest["counts"]["deviations"] > 20
    assert all("up to date" in line for line in list(prepare_run(config)) if "store" in line)
    harder = copy.deepcopy(MADE)
    harder["generator"]["operations"] = [2, 3]
    changed = load_config(config_of(tmp_path, [harder], [str(heldout)], traces=traces))
    (line,) = [line for line in prepare_run(changed) if line.startswith("train")]
    assert "stored 60" in line


def test_operators_reach_the_generator(tmp_path: Path) -> None:
    made = load_config(config_of(tmp_path, [MADE], [MADE | {"generator": {
        **MADE["generator"], "operators": ["-"], "seed": 1}}]))  # fmt: skip
    for section, expected in ((made.data.train[0], set("+-*")), (made.data.heldout[0], {"-"})):
        assert section.generator is not None
        settings = SourceSettings(generator=section.generator.model_dump())
        with opened([settings], tmp_path) as (source,):
            prompts = " ".join(record.turns[0].prompt for record in source.all_records())
        assert set(prompts) & set("+-*") == expected


def test_refused_records_are_listed_with_file_line_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [json.dumps(row) for row in sums(20)]
    rows[3], rows[7] = "{", json.dumps({"prompt": "x", "reference": "1", "deviations": [
        {"at": 0, "text": "1"}]})  # fmt: skip
    path.write_text("".join(row + "\n" for row in rows))
    good = tmp_path / "good.jsonl"
    good.write_text("".join(json.dumps(row) + "\n" for row in sums(40)))
    asked = ["tokenizer.train.vocab_size=40"]
    with pytest.raises(TraceError, match=r"a\.jsonl:4: record: not JSON"):
        list(prepare_run(load_config(config_of(tmp_path, [str(good)], [str(path)]), asked)))
    both = [str(good), str(path)]  # the tokenizer's training passes them over as well
    list(prepare_run(load_config(config_of(tmp_path, both, [str(path)], refused="drop"), asked)))
    store = Store(tmp_path / "store/heldout")
    assert store.manifest["counts"]["refused"] == 2 and store.manifest["counts"]["stored"] == 18
    listed = [
        json.loads(line) for line in (store.folder / "refused.jsonl").read_text().splitlines()
    ]
    assert [(row["path"], row["line"]) for row in listed] == [(str(path), 4), (str(path), 8)]
    assert "says what the reference says" in listed[1]["message"]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            [{"path": "a.jsonl", "wieght": 2}],
            r"data.train.0.wieght: unknown key; did you mean 'weight'",
        ),
        ([{"weight": 2.0}], "has `path` and `generator`, or neither"),
        ([{"path": "a", **MADE}], "has `path` and `generator`, or neither"),
        ([{"path": "a", "weight": 0.0}], r"data.train.0.weight: Input should be greater than 0"),
        ([{"path": ""}], r"data.train.0.path: cannot be a path"),
        (
            [{"generator": {"name": "dependency_aritmetic", "num": 1}}],
            r"generator.name: Input should",
        ),
        (
            [{"generator": {"name": "reasoning_gym", "num": 1}}],
            "`family` goes with `reasoning_gym`",
        ),
        (
            [{"generator": {"nme": "reasoning_gym", "num": 1}}],
            r"nme: unknown key; did you mean 'name'",
        ),
        (
            [{"generator": {**MADE["generator"], "operators": []}}],
            "operators: List should have at least 1 item",
        ),
        (
            [{"generator": {**MADE["generator"], "operators": ["+", "/"]}}],
            r"operators.1: Input should be '\+', '-' or '\*'",
        ),
        ([], "is empty, expected at least one source"),
        ([MADE], "both generate dependency_arithmetic with seed 0"),
    ],
)
def test_entries_that_cannot_be_meant(train: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config_of(tmp_path, train, [MADE]))


def test_an_entry_is_named_with_its_line(tmp_path: Path) -> None:
    path = config_of(tmp_path, ["a"], ["b"])
    text = path.read_text()
    import yaml

    lines = yaml.safe_dump(json.loads(text) | {"data": {
        **json.loads(text)["data"], "train": ["a", {"path": "b", "colums": {}}]}})  # fmt: skip
    path.write_text(lines)
    where = next(n for n, line in enumerate(lines.splitlines(), 1) if "colums" in line)
    with pytest.raises(
        ConfigError, match=rf"run\.yaml:{where}: data\.train\.1\.colums: unknown key"
    ):
        load_config(path)


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(config_of(tmp_path, ["nowhere"], ["b"]))
    with pytest.raises(StoreError, match=r"data\.train: nowhere: no such file or folder"):
        list(prepare_run(config))
    kinds = every_kind(tmp_path, ROWS)
    for module, name in (("pyarrow", "parquet"), ("zstandard", "zst")):
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, module, None)
            with pytest.raises(ConfigError, match=rf"needs {module}; pip install .nmar_ds\[data\]"):
                read(kinds[name], tmp_path)
    gym = {"generator": {"name": "reasoning_gym", "num": 3, "family": "chain_sum"}}
    config = load_config(config_of(tmp_path, [gym], [MADE]))
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(
        ConfigError, match=r"chain_sum: needs reasoning-gym; pip install 'nmar_ds\["
    ):
        list(prepare_run(config))


def test_families_of_reasoning_gym(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library compiles C when it is installed; what is asked of it is a list of entries."""
    import types

    def create_dataset(name: str, size: int, seed: int, **settings: Any) -> list[dict[str, str]]:
        if name != "chain_sum":
            raise ValueError(f"Dataset {name} not registered")
        assert settings == {"max_terms": 3}
        return [{"question": f"{seed} + {n} =", "answer": str(seed + n)} for n in range(size)]

    fake = types.SimpleNamespace(create_dataset=create_dataset)
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", fake)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.1")
    gym = {"generator": {"name": "reasoning_gym", "num": 3, "seed": 4, "family": "chain_sum",
                         "settings": {"max_terms": 3}}}  # fmt: skip
    config = load_config(config_of(tmp_path, [gym], [MADE]))
    (settings,) = source_settings(config, "train")
    records = list(open_source(settings).all_records())
    assert [r.turns[0].prompt for r in records] == ["4 + 0 =\n", "4 + 1 =\n", "4 + 2 =\n"]
    assert [r.answer for r in records] == ["4", "5", "6"]
    gym["generator"]["family"] = "chain_sums"
    (settings,) = source_settings(load_config(config_of(tmp_path, [gym], [MADE])), "train")
    with pytest.raises(ConfigError, match="chain_sums: reasoning-gym refuses it: Dataset"):
        open_source(settings)
