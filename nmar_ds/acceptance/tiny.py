"""A model of a few thousand weights and traces for it: the same on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nmar_ds.traces.schema import Role

VOCAB = 61
UNDO = 60
LENGTH = 24
NUM_TRACES = 9

Ids = npt.NDArray[np.int32]
Roles = npt.NDArray[np.uint8]


class ListSource:
    """Traces held in memory, as the loader wants them."""

    def __init__(self, traces: list[tuple[Ids, Roles]]) -> None:
        self.traces = traces

    def ids(self, index: int) -> Ids:
        """int32[T] of one trace."""
        return self.traces[index][0]

    def roles(self, index: int) -> Roles:
        """uint8[T] of one trace."""
        return self.traces[index][1]


def make_traces(seed: int = 0, *, num: int = NUM_TRACES) -> list[tuple[Ids, Roles]]:
    """Traces of uneven lengths and uneven shares of deviation; the last one is a prompt alone."""
    rng = np.random.default_rng(seed)
    traces = []
    for index in range(num):
        prompt, prefix, wrong = (int(rng.integers(1, end)) for end in (4, 5, 5))
        if index % 4 == 3:
            wrong = 0
        right = int(rng.integers(1, 6)) if wrong else 0
        roles = np.repeat(
            [Role.PROMPT, Role.PREFIX, Role.DEVIATION, Role.UNDO, Role.CORRECTION],
            [prompt, prefix, wrong, wrong, right],
        ).astype(np.uint8)
        ids = rng.integers(0, UNDO, size=len(roles)).astype(np.int32)
        ids[roles == Role.UNDO] = UNDO
        traces.append((ids, roles))
    # Nothing of this one is trained under any preset: a whole micro-batch of it stays silent.
    ids = rng.integers(0, UNDO, size=LENGTH).astype(np.int32)
    traces.append((ids, np.full(LENGTH, Role.PROMPT, dtype=np.uint8)))
    return traces


def model_keys(tied: bool) -> dict[str, Any]:
    """`model.config` of a two-layer Llama; wide initial weights keep leaks far above rounding."""
    return {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
    }
