"""The exported model folder: reading `nmar.json`, then tokenizer and model.

`launcher/export.py` writes it: a plain Hugging Face folder plus `nmar.json` (what the undo token
means to this model) and `nmar_tokenizer/` (the tokenizer as it was trained with). The settings
are checked before torch is imported, so that a wrong folder is refused at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmar_ds.errors import ConfigError, VocabularyError
from nmar_ds.files import EXPORT_SETTINGS
from nmar_ds.model.folder import check_no_code
from nmar_ds.traces.chat import ChatTemplate
from nmar_ds.traces.encoding import Tokenizer, load_tokenizer
from nmar_ds.traces.reduction import SEMANTICS, Machine

FORMAT_VERSION = 1
TOKENIZER_FOLDER = "nmar_tokenizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSettings:
    """What a decoder must know of a model; the fields of `nmar.json`.

    Attributes:
        undo_id: id of the undo token; `undo_token` is its text.
        semantics: `undo.semantics`: what one undo takes back.
        context: what the model was trained to see; the decoder knows `linear`.
        boundary_ids: ids at which an undo stops, under semantics `span`; sorted.
        eos_id: stop token. bos_id, pad_id: None where the model has none.
        tokenizer_fingerprint: of the tokenizer the model was trained with.
        chat: the chat template put around prompts in training (`ChatTemplate.facts`), or None.
    """

    undo_id: int
    undo_token: str
    semantics: str
    boundary_ids: tuple[int, ...] = ()
    context: str
    eos_id: int
    bos_id: int | None
    pad_id: int | None
    tokenizer_fingerprint: str
    chat: dict[str, Any] | None = None

    @property
    def machine(self) -> Machine:
        """What one undo pops."""
        return Machine(self.undo_id, self.semantics, frozenset(self.boundary_ids))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(_is_id(item) for item in value)
        and value == sorted(set(value))
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "undo_id": (_is_id, "a token id"),
    "undo_token": (_is_text, "a string"),
    "semantics": (lambda value: value in SEMANTICS, f"one of {', '.join(SEMANTICS)}"),
    "boundary_ids": (_is_ids, "a list of token ids, ascending"),
    "context": (lambda value: value == "linear", "'linear', the only one decoding is built for"),
    "eos_id": (_is_id, "a token id"),
    "bos_id": (lambda value: value is None or _is_id(value), "a token id or null"),
    "pad_id": (lambda value: value is None or _is_id(value), "a token id or null"),
    "tokenizer_fingerprint": (_is_text, "a string"),
}


def _is_chat(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and value.keys() == {"system", "template_sha256"}
        and _is_text(value["template_sha256"])
        and (value["system"] is None or isinstance(value["system"], str))
    )


def read_settings(folder: Path) -> ExportSettings:
    """Read and check `nmar.json`; imports no torch.

    Raises:
        ConfigError: not an exported folder, one that this version cannot decode, or one that wants
            code of its own run.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: --model: no such folder, expected one made by export.py")
    check_no_code(folder, place="")
    path = folder / EXPORT_SETTINGS
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: missing, so nothing is known of <UNDO> in this model, expected a folder made "
            "by launcher/export.py"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: unreadable ({error}), expected a JSON object") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {type(values).__name__}, expected a JSON object")
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise ConfigError(f"{path}: format_version: {version!r}, expected {FORMAT_VERSION}")
    values.setdefault("boundary_ids", [])  # folders from before there were any
    for name, (fits, expected) in _FIELDS.items():
        if name not in values:
            raise ConfigError(f"{path}: {name}: missing, expected {expected}")
        if not fits(values[name]):
            raise ConfigError(f"{path}: {name}: {values[name]!r}, expected {expected}")
    chat = values.get("chat")  # absent where no template was used
    if not _is_chat(chat):
        raise ConfigError(f"{path}: chat: {chat!r}, expected system and template_sha256, or null")
    if bool(values["boundary_ids"]) != (values["semantics"] == "span"):
        raise ConfigError(
            f"{path}: boundary_ids: {len(values['boundary_ids'])} under semantics "
            f"{values['semantics']!r}, expected some under 'span' and none under the others"
        )
    values["boundary_ids"] = tuple(values["boundary_ids"])
    return ExportSettings(**{name: values[name] for name in _FIELDS}, chat=chat)


def load_exported_tokenizer(folder: Path, settings: ExportSettings) -> Tokenizer:
    """Load the tokenizer of an exported folder and check that it is the one trained with.

    Raises:
        VocabularyError: it is missing or another one.
    """
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER, undo_token=settings.undo_token)
    if tokenizer.fingerprint != settings.tokenizer_fingerprint:
        raise VocabularyError(
            f"{folder / TOKENIZER_FOLDER}: fingerprint {tokenizer.fingerprint[:12]}, expected "
            f"{settings.tokenizer_fingerprint[:12]} as in {EXPORT_SETTINGS}"
        )
    if tokenizer.undo_id != settings.undo_id:
        raise VocabularyError(
            f"{folder / EXPORT_SETTINGS}: undo_id: {settings.undo_id}, expected "
            f"{tokenizer.undo_id} as in the tokenizer"
        )
    for token in settings.boundary_ids:
        if token >= tokenizer.size or tokenizer.is_special[token]:
            raise VocabularyError(
                f"{folder / EXPORT_SETTINGS}: boundary_ids: {token}, expected ordinary ids of the "
                "tokenizer"
            )
    return tokenizer


def chat_of(settings: ExportSettings, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template that prompts had around them in training, None where they had none.

    Raises:
        VocabularyError: the template beside the tokenizer is another one.
    """
    if settings.chat is None:
        return None
    template = ChatTemplate(tokenizer, system=settings.chat["system"])
    if template.facts != settings.chat:
        raise VocabularyError(
            f"{tokenizer.path.parent}: its chat template is not the one the model was trained "
            f"with ({EXPORT_SETTINGS}), expected the exported folder as it was written"
        )
    return template


def load_model(folder: Path) -> Any:
    """Load an exported model for decoding, on the accelerator where there is one.

    Raises:
        ConfigError: transformers cannot load the folder.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        # No code and no pickles from the folder; transformers would ask, or load them.
        model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{folder}: not loadable as a model ({line})") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()
