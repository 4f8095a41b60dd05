"""`<UNDO>` in a model's embedding and head, for any kind of model and sharded or not.

By default a new row is the mean of the known rows: the token then starts as an average token, with
about average logits, instead of a random direction (Hewitt 2021, "Initializing new word
embeddings"). Everything is computed alike on all ranks, in float64, and rounded once.
"""

# V vocabulary rows, K known rows, C rows of a chunk, H hidden

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nmar_ds.errors import ConfigError, VocabularyError
from nmar_ds.model.undo_init import MEAN, UndoInit

_CHUNK_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class RowsReport:
    """What was done to a model's vocabulary.

    Attributes:
        rows_before: embedding rows before.
        rows_after: embedding rows now; never fewer.
        reused_spare_row: the undo id already had an (unused) row, nothing was resized.
        tied: the head shares the embedding's rows.
        init: what the undo row was set to.
    """

    rows_before: int
    rows_after: int
    reused_spare_row: bool
    tied: bool
    init: UndoInit

    def __str__(self) -> str:
        how = (
            f"spare row reused, {self.rows_after} rows"
            if self.reused_spare_row
            else f"resized from {self.rows_before} to {self.rows_after} rows"
        )
        return f"{self.init}; {how}, {'tied' if self.tied else 'untied'} head"


def add_undo_rows(
    model: Any,
    *,
    undo_id: int,
    num_known_rows: int,
    init: UndoInit = MEAN,
    pad_to_multiple_of: int | None = None,
) -> RowsReport:
    """Give `undo_id` a row in the input embedding and, if untied, in the head.

    Never shrinks: models are often padded past their tokenizer (Qwen, Gemma). A spare row is
    initialised in place; otherwise the matrices grow to `undo_id + 1` rows or more, and every new
    row is set: that of `<UNDO>` as `init` says, padding to the mean of the known rows. Call before
    the engine is built. Under ZeRO-3 all ranks must call it; all end equal.

    The undo row is, in each matrix by itself, the mean of the known rows, the copied row, or the
    mean over anchors of the mean over each anchor's ids; plus, in coordinate h, Gaussian noise of
    standard deviation `init.noise` * s_h, s_h the (population) standard deviation of the known rows
    in that coordinate. A head's bias is the known rows' mean bias + `init.output_bias`, without
    noise and whatever the method: it says how often a token occurs, not what it means.

    Args:
        model: a transformers causal language model.
        undo_id: the id `<UNDO>` has in the tokenizer.
        num_known_rows: rows [0, num_known_rows) belong to real tokens. "Known" are those of them
            that are neither the undo row nor among `init.excluded_ids`: reserved and padding rows
            would pull a mean to nothing.
        init: first value of the undo row.
        pad_to_multiple_of: grow to a multiple of this; ignored where nothing grows.

    Returns:
        What was done.

    Raises:
        ConfigError: an output bias for a head that has none.
        VocabularyError: fewer rows than known tokens, input and head of different sizes, or a
            source of `init` that is no known token's row.
    """
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    num_rows = _num_rows(model.get_input_embeddings().weight)
    known_K = _check(model, num_rows, undo_id, num_known_rows, init)
    grows = undo_id >= num_rows
    if grows:
        # never called with the present size: under ZeRO-3 that would rebuild and unpartition
        model.resize_token_embeddings(
            undo_id + 1, pad_to_multiple_of=pad_to_multiple_of, mean_resizing=False
        )
    num_rows_now = _num_rows(model.get_input_embeddings().weight)
    # after a resize the fresh rows are random, and differ between ranks: set all of them
    rows = range(num_rows, num_rows_now) if grows else (undo_id,)
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    matrices = {"input": model.get_input_embeddings().weight}
    if not tied:
        matrices["output"] = head.weight
    for name, parameter in matrices.items():
        with _whole(parameter):
            _set_rows(parameter.data, rows, known_K, undo_id, init=init, name=name)
    if bias is not None:
        with _whole(bias):
            mean = _mean(bias.data[:, None], known_K)[0]
            bias.data[list(rows)] = mean.to(bias.dtype)
            bias.data[undo_id] = mean + init.output_bias
    return RowsReport(
        rows_before=num_rows,
        rows_after=num_rows_now,
        reused_spare_row=not grows,
        tied=tied,
        init=init,
    )


def known_rows(num_known_rows: int, undo_id: int, excluded_ids: Iterable[int]) -> Tensor:
    """bool[K]: which of the first K rows belong to ordinary tokens that are not `<UNDO>`."""
    known_K = torch.ones(num_known_rows, dtype=torch.bool)
    outside = [token for token in (undo_id, *excluded_ids) if token < num_known_rows]
    known_K[outside] = False
    return known_K


def _check(model: Any, num_rows: int, undo_id: int, num_known_rows: int, init: UndoInit) -> Tensor:
    """Refuse what cannot be done, before anything is changed; the known rows, bool[K]."""
    if not 1 <= num_known_rows <= num_rows:
        raise VocabularyError(
            f"model has {num_rows} embedding rows, expected at least the {num_known_rows} tokens "
            "of the tokenizer"
        )
    if undo_id < 0:
        raise VocabularyError(f"undo id {undo_id}: no such row, expected an id >= 0")
    known_K = known_rows(num_known_rows, undo_id, init.excluded_ids)
    if not known_K.any():
        raise VocabularyError(
            f"none of the {num_known_rows} tokens is an ordinary one beside undo id {undo_id}, "
            "expected some whose rows can be averaged"
        )
    for token in (token for ids in init.sources for token in ids):
        if not 0 <= token < num_known_rows or token == undo_id:
            raise VocabularyError(
                f"model.undo_init: id {token} has no known row, expected one of the "
                f"{num_known_rows} tokens other than the undo token"
            )
    head = model.get_output_embeddings()
    if head is None:
        raise VocabularyError(f"{type(model).__name__}: no head, expected a causal language model")
    if _num_rows(head.weight) != num_rows:
        raise VocabularyError(
            f"head has {_num_rows(head.weight)} rows, expected the embedding's {num_rows}"
        )
    if init.output_bias and getattr(head, "bias", None) is None:
        raise ConfigError(
            f"model.undo_init.output_bias: {init.output_bias:g}, but the head of "
            f"{type(model).__name__} has no bias; drop it"
        )
    return known_K


def _num_rows(parameter: Tensor) -> int:
    """Rows of a parameter, partitioned (its own shape is then empty) or not."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return int(shape[0])


def _set_rows(
    matrix_VH: Tensor,
    rows: Sequence[int],
    known_K: Tensor,
    undo_id: int,
    *,
    init: UndoInit,
    name: str,
) -> None:
    """Overwrite rows of a weight: all by the mean of the known ones, then the undo's by `init`."""
    mean_H = _mean(matrix_VH, known_K)
    start_H = mean_H
    if init.sources:
        anchors_AH = torch.stack([matrix_VH[list(ids)].double().mean(0) for ids in init.sources])
        start_H = anchors_AH.mean(0)
    if init.noise:
        spread_H = _mean(matrix_VH, known_K, around_H=mean_H).sqrt()
        draw_H = torch.from_numpy(_draw(init.seed, name, len(mean_H))).to(spread_H)
        start_H = start_H + init.noise * spread_H * draw_H
    matrix_VH[list(rows)] = mean_H.to(matrix_VH.dtype)
    matrix_VH[undo_id] = start_H.to(matrix_VH.dtype)


def _mean(matrix_VH: Tensor, known_K: Tensor, around_H: Tensor | None = None) -> Tensor:
    """Mean of the known rows, or their mean square distance to a row; float64[H], in chunks."""
    known_K = known_K.to(matrix_VH.device)
    total_H = torch.zeros(matrix_VH.shape[1], dtype=torch.float64, device=matrix_VH.device)
    for start in range(0, len(known_K), _CHUNK_ROWS):
        is_known_C = known_K[start : start + _CHUNK_ROWS]
        rows_CH = matrix_VH[start : start + len(is_known_C)][is_known_C].double()
        if around_H is not None:
            rows_CH = (rows_CH - around_H).square()
        total_H += rows_CH.sum(dim=0)
    return total_H / known_K.sum()


def _draw(seed: int, name: str, size: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Standard normal numbers that depend on seed and matrix alone, never on a rank."""
    key = hashlib.sha256(f"undo row {seed} {name}".encode()).digest()[:16]
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return generator.standard_normal(size)


@contextmanager
def _whole(parameter: Any) -> Iterator[None]:
    """Gather a parameter that is partitioned, for writing.

    Every rank writes the same values; rank 0's are the ones that are spread on leaving. Fresh
    parameters (after a resize) stay whole on every rank until the engine is built.
    """
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield
