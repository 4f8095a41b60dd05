"""Configuration -> model, created or loaded straight into ZeRO-3 partitions."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.integrations import HfDeepSpeedConfig

from nmar_ds.config import ModelSection
from nmar_ds.errors import ConfigError, VocabularyError
from nmar_ds.model.attention import ATTENTION_NAME, check_supported
from nmar_ds.model.vocabulary import add_undo_rows
from nmar_ds.yaml_input import nearest

EXPORT_FACTS = "nmar.json"
# transformers holds this object by a weak reference only; once it is gone, `from_pretrained`
# silently loads a whole model on every rank.
_KEPT_ALIVE: list[HfDeepSpeedConfig] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A Hugging Face causal language model ready for training.

    Attributes:
        model: with parameters partitioned by ZeRO-3.
        undo_row: one line on how `<UNDO>` got its row.
    """

    model: transformers.PreTrainedModel
    undo_row: str


def _dtype(section: ModelSection) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[section.dtype]


def _config_from_keys(section: ModelSection, *, vocab_size: int, ids: dict[str, int | None]) -> Any:
    keys = dict(section.config or {})
    model_type = keys.pop("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        known = nearest(str(model_type), list(transformers.CONFIG_MAPPING))
        raise ConfigError(f"model.config.model_type: {model_type!r} is unknown{known}")
    config_class = transformers.CONFIG_MAPPING[model_type]
    if "vocab_size" in keys:
        raise ConfigError("model.config.vocab_size: is set by the tokenizer, expected no such key")
    known_keys = config_class().to_dict()
    for key in keys:
        if key not in known_keys:
            raise ConfigError(f"model.config.{key}: unknown key{nearest(key, known_keys)}")
    multiple = section.pad_vocab_to_multiple_of
    rows = -(-vocab_size // multiple) * multiple
    try:
        return config_class(**keys, **ids, vocab_size=rows, use_cache=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.config: {error}") from None


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
                header = json.loads(stream.read(size))
        except (struct.error, ValueError, MemoryError, OverflowError):
            raise ConfigError(f"{file}: is not a safetensors file") from None
        shapes |= {k: tuple(v["shape"]) for k, v in header.items() if k != "__metadata__"}
    return shapes


def _config_from_folder(section: ModelSection) -> Any:
    folder = Path(section.path or "")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.path: {folder}: holds no config.json")
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "auto_map" in raw:
        raise ConfigError(f"model.path: {folder}: wants code of its own run (auto_map): refused")
    config = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    # transformers raises on a shape mismatch on rank 0 only, and the other ranks hang.
    for name, shape in stored_shapes(folder).items():
        if name.endswith("embed_tokens.weight") and shape[0] != config.vocab_size:
            raise VocabularyError(
                f"{folder}: {name} has {shape[0]} rows, but config.json says {config.vocab_size}"
            )
    config.use_cache = False
    return config


def load_model(
    section: ModelSection,
    deepspeed_settings: dict[str, Any],
    *,
    tokenizer_size: int,
    undo_id: int,
    ids: dict[str, int | None],
    seed: int,
    partition: bool = True,
) -> LoadedModel:
    """Build the model of a run. Collective under ZeRO-3.

    Args:
        section: which model.
        deepspeed_settings: from `deepspeed_config`; the dtype there is the parameters' dtype.
        tokenizer_size: number of ids, `<UNDO>` among them.
        undo_id: id of `<UNDO>`.
        ids: bos_token_id, eos_token_id, pad_token_id for the model's configuration.
        seed: of the random initialisation; the weights do not depend on the number of ranks.
        partition: False builds a plain model, for tests on one process.

    Raises:
        ConfigError, VocabularyError: the folder or configuration does not fit.
    """
    if partition:
        _KEPT_ALIVE[:] = [HfDeepSpeedConfig(deepspeed_settings)]
    torch.manual_seed(seed)
    if section.path is None:
        config = _config_from_keys(section, vocab_size=tokenizer_size, ids=ids)
        check_supported(config)
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=_dtype(section), attn_implementation=ATTENTION_NAME
        )
        undo_row = f"row {undo_id} of {config.vocab_size}, initialised with all the others"
    else:
        config = _config_from_folder(section)
        check_supported(config)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            section.path,
            config=config,
            dtype=_dtype(section),
            attn_implementation=ATTENTION_NAME,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
        undo_row = _undo_row(model, Path(section.path), undo_id, section)
    if section.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return LoadedModel(model=model, undo_row=undo_row)


def _undo_row(model: Any, folder: Path, undo_id: int, section: ModelSection) -> str:
    facts = folder / EXPORT_FACTS
    if facts.is_file() and json.loads(facts.read_text(encoding="utf-8")).get("undo_id") == undo_id:
        return f"row {undo_id}, as trained before"
    report = add_undo_rows(
        model,
        undo_id=undo_id,
        num_known_rows=undo_id,
        pad_to_multiple_of=section.pad_vocab_to_multiple_of,
    )
    return str(report)


def trainable_parameters(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Number of trainable weights, whole, also under ZeRO-3."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad)
