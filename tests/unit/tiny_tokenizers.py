"""Records and tokenizers to test with: small sums with words between them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

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
