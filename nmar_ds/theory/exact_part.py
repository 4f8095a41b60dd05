"""(a), (b) and (c) of SPEC section 4 in float64, one process.

The G_k are of stock models, one trace at a time, by naive log-softmax and autograd; the
objectives' gradients are of the packed training module. Two runs of one code would prove nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nmar_ds.acceptance.reference import gradients, reference_sums, worst_gap
from nmar_ds.data.loader import RowLoader
from nmar_ds.model.weighting import denominator, role_weights
from nmar_ds.theory.formulas import predicted_difference, predicted_log_ratio, weighted
from nmar_ds.theory.material import (
    in_float64,
    log_p_errors,
    packed_gradient,
    stepped,
    whole_batch,
)
from nmar_ds.traces.schema import Role

PRESETS = {"SFT": role_weights("sft"), "mSFT": role_weights("msft")}


def identity_gaps(lm: Any, loader: RowLoader) -> dict[str, float]:
    """Relative residuals of (a) and (b) over all traces of a plan.

    Returns:
        By name; `apart`: how far the difference under `trained` is from G_e / D, which must be far.
    """
    ours, stock = in_float64(lm), in_float64(lm, "sdpa")
    batch = whole_batch(loader)
    num_traces = int((batch.trace_ids >= 0).sum())
    sums = reference_sums(stock, loader.source, range(num_traces))
    parts = [gradients(stock, total) for total in sums]
    counts = np.bincount(batch.target_roles, minlength=256)[: len(Role)]
    found: dict[str, float] = {}
    total = float(counts[1:].sum())
    for kind in ("common", "trained"):
        whole = {}
        for name, weights in PRESETS.items():
            divisor = denominator(kind, counts, weights, num_traces)
            whole[name], losses = packed_gradient(ours, batch, weights, divisor)
            if kind == "common":
                expected = torch.stack(sums).detach()
                found |= _same_terms(name, whole[name], parts, total)
                found |= _same_losses(name, losses, expected)
        seen = weighted([1, -1], [whole["SFT"], whole["mSFT"]])
        predicted = predicted_difference(kind, parts, counts)
        if kind == "common":
            found["(b) g_SFT - g_mSFT = G_e / D"] = worst_gap(seen, predicted)
        else:
            found["(b) g_SFT - g_mSFT under `trained`, as predicted"] = worst_gap(seen, predicted)
            found["apart"] = worst_gap(seen, predicted_difference("common", parts, counts))
    return found


def _same_terms(name: str, whole: Any, parts: Sequence[Any], total: float) -> dict[str, float]:
    """(a): take the other roles' terms out of an objective's gradient; G_k / D is what is left."""
    weights, found = PRESETS[name], {}
    for role in (Role.UNDO, Role.CORRECTION):
        others = [other for other in Role if other is not role and weights[other]]
        factors = [1.0, *(-weights[other] / total for other in others)]
        left = weighted(factors, [whole, *(parts[other] for other in others)])
        expected = weighted([1 / total], [parts[role]])
        found[f"(a) {role.label} term's gradient in {name} = G / D"] = worst_gap(left, expected)
    return found


def _same_losses(name: str, losses: Any, expected: torch.Tensor) -> dict[str, float]:
    """(a): the loss terms themselves."""
    return {
        f"(a) {role.label} loss in {name} = S": abs(float(losses[role] - expected[role]))
        / abs(float(expected[role]))
        for role in (Role.UNDO, Role.CORRECTION)
    }


def one_step(
    lm: Any, batches: RowLoader, probe: RowLoader, etas: Sequence[float]
) -> list[dict[str, float]]:
    """(c): log p_SFT(e|p) - log p_mSFT(e|p) after one SGD step, measured and predicted.

    Args:
        lm: the common start.
        batches: its first step is the batch.
        probe: held-out traces with deviations.
        etas: learning rates.
    """
    model = in_float64(lm)
    batch = batches.batches_of_step(0)[0]
    counts, num_traces = batches.counts_of_step(0)
    divisor = denominator("common", counts, PRESETS["SFT"], num_traces)
    error_only = np.zeros(len(Role))
    error_only[Role.DEVIATION] = 1
    error_share, _ = packed_gradient(model, batch, error_only, divisor)
    slopes = {n: packed_gradient(model, batch, w, divisor)[0] for n, w in PRESETS.items()}
    on, onsets = whole_batch(probe), probe.source.onsets  # type: ignore[attr-defined]
    g_e = gradients(model, -log_p_errors(model, on, onsets))
    found = []
    for eta in etas:
        with torch.no_grad():
            after = {
                name: float(log_p_errors(stepped(model, slope, eta), on, onsets))
                for name, slope in slopes.items()
            }
        seen, expected = after["SFT"] - after["mSFT"], predicted_log_ratio(eta, error_share, g_e)
        found.append(
            {"eta": eta, "measured": seen, "predicted": expected, "ratio": seen / expected}
        )
    return found
