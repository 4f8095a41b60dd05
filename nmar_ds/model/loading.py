"""Configuration -> model, created or loaded straight into ZeRO-3 partitions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.integrations import HfDeepSpeedConfig
from transformers.modeling_rope_utils import RopeParameters

from nmar_ds.config import ModelSection
from nmar_ds.errors import ConfigError
from nmar_ds.model.attention import ATTENTION_NAME, check_supported
from nmar_ds.model.folder import check_model_folder
from nmar_ds.model.streaming import Alone, Peers, load_streaming, plan_filling
from nmar_ds.model.undo_init import MEAN, UndoInit
from nmar_ds.model.vocabulary import add_undo_rows
from nmar_ds.yaml_input import nearest

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


def config_of_keys(section: ModelSection, *, vocab_size: int, ids: dict[str, int | None]) -> Any:
    """The transformers configuration of a model made from `model.config`.

    Raises:
        ConfigError: a key or value of `model.config` is at fault.
    """
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
    _check_rope_keys(keys.get("rope_parameters"), "model.config.rope_parameters")
    multiple = section.pad_vocab_to_multiple_of
    rows = -(-vocab_size // multiple) * multiple
    try:
        return config_class(**keys, **ids, vocab_size=rows, use_cache=False)
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"model.config: {error}") from None


def _check_rope_keys(keys: Any, place: str) -> None:
    """Transformers warns of a misspelt one and trains with its default; by layer type or flat."""
    for key, value in keys.items() if isinstance(keys, dict) else ():
        if isinstance(value, dict):
            _check_rope_keys(value, f"{place}.{key}")
        elif key not in RopeParameters.__annotations__:
            known = nearest(str(key), RopeParameters.__annotations__)
            raise ConfigError(f"{place}.{key}: unknown key{known}")


def config_of_folder(folder: Path) -> Any:
    """The transformers configuration of a model folder.

    Raises:
        ConfigError: it has none that can be read.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.path: {folder / 'config.json'}: {reason}") from None
    config.use_cache = False
    return config


def load_model(
    section: ModelSection,
    deepspeed_settings: dict[str, Any],
    *,
    tokenizer_size: int,
    undo_id: int,
    tokenizer_fingerprint: str = "",
    ids: dict[str, int | None],
    seed: int,
    undo_init: UndoInit = MEAN,
    partition: bool = True,
    peers: Peers | None = None,
) -> LoadedModel:
    """Build the model of a run. Collective under ZeRO-3.

    Args:
        section: which model.
        deepspeed_settings: from `deepspeed_config`; the dtype there is the parameters' dtype.
        tokenizer_size: number of ids, `<UNDO>` among them.
        undo_id: id of `<UNDO>`.
        tokenizer_fingerprint: of the data's tokenizer; an earlier export must have the same.
        ids: bos_token_id, eos_token_id, pad_token_id for the model's configuration.
        seed: of the random initialisation; the weights do not depend on the number of ranks.
        undo_init: how `<UNDO>` starts in a model that does not know it.
        partition: False builds a plain model, for tests on one process.
        peers: the other ranks, who must learn of a fault in the folder; None where there are none.

    Raises:
        ConfigError, VocabularyError: the folder or configuration does not fit.
    """
    peers = peers or Alone()
    if partition:
        _KEPT_ALIVE[:] = [HfDeepSpeedConfig(deepspeed_settings)]
    torch.manual_seed(seed)
    if section.path is None:
        config = config_of_keys(section, vocab_size=tokenizer_size, ids=ids)
        check_supported(config)
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=_dtype(section), attn_implementation=ATTENTION_NAME
        )
        undo_row = f"row {undo_id} of {config.vocab_size}, initialised with all the others"
    else:
        folder = Path(section.path)
        with peers.share_errors():
            trained_before = check_model_folder(
                folder, tokenizer_size=tokenizer_size, tokenizer_fingerprint=tokenizer_fingerprint
            )
            config = config_of_folder(folder)
            check_supported(config)
            plan = plan_filling(config, folder, dtype=_dtype(section), peers=peers)
        model = load_streaming(
            config,
            plan,
            dtype=_dtype(section),
            attention=ATTENTION_NAME,
            deepspeed_settings=deepspeed_settings if partition else None,
            peers=peers,
        )
        undo_row = f"row {undo_id}, as trained before"
        if not trained_before:
            report = add_undo_rows(
                model,
                undo_id=undo_id,
                num_known_rows=min(tokenizer_size, config.vocab_size),
                init=undo_init,
                pad_to_multiple_of=section.pad_vocab_to_multiple_of,
            )
            undo_row = str(report)
    if section.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return LoadedModel(model=model, undo_row=undo_row)


def trainable_parameters(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Number of trainable weights, whole, also under ZeRO-3."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad)
