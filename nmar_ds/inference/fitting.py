"""What may stand beside an exported model: a store of its traces, a baseline of its tokenizer.

Checked before torch is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nmar_ds.data.store import MANIFEST, Store
from nmar_ds.errors import ConfigError, StoreError
from nmar_ds.files import EXPORT_SETTINGS
from nmar_ds.inference.exported import ExportSettings, read_settings
from nmar_ds.model.folder import check_model_folder
from nmar_ds.model.own_tokenizer import check_own_tokenizer
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.schema import IdArray


def open_store(folder: Path, settings: ExportSettings) -> Store:
    """Open a store whose traces mean to the model what they say.

    Raises:
        StoreError: no store there, an empty one, or one of another tokenizer, undo or context
            than the model was trained with.
    """
    store = Store(folder)
    manifest = store.manifest
    kinds = {
        "tokenizer.fingerprint": (
            manifest["tokenizer"]["fingerprint"], settings.tokenizer_fingerprint,
        ),
        "tokenizer.undo_id": (manifest["tokenizer"]["undo_id"], settings.undo_id),
        "semantics": (manifest["semantics"], settings.semantics),
        "boundary_ids": (sorted(store.machine.boundary_ids), list(settings.boundary_ids)),
        "context": (manifest["context"], settings.context),
        "builder.chat": (manifest["builder"].get("chat"), settings.chat),
    }  # fmt: skip
    for name, (found, expected) in kinds.items():
        if found != expected:
            raise StoreError(
                f"{folder / MANIFEST}: {name}: {_short(found)}, expected {_short(expected)} as in "
                f"the model's {EXPORT_SETTINGS}; prepare the traces with the model's configuration"
            )
    if store.num_traces == 0:
        raise StoreError(f"{folder / MANIFEST}: holds no traces, expected some")
    return store


def check_positions(
    place: str, model: Any, prompts: Sequence[IdArray], max_new_tokens: int
) -> None:
    """Check that a model has places for every prompt and what is written after it.

    Args:
        place: the model's, for the message.
        model: of transformers.
        prompts: int arrays, one at least; with what is forced after them.
        max_new_tokens: of a response.

    Raises:
        ConfigError: names the longest prompt's length.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, prompts))
    if positions is not None and longest + max_new_tokens > positions:
        raise ConfigError(
            f"{place}: {longest} prompt tokens and {max_new_tokens} new ones make "
            f"{longest + max_new_tokens}, expected at most the model's {positions} positions; "
            "see --max-new-tokens"
        )


def _short(value: object) -> str:
    """A value for a message; of a checksum its beginning tells enough."""
    text = repr(value)
    return text if len(text) <= 80 else text[:76] + " ..."


def check_baseline(folder: Path, settings: ExportSettings, tokenizer: Tokenizer) -> None:
    """Check that a folder holds a model that can be voted against the examined one.

    Tokens are what is counted, so both have to have the same ones, `<UNDO>` aside: a folder of
    `launcher/export.py` with the same tokenizer, or any Hugging Face folder with the tokenizer
    that `<UNDO>` was added to.

    Raises:
        ConfigError: no such folder, no plain language model, or another chat template.
        VocabularyError: another tokenizer.
    """
    if not folder.is_dir():
        raise ConfigError(f"--baseline: {folder}: no such folder")
    exported = check_model_folder(
        folder, tokenizer_size=tokenizer.size, tokenizer_fingerprint=tokenizer.fingerprint
    )
    if not exported:
        check_own_tokenizer(folder, tokenizer.path, undo_id=tokenizer.undo_id)
    elif read_settings(folder).chat != settings.chat:
        raise ConfigError(
            f"{folder / EXPORT_SETTINGS}: chat: another template than the examined model's, "
            "expected the same prompts for both"
        )
