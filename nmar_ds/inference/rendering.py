"""Responses made readable: what was undone stays visible, from ids.

On a terminal undone text is red and struck through; in plain output it stands as `[-text-]`,
and a run of undos as `<UNDO>` or `<UNDO>{3}`.
"""

# R tokens of a raw response

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from rich.text import Text

from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.reduction import Machine, survivors
from nmar_ds.traces.schema import IdArray

Kind = Literal["kept", "undone", "undo"]
STYLES: dict[Kind, str] = {"kept": "", "undone": "red strike", "undo": "bold magenta"}


class Run(NamedTuple):
    """Neighbouring tokens of one fate.

    Attributes:
        kind: "kept", "undone" or "undo".
        forced: whether they were given to the model rather than written by it.
        text: what they add to the text; empty for undos.
        num_tokens: how many they are.
    """

    kind: Kind
    forced: bool
    text: str
    num_tokens: int


def response_text(tokenizer: Tokenizer, prompt_ids: IdArray, response_ids: IdArray) -> str:
    """Text that a response adds to its prompt; undos and stop tokens contribute nothing."""
    follows = len(tokenizer.decode_bytes(prompt_ids)) > 0
    return tokenizer.decode(response_ids, continuation=follows)


def without_undos(ids: IdArray, undo_id: int) -> IdArray:
    """The raw response as a reader without a stack machine sees it."""
    return np.asarray(ids[ids != undo_id], np.int32)


def runs(
    tokenizer: Tokenizer,
    prompt_ids: IdArray,
    raw_ids: IdArray,
    machine: Machine,
    *,
    num_forced: int = 0,
) -> Iterator[Run]:
    """Split a raw response into runs of tokens that were kept, undone, or undos.

    Args:
        tokenizer: of the model.
        prompt_ids: what the response follows.
        raw_ids: int32[R].
        machine: what one undo pops.
        num_forced: leading ids of `raw_ids` that were given.
    """
    if len(raw_ids) == 0:
        return
    is_undo = raw_ids == machine.undo_id
    kept = survivors(raw_ids, machine)
    fate = np.where(is_undo, 2, np.where(kept, 0, 1))
    forced = np.arange(len(raw_ids)) < num_forced
    cuts = [0, *(np.flatnonzero(np.diff(fate * 2 + forced)) + 1).tolist(), len(raw_ids)]
    names: tuple[Kind, Kind, Kind] = ("kept", "undone", "undo")
    follows = len(tokenizer.decode_bytes(prompt_ids)) > 0
    for start, end in pairwise(cuts):
        kind = names[int(fate[start])]
        text = tokenizer.decode(raw_ids[start:end], continuation=follows or start > 0)
        yield Run(kind, bool(forced[start]), text, end - start)


def as_rich(parts: Iterator[Run], undo_token: str) -> Text:
    """For a terminal: undone text red and struck through, given text underlined."""
    line = Text()
    for part in parts:
        style = STYLES[part.kind] + (" underline" if part.forced else "")
        line.append(part.text if part.kind != "undo" else _undos(part, undo_token), style.strip())
    return line


def as_plain(parts: Iterator[Run], undo_token: str) -> str:
    """For files and pipes: `[-undone-]` and `<UNDO>{3}`."""
    pieces = []
    for part in parts:
        if part.kind == "undo":
            pieces.append(_undos(part, undo_token))
        else:
            pieces.append(f"[-{part.text}-]" if part.kind == "undone" else part.text)
    return "".join(pieces)


def _undos(part: Run, undo_token: str) -> str:
    return undo_token if part.num_tokens == 1 else f"{undo_token}{{{part.num_tokens}}}"
