"""Checks of a local model folder that need no torch: they fail in the first second.

A mismatch that transformers would find on rank 0 alone leaves the other ranks waiting.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nmar_ds.errors import ConfigError, VocabularyError
from nmar_ds.files import EXPORT_SETTINGS
from nmar_ds.model.weight_files import read_stored_tensors
from nmar_ds.traces.encoding import TOKENIZER_CONFIG

_QUANTISED = ("quantization_config", "compression_config")
# Parts of models that read images or sound, or that encode before they decode.
_OTHER_PARTS = (
    "vision_config", "visual", "audio_config", "speech_config", "text_config", "encoder", "decoder",
)  # fmt: skip


def _read_object(path: Path, place: str = "model.path: ") -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{place}{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"{place}{path}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{place}{path}: is a {type(value).__name__}, expected an object")
    return value


def check_model_folder(folder: Path, *, tokenizer_size: int, tokenizer_fingerprint: str) -> bool:
    """Check that a folder holds a model that can be trained on data of this tokenizer.

    Whether its own tokenizer is the data's is for `check_own_tokenizer` to say.

    Args:
        folder: `model.path`.
        tokenizer_size: ids of the data's tokenizer, `<UNDO>` among them.
        tokenizer_fingerprint: of the data's tokenizer.

    Returns:
        Whether the folder is an earlier export whose `<UNDO>` row is trained already.

    Raises:
        ConfigError: not a model folder, one that wants code of its own run, or one whose weights
            are quantised, pickled, damaged or not only a language model's.
        VocabularyError: its rows do not fit the data's tokenizer, or an export's tokenizer is
            not the data's.
    """
    if not folder.is_dir():
        raise ConfigError(f"model.path: {folder}: no such folder")
    config = _read_object(folder / "config.json")
    check_no_code(folder)
    _check_config(folder / "config.json", config)
    rows = config.get("vocab_size")
    for name, tensor in read_stored_tensors(folder).items():
        if not name.endswith("embed_tokens.weight") or not tensor.shape:
            continue
        if rows is not None and tensor.shape[0] != rows:
            raise VocabularyError(
                f"{tensor.file}: {name} has {tensor.shape[0]} rows, but config.json says {rows}"
            )
        if tensor.shape[0] < tokenizer_size - 1:
            raise VocabularyError(
                f"{folder}: has rows for {tensor.shape[0]} ids, but the data's tokenizer has "
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
    return False


def check_no_code(folder: Path, place: str = "model.path: ") -> None:
    """Check that neither configuration nor tokenizer of a model folder brings code of its own.

    Args:
        folder: to read; a file that is not there is left to others.
        place: of the setting that named the folder, for the message.

    Raises:
        ConfigError: one of them does, or is no JSON object.
    """
    for name in ("config.json", TOKENIZER_CONFIG):
        file = folder / name
        if file.is_file() and _read_object(file, place).get("auto_map") is not None:
            raise ConfigError(
                f"{place}{file}: wants code of its own run (auto_map), which is refused, expected "
                "an architecture that transformers has; if it has it, remove the key"
            )


def _check_config(file: Path, config: dict[str, Any]) -> None:
    for key in _QUANTISED:
        if config.get(key) is not None:
            raise ConfigError(
                f"model.path: {file}: {key}: the weights are quantised, expected F32, F16 or BF16: "
                "quantised weights cannot be trained; use the unquantised model, or dequantise it "
                "with transformers and save it again"
            )
    for key in _OTHER_PARTS:
        if config.get(key) is not None:
            raise ConfigError(
                f"model.path: {file}: {key}: not a plain language model "
                f"(model_type {config.get('model_type')!r}), expected a text-only causal decoder; "
                "save its language part alone, with that part's configuration"
            )
    if config.get("is_encoder_decoder"):
        raise ConfigError(
            f"model.path: {file}: is_encoder_decoder: True, expected a causal decoder"
        )
