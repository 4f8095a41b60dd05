"""SPEC 4 (a) and (b): what masking the deviation changes in a gradient, exactly.

The per-role gradients G_k come from stock models, each trace alone, naive log-softmax and
autograd; the objectives' gradients from the packed training module. Two runs of the same code
would prove nothing.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from tiny_models import Traces, build, gap, gradients, pack, reference_sums, run_ours

from nmar_ds.model.training_model import UndoTrainingModel
from nmar_ds.model.weighting import denominator, role_weights

torch.set_num_threads(1)

# one trace: prompt, prefix, deviation, undo, correction, and a second deviation
ROLES = [0] * 4 + [1] * 5 + [2] * 3 + [3] * 3 + [4] * 6 + [2] * 2 + [3] * 2 + [4] * 3
ROWS = [[0, 1], [2, 3]]
LENGTH = 60
PRECISIONS = pytest.mark.parametrize(
    ("family", "tied", "exact", "bound"),
    [
        ("llama", True, False, 1e-6),
        ("llama", True, True, 1e-10),
        ("llama", False, True, 1e-10),
        ("qwen2", False, True, 1e-10),
        ("gemma", True, True, 1e-10),
    ],
)


def _traces():
    traces = Traces([len(ROLES), 20, 28, 9], seed=5)
    for index in range(4):
        roles = np.array(ROLES[: len(traces.ids(index))], dtype=np.uint8)
        traces._roles[index] = roles
        traces._ids[index][roles == 3] = 60
    return traces


TRACES = _traces()
COUNTS = np.array([sum(int((TRACES.roles(i)[1:] == r).sum()) for i in range(4)) for r in range(5)])


@functools.cache
def _role_gradients(family, tied, exact):
    """G_k for the five roles by independent autograd."""
    lm = build(family, tied=tied, exact=exact, dtype=torch.float64, attention="sdpa")
    sums = reference_sums(lm, TRACES, range(4))
    return [gradients(lm, total) for total in sums]


@functools.cache
def _objective_gradient(family, tied, exact, preset, kind):
    """grad L of SPEC 3 by the packed training module."""
    lm = build(family, tied=tied, exact=exact, dtype=torch.float64)
    weights = role_weights(preset)
    out = run_ours(UndoTrainingModel(lm, chunk_size=8), pack(TRACES, ROWS, LENGTH), weights)
    return gradients(lm, out.loss_sum / denominator(kind, COUNTS, weights, 4))


def _combine(factors, tensors):
    return [
        sum(f * t for f, t in zip(factors, parts, strict=True))
        for parts in zip(*tensors, strict=True)
    ]


@PRECISIONS
@pytest.mark.parametrize("preset", ["sft", "msft"])
@pytest.mark.parametrize("role", [3, 4], ids=["undo", "correction"])
def test_undo_and_correction_terms_are_the_same_under_both(
    family, tied, exact, bound, *, preset, role
):
    """(a): take the other terms out of the objective's gradient; what is left is G_k / D."""
    expected = _role_gradients(family, tied, exact)
    num = COUNTS[1:].sum()
    whole = _objective_gradient(family, tied, exact, preset, "common")
    others = [k for k in (1, 2, 3, 4) if k != role and (k != 2 or preset == "sft")]
    rest = _combine([1.0, *[-1 / num] * len(others)], [whole, *(expected[k] for k in others)])
    assert gap(rest, [g / num for g in expected[role]]) <= bound


@PRECISIONS
@pytest.mark.parametrize("kind", ["common", "traces", "sum"])
def test_objectives_differ_by_the_deviation_s_gradient(family, tied, exact, bound, kind):
    """(b): g_SFT - g_mSFT = G_e / D."""
    divisor = {"common": COUNTS[1:].sum(), "traces": 4, "sum": 1}[kind]
    sft = _objective_gradient(family, tied, exact, "sft", kind)
    msft = _objective_gradient(family, tied, exact, "msft", kind)
    difference = _combine([1, -1], [sft, msft])
    assert gap(difference, [g / divisor for g in _role_gradients(family, tied, exact)[2]]) <= bound


@PRECISIONS
def test_under_trained_the_identity_fails_by_the_predicted_amount(family, tied, exact, bound):
    """`trained` divides mSFT by fewer tokens: a learning-rate change posing as masking."""
    gradients_by_role = _role_gradients(family, tied, exact)
    num, num_e = COUNTS[1:].sum(), COUNTS[2]
    sft = _objective_gradient(family, tied, exact, "sft", "trained")
    msft = _objective_gradient(family, tied, exact, "msft", "trained")
    difference = _combine([1, -1], [sft, msft])
    _, prefix, deviation, undo, correction = gradients_by_role
    share = num_e / (num * (num - num_e))
    predicted = _combine([1 / num, -share, -share, -share], [deviation, prefix, undo, correction])
    assert gap(difference, predicted) <= bound
    assert gap(difference, [g / num for g in deviation]) > 0.01
