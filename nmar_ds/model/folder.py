"""Checks of a local model folder that need no torch: they fail in the first second.

A mismatch that transformers would find on rank 0 alone leaves the other ranks waiting.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from nmar_ds.errors import ConfigError, VocabularyError
from nmar_ds.files import EXPORT_SETTINGS


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"model.path: {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"model.path: {path}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"model.path: {path}: is a {type(value).__name__}, expected an object")
    return value


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in a folder's safetensors files, from their headers alone.

    Raises:
        ConfigError: no safetensors there, or a header cannot be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"model.path: {folder}: holds no .safetensors weights")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with file.open("rb") as stream:
                (size,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(min(size, file.stat().st_size)))
            shapes |= {k: tuple(v["shape"]) for k, v in header.items() if k != "__metadata__"}
        except (OSError, struct.error, ValueError, TypeError, KeyError, AttributeError):
            raise ConfigError(f"model.path: {file}: is not a whole safetensors file") from None
    return shapes


def _own_vocabulary_size(folder: Path) -> int | None:
    """Ids of the folder's own tokenizer.json, or else of its tokenizer.model, if it has one."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        if not (folder / "tokenizer.model").is_file():
            return None
        from nmar_ds.traces.sentencepiece_vocabulary import read_model

        return len(read_model(folder / "tokenizer.model").pieces)
    import tokenizers

    try:
        return int(tokenizers.Tokenizer.from_file(str(file)).get_vocab_size())
    except Exception as error:  # the binding raises bare Exception
        raise ConfigError(f"model.path: {file}: is no tokenizer: {error}") from None


def check_model_folder(
    folder: Path, *, tokenizer_size: int, undo_id: int, tokenizer_fingerprint: str
) -> bool:
    """Check that a folder can be trained on data of this tokenizer.

    Args:
        folder: `model.path`.
        tokenizer_size: ids of the data's tokenizer, `<UNDO>` among them.
        undo_id: id of `<UNDO>`.
        tokenizer_fingerprint: of the data's tokenizer.

    Returns:
        Whether the folder is an earlier export whose `<UNDO>` row is trained already.

    Raises:
        ConfigError: not a model folder, or one that wants code of its own run.
        VocabularyError: its rows or its tokenizer do not fit the data's tokenizer.
    """
    if not folder.is_dir():
        raise ConfigError(f"model.path: {folder}: no such folder")
    config = _read_object(folder / "config.json")
    if "auto_map" in config:
        raise ConfigError(f"model.path: {folder}: wants code of its own run (auto_map): refused")
    rows = config.get("vocab_size")
    for name, shape in stored_shapes(folder).items():
        if name.endswith("embed_tokens.weight") and rows is not None and shape[0] != rows:
            raise VocabularyError(
                f"{folder}: {name} has {shape[0]} rows, but config.json says {rows}"
            )
        if name.endswith("embed_tokens.weight") and shape[0] < tokenizer_size - 1:
            raise VocabularyError(
                f"{folder}: has rows for {shape[0]} ids, but the data's tokenizer has "
                f"{tokenizer_size}, expected the model's own tokenizer"
            )
    if (folder / EXPORT_SETTINGS).is_file():
        facts = _read_object(folder / EXPORT_SETTINGS)
        if facts.get("tokenizer_fingerprint") != tokenizer_fingerprint:
            raise VocabularyError(
                f"{folder / EXPORT_SETTINGS}: the model was trained with another tokenizer than "
                "the data's, expected the same"
            )
        return True
    own = _own_vocabulary_size(folder)
    # The data's tokenizer is the model's own plus `<UNDO>`, or the very same one.
    if own is not None and own not in (tokenizer_size, tokenizer_size - 1):
        raise VocabularyError(
            f"{folder}: its tokenizer has {own} ids, the data's has {tokenizer_size} with the undo "
            f"token (id {undo_id}), expected {own + 1}"
        )
    return False
