"""How long the undo token's rows are beside those of the tokens the model knew before.

A row that starts as a mean is short and grows as it is learned; one that stays where it began was
not reached by training, and one that outgrows the others makes `<UNDO>` likely everywhere.
"""

# V vocabulary rows, H hidden, K known rows

from __future__ import annotations

import torch
from torch import Tensor

ROW_TAGS = (
    "undo_row/input_norm",
    "undo_row/output_norm",
    "undo_row/mean_known_input_norm",
    "undo_row/mean_known_output_norm",
    "undo_row/output_bias",
)

_CHUNK_ROWS = 4096


def row_norms(
    embedding_VH: Tensor,
    head_VH: Tensor,
    bias_V: Tensor | None,
    *,
    known_K: Tensor,
    undo_id: int,
) -> Tensor:
    """2-norms of the undo row and of an average known row, in embedding and head.

    Rows are read a chunk at a time, so no second copy of a matrix is made.

    Args:
        embedding_VH: input embedding, whole.
        head_VH: head weight, whole; the same tensor where the model ties them.
        bias_V: head bias or None.
        known_K: bool[K], K <= V, rows whose norms are averaged.
        undo_id: the row of `<UNDO>`.

    Returns:
        float64, in the order of ROW_TAGS; the last is left out where the head has no bias.
    """
    undo_in, known_in = _of_matrix(embedding_VH, known_K, undo_id)
    same = head_VH is embedding_VH
    undo_out, known_out = (undo_in, known_in) if same else _of_matrix(head_VH, known_K, undo_id)
    values = [undo_in, undo_out, known_in, known_out]
    if bias_V is not None:
        values.append(bias_V.detach()[undo_id].double())
    return torch.stack(values)


def as_scalars(norms: Tensor) -> dict[str, float]:
    """TensorBoard scalars of what `row_norms` returned."""
    return dict(zip(ROW_TAGS, norms.tolist(), strict=False))


def describe(scalars: dict[str, float]) -> str:
    """The same as a few words for the log."""
    values = [scalars[tag] for tag in ROW_TAGS[:4]]
    line = (
        f"norm {values[0]:.4g} in (mean of known rows {values[2]:.4g}), "
        f"{values[1]:.4g} out ({values[3]:.4g})"
    )
    bias = scalars.get("undo_row/output_bias")
    return line if bias is None else f"{line}, output bias {bias:.4g}"


def _of_matrix(matrix_VH: Tensor, known_K: Tensor, undo_id: int) -> tuple[Tensor, Tensor]:
    matrix_VH = matrix_VH.detach()
    total = torch.zeros((), dtype=torch.float64, device=matrix_VH.device)
    for start in range(0, len(known_K), _CHUNK_ROWS):
        is_known_C = known_K[start : start + _CHUNK_ROWS]
        norms_C = _norms(matrix_VH[start : start + len(is_known_C)])
        total += torch.where(is_known_C, norms_C, 0.0).sum()
    return _norms(matrix_VH[undo_id : undo_id + 1])[0], total / known_K.sum()


def _norms(rows_CH: Tensor) -> Tensor:
    norms_C: Tensor = torch.linalg.vector_norm(rows_CH, dim=1, dtype=torch.float64)
    return norms_C
