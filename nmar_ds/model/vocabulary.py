"""`<UNDO>` in a model's embedding and head, for any kind of model and sharded or not.

A new row is the mean of the known rows: the token then starts as an average token, with about
average logits, instead of a random direction (Hewitt 2021, "Initializing new word embeddings").
"""

# V vocabulary rows, H hidden

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nmar_ds.errors import ConfigError, VocabularyError


@dataclass(frozen=True, kw_only=True)
class RowsReport:
    """What was done to a model's vocabulary.

    Attributes:
        rows_before: embedding rows before.
        rows_after: embedding rows now; never fewer.
        reused_spare_row: the undo id already had an (unused) row, nothing was resized.
        tied: the head shares the embedding's rows.
    """

    rows_before: int
    rows_after: int
    reused_spare_row: bool
    tied: bool

    def __str__(self) -> str:
        how = (
            f"spare row reused, {self.rows_after} rows"
            if self.reused_spare_row
            else f"resized from {self.rows_before} to {self.rows_after} rows"
        )
        return f"{how}, {'tied' if self.tied else 'untied'} head"


def add_undo_rows(
    model: Any,
    *,
    undo_id: int,
    num_known_rows: int,
    init: str = "mean",
    pad_to_multiple_of: int | None = None,
) -> RowsReport:
    """Give `undo_id` a row in the input embedding and, if untied, in the head.

    Never shrinks: models are often padded past their tokenizer (Qwen, Gemma). A spare row is
    initialised in place; otherwise the matrices grow to `undo_id + 1` rows and every new row is
    set. Call before the engine is built. Under ZeRO-3 all ranks must call it; all end equal.

    Args:
        model: a transformers causal language model.
        undo_id: the id `<UNDO>` has in the tokenizer.
        num_known_rows: rows [0, num_known_rows) belong to real tokens; the mean is taken over
            them, without the undo row itself. Padding rows past them would pull it to nothing.
        init: "mean", the only one.
        pad_to_multiple_of: grow to a multiple of this; ignored where nothing grows.

    Returns:
        What was done.

    Raises:
        ConfigError: unknown `init`.
        VocabularyError: fewer rows than known tokens, or input and head of different sizes.
    """
    if init != "mean":
        raise ConfigError(f"initialisation of the undo row: {init!r}, expected 'mean'")
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    num_rows = _num_rows(model.get_input_embeddings().weight)
    _check(model, num_rows, undo_id, num_known_rows)
    grows = undo_id >= num_rows
    if grows:
        # never called with the present size: under ZeRO-3 that would rebuild and unpartition
        model.resize_token_embeddings(
            undo_id + 1, pad_to_multiple_of=pad_to_multiple_of, mean_resizing=False
        )
    num_rows_now = _num_rows(model.get_input_embeddings().weight)
    # after a resize the fresh rows are random, and differ between ranks: set all of them
    rows = range(num_rows, num_rows_now) if grows else (undo_id,)
    parameters = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if not tied:
        parameters.append(head.weight)
    if getattr(head, "bias", None) is not None:
        parameters.append(head.bias)
    with _whole(parameters):
        for parameter in parameters:
            _set_to_mean(parameter.data, rows, num_known_rows, undo_id)
    return RowsReport(
        rows_before=num_rows,
        rows_after=num_rows_now,
        reused_spare_row=not grows,
        tied=tied,
    )


def _check(model: Any, num_rows: int, undo_id: int, num_known_rows: int) -> None:
    if not 1 <= num_known_rows <= num_rows:
        raise VocabularyError(
            f"model has {num_rows} embedding rows, expected at least the {num_known_rows} tokens "
            "of the tokenizer"
        )
    if undo_id < 0 or (num_known_rows == 1 and undo_id == 0):
        raise VocabularyError(f"undo id {undo_id}: no such row, expected an id >= 0")
    head = model.get_output_embeddings()
    if head is None:
        raise VocabularyError(f"{type(model).__name__}: no head, expected a causal language model")
    if _num_rows(head.weight) != num_rows:
        raise VocabularyError(
            f"head has {_num_rows(head.weight)} rows, expected the embedding's {num_rows}"
        )


def _num_rows(parameter: Tensor) -> int:
    """Rows of a parameter, partitioned (its own shape is then empty) or not."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return int(shape[0])


def _set_to_mean(matrix_V: Tensor, rows: Sequence[int], num_known_rows: int, undo_id: int) -> None:
    """Overwrite rows of a [V, H] weight or a [V] bias by the mean of the known ones, in float32."""
    known = matrix_V[:num_known_rows].to(torch.promote_types(matrix_V.dtype, torch.float32))
    if undo_id < num_known_rows:
        known = torch.cat([known[:undo_id], known[undo_id + 1 :]])
    matrix_V[list(rows)] = known.mean(dim=0).to(matrix_V.dtype)


@contextmanager
def _whole(parameters: Sequence[Any]) -> Iterator[None]:
    """Gather those parameters that are partitioned, for writing.

    Every rank writes the same values; rank 0's are the ones that are spread on leaving. Fresh
    parameters (after a resize) stay whole on every rank until the engine is built.
    """
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
        yield
