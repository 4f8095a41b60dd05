"""The tokenizer of the data against the one that plain transformers will load.

A SentencePiece model is exported as tokenizer.json, which another library reads. Every text that a
preparation encodes is therefore encoded by both, and the first difference refuses its record: it is
cheaper to learn of it before training than at the export.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from nmar_ds.errors import TraceError, VocabularyError
from nmar_ds.traces.encoding import Tokenizer, common_length, load_tokenizer
from nmar_ds.traces.json_vocabulary import JsonVocabulary
from nmar_ds.traces.records import Record
from nmar_ds.traces.schema import IdArray

NUM_SHOWN = 4  # tokens of each side in a message
MEND = (
    "the same ids from both; change that text, or make a tokenizer.json that has the ids you want "
    "and name it in tokenizer.path"
)


class ParityError(VocabularyError):
    """A text that the converted tokenizer encodes or decodes differently."""

    expected = MEND


class CheckedTokenizer(Tokenizer):
    """A tokenizer that refuses texts on which its tokenizer.json departs from it.

    Attributes:
        num_texts: texts compared so far.
    """

    def __init__(self, tokenizer: Tokenizer, folder: Path) -> None:
        """Open the tokenizer.json in `folder`, written by `tokenizer.save_transformers`."""
        vars(self).update(vars(tokenizer))
        self._inner = tokenizer
        exported = load_tokenizer(folder, undo_token=tokenizer.undo_token)
        assert isinstance(exported, JsonVocabulary), "save_transformers writes a tokenizer.json"
        self._exported = exported
        self.num_texts = 0
        self._last: tuple[str, bool] | None = None

    def count_anew(self) -> None:
        """Begin to count, as if no text had been compared yet."""
        self.num_texts, self._last = 0, None

    @property
    def unchecked(self) -> Tokenizer:
        """The tokenizer without the check, for texts that are encoded again."""
        return self._inner

    def encode(self, text: str, *, continuation: bool) -> IdArray:
        """Encode as the tokenizer does.

        Raises:
            ParityError: the tokenizer.json does not give the same ids and the same text.
        """
        ids = self._inner.encode(text, continuation=continuation)
        if (text, continuation) != self._last:
            self._compare(text, ids, continuation)
            self._last = (text, continuation)
            self.num_texts += 1
        return ids

    def _compare(self, text: str, ids: IdArray, continuation: bool) -> None:
        exported = self._exported
        theirs = exported.encode(text, continuation=continuation)
        if not np.array_equal(ids, theirs):
            start = common_length(ids.tolist(), theirs.tolist())
            around = self._inner.decode_bytes(ids[max(start - NUM_SHOWN, 0) : start + NUM_SHOWN])
            raise ParityError(
                f"near {around.decode('utf-8', 'replace')!r} the tokenizer gives "
                f"{_shown(self._inner, ids[start:])}, its tokenizer.json "
                f"{_shown(exported, theirs[start:])}"
            )
        said = self._inner.decode(ids, continuation=continuation)
        decodings = [exported.decode(ids, continuation=continuation)]
        if not (continuation or isinstance(self._inner, JsonVocabulary)):
            # The library strips a start only; a tokenizer.json that came so decodes as it did.
            decodings.append(exported.plain_decode(ids))
        for decoded in decodings:
            if decoded != said:
                start = common_length(decoded, said)
                raise ParityError(
                    f"the tokenizer decodes {said[start : start + 20]!r}, its tokenizer.json "
                    f"{decoded[start : start + 20]!r} at character {start}"
                )

    def _raw_encode(self, text: str, continuation: bool) -> Sequence[int]:
        return self._inner._raw_encode(text, continuation)

    def _starts_with_space(self, text: str) -> bool:
        return self._inner._starts_with_space(text)

    def save(self, folder: str | Path) -> Path:
        """Save the tokenizer itself."""
        return self._inner.save(folder)

    def save_transformers(self, folder: str | Path) -> None:
        """Write the tokenizer.json again."""
        self._inner.save_transformers(folder)


@contextlib.contextmanager
def checked(tokenizer: Tokenizer) -> Iterator[CheckedTokenizer]:
    """Convert a tokenizer for as long as its texts are checked.

    Raises:
        VocabularyError: it cannot be converted exactly.
    """
    with tempfile.TemporaryDirectory(prefix="nmar-parity-") as folder:
        tokenizer.save_transformers(folder)
        yield CheckedTokenizer(tokenizer, Path(folder))


def check_records(tokenizer: CheckedTokenizer, records: Iterable[Record]) -> None:
    """Compare on all texts of records, each as a start and as a continuation.

    Raises:
        TraceError: the first text that differs, by file, line and field.
    """
    for record in records:
        for field, text in _texts(record):
            for continuation in (False, True):
                try:
                    tokenizer.encode(text, continuation=continuation)
                except VocabularyError as error:
                    raise TraceError(
                        record.path, record.line, field, str(error), error.expected
                    ) from None


def _texts(record: Record) -> Iterator[tuple[str, str]]:
    for number, turn in enumerate(record.turns):
        prefix = f"turn {number}: " if len(record.turns) > 1 else ""
        yield f"{prefix}prompt", turn.prompt
        yield f"{prefix}reference", turn.reference
        for place, (at, text) in enumerate(turn.deviations):
            yield f"{prefix}deviations[{place}]", turn.reference[:at] + text


def _shown(tokenizer: Tokenizer, ids: IdArray) -> str:
    return repr([tokenizer.piece(token) for token in ids[:NUM_SHOWN].tolist()])
