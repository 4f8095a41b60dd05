"""The formulas of SPEC section 4, on plain lists of tensors: no model, no data, no rank."""

# p prefix, e deviation, b undo, c correction; G_k gradient of the loss sum S_k, D denominator

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nmar_ds.traces.schema import Role

Gradient = Sequence[Tensor]
# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
NORMAL_QUANTILE = 1.959964
ROUNDING = 1e-12  # relative to the largest value, or to 1: differences of equal figures


def weighted(factors: Sequence[float], gradients: Sequence[Gradient]) -> list[Tensor]:
    """sum_i f_i g_i, tensor by tensor."""
    columns = zip(*gradients, strict=True)
    return [
        torch.stack([f * t for f, t in zip(factors, parts, strict=True)]).sum(dim=0)
        for parts in columns
    ]


def dot(a: Gradient, b: Gradient) -> float:
    """<a, b> over all parameters, in float64."""
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def norm(a: Gradient) -> float:
    """Euclidean norm over all parameters."""
    return math.sqrt(dot(a, a))


def cosine(a: Gradient, b: Gradient) -> float | None:
    """Cosine of two gradients; None where one vanishes. Meaningless without their norms."""
    size = norm(a) * norm(b)
    return dot(a, b) / size if size > 0 else None


def predicted_difference(
    kind: str, by_role: Sequence[Gradient], counts: Sequence[int] | Any
) -> list[Tensor]:
    """g_SFT - g_mSFT by SPEC 4 (b), under the denominator `common` or `trained`.

    Args:
        kind: of the denominator.
        by_role: G_k, indexed by `Role`.
        counts: targets by role.
    """
    num = float(sum(counts[role] for role in Role if role is not Role.PROMPT))
    num_e = float(counts[Role.DEVIATION])
    if kind == "common":
        return weighted([1 / num], [by_role[Role.DEVIATION]])
    assert kind == "trained", kind
    share = num_e / (num * (num - num_e))
    chosen = (Role.DEVIATION, Role.PREFIX, Role.UNDO, Role.CORRECTION)
    return weighted([1 / num, -share, -share, -share], [by_role[role] for role in chosen])


def predicted_log_ratio(eta: float, error_share: Gradient, probe: Gradient) -> float:
    """What one SGD step makes of log p_SFT(e|p) - log p_mSFT(e|p): eta <G_e / D, g_e>, SPEC 4 (c).

    Args:
        eta: learning rate.
        error_share: G_e / D of the batch that is stepped on.
        probe: g_e, the gradient of the probe's -log p(e|p).
    """
    return eta * dot(error_share, probe)


def alpha_hat(inner: Sequence[float], squares: Sequence[float]) -> float | None:
    """E[-<g_bk, g_e>] / E||g_e||^2 over traces (N-MARS Prop. 2.1); None where g_e vanishes.

    Args:
        inner: <g_bk, g_e> of each trace.
        squares: ||g_e||^2 of each trace.
    """
    below = float(np.mean(squares))
    return -float(np.mean(inner)) / below if below > 0 else None


def t_quantile(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t, to 0.001.

    Source: beyond the table, Abramowitz and Stegun 26.7.5, two terms.
    """
    if freedom <= len(T_QUANTILES):
        return T_QUANTILES[freedom - 1]
    z = NORMAL_QUANTILE
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean of independent repetitions and its 95 % t interval.

    No interval (None) of one value, nor where it would be a point: repetitions that all agree do
    not tell how others might differ.
    """
    mean = float(np.mean(values))
    if np.ptp(values) <= ROUNDING * max(1.0, float(np.max(np.abs(values)))):
        return {"mean": mean, "low": None, "high": None}
    half = t_quantile(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def excludes_zero(found: Mapping[str, float | None]) -> bool:
    """Whether an interval leaves 0 out; one that is missing leaves out nothing."""
    low, high = found["low"], found["high"]
    return low is not None and high is not None and (low > 0 or high < 0)
