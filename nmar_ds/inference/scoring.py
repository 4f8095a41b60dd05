"""Teacher-forced probabilities of the undo: what the model would do at every place of a text."""

# B sequences in a batch, T padded length, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nmar_ds.traces.schema import IdArray

MAX_LOGITS = 2**26  # logits held at once; 256 MiB in fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class UndoScores:
    """The undo as next token, after each token of one sequence.

    Attributes:
        probability: float32[T] p(UNDO).
        is_top: bool[T] whether greedy decoding would emit an undo here.
    """

    probability: npt.NDArray[np.float32]
    is_top: npt.NDArray[np.bool_]


@torch.inference_mode()
def score_undo(model: Any, sequences: Sequence[IdArray], *, undo_id: int) -> list[UndoScores]:
    """Score the undo after every token of every sequence, in whole forwards without a cache.

    Sequences are padded on the right, where a causal model needs no mask: nothing looks ahead.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        sequences: int arrays, one id at least.
        undo_id: id of `<UNDO>`.
    """
    device = next(model.parameters()).device
    num_classes = model.get_input_embeddings().weight.shape[0]
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    results: dict[int, UndoScores] = {}
    while len(results) < len(order):
        longest = len(sequences[order[len(results)]])
        num_rows = max(1, MAX_LOGITS // (longest * num_classes))
        chosen = order[len(results) : len(results) + num_rows]
        ids_BT = np.zeros((len(chosen), longest), np.int64)
        for row, index in enumerate(chosen):
            ids_BT[row, : len(sequences[index])] = sequences[index]
        logits_BTV = model(input_ids=torch.from_numpy(ids_BT).to(device), use_cache=False).logits
        top_BT = (logits_BTV.argmax(dim=-1) == undo_id).cpu().numpy()
        undo_BT = logits_BTV[..., undo_id].float() - logits_BTV.float().logsumexp(dim=-1)
        probability_BT = undo_BT.exp().cpu().numpy()
        for row, index in enumerate(chosen):
            size = len(sequences[index])
            results[index] = UndoScores(
                probability=probability_BT[row, :size], is_top=top_BT[row, :size]
            )
    return [results[index] for index in range(len(sequences))]
