"""Which targets count, and what their sum is divided by: SPEC section 3 without a tensor.

Imports no torch, so that a run can be planned, and its untrained traces listed, before it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nmar_ds.errors import ConfigError
from nmar_ds.traces.schema import NUM_ROLES, ROLE_BY_LABEL, Role

FloatArray = npt.NDArray[np.float64]

# Bytes of one chunk's logits in the loss dtype. One such block lives at a time (and, for a bfloat16
# head, one of half its size; under unlikelihood, copies of the chunk's penalised rows). Measured on
# a CPU: products over fewer than 256 rows lose a fifth of their rate at V = 49,152; 48 MiB hold
# 256 there, and at V = 128,256 stay small beside the head's gradient.
CHUNK_BYTES = {"cpu": 48 << 20, "cuda": 256 << 20}

PRESETS: dict[str, dict[str, float]] = {
    "msft": {"prompt": 0, "prefix": 1, "deviation": 0, "undo": 1, "correction": 1},
    "sft": {"prompt": 0, "prefix": 1, "deviation": 1, "undo": 1, "correction": 1},
}
DENOMINATORS = ("common", "traces", "sum", "trained")
RESPONSE_ROLES = (Role.PREFIX, Role.DEVIATION, Role.UNDO, Role.CORRECTION)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """What the loss has beside a weight per role; the defaults change nothing.

    Attributes:
        nll_clip: targets of negatively weighted roles count with min(nll, nll_clip), in nats, and
            give no gradient beyond it. Other targets are not touched.
        unlikelihood: weight of -log(1 - p) on deviation targets, beside their weighted nll
            (Welleck et al., "Neural text generation with unlikelihood training", 1908.04319).
    """

    nll_clip: float | None = None
    unlikelihood: float = 0.0


PLAIN = LossOptions()


def role_weights(
    preset: str, custom: Mapping[str, float] | None = None, options: LossOptions = PLAIN
) -> FloatArray:
    """Loss weight of each role.

    Args:
        preset: "msft", "sft" or "custom".
        custom: role label to weight, for "custom" only; `prompt` may be left out and is then 0.
        options: decide whether a weight may be negative, and whether all may be 0.

    Returns:
        float64[NUM_ROLES], indexed by `Role`.

    Raises:
        ConfigError: unknown preset or role, a missing or non-finite weight, a negative one without
            `nll_clip` or the other way round, or nothing trained at all.
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
            raise ConfigError(f"{key}.{label}: missing, expected a weight")
        weight = float(table[label])
        if not math.isfinite(weight):
            raise ConfigError(f"{key}.{label}: {weight}, expected a finite number")
        if weight < 0 and options.nll_clip is None:
            raise ConfigError(
                f"{key}.{label}: {weight}, expected a weight >= 0: a negative weight makes the "
                "loss unbounded; set objective.nll_clip (nats per token), for example 5.0"
            )
        weights[role] = weight
    if options.nll_clip is not None and not (weights < 0).any():
        raise ConfigError(
            f"objective.nll_clip: {options.nll_clip}, but no weight is negative, so it would do "
            "nothing; drop it, or make a weight negative"
        )
    if not trained_roles(weights, options).any():
        raise ConfigError(f"{key}: all are 0, expected at least one trained role")
    return weights


def trained_roles(weights: FloatArray, options: LossOptions = PLAIN) -> npt.NDArray[np.bool_]:
    """bool[NUM_ROLES]: the roles whose targets are trained, in one direction or the other."""
    trained: npt.NDArray[np.bool_] = weights != 0
    trained[Role.DEVIATION] |= options.unlikelihood != 0
    return trained


def denominator(
    kind: str,
    counts_by_role: Sequence[int] | npt.NDArray[np.int64],
    weights: FloatArray,
    num_traces: int,
    options: LossOptions = PLAIN,
) -> float:
    """The divisor D of the loss, for one whole global batch (SPEC section 3).

    Args:
        kind: "common" (all response targets, masked or not), "traces", "sum" (1) or "trained"
            (sum of |w_k| N_k, and |unlikelihood| more for each deviation target).
        counts_by_role: int[NUM_ROLES] targets per role over all ranks and micro-batches.
        weights: float64[NUM_ROLES].
        num_traces: traces in the global batch.
        options: of the loss; only "trained" looks at them.

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
        total += abs(options.unlikelihood) * float(counts[Role.DEVIATION])
    else:
        raise ConfigError(f"objective.denominator: {kind!r}, expected one of {DENOMINATORS}")
    return total or 1.0
