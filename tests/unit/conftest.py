"""Tiny tokenizers, trained in process: SentencePiece, and byte-level BPE with and without a prefix space."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from examined_fixtures import export, tokenizer
from tiny_tokenizers import corpus, write_bpe

from nmar_ds.traces.encoding import Tokenizer, add_undo, train_sentencepiece

__all__ = ["export", "tokenizer"]  # fixtures of the tests here


@pytest.fixture(scope="session")
def sp_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """SentencePiece unigram with bytes for unknown characters; no dummy prefix."""
    folder = tmp_path_factory.mktemp("sp")
    return train_sentencepiece(corpus(), folder, vocab_size=400, byte_fallback=True, seed=1)


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """SentencePiece BPE over the corpus' characters only."""
    folder = tmp_path_factory.mktemp("small")
    return train_sentencepiece(corpus(), folder, vocab_size=100, model_type="bpe", seed=1)


@pytest.fixture(scope="session")
def bpe_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bpe")
    return add_undo(write_bpe(folder / "plain", add_prefix_space=False), folder / "undo")


@pytest.fixture(scope="session")
def bpe_prefix_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bpe-prefix")
    return add_undo(write_bpe(folder / "plain", add_prefix_space=True), folder / "undo")


@pytest.fixture(params=["sp", "small", "bpe", "bpe_prefix"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each of the tiny tokenizers in turn."""
    tokenizer: Tokenizer = request.getfixturevalue(f"{request.param}_tokenizer")
    return tokenizer


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write records (or raw lines) to a file."""

    def write(records: list[object], name: str = "records.jsonl") -> Path:
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (tmp_path / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return tmp_path / name

    return write
