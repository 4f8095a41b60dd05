"""SentencePiece models as tokenizers (SPEC 2.5, 2.6).

A model folder of the Llama kind holds a `tokenizer.model` and a `tokenizer_config.json` that may
name other special tokens than the model does; what the two say together is read here.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from nmar_ds.errors import NoUndoTokenError, VocabularyError
from nmar_ds.traces.encoding import (
    SENTENCEPIECE_FILE,
    TOKENIZER_CONFIG,
    Tokenizer,
    fingerprint_of,
)
from nmar_ds.traces.json_vocabulary import CHAT_TEMPLATE, SIDE_FILES, read_settings

WORD_MARK = "\u2581"
# Piece types of the model format (sentencepiece_model.proto).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MAX_SENTENCE_BYTES = 2**20
CONTROLS = ("<s>", "</s>", "<pad>")
# Learnt where bytes are a fallback, so that a literal "<0x41>" or "<unk>" is spelt out and never
# taken for the piece of that name in an exported tokenizer.
BYTE_PIECE_CHARACTERS = "<0x>123456789ABCDEFunk"
# Names under which vocabularies keep spare rows, offered first where one is to be chosen.
SPARE_NAME = re.compile(r"control|reserved|unused|extra|spare|special", re.IGNORECASE)
ADDED_TOKENS = "added_tokens.json"


class SentencePieceVocabulary(Tokenizer):
    """A `.model` file whose undo token is a control symbol, which no text can produce."""

    def __init__(self, file: Path, *, undo_token: str) -> None:
        self.path, self.undo_token = file, undo_token
        self.model = read_model(file)
        self._require_plain()
        types = {piece.piece: piece.type for piece in self.model.pieces}
        if undo_token not in types:
            raise NoUndoTokenError(
                f"{file}: no piece {undo_token!r}, expected it as a control symbol; "
                "add it with nmar_ds.traces.encoding.add_undo"
            )
        if types[undo_token] != CONTROL:
            raise VocabularyError(
                f"{file}: {undo_token!r} is a piece that text can produce (a user-defined symbol "
                "or a normal piece), expected a control symbol; train with "
                f"control_symbols=[{undo_token!r}] or choose another undo token"
            )
        self._start = _processor(self.model, self.model.normalizer_spec.add_dummy_prefix)
        self._continuation = _processor(self.model, False)
        self._settings = read_settings(file.parent)
        _require_no_added_tokens(file, self.model, self._settings)
        self._set_ids()
        self._finish(
            [piece.piece for piece in self.model.pieces],
            [_bytes_of(piece) for piece in self.model.pieces],
            [n for n, piece in enumerate(self.model.pieces) if piece.type in (CONTROL, UNKNOWN)],
        )
        unused = [n for n, piece in enumerate(self.model.pieces) if piece.type == UNUSED]
        self._ordinary = self._ordinary[~np.isin(self._ordinary, unused)]
        self.fingerprint = self._fingerprint()

    @property
    def has_chat_template(self) -> bool:
        """Whether the folder brings a chat template."""
        beside = self.path.parent / CHAT_TEMPLATE
        return "chat_template" in self._settings or beside.is_file()

    @property
    def chat_settings(self) -> dict[str, Any]:
        """What the folder's configuration says about chats; it belongs in an export too."""
        return {name: self._settings[name] for name in ("chat_template",) if name in self._settings}

    def copy_chat_template(self, folder: Path) -> None:
        """Copy the chat template that is a file of its own, where there is one."""
        if (self.path.parent / CHAT_TEMPLATE).is_file():
            shutil.copyfile(self.path.parent / CHAT_TEMPLATE, folder / CHAT_TEMPLATE)

    def _require_plain(self) -> None:
        normalizer = self.model.normalizer_spec
        if not normalizer.escape_whitespaces or self.model.trainer_spec.treat_whitespace_as_suffix:
            raise VocabularyError(
                f"{self.path}: marks white space in an unusual way, expected escape_whitespaces "
                "and no treat_whitespace_as_suffix"
            )

    def _set_ids(self) -> None:
        self.undo_id = self._start.piece_to_id(self.undo_token)
        self.bos_id, eos_id = self._special_id("bos"), self._special_id("eos")
        self.pad_id = self._special_id("pad")
        self.add_bos = self.bos_id is not None and self._settings.get("add_bos_token") is not False
        if eos_id is None:
            raise VocabularyError(
                f"{self.path}: has no end-of-sequence piece, expected eos_id >= 0"
            )
        self.eos_id = eos_id

    def _special_id(self, name: str) -> int | None:
        """Id by the configuration's name for it, else the model's own."""
        own = int(getattr(self._start, f"{name}_id")())
        token = self._settings.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text is None:
            return own if own >= 0 else None
        kinds = (CONTROL, UNKNOWN) if name == "pad" else (CONTROL,)
        for number, piece in enumerate(self.model.pieces):
            if piece.piece == text and piece.type in kinds:
                return number
        raise VocabularyError(
            f"{self.path.parent / TOKENIZER_CONFIG}: {name}_token: {text!r} is no control piece of "
            f"{self.path.name}, expected one"
        )

    def _fingerprint(self) -> str:
        normalizer = self.model.normalizer_spec
        return fingerprint_of(
            {
                "kind": "sentencepiece",
                "model_type": self.model.trainer_spec.model_type,
                "pieces": [[p.piece, repr(p.score), p.type] for p in self.model.pieces],
                "charsmap": hashlib.sha256(normalizer.precompiled_charsmap).hexdigest(),
                "add_dummy_prefix": normalizer.add_dummy_prefix,
                "remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
                "specials": [self.undo_id, self.bos_id, self.eos_id, self.pad_id],
                **({} if self.add_bos or self.bos_id is None else {"add_bos": False}),
            }
        )

    def _raw_encode(self, text: str, continuation: bool) -> Sequence[int]:
        processor = self._continuation if continuation else self._start
        ids: list[int] = processor.encode(text)
        return ids

    def _starts_with_space(self, text: str) -> bool:
        return bool(self.model.normalizer_spec.add_dummy_prefix and text)

    def save(self, folder: str | Path) -> Path:
        """Copy the model to `folder/tokenizer.model`, and what the folder says about it."""
        destination = Path(folder) / SENTENCEPIECE_FILE
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.path, destination)
        _copy_side_files(self.path.parent, destination.parent)
        return destination

    def save_transformers(self, folder: str | Path) -> None:
        """Convert to tokenizer.json; VocabularyError where that cannot be exact."""
        from nmar_ds.traces.conversion import save_sentencepiece_as_json

        save_sentencepiece_as_json(self, Path(folder))


def read_model(file: Path) -> Any:
    """Parse a `.model` file.

    Raises:
        VocabularyError: it is not a SentencePiece model.
    """
    model = model_pb2.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
        _processor(model, model.normalizer_spec.add_dummy_prefix)
    except Exception as error:  # protobuf and sentencepiece raise several unrelated types
        raise VocabularyError(
            f"{file}: not a SentencePiece model, expected one ({error})"
        ) from None
    return model


def pieces_of(model: Any, kind: int) -> list[str]:
    """List the pieces of one type, in order of id."""
    return [piece.piece for piece in model.pieces if piece.type == kind]


def add_control_piece(
    file: Path, destination: Path, undo_token: str, reserved: str | None = None
) -> Path:
    """Add the undo token to a model as a control piece and write it; no other id changes.

    Args:
        file: the `.model` file.
        destination: the file to write, or a folder for `tokenizer.model`.
        undo_token: text form of the undo token.
        reserved: a spare piece that becomes the undo token; None appends a piece.

    Returns:
        The file written.

    Raises:
        VocabularyError: the token is there already, or `reserved` is no spare piece.
    """
    model = read_model(file)
    settings = read_settings(file.parent)
    _require_no_added_tokens(file, model, settings)
    if any(piece.piece == undo_token for piece in model.pieces):
        raise VocabularyError(
            f"{file}: has a piece {undo_token!r} already, expected none to add it"
        )
    if reserved is None:
        model.pieces.add(piece=undo_token, score=0.0, type=CONTROL)
        model.trainer_spec.vocab_size = len(model.pieces)
    else:
        spare = _spare_pieces(model, settings)
        if reserved not in spare:
            usable = sorted(spare, key=lambda piece: not SPARE_NAME.search(piece))[:5]
            raise VocabularyError(
                f"{file}: {reserved!r} is no spare piece, expected a control piece other than the "
                f"ones for bos, eos, pad and unknown, such as {', '.join(usable) or '(none here)'}"
            )
        piece = model.pieces[spare[reserved]]
        piece.piece, piece.score, piece.type = undo_token, 0.0, CONTROL
    written = destination if destination.suffix == ".model" else destination / SENTENCEPIECE_FILE
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_bytes(model.SerializeToString(deterministic=True))
    _copy_side_files(file.parent, written.parent)
    return written


def _spare_pieces(model: Any, settings: dict[str, Any]) -> dict[str, int]:
    """Map pieces that no text yields and nothing needs to their ids.

    Unused pieces of BPE models are not among them: they may still stand between two joins.
    """
    trainer = model.trainer_spec
    named = [settings.get(f"{name}_token") for name in ("bos", "eos", "pad", "unk")]
    taken = {token.get("content") if isinstance(token, dict) else token for token in named}
    ids = {trainer.bos_id, trainer.eos_id, trainer.pad_id, trainer.unk_id}
    kinds = (CONTROL, UNUSED) if trainer.model_type == trainer.UNIGRAM else (CONTROL,)
    return {
        piece.piece: number
        for number, piece in enumerate(model.pieces)
        if piece.type in kinds and number not in ids and piece.piece not in taken
    }


def _require_no_added_tokens(file: Path, model: Any, settings: dict[str, Any]) -> None:
    """Refuse a model whose folder adds tokens to it: the model alone is not the tokenizer then."""
    pieces = {piece.piece for piece in model.pieces}
    added = settings.get("added_tokens_decoder") or {}
    found = {str(token.get("content")): number for number, token in added.items()}
    if (file.parent / ADDED_TOKENS).is_file():
        try:
            found |= json.loads((file.parent / ADDED_TOKENS).read_text(encoding="utf-8"))
        except (ValueError, TypeError) as error:
            raise VocabularyError(
                f"{file.parent / ADDED_TOKENS}: not JSON, expected it ({error})"
            ) from None
    for text, number in found.items():
        if text not in pieces:
            raise VocabularyError(
                f"{file.parent}: adds the token {text!r} (id {number}) that {file.name} lacks, "
                "expected a tokenizer.json there; transformers' save_pretrained writes one"
            )


def _copy_side_files(source: Path, destination: Path) -> None:
    for name in SIDE_FILES:
        if (source / name).is_file() and source.resolve() != destination.resolve():
            shutil.copyfile(source / name, destination / name)


def train(
    texts: Iterable[str],
    path: Path,
    *,
    vocab_size: int,
    model_type: str,
    undo_token: str,
    seed: int,
    byte_fallback: bool,
    phrases: Sequence[str] = (),
) -> Path:
    """Train and write a model; see `encoding.train_sentencepiece`."""
    if phrases and model_type != "unigram":
        raise VocabularyError(f"phrases: given for model_type {model_type!r}, expected unigram")
    if model_type not in ("unigram", "bpe"):
        raise VocabularyError(f"model_type: {model_type!r}, expected unigram or bpe")
    controls = [*CONTROLS, undo_token]
    buffer = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts, phrases),
            model_writer=buffer,
            vocab_size=max(vocab_size - len(controls) - len(phrases), 1),
            model_type=model_type,
            character_coverage=1.0,
            max_sentence_length=MAX_SENTENCE_BYTES,
            split_digits=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            required_chars=BYTE_PIECE_CHARACTERS if byte_fallback else "",
            byte_fallback=byte_fallback,
            hard_vocab_limit=False,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise VocabularyError(
            f"{path}: training with vocab_size {vocab_size} failed, expected texts and a size "
            f"that fit each other ({reason})"
        ) from None
    written = path if path.suffix == ".model" else path / SENTENCEPIECE_FILE
    written.parent.mkdir(parents=True, exist_ok=True)
    model = model_pb2.ModelProto.FromString(buffer.getvalue())
    # Log-probability 0: no other way to cut the text can beat a phrase that fits.
    for phrase in phrases:
        model.pieces.add(piece=phrase.replace(" ", "\u2581"), score=0.0, type=NORMAL)
    # At the end, not at 1 to 4: tokenizer.json keeps pieces there out of the unigram lattice, so
    # that a literal `<UNDO>` stays text in an exported tokenizer too.
    for piece in controls:
        model.pieces.add(piece=piece, score=0.0, type=CONTROL)
    first = len(model.pieces) - len(controls)
    model.trainer_spec.bos_id, model.trainer_spec.eos_id = first, first + 1
    model.trainer_spec.pad_id, model.trainer_spec.vocab_size = first + 2, len(model.pieces)
    written.write_bytes(model.SerializeToString(deterministic=True))
    return written


def _sentences(texts: Iterable[str], phrases: Sequence[str]) -> Iterator[str]:
    """What is left between the phrases, cut where the trainer would skip it as too long."""
    step = MAX_SENTENCE_BYTES // 4
    longest_first = sorted(phrases, key=len, reverse=True)
    border = re.compile("|".join(re.escape(phrase) for phrase in longest_first) or r"(?!)")
    line_ends = ""
    for text in texts:
        for part in border.split(text):
            for start in range(0, len(part), step):
                # The trainer drops line ends at the end of a sentence, and would never learn
                # them: they are moved to the front, of the next one if need be.
                sentence = line_ends + part[start : start + step]
                body = sentence.rstrip("\r\n")
                line_ends = sentence[len(body) :]
                if body:
                    yield line_ends + body
                    line_ends = ""


def _processor(model: Any, add_dummy_prefix: bool) -> Any:
    copy = model_pb2.ModelProto()
    copy.CopyFrom(model)
    copy.normalizer_spec.add_dummy_prefix = add_dummy_prefix
    return sentencepiece.SentencePieceProcessor(model_proto=copy.SerializeToString())


def _bytes_of(piece: Any) -> bytes:
    if piece.type == BYTE:
        return bytes([int(piece.piece[1:-1], 16)])
    text: str = piece.piece
    return text.replace(WORD_MARK, " ").encode("utf-8")
