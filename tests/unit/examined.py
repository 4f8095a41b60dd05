"""A toy task, its tokenizer, and an exported folder, for the tests of inference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nmar_ds.traces.encoding import Tokenizer, train_sentencepiece

WORDS = "sun mat lamp tree stone river cloud bread horse music".split()


def records(
    num: int, *, group: str = "words", seed: int = 0, first: int = 0
) -> list[dict[str, Any]]:
    """Word lists to be reversed; `first` sets a running number apart, so prompts are unique."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(first, first + num):
        words = rng.choice(WORDS, size=4, replace=False).tolist()
        rows.append(
            {
                "group": group,
                "prompt": f"{number}. Reverse: {' '.join(words)}\n",
                "reference": " ".join(reversed(words)),
            }
        )
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_tokenizer(folder: Path) -> Tokenizer:
    texts = [row[key] for row in records(200) for key in ("prompt", "reference")]
    folder.mkdir(exist_ok=True)
    return train_sentencepiece([*texts, "<UNDO>\n-é"], folder / "tokenizer.model", vocab_size=90)


def make_export(folder: Path, tokenizer: Tokenizer, **changes: Any) -> Path:
    """A folder as launcher/export.py writes it, with a random Llama in it."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=tokenizer.size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    model.save_pretrained(folder)
    tokenizer.save_transformers(folder)
    tokenizer.save(folder / "nmar_tokenizer")
    facts = {
        "format_version": 1, "undo_id": tokenizer.undo_id, "undo_token": "<UNDO>",
        "semantics": "token", "context": "linear", "eos_id": tokenizer.eos_id,
        "bos_id": tokenizer.bos_id, "pad_id": tokenizer.pad_id,
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }  # fmt: skip
    facts = {key: value for key, value in (facts | changes).items() if value != "absent"}
    (folder / "nmar.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def variant(export: Path, folder: Path, **changes: Any) -> Path:
    """A copy of an export with other facts in its nmar.json ("absent" drops one)."""
    shutil.copytree(export, folder)
    facts = json.loads((folder / "nmar.json").read_text())
    facts = {key: value for key, value in (facts | changes).items() if value != "absent"}
    (folder / "nmar.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder
