"""How `<UNDO>` starts in a pretrained model: from texts to ids, before torch is imported.

Published ways to give a new token its first row: the mean of the known rows (Hewitt 2021,
"Initializing new word embeddings"), a token with a like meaning, or the mean of several
(N-MARS table 1a: its semantic start is 0 to 2 points better than the centroid).
"""

from __future__ import annotations

from dataclasses import dataclass

from nmar_ds.config import UndoInitSection
from nmar_ds.errors import ConfigError, VocabularyError
from nmar_ds.traces.encoding import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class UndoInit:
    """First values of the undo token's rows, in ids.

    Attributes:
        method: "mean" of the known rows, "copy" of a row, or "semantic" mean of anchors.
        sources: ids of each anchor, in order; for "copy" one anchor of one id.
        labels: the texts they came from.
        noise: standard deviation of Gaussian noise, as a multiple of the known rows' own standard
            deviation in each coordinate.
        output_bias: added to the mean bias of the known rows, in a head that has a bias.
        seed: of the noise.
        excluded_ids: special ids; often reserved and never trained, so they are not "known".
    """

    method: str = "mean"
    sources: tuple[tuple[int, ...], ...] = ()
    labels: tuple[str, ...] = ()
    noise: float = 0.0
    output_bias: float = 0.0
    seed: int = 0
    excluded_ids: tuple[int, ...] = ()

    def __str__(self) -> str:
        named = ", ".join(
            f"{label!r} (id {', '.join(str(token) for token in ids)})"
            for label, ids in zip(self.labels, self.sources, strict=True)
        )
        start = {
            "mean": "mean of the known rows",
            "copy": f"copy of {named}",
            "semantic": f"mean of {named}",
        }[self.method]
        return start + (f", noise {self.noise:g}" if self.noise else "")


MEAN = UndoInit()


def resolve_undo_init(section: UndoInitSection | None, tokenizer: Tokenizer, seed: int) -> UndoInit:
    """Look the texts up in the tokenizer.

    Args:
        section: `model.undo_init`, or None for the mean.
        tokenizer: of the data.
        seed: of the run.

    Raises:
        ConfigError: a token that is no single id, or an anchor without an ordinary id.
    """
    section = UndoInitSection() if section is None else section
    if section.method == "copy":
        assert section.token is not None
        sources: list[tuple[int, ...]] = [(_token_id(section.token, tokenizer),)]
        labels = [section.token]
    else:
        sources = [
            _anchor_ids(f"model.undo_init.anchors[{place}]", text, tokenizer)
            for place, text in enumerate(section.anchors)
        ]
        labels = list(section.anchors)
    return UndoInit(
        method=section.method,
        sources=tuple(sources),
        labels=tuple(labels),
        noise=section.noise,
        output_bias=section.output_bias,
        seed=seed,
        excluded_ids=tuple(tokenizer.is_special.nonzero()[0].tolist()),
    )


def _token_id(token: str, tokenizer: Tokenizer) -> int:
    """Id of a piece, or of a text that is one piece in the middle of other text."""
    key = "model.undo_init.token"
    pieces = [number for number in range(tokenizer.size) if tokenizer.piece(number) == token]
    if token and pieces == [tokenizer.undo_id]:
        raise ConfigError(f"{key}: {token!r} is the undo token itself, expected another token")
    if token and pieces:
        return pieces[0]
    ids = _encode(key, token, tokenizer)
    if len(ids) != 1:
        raise ConfigError(
            f"{key}: {token!r} is no piece of the tokenizer and encodes to {len(ids)} ids, "
            "expected a piece or a text of exactly one id (semantic takes longer texts)"
        )
    return ids[0]


def _anchor_ids(key: str, text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    ids = _encode(key, text, tokenizer)
    if not ids:
        raise ConfigError(f"{key}: {text!r} encodes to no id, expected a text such as ' undo'")
    return ids


def _encode(key: str, text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    try:
        return tuple(tokenizer.encode(text, continuation=True).tolist())
    except VocabularyError as error:  # a special came out, such as the one for unknown characters
        raise ConfigError(f"{key}: {text!r}: {error}") from None
