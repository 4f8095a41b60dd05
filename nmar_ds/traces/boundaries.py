"""Boundary texts to boundary ids: what makes the machine of a run (SPEC section 2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nmar_ds.errors import ConfigError
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.reduction import Machine


def boundary_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> frozenset[int]:
    r"""Return the ids that end a span: those whose exact text ends with one of the texts.

    So ".\n" and "\n\n" count for "\n". Special ids are never among them.

    Raises:
        ConfigError: a text that no id ends with; it would never end a span.
    """
    ordinary = np.flatnonzero(~tokenizer.is_special).tolist()
    spelled = {token: tokenizer.decode_bytes([token]) for token in ordinary}
    found: set[int] = set()
    for text in texts:
        ending = text.encode("utf-8")
        ids = {token for token, content in spelled.items() if ending and content.endswith(ending)}
        if not ids:
            raise ConfigError(
                f"undo.boundaries: {text!r}: no token of {tokenizer.path} ends with it, expected "
                "texts that single tokens end with"
            )
        found |= ids
    return frozenset(found)


def machine_of(
    tokenizer: Tokenizer, semantics: str = "token", boundaries: Sequence[str] = ()
) -> Machine:
    """Make the machine of a run.

    Args:
        tokenizer: has the undo token.
        semantics: "token", "span" or "reset".
        boundaries: texts at which a span ends; some under `span`, none under the others.

    Raises:
        ConfigError: settings that do not fit each other or the tokenizer.
    """
    return Machine(tokenizer.undo_id, semantics, boundary_ids(tokenizer, boundaries))
