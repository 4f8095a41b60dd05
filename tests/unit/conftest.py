"""Tiny tokenizers, trained in process: SentencePiece, and byte-level BPE with and without a prefix space."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nmar_ds.traces.encoding import Tokenizer, add_undo, train_sentencepiece

WORDS = (
    "so",
    "the",
    "answer",
    "is",
    "add",
    "carry",
    "one",
    "yes",
    "no",
    "h\u00e9llo",
    "\u65e5\u672c",
)


def sums(number: int, seed: int = 0) -> list[dict[str, str]]:
    """Arithmetic records in two groups, with words between the numbers."""
    rng = random.Random(seed)
    records = []
    for _ in range(number):
        a, b, word = rng.randint(1, 999), rng.randint(1, 999), rng.choice(WORDS)
        reference = f" {word}: {a} + {b} = {a + b}, so the answer is {a + b}."
        records.append({"prompt": f"{a}+{b}?", "reference": reference, "group": f"g{a % 2}"})
    return records


def corpus() -> list[str]:
    return [record["prompt"] + record["reference"] + "\n" for record in sums(400)]


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


def write_bpe(folder: Path, *, add_prefix_space: bool) -> Path:
    """A byte-level tokenizer.json without the undo token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<pad>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>", "pad_token": {"content": "<pad>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


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
