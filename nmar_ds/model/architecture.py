"""How many weights a decoder has, and of which shapes, from its configuration alone. No torch.

For planning: a preset of 70 billion weights can be looked at on a laptop, in a moment. Tests
compare the counts with the models themselves on the meta device.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmar_ds.errors import ConfigError

# What transformers takes for a key that a configuration leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "head_dim": None},
    "mistral": {"num_key_value_heads": 8, "head_dim": None},
    "qwen2": {"num_key_value_heads": 32, "head_dim": None},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder of Llama's kind: RMS norms, rotary positions, grouped queries, gated MLP.

    Attributes:
        model_type: transformers' name.
        hidden, intermediate, layers, heads, kv_heads, head_dim: sizes.
        rows: vocabulary rows of embedding and head.
        tied: the head shares the embedding's rows.
        head_norms: queries and keys are normalised per head (Qwen3).
        qkv_bias, output_bias, mlp_bias: linear layers that have one.
    """

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rows: int
    tied: bool
    head_norms: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together, which is that of the values."""
        return self.kv_heads * self.head_dim

    def layer_matrices(self) -> list[int]:
        """Elements of a layer's matrices."""
        attention = [self.hidden * n for n in (self.queries, self.keys, self.keys, self.queries)]
        return attention + [self.hidden * self.intermediate] * 3

    def layer_vectors(self) -> list[int]:
        """Elements of a layer's norms and biases."""
        vectors = [self.hidden] * 2
        vectors += [self.head_dim] * 2 if self.head_norms else []
        vectors += [self.queries, self.keys, self.keys] if self.qkv_bias else []
        vectors += [self.hidden] if self.output_bias else []
        return vectors + ([self.intermediate] * 2 + [self.hidden] if self.mlp_bias else [])

    def parameters(self) -> Iterator[tuple[int, int]]:
        """(elements of a parameter, how many such there are), all of them."""
        for numel in self.layer_matrices() + self.layer_vectors():
            yield numel, self.layers
        yield self.rows * self.hidden, 1 if self.tied else 2
        yield self.hidden, 1

    @property
    def num_weights(self) -> int:
        """All weights."""
        return sum(numel * count for numel, count in self.parameters())

    @property
    def num_layer_weights(self) -> int:
        """Weights of one layer."""
        return sum(self.layer_matrices()) + sum(self.layer_vectors())


def architecture_of(keys: Mapping[str, Any], *, rows: int, place: str) -> Architecture:
    """Read a transformers configuration.

    Args:
        keys: `config.json`, or `model.config` of a run.
        rows: vocabulary rows.
        place: where the keys stand, for messages.

    Raises:
        ConfigError: a kind that is not known here, or a size is missing.
    """
    model_type = str(keys.get("model_type"))
    if model_type not in _DEFAULTS:
        raise ConfigError(
            f"{place}: model_type: {model_type!r} has no estimate, expected one of "
            f"{', '.join(_DEFAULTS)}"
        )
    for name in _NEEDED:
        if not isinstance(keys.get(name), int):
            raise ConfigError(f"{place}: {name}: is {keys.get(name)!r}, expected an integer")
    filled = {**_DEFAULTS[model_type], **keys}
    heads = int(filled["num_attention_heads"])
    qwen2 = model_type == "qwen2"
    attention_bias = bool(filled.get("attention_bias", False)) and model_type != "mistral"
    return Architecture(
        model_type=model_type,
        hidden=filled["hidden_size"],
        intermediate=filled["intermediate_size"],
        layers=filled["num_hidden_layers"],
        heads=heads,
        kv_heads=filled["num_key_value_heads"] or heads,
        head_dim=filled["head_dim"] or filled["hidden_size"] // heads,
        rows=rows,
        tied=bool(filled.get("tie_word_embeddings", False)),
        head_norms=model_type == "qwen3",
        qkv_bias=qwen2 or attention_bias,
        output_bias=attention_bias and not qwen2,
        mlp_bias=bool(filled.get("mlp_bias", False)) and model_type == "llama",
    )


def rows_with_undo(rows: int, tokenizer_size: int, multiple: int) -> int:
    """Rows of a pretrained model's vocabulary once `<UNDO>` has its own; never fewer."""
    return rows if tokenizer_size <= rows else -(-tokenizer_size // multiple) * multiple


def read_folder_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model folder, which is all that an estimate needs of it.

    Raises:
        ConfigError: no such folder or file, or no JSON object.
    """
    path = folder / "config.json"
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"model.path: {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"model.path: {path}: is not JSON: {error}") from None
    if not isinstance(keys, dict) or not isinstance(keys.get("vocab_size"), int):
        raise ConfigError(f"model.path: {path}: vocab_size: is missing, expected an integer")
    return keys
