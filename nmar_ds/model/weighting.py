"""Which targets count, and what their sum is divided by: SPEC section 3 without a tensor.

Imports no torch, so that a run can be planned, and its untrained traces listed, before it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from nmar_ds.errors import ConfigError
from nmar_ds.traces.schema import NUM_ROLES, ROLE_BY_LABEL, Role

FloatArray = npt.NDArray[np.float64]

PRESETS: dict[str, dict[str, float]] = {
    "msft": {"prompt": 0, "prefix": 1, "deviation": 0, "undo": 1, "correction": 1},
    "sft": {"prompt": 0, "prefix": 1, "deviation": 1, "undo": 1, "correction": 1},
}
DENOMINATORS = ("common", "traces", "sum", "trained")
RESPONSE_ROLES = (Role.PREFIX, Role.DEVIATION, Role.UNDO, Role.CORRECTION)


def role_weights(preset: str, custom: Mapping[str, float] | None = None) -> FloatArray:
    """Loss weight of each role.

    Args:
        preset: "msft", "sft" or "custom".
        custom: role label to weight, for "custom" only; `prompt` may be left out and is then 0.

    Returns:
        float64[NUM_ROLES], indexed by `Role`.

    Raises:
        ConfigError: unknown preset or role, a missing, negative or non-finite weight, or nothing
            trained at all.
    """
    key = "objective.weights"
    if preset in PRESETS:
        if custom:
            raise ConfigError(f"{key}: given beside preset {preset!r}, expected preset 'custom'")
        table: Mapping[str, float] = PRESETS[preset]
    elif preset == "custom":
        table = {"prompt": 0.0, **(custom or {})}
    else:
        raise ConfigError(
            f"objective.preset: {preset!r}, expected one of {', '.join([*PRESETS, 'custom'])}"
        )
    for label in table:
        if label not in ROLE_BY_LABEL:
            near = difflib.get_close_matches(label, ROLE_BY_LABEL, n=1) or list(ROLE_BY_LABEL)
            raise ConfigError(f"{key}.{label}: no such role, expected {' or '.join(near)}")
    weights = np.zeros(NUM_ROLES)
    for label, role in ROLE_BY_LABEL.items():
        if label not in table:
            raise ConfigError(f"{key}.{label}: missing, expected a weight >= 0")
        weight = float(table[label])
        if not math.isfinite(weight):
            raise ConfigError(f"{key}.{label}: {weight}, expected a finite number")
        if weight < 0:
            raise ConfigError(
                f"{key}.{label}: {weight}, expected a weight >= 0: a negative weight makes the "
                "loss unbounded without nll_clip, which is not supported yet"
            )
        weights[role] = weight
    if not weights.any():
        raise ConfigError(f"{key}: all are 0, expected at least one trained role")
    return weights


def denominator(
    kind: str,
    counts_by_role: Sequence[int] | npt.NDArray[np.int64],
    weights: FloatArray,
    num_traces: int,
) -> float:
    """The divisor D of the loss, for one whole global batch (SPEC section 3).

    Args:
        kind: "common" (all response targets, masked or not), "traces", "sum" (1) or "trained"
            (sum of |w_k| N_k).
        counts_by_role: int[NUM_ROLES] targets per role over all ranks and micro-batches.
        weights: float64[NUM_ROLES].
        num_traces: traces in the global batch.

    Returns:
        D; 1.0 where it would be 0 (a step with nothing to count has a zero numerator).

    Raises:
        ConfigError: unknown kind.
    """
    counts = np.asarray(counts_by_role, dtype=np.float64)
    if kind == "common":
        total = float(counts[list(RESPONSE_ROLES)].sum())
    elif kind == "traces":
        total = float(num_traces)
    elif kind == "sum":
        total = 1.0
    elif kind == "trained":
        total = float((np.abs(weights) * counts).sum())
    else:
        raise ConfigError(f"objective.denominator: {kind!r}, expected one of {DENOMINATORS}")
    return total or 1.0
