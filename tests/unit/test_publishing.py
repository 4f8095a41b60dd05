"""What stands between the last trace and a published store: the audit, and the page of statistics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_stores import prepare_store
from tiny_tokenizers import sums

from nmar_ds.data import statistics
from nmar_ds.data.store import Store
from nmar_ds.errors import StoreError
from nmar_ds.traces import prepare
from nmar_ds.traces.encoding import Tokenizer

Write = Callable[..., Path]


def test_a_store_that_fails_its_audit_is_not_published(
    write_jsonl: Write, sp_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"builder": "random", "max_length": 200}
    source = write_jsonl(sums(20))
    prepare_store([source], tmp_path / "s", sp_tokenizer, **asked)
    before = (tmp_path / "s" / "manifest.json").read_bytes()

    def refuse(store: Store) -> None:
        assert store.folder != tmp_path / "s" and len(store) == 20, "the new one, in full"
        raise StoreError("planted")

    monkeypatch.setattr(prepare, "audit", refuse)
    with pytest.raises(StoreError, match="planted"):
        prepare_store([source], tmp_path / "s", sp_tokenizer, seed=1, **asked)
    assert (tmp_path / "s" / "manifest.json").read_bytes() == before
    assert not (tmp_path / "s.partial").exists()
    monkeypatch.undo()
    prepare_store([source], tmp_path / "s", sp_tokenizer, seed=1, **asked)  # what is done serves
    assert (tmp_path / "s" / "manifest.json").read_bytes() != before


def test_the_page_lies_beside_the_store(
    write_jsonl: Write, sp_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_store([write_jsonl(sums(20))], tmp_path / "s", sp_tokenizer, builder="random",
                  max_length=200)  # fmt: skip
    text = (tmp_path / "s.statistics.txt").read_text()
    assert "traces 20, tokens" in text and (tmp_path / "s.statistics.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "s.statistics.json").read_text())["traces"] == 20
    found = prepare.audit(Store(tmp_path / "s"))
    (tmp_path / "s.statistics.png").unlink()
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    statistics.write_pages(found, tmp_path / "s")
    assert "pip install '.[plots]'" in (tmp_path / "s.statistics.txt").read_text()
    assert not (tmp_path / "s.statistics.png").exists()


def test_a_preparation_that_leaves_everything_out_fails(
    write_jsonl: Write, sp_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    bad = write_jsonl([{"prompt": "1", "reference": ""}] * 3, "bad.jsonl")
    with pytest.raises(StoreError, match=r"none of 3 records .*: .*bad\.jsonl:1: reference: empty"):
        prepare_store([bad], tmp_path / "s", sp_tokenizer, builder="given", max_length=99,
                      refused="drop")  # fmt: skip
    long = write_jsonl(sums(3), "long.jsonl")
    with pytest.raises(StoreError, match=r"none of 3 records .*: every trace is longer than a row"):
        prepare_store([long], tmp_path / "s", sp_tokenizer, builder="given", max_length=5,
                      overlong="drop")  # fmt: skip
    assert not (tmp_path / "s").exists()
    empty = write_jsonl([], "empty.jsonl")
    assert prepare_store([empty], tmp_path / "s", sp_tokenizer, builder="given", max_length=9)
