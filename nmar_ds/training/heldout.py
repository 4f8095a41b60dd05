"""Held-out losses per role, and the two numbers that show what masking does.

`log p(e|p)` per wrong token says how willing the model is to err; P(`<UNDO>`) at its first place
says whether it notices an error that is forced on it, at all its places and nowhere else whether it
takes back the right number of tokens (SPEC sections 4 and 7).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nmar_ds.data.loader import FILLER_ROW, Batch, RowLoader
from nmar_ds.traces.schema import NO_ROLE, NUM_ROLES, IdArray, Role

NUM_TOTALS = 2 * NUM_ROLES + 8
SURE = 0.5  # above it no other token is likelier
Onsets = Callable[[int], IdArray]


def batch_sums(
    batch: Batch,
    nll_N: npt.NDArray[np.float64],
    undo_nll_N: npt.NDArray[np.float64],
    onsets: Onsets,
) -> npt.NDArray[np.float64]:
    """Sums and counts of one batch, to be added up over batches and ranks.

    Args:
        batch: packed held-out traces.
        nll_N: float64[N], -log p of each target.
        undo_nll_N: float64[N], -log p of `<UNDO>` where the target is.
        onsets: trace -> int32[deviations], the index in it of each one's first wrong token.

    Returns:
        float64[NUM_TOTALS]: loss sums by role, target counts by role; P(undo) summed over the
        places of undos; the same, and the number, of the places of prefix and correction tokens;
        number of deviations that get their undos exactly; loss sum and count of the wrong tokens of
        deviations, sum over deviations of P(undo) right after them, number of deviations.
    """
    result = np.zeros(NUM_TOTALS)
    has_target = batch.target_roles != NO_ROLE
    for role in Role:
        chosen = batch.target_roles == role
        result[role] = nll_N[chosen].sum()
        result[NUM_ROLES + role] = chosen.sum()
    undo_is_due = batch.target_roles == Role.UNDO
    elsewhere = (batch.target_roles == Role.PREFIX) | (batch.target_roles == Role.CORRECTION)
    result[-8] = np.exp(-undo_nll_N[undo_is_due]).sum()
    result[-7:-5] = np.exp(-undo_nll_N[elsewhere]).sum(), elsewhere.sum()
    result[-5] = num_exact(batch, undo_nll_N)
    wrong = wrong_targets(batch, onsets)
    result[-4:-2] = nll_N[wrong].sum(), wrong.sum()
    # The first undo of a deviation is the target of the deviation's last token.
    first = has_target & (batch.target_roles == Role.UNDO)
    first &= batch.roles.reshape(-1) == Role.DEVIATION
    result[-2] = np.exp(-nll_N[first]).sum()
    result[-1] = first.sum()
    return result


def num_exact(batch: Batch, undo_nll_N: npt.NDArray[np.float64]) -> int:
    """Deviations after which `<UNDO>` is likelier than all else at its places, and then no more.

    Where the response ends with an undo, nothing is asked of the place after it.
    """
    due_N = batch.target_roles == Role.UNDO
    after_due_N = np.concatenate([[False], due_N[:-1]])
    begins_N = due_N & (batch.roles.reshape(-1) == Role.DEVIATION)
    response_N = (batch.target_roles != NO_ROLE) & (batch.target_roles != Role.PROMPT)
    asked_N = due_N | (after_due_N & response_N)
    sure_N = np.zeros(len(undo_nll_N), dtype=np.bool_)
    sure_N[asked_N] = np.exp(-undo_nll_N[asked_N]) > SURE
    # A run of places goes from after a deviation's last token to after its last undo.
    run_N = np.cumsum(begins_N | (due_N & ~after_due_N))
    wrong_runs = np.unique(run_N[asked_N & (sure_N != due_N)])
    return int(begins_N.sum()) - int(np.isin(run_N[begins_N], wrong_runs).sum())


def wrong_targets(batch: Batch, onsets: Onsets) -> npt.NDArray[np.bool_]:
    """bool[N]: whether the target is a deviation's token from its onset on.

    What stands before the onset is right: moved there by the snapping of a cut, or since undos
    under `span` and `reset` take it back too. The model's willingness to err begins after it.
    """
    wrong_N = np.zeros(batch.targets.size, dtype=np.bool_)
    roles_N = batch.roles.reshape(-1)
    for trace, (start, end) in zip(batch.trace_ids, pairwise(batch.cu_seqlens), strict=True):
        in_deviation = roles_N[start:end] == Role.DEVIATION
        if trace < 0 or not in_deviation.any():
            continue
        opens = in_deviation & ~np.concatenate([[False], in_deviation[:-1]])
        onset_of = np.asarray(onsets(int(trace)))[np.cumsum(opens) - 1]
        is_wrong = in_deviation & (np.arange(end - start) >= onset_of)
        wrong_N[start : end - 1] = is_wrong[1:]  # a trace's first token is nobody's target
    return wrong_N


def as_scalars(totals: npt.NDArray[np.float64]) -> dict[str, float]:
    """TensorBoard scalars from the totals of `batch_sums`; roles that do not occur are left out."""
    values = {}
    for role in Role:
        count = totals[NUM_ROLES + role]
        if count > 0 and role is not Role.PROMPT:
            values[f"heldout/loss_{role.label}"] = float(totals[role] / count)
    if totals[-3] > 0:
        values["heldout/log_p_deviation_per_token"] = -float(totals[-4] / totals[-3])
    if totals[-1] > 0:
        values["heldout/p_undo_at_first_place"] = float(totals[-2] / totals[-1])
        values["heldout/p_undo_where_due"] = float(totals[-8] / totals[NUM_ROLES + Role.UNDO])
        values["heldout/undo_count_accuracy"] = float(totals[-5] / totals[-1])
    if totals[-6] > 0:
        values["heldout/p_undo_elsewhere"] = float(totals[-7] / totals[-6])
    return values


def measure(
    engine: Any,
    loader: RowLoader,
    *,
    num_rows: int,
    undo_id: int,
    onsets: Onsets,
    arguments: Callable[[Batch], dict[str, Any]],
    reduce: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, float]:
    """Teacher-forced measures on the first rows of the held-out plan. Collective.

    Every rank runs the same number of forwards; missing rows are empty ones.

    Args:
        engine: called as the training step calls it, with mode "nll".
        loader: of the held-out plan.
        num_rows: rows to look at, over all ranks.
        undo_id: of `<UNDO>`.
        onsets: of the held-out traces, as for `batch_sums`.
        arguments: batch -> arguments of the forward.
        reduce: sums a tensor over the ranks.
    """
    share = loader.micro_batch_rows * loader.world_size
    num_batches = -(-min(num_rows, loader.plan.num_rows) // share)
    rows = np.full(num_batches * share, FILLER_ROW, dtype=np.int64)
    available = min(num_rows, loader.plan.num_rows)
    # Spread over the plan: its first rows hold the longest traces only.
    rows[:available] = np.arange(available) * loader.plan.num_rows // available
    totals = np.zeros(NUM_TOTALS)
    engine.train(False)
    with torch.no_grad():
        for mine in rows.reshape(num_batches, loader.world_size, loader.micro_batch_rows)[
            :, loader.rank
        ]:
            batch = loader.batch(mine)
            both_2N = engine(**arguments(batch), mode="nll", undo_id=undo_id)
            nll_N, undo_nll_N = both_2N.double().cpu().numpy()
            totals += batch_sums(batch, nll_N, undo_nll_N, onsets)
    engine.train(True)
    reduced = reduce(torch.from_numpy(totals).to(engine.device))
    return as_scalars(reduced.cpu().numpy())
