"""A store has the same bytes whoever prepares it: every builder, 1 to 3 processes, tiny units."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_stores import digests
from tiny_tokenizers import sums

from nmar_ds.data.crew import Crew
from nmar_ds.data.store import Store
from nmar_ds.data.work import Work
from nmar_ds.errors import NmarError, TraceError
from nmar_ds.traces import prepare, sources
from nmar_ds.traces.arithmetic import problem
from nmar_ds.traces.building import BUILDERS, BuilderSettings
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.parity import checked
from nmar_ds.traces.prepare import Preparation, preparation
from nmar_ds.traces.sources import SourceSettings
from nmar_ds.traces.units import MAX_UNITS, units_of

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def tiny_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 700)
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 1500)


class Other(Crew):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def take_part(asked: Preparation, attempt: str, rank: int, size: int) -> None:
    try:
        asked.run(Work(asked.work_folder, attempt), Other(rank, size))
    except NmarError as error:
        os._exit(3 if error.shared else 4)
    os._exit(0)


def run(asked: Preparation, size: int) -> dict[str, Any]:
    """By `size` processes: this one and forks of it."""
    work = asked.begin()
    fork = multiprocessing.get_context("fork")
    others = [fork.Process(target=take_part, args=(asked, work.attempt, rank, size))
              for rank in range(1, size)]  # fmt: skip
    for other in others:
        other.start()
    try:
        manifest = asked.run(work, Other(0, size))
        expected = 0
    except NmarError:
        expected = 3
        raise
    finally:
        for other in others:
            other.join(30)
            assert other.exitcode == expected
    return manifest


def records(builder: str, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    if builder in ("retry", "weak_retry"):
        return [problem(0, number, operations=(2, 4)) for number in range(40)]
    rows: list[dict[str, Any]] = sums(60, seed=3)
    if builder == "pairs":
        return [{"prompt": row["prompt"], "chosen": row["reference"],
                 "rejected": row["reference"].replace("the", "no")[:-4]} for row in rows]  # fmt: skip
    if builder == "on_policy":
        for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
            ids = tokenizer.encode(other["reference"], continuation=True).tolist()
            row |= {"samples": [{"ids": ids}], "sampled_with": tokenizer.fingerprint}
    return rows


@pytest.mark.parametrize("builder", BUILDERS)
def test_every_builder(
    builder: Any, write_jsonl: Write, sp_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = records(builder, sp_tokenizer)
    once = builder == "given"
    files = [write_jsonl(rows[:35], "a.jsonl"), write_jsonl([*rows[35:], "{"], "b.jsonl")]
    found = []
    for size in (1, 2, 3):
        asked = preparation(
            [SourceSettings(path=path, weight=1.5 - once / 2, asked=str(path)) for path in files],
            tmp_path / f"{size}", sp_tokenizer, max_length=400 if "steps" in rows[0] else 60,
            overlong="drop", refused="drop",
            builder=BuilderSettings(name=builder, traces_per_record=2 - once, clean_share=0.2),
        )  # fmt: skip
        manifest = run(asked, size)
        counts = manifest["counts"]
        assert counts["read"] == len(rows) + 1 and counts["refused"] == 1
        assert counts["built"] == counts["stored"] + counts["dropped"] > 0
        assert len(manifest["shards"]) > 1 and not asked.work_folder.exists()
        Store(tmp_path / f"{size}").verify()
        found.append(digests(tmp_path / f"{size}"))
    assert found[0] == found[1] == found[2]
    refused = [json.loads(line) for line in (tmp_path / "2/refused.jsonl").read_text().splitlines()]
    assert [(row["path"], row["line"]) for row in refused] == [(str(files[1]), len(rows) - 34)]
    assert refused[0]["message"].startswith(f"{files[1]}:{len(rows) - 34}: record: not JSON")


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", ["refused", "overlong"])
def test_the_first_bad_record_is_the_one_reported(
    kind: str, size: int, write_jsonl: Write, sp_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows: list[Any] = sums(60, seed=3)
    for line in (17, 41, 42, 59):  # the later ones in units that may well be done first
        rows[line - 1] = "{" if kind == "refused" else {"reference": "1" * 150}
    asked = preparation(
        [SourceSettings(path=write_jsonl(rows))], tmp_path / "s", sp_tokenizer, max_length=120,
        builder=BuilderSettings(name="given"),
    )  # fmt: skip
    said = "record: not JSON" if kind == "refused" else "trace: trace 0 has 152 tokens"
    for _ in range(2):  # and again, by the attempt that finds results of the first
        with pytest.raises(TraceError, match=f"jsonl:17: {said}"):
            run(asked, size)
    assert not (tmp_path / "s").exists()


def test_comparing_with_the_exported_tokenizer(
    write_jsonl: Write, sp_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = SourceSettings(path=write_jsonl(sums(40, seed=3)))
    found = []
    for size in (1, 3):
        with checked(sp_tokenizer) as compared:
            asked = preparation([source], tmp_path / "s", compared, max_length=120,
                            builder=BuilderSettings(name="hard"))  # fmt: skip
            run(asked, size)
            found.append(compared.num_texts)
    assert found[0] == found[1] >= 80, "of all processes"


def test_large_sources_have_large_units(
    write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources.open_source(SourceSettings(path=write_jsonl(sums(300))))
    chunks = source.chunks()
    assert len(units_of([source])) == len(chunks) > 30
    monkeypatch.setattr("nmar_ds.traces.units.MAX_UNITS", 8)
    units = units_of([source, source])
    assert len(units) <= 8 < MAX_UNITS
    assert [part for unit in units for part in unit.parts] == [
        (number, chunk) for number in (0, 1) for chunk in chunks
    ]
    monkeypatch.setattr(sources, "MAX_CHUNKS", 5)
    assert len(source.chunks()) <= 6


def test_an_empty_source_gives_an_empty_store(
    write_jsonl: Write, sp_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    asked = preparation([SourceSettings(path=write_jsonl([]))], tmp_path / "s", sp_tokenizer,
                        max_length=120, builder=BuilderSettings(name="hard"))  # fmt: skip
    counts = run(asked, 2)["counts"]
    assert (counts["read"], counts["stored"], counts["tokens"]["undo"]) == (0, 0, 0)
    assert len(Store(tmp_path / "s")) == 0


def test_a_kill_while_publishing_costs_the_moved_shards_alone(
    write_jsonl: Write, sp_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = preparation([SourceSettings(path=write_jsonl(sums(60, seed=3)))], tmp_path / "s",
                        sp_tokenizer, max_length=120, builder=BuilderSettings(name="random"))  # fmt: skip
    run(asked, 1)
    whole = digests(tmp_path / "s")

    class Killed(BaseException): ...

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("nmar_ds.data.store._put_in_place", killed)
        with pytest.raises(Killed):
            run(asked, 1)
    assert digests(tmp_path / "s") == whole, "the store before is untouched"
    built: list[object] = []
    monkeypatch.setattr(prepare, "build", lambda *given: built.append(given))
    run(asked, 1)
    assert built == [] and digests(tmp_path / "s") == whole


def test_packed_and_columned_sources(sp_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Unpacked once, for all processes."""
    import pyarrow
    from pyarrow import parquet

    rows = sums(90, seed=3)
    packed, table = tmp_path / "a.jsonl.gz", tmp_path / "b.parquet"
    packed.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows[:60]).encode()))
    parquet.write_table(pyarrow.Table.from_pylist(rows[60:]), table, row_group_size=7)
    made = {"name": "dependency_arithmetic", "num": 9, "seed": 1, "operations": [1, 2],
            "distractors": [0, 1], "operators": ["+", "*"]}  # fmt: skip
    found = []
    for size in (1, 3):
        asked = preparation(
            [SourceSettings(path=packed), SourceSettings(path=table), SourceSettings(generator=made)],
            tmp_path / f"{size}", sp_tokenizer, max_length=400,
            builder=BuilderSettings(name="hard"),
        )  # fmt: skip
        assert run(asked, size)["counts"]["stored"] == 99
        found.append(digests(tmp_path / f"{size}"))
    assert found[0] == found[1]
