"""Is the data's tokenizer the model's own? Compared piece by piece, and without torch.

Equal sizes prove nothing: a model trained on ids of another tokenizer of the same size learns
noise, and the loss falls all the same. The files are read as they are, not through
`load_tokenizer`, which takes seconds for 150,000 pieces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nmar_ds.errors import VocabularyError
from nmar_ds.traces.encoding import TOKENIZER_CONFIG, TOKENIZER_JSON, find_tokenizer

# Byte-level tokenizers of older folders: pieces in one file, added tokens in two others.
VOCABULARY_FILE = "vocab.json"
ADDED_TOKENS_FILE = "added_tokens.json"


def check_own_tokenizer(folder: Path, data_tokenizer: Path, *, undo_id: int) -> None:
    """Check that all ids mean the same to the model and to the data, `<UNDO>` aside.

    The data's tokenizer is the model's own with `<UNDO>` appended, or with one reserved token
    renamed to it; so the piece of the undo id may differ, and no other. A folder without a
    tokenizer passes: there is nothing to compare.

    Args:
        folder: the model's.
        data_tokenizer: folder or file of the data's tokenizer.
        undo_id: id of `<UNDO>` in it.

    Raises:
        VocabularyError: names the first id that differs and both pieces.
    """
    data_file = find_tokenizer(data_tokenizer)
    own_file = _own_file(folder, data_file.suffix)
    if own_file is None:
        return
    own, data = read_pieces(own_file), read_pieces(data_file)
    for number in sorted((own.keys() | data.keys()) - {undo_id}):
        if own.get(number) != data.get(number):
            mine, its = (
                f"is {found[number]!r}" if number in found else "does not exist"
                for found in (own, data)
            )
            raise VocabularyError(
                f"{own_file}: id {number} {mine}, but in the data's tokenizer ({data_file}) it "
                f"{its}, expected the model's own tokenizer and the undo token (id {undo_id}); "
                "prepare the data with a tokenizer made from the model's"
            )


def _own_file(folder: Path, kind: str) -> Path | None:
    """The file that names the model's pieces; of the data's kind where there are two."""
    models = sorted(folder.glob("*.model"))
    converted, older = (
        [folder / name] if (folder / name).is_file() else []
        for name in (TOKENIZER_JSON, VOCABULARY_FILE)
    )
    alike, other = (models, converted) if kind == ".model" else (converted, models)
    found = alike or other or older
    if len(found) > 1:
        raise VocabularyError(
            f"{folder}: holds {', '.join(file.name for file in found)}, expected one tokenizer; "
            "remove those that are not the model's"
        )
    return found[0] if found else None


def read_pieces(file: Path) -> dict[int, str]:
    """Pieces by id of a SentencePiece `.model`, a tokenizer.json or a vocab.json.

    Raises:
        VocabularyError: it is none of these.
    """
    if file.suffix == ".model":
        from nmar_ds.traces.sentencepiece_vocabulary import read_model

        return {number: piece.piece for number, piece in enumerate(read_model(file).pieces)}
    loaded = _load(file)
    try:
        if file.name == VOCABULARY_FILE:
            return _by_id(loaded) | _added_beside(file.parent)
        vocabulary = loaded["model"]["vocab"]
        if isinstance(vocabulary, list):  # unigram: a list of [piece, score]
            pieces = {number: str(entry[0]) for number, entry in enumerate(vocabulary)}
        else:
            pieces = _by_id(vocabulary)
        return pieces | {int(t["id"]): str(t["content"]) for t in loaded.get("added_tokens", ())}
    except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
        raise VocabularyError(
            f"{file}: is no tokenizer, expected a vocabulary of pieces and ids ({error!r})"
        ) from None


def _by_id(vocabulary: Mapping[str, int]) -> dict[int, str]:
    return {int(number): piece for piece, number in vocabulary.items()}


def _added_beside(folder: Path) -> dict[int, str]:
    added: dict[int, str] = {}
    if (folder / ADDED_TOKENS_FILE).is_file():
        added |= _by_id(_load(folder / ADDED_TOKENS_FILE))
    if (folder / TOKENIZER_CONFIG).is_file():
        entries = _load(folder / TOKENIZER_CONFIG).get("added_tokens_decoder", {})
        added |= {int(number): str(entry["content"]) for number, entry in entries.items()}
    return added


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise VocabularyError(f"{file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise VocabularyError(f"{file}: is not JSON, expected a tokenizer ({error})") from None
