"""How large a run's checkpoints will be, known before its model is built."""

from __future__ import annotations

from pathlib import Path

from nmar_ds.config import RunConfig
from nmar_ds.data.store import read_manifest
from nmar_ds.errors import ConfigError, StoreError
from nmar_ds.training.run_folder import checkpoint_bytes


def expected_checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of one checkpoint, from a model on the meta device, which takes no memory.

    The rows of `<UNDO>` that a pretrained folder may still get are not counted: a few of many.

    Raises:
        ConfigError: the model is none, or its vocabulary is not known yet.
    """
    if config.model.path is None:
        vocab_size = _vocab_size(config)
    elif not Path(config.model.path).is_dir():
        raise ConfigError(f"model.path: {config.model.path}: no such folder")
    import torch
    import transformers

    from nmar_ds.model.loading import config_of_folder, config_of_keys, trainable_parameters

    if config.model.path is None:
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        keys = config_of_keys(config.model, vocab_size=vocab_size, ids=ids)
    else:
        keys = config_of_folder(Path(config.model.path))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(keys)
    return checkpoint_bytes(trainable_parameters(model.parameters()), config.optimizer.name)


def _vocab_size(config: RunConfig) -> int:
    try:
        return int(read_manifest(Path(config.data.store) / "train")["tokenizer"]["size"])
    except StoreError as error:
        if config.tokenizer.train is not None:
            return config.tokenizer.train.vocab_size
        raise ConfigError(
            f"data.store: the model's size is not known before the data is prepared ({error}); "
            "run launcher/prepare.py first"
        ) from None
