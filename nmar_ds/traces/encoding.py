"""Text to ids and back: special-token parsing off, nothing lost, one interface.

Two kinds of tokenizer stand behind it: SentencePiece models (`sentencepiece_vocabulary.py`) and
the `tokenizer.json` of Hugging Face's `tokenizers` (`json_vocabulary.py`). Both are opened in two
ways, as the start of a text and as its continuation, since a SentencePiece dummy prefix (or a
byte-level prefix space) in the middle of a text is a mark by which deviations can be told
(SPEC 2.5). Text is rebuilt from a table of bytes per id, so that decoding concatenates exactly
and cleans nothing up.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nmar_ds.errors import VocabularyError
from nmar_ds.traces.schema import IdArray

# T tokens in a text, V ids in the vocabulary

UNDO_TOKEN = "<UNDO>"
PIECE_CLASSES = (
    "word-digit", "word-letter", "word-punct", "digit", "letter", "punct", "space", "byte",
    "special",
)  # fmt: skip
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SENTENCEPIECE_FILE = "tokenizer.model"


class InexactError(VocabularyError):
    """A text that decoding does not give back."""

    expected = "a text the tokenizer gives back exactly"


class Tokenizer(ABC):
    """A vocabulary with `<UNDO>` as one special token.

    Attributes:
        path: the file it was read from.
        undo_token: text form of the undo token.
        undo_id: its id.
        bos_id: id of the beginning-of-sequence token, or None.
        eos_id: id of the stop token.
        pad_id: id of the padding token, or None.
        add_bos: whether this tokenizer starts a sequence with BOS; BOS belongs to the prompt.
        size: highest id + 1, the undo's included.
        fingerprint: sha256 over pieces, ids, specials and settings, not over file names.
        is_special: bool[V]; special ids come from no text.
        class_of: int8[V] index into PIECE_CLASSES.
    """

    path: Path
    undo_token: str
    undo_id: int
    bos_id: int | None
    eos_id: int
    pad_id: int | None
    add_bos: bool
    size: int
    fingerprint: str
    is_special: npt.NDArray[np.bool_]
    class_of: npt.NDArray[np.int8]

    def _finish(
        self, pieces: Sequence[str], table: Sequence[bytes], special_ids: Iterable[int]
    ) -> None:
        """Set what follows from the pieces: tables of bytes, classes and specials."""
        self.size = len(pieces)
        self._pieces = list(pieces)
        self._table = list(table)
        self._num_bytes = np.array([len(content) for content in table], dtype=np.int64)
        self.is_special = np.zeros(self.size, dtype=np.bool_)
        self.is_special[list(special_ids)] = True
        for token in np.flatnonzero(self.is_special).tolist():
            self._table[token] = b""
        self._num_bytes[self.is_special] = 0
        classes = [
            "special" if special else class_of_bytes(content)
            for content, special in zip(self._table, self.is_special, strict=True)
        ]
        self.class_of = np.array([PIECE_CLASSES.index(name) for name in classes], dtype=np.int8)
        self._is_loose = self.class_of == PIECE_CLASSES.index("byte")
        self._ordinary = np.flatnonzero(~self.is_special & ~self._is_loose).astype(np.int32)

    @property
    def unchecked(self) -> Tokenizer:
        """This tokenizer without the check of `parity.py`, where it has one."""
        return self

    @abstractmethod
    def _raw_encode(self, text: str, continuation: bool) -> Sequence[int]:
        """Encode with special-token parsing off."""

    @abstractmethod
    def _starts_with_space(self, text: str) -> bool:
        """Whether encoding `text` as a start puts a space of its own before it."""

    @abstractmethod
    def save(self, folder: str | Path) -> Path:
        """Write what `load_tokenizer` needs into `folder`; the files are byte-identical copies."""

    @abstractmethod
    def save_transformers(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json that plain transformers loads."""

    def encode(self, text: str, *, continuation: bool) -> IdArray:
        """Encode text as ordinary tokens; no BOS, no EOS.

        Args:
            text: any text; `<UNDO>`, `</s>` and the like in it are letters like others.
            continuation: whether other text comes before it.

        Returns:
            int32[T].

        Raises:
            VocabularyError: the tokenizer made a special token of the text all the same.
        """
        ids = np.array(self._raw_encode(text, continuation), dtype=np.int32)
        if self.is_special[ids].any():
            piece = self._pieces[int(ids[self.is_special[ids]][0])]
            raise VocabularyError(
                f"{self.path}: text became the special token {piece!r}, expected ordinary tokens; "
                f"the vocabulary lacks the characters, or matches {piece!r} as plain text"
            )
        return ids

    def encode_exactly(self, text: str, *, continuation: bool) -> IdArray:
        """Encode as `encode` does, and make sure that decoding gives the text back.

        Raises:
            InexactError: it does not.
            VocabularyError: as `encode`.
        """
        ids = self.encode(text, continuation=continuation)
        self._require_exact(ids, text, continuation=continuation)
        return ids

    def _require_exact(self, ids: IdArray, text: str, *, continuation: bool) -> None:
        spelled = self.decode(ids, continuation=continuation)
        if spelled != text:
            raise InexactError(self.difference(text, spelled))

    def decode(self, ids: Sequence[int] | IdArray, *, continuation: bool = False) -> str:
        """Rebuild the exact text; special ids contribute nothing.

        Args:
            ids: int[T].
            continuation: whether other text comes before it, so that a leading space is its own
                and not the tokenizer's.
        """
        content = self.decode_bytes(ids)
        if not continuation and self.has_prefix_space and content.startswith(b" "):
            content = content[1:]
        return content.decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | IdArray) -> bytes:
        """Join the bytes of the ids; a prefix space, where there is one, stays."""
        tokens = ids.tolist() if isinstance(ids, np.ndarray) else ids
        return b"".join(map(self._table.__getitem__, tokens))

    @property
    def has_prefix_space(self) -> bool:
        """Whether the tokenizer puts a space before the start of a text."""
        return self._starts_with_space("a")

    def starts_of(self, ids: IdArray, text: str, *, continuation: bool) -> npt.NDArray[np.int64]:
        """Say where each token of a text starts.

        Args:
            ids: int32[T] that spell the text, from `encode_exactly`.
            text: what they spell.
            continuation: as it was encoded.

        Returns:
            int64[T] index of the character at which the token starts, or -1 where it starts inside
            a character or where an earlier token starts there too; the places not -1 are those
            where the text can be cut between tokens.
        """
        starts_inside = not continuation and self._starts_with_space(text)
        begins = np.cumsum(self._num_bytes[ids]) - self._num_bytes[ids]
        if text.isascii() and not starts_inside:
            return begins  # a byte is a character, and every token has one
        encoded = (b" " if starts_inside else b"") + text.encode("utf-8")
        characters = np.frombuffer(encoded, dtype=np.uint8) & 0xC0 != 0x80
        character_of = np.where(characters, np.cumsum(characters) - 1 - starts_inside, -1)
        if starts_inside:
            character_of[0] = 0
        starts = np.full(len(ids), -1, dtype=np.int64)
        inside = begins < len(encoded)
        starts[inside] = character_of[begins[inside]]
        starts[1:][starts[1:] == np.maximum.accumulate(starts)[:-1]] = -1
        return starts

    def cut_before(self, text: str, end: int) -> int:
        """A place before `end` where a text may be cut: its ids are those of both parts on end.

        Args:
            text: any text.
            end: index of a character; what comes from there on makes no difference.

        Returns:
            0 where no such place is known. From another place on, text is a continuation.
        """
        return 0

    def difference(self, text: str, spelled: bytes | str) -> str:
        """Say in a few words where decoded text departs from the text that was encoded."""
        decoded = spelled if isinstance(spelled, str) else spelled.decode("utf-8", "replace")
        shared = common_length(text, decoded)
        return (
            f"decodes to {decoded[shared : shared + 12]!r} instead of "
            f"{text[shared : shared + 12]!r} at character {shared} "
            "(a character the vocabulary lacks, or a tokenizer that normalises text, which is "
            "not supported)"
        )

    def piece(self, token: int) -> str:
        """Return the display form of an id."""
        return self._pieces[token]

    def piece_class(self, token: int) -> str:
        """Return the class (of PIECE_CLASSES) of an id: word-initial mark and kind of character."""
        return PIECE_CLASSES[self.class_of[token]]

    def ordinary_ids(self) -> IdArray:
        """Return int32[<= V], the ids of whole pieces of text: no specials, no loose bytes."""
        return self._ordinary

    def starts_character(self, ids: IdArray) -> npt.NDArray[np.bool_]:
        """Return bool[T]: whether each token starts where a character does."""
        if not self._is_loose[ids].any():
            return np.ones(len(ids), dtype=np.bool_)
        spelled = np.frombuffer(self.decode_bytes(ids) + b" ", dtype=np.uint8)
        begins = np.cumsum(self._num_bytes[ids]) - self._num_bytes[ids]
        starts: npt.NDArray[np.bool_] = spelled[begins] & 0xC0 != 0x80
        return starts

    def token_at(self, ids: IdArray, num_bytes: int) -> int:
        """Return the index of the token that holds the byte after the first `num_bytes`."""
        return int(np.searchsorted(np.cumsum(self._num_bytes[ids]), num_bytes, side="right"))


def load_tokenizer(path: str | Path, *, undo_token: str = UNDO_TOKEN) -> Tokenizer:
    """Open a tokenizer that has the undo token.

    Args:
        path: a SentencePiece `.model`, a `tokenizer.json`, or a folder that holds either
            (`tokenizer.json` first).
        undo_token: text form of the undo token.

    Raises:
        VocabularyError: nothing usable there, or no special undo token in it.
    """
    file = find_tokenizer(path)
    if file.suffix == ".model":
        from nmar_ds.traces.sentencepiece_vocabulary import SentencePieceVocabulary

        return SentencePieceVocabulary(file, undo_token=undo_token)
    from nmar_ds.traces.json_vocabulary import JsonVocabulary

    return JsonVocabulary(file, undo_token=undo_token)


def add_undo(
    path: str | Path,
    destination: str | Path,
    *,
    undo_token: str = UNDO_TOKEN,
    reserved: str | None = None,
) -> Tokenizer:
    """Add the undo token at the next free id, or in a reserved token's place.

    No other id changes.

    Args:
        path: as for `load_tokenizer`, without the undo token.
        destination: folder to write to, or a `.model` file for SentencePiece.
        undo_token: text form of the undo token.
        reserved: a special token that nothing uses; the undo token takes its id.

    Raises:
        VocabularyError: the text is in the vocabulary already, the reserved token is none, or
            nothing usable is at `path`.
    """
    file = find_tokenizer(path)
    if file.suffix == ".model":
        from nmar_ds.traces.sentencepiece_vocabulary import add_control_piece

        written = add_control_piece(file, Path(destination), undo_token, reserved)
    else:
        from nmar_ds.traces.json_vocabulary import add_special_token

        written = add_special_token(file, Path(destination), undo_token, reserved)
    return load_tokenizer(written, undo_token=undo_token)


def train_sentencepiece(
    texts: Iterable[str],
    path: str | Path,
    *,
    vocab_size: int,
    model_type: str = "unigram",
    undo_token: str = UNDO_TOKEN,
    seed: int = 0,
    byte_fallback: bool = False,
    phrases: Sequence[str] = (),
) -> Tokenizer:
    """Train a SentencePiece model that has the undo token as a control symbol.

    Digits are split, no dummy prefix, white space and characters kept as they are.

    Args:
        texts: training texts; line breaks in them are kept.
        path: the `.model` file to write, or a folder for `tokenizer.model`.
        vocab_size: number of ids at most, specials included; fewer where the texts give fewer.
        model_type: "unigram" or "bpe".
        undo_token: text form of the undo token.
        seed: of SentencePiece's sampling; the same texts and seed give the same file.
        byte_fallback: spell unknown characters as bytes (256 ids more) instead of refusing them.
        phrases: texts that become one piece each wherever they occur (unigram only), such as the
            fixed wording of a task, which would otherwise fill every row.

    Raises:
        VocabularyError: the texts or the size do not make a vocabulary.
    """
    from nmar_ds.traces.sentencepiece_vocabulary import train

    written = train(
        texts, Path(path), vocab_size=vocab_size, model_type=model_type, undo_token=undo_token,
        seed=seed, byte_fallback=byte_fallback, phrases=phrases,
    )  # fmt: skip
    return load_tokenizer(written, undo_token=undo_token)


def assert_parity(tokenizer: Tokenizer, folder: str | Path, texts: Iterable[str]) -> None:
    """Check that the exported tokenizer encodes as the original does.

    Args:
        tokenizer: the original.
        folder: written by `tokenizer.save_transformers`.
        texts: samples of the run's own data.

    Raises:
        VocabularyError: names the first text on which they differ.
    """
    exported = load_tokenizer(folder, undo_token=tokenizer.undo_token)
    for text in texts:
        for continuation in (False, True):
            ours = tokenizer.encode(text, continuation=continuation)
            theirs = exported.encode(text, continuation=continuation)
            if not np.array_equal(ours, theirs):
                raise VocabularyError(
                    f"{folder}: the exported tokenizer encodes {text[:60]!r} as "
                    f"{theirs[:12].tolist()}, expected {ours[:12].tolist()} as by "
                    f"{tokenizer.path}"
                )
            if exported.decode(ours, continuation=continuation) != tokenizer.decode(
                ours, continuation=continuation
            ):
                raise VocabularyError(f"{folder}: decodes the ids of {text[:60]!r} differently")
    for name in ("undo_id", "bos_id", "eos_id", "pad_id", "size", "add_bos"):
        ours_value, theirs_value = getattr(tokenizer, name), getattr(exported, name)
        if ours_value != theirs_value:
            raise VocabularyError(f"{folder}: {name} is {theirs_value}, expected {ours_value}")


def find_tokenizer(path: str | Path) -> Path:
    """Return the tokenizer file that `path` means.

    Raises:
        VocabularyError: there is none, or more than one.
    """
    path = Path(path)
    if path.is_dir():
        if (path / TOKENIZER_JSON).is_file():
            return path / TOKENIZER_JSON
        models = sorted(path.glob("*.model"))
        if len(models) != 1:
            raise VocabularyError(
                f"{path}: holds {len(models)} SentencePiece models and no {TOKENIZER_JSON}, "
                "expected one tokenizer"
            )
        return models[0]
    if not path.is_file():
        raise VocabularyError(f"{path}: no such file, expected a tokenizer")
    if path.suffix not in (".model", ".json"):
        raise VocabularyError(f"{path}: unknown kind, expected a .model or a {TOKENIZER_JSON}")
    return path


def class_of_bytes(content: bytes) -> str:
    """Classify a piece by its word-initial space and the kind of its first character."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return "byte"
    if not text.strip():
        return "space"
    first = text.lstrip()[0]
    kind = "digit" if first.isnumeric() else "letter" if first.isalpha() else "punct"
    return kind if text[0] == first else f"word-{kind}"


def common_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Return how many leading items two sequences share."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))


def fingerprint_of(description: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) of a description in canonical JSON."""
    canonical = json.dumps(description, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
