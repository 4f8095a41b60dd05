"""Negative weights with a clip, unlikelihood, the `traces` denominator: by hand, and independently."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import Traces, build, gap, gradients, pack, reference_nll, run_ours

from nmar_ds.errors import IsolationError
from nmar_ds.model import training_model
from nmar_ds.model.canary import run_canary
from nmar_ds.model.objective import weighted_cross_entropy
from nmar_ds.model.training_model import UndoTrainingModel
from nmar_ds.model.weighting import LossOptions, denominator, role_weights

torch.set_num_threads(1)

LENGTHS = [7, 1, 19, 2, 30, 11, 1, 24]
ROWS = [[0, 1, 2, 3], [4, 6], [5, 7]]
LENGTH = 40
DEVIATION = 2


def _by_logits(logits, targets, weights, *, penalties=None, clip=None, dtype=torch.float64):
    """The loss of rows with given logits, and its gradient with respect to them.

    The head is the identity, so hidden states are logits and their gradients are logit gradients.
    """
    hidden = torch.tensor(logits, dtype=dtype, requires_grad=True)
    head = torch.eye(hidden.shape[1], dtype=dtype, requires_grad=True)
    result = weighted_cross_entropy(
        hidden, head, None, torch.tensor(targets), torch.tensor(weights, dtype=dtype),
        penalties_N=None if penalties is None else torch.tensor(penalties, dtype=dtype),
        nll_clip=clip,
    )  # fmt: skip
    by_hidden, by_head = torch.autograd.grad(result.loss_sum, (hidden, head))
    # the identity's own gradient is the outer product of the same numbers
    torch.testing.assert_close(by_head, by_hidden.t() @ hidden.detach())
    return result, by_hidden


# --- by hand ------------------------------------------------------------------------------------


def test_negative_weight_by_hand():
    """Two tokens with logits (ln 3, 0): p = (3/4, 1/4), so the losses are ln 4/3 and ln 4.

    Weight -1/2, clip 1: the first (0.288) is below the clip, the second (1.386) beyond it.
    """
    logits = [[math.log(3), 0.0], [math.log(3), 0.0]]
    result, grad = _by_logits(logits, [0, 1], [-0.5, -0.5], clip=1.0)
    assert result.loss_sum.item() == pytest.approx(-0.5 * math.log(4 / 3) - 0.5 * 1.0, rel=1e-14)
    assert result.nll_N.tolist() == pytest.approx([math.log(4 / 3), math.log(4)], rel=1e-14)
    # -1/2 (p - onehot) = -1/2 (-1/4, 1/4) below the clip; exactly nothing beyond it
    assert grad[0].tolist() == pytest.approx([0.125, -0.125], rel=1e-14)
    assert grad[1].tolist() == [0.0, 0.0]


def test_the_clip_leaves_other_weights_alone_by_hand():
    """The same rows with weights 2 and -1: only the negative one may be clipped."""
    logits = [[math.log(3), 0.0], [math.log(3), 0.0]]
    result, grad = _by_logits(logits, [1, 1], [2.0, -1.0], clip=1.0)
    assert result.loss_sum.item() == pytest.approx(2 * math.log(4) - 1.0, rel=1e-14)
    assert grad[0].tolist() == pytest.approx([2 * 0.75, 2 * -0.75], rel=1e-14)
    assert grad[1].tolist() == [0.0, 0.0]


def test_unlikelihood_by_hand():
    """Three tokens with p = (1/2, 1/3, 1/6), the target the second: -log(1 - 1/3) = ln 3/2.

    Its gradient is p_y (onehot - softmax over the others): 1/3 * (-3/4, 1, -1/4).
    """
    logits = [[math.log(3), math.log(2), 0.0]]
    result, grad = _by_logits(logits, [1], [0.0], penalties=[0.6])
    assert result.loss_sum.item() == pytest.approx(0.6 * math.log(1.5), rel=1e-14)
    assert result.unlikelihood_N.tolist() == pytest.approx([math.log(1.5)], rel=1e-14)
    assert result.nll_N.tolist() == pytest.approx([math.log(3)], rel=1e-14)
    assert grad[0].tolist() == pytest.approx([0.6 * -1 / 4, 0.6 / 3, 0.6 * -1 / 12], rel=1e-14)


@pytest.mark.parametrize("weight", [0.0, 1.0, -1.0])
def test_unlikelihood_beside_a_weight_by_hand(weight):
    """p = (3/4, 1/4), target the first: nll ln 4/3 and its gradient (-1/4, 1/4);
    unlikelihood ln 4 and 3/4 (1, -1)."""
    result, grad = _by_logits([[math.log(3), 0.0]], [0], [weight], penalties=[0.5], clip=0.9)
    assert result.loss_sum.item() == pytest.approx(
        weight * math.log(4 / 3) + 0.5 * math.log(4), rel=1e-14
    )
    both = weight * -0.25 + 0.5 * 0.75
    assert grad[0].tolist() == pytest.approx([both, -both], rel=1e-14)


def test_beyond_the_clip_the_unlikelihood_still_pushes_by_hand():
    """p = (3/4, 1/4), target the second with nll ln 4 > 1: only 1/2 * 1/4 * (-1, 1) is left."""
    result, grad = _by_logits([[math.log(3), 0.0]], [1], [-1.0], penalties=[0.5], clip=1.0)
    assert result.loss_sum.item() == pytest.approx(-1 + 0.5 * math.log(4 / 3), rel=1e-14)
    assert grad[0].tolist() == pytest.approx([-0.125, 0.125], rel=1e-14)


def test_traces_denominator_by_hand():
    """Two traces of 2 and 4 trained targets with p = 1/2 each, in a head of two equal logits.

    L = (2 ln 2 + 4 ln 2) / 2 traces = 3 ln 2, where a mean over tokens would be ln 2.
    """
    result, grad = _by_logits([[0.0, 0.0]] * 6, [0, 1] * 3, [1.0] * 6)
    divisor = denominator("traces", [9, 2, 0, 0, 4], role_weights("msft"), 2)
    assert divisor == 2
    assert result.loss_sum.item() / divisor == pytest.approx(3 * math.log(2), rel=1e-14)
    assert (grad[0] / divisor).tolist() == pytest.approx([-0.25, 0.25], rel=1e-14)


# --- at the edges -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("lead", [30.0, 200.0, 1e4])
def test_unlikelihood_is_finite_as_p_goes_to_1(dtype, lead):
    """No clamp: the value is the target's lead over the others, the gradient (1, -1/2, -1/2)."""
    result, grad = _by_logits([[lead, 0.0, 0.0]], [0], [0.0], penalties=[1.0], dtype=dtype)
    value = float(result.unlikelihood_N[0])
    assert value == pytest.approx(lead - math.log(2), rel=1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert grad[0].tolist() == pytest.approx([1.0, -0.5, -0.5], rel=1e-6)


def test_unlikelihood_is_exact_as_p_goes_to_0():
    """-log(1 - p) is p itself there, and must not drown in the rounding of two large numbers."""
    result, grad = _by_logits([[-25.0, 0.0]], [0], [0.0], penalties=[1.0], dtype=torch.float32)
    p = math.exp(-25.0)
    assert float(result.unlikelihood_N[0]) == pytest.approx(p, rel=1e-5)
    assert grad[0].tolist() == pytest.approx([p, -p], rel=1e-5)


def test_rows_beyond_the_clip_give_nothing_whatever_is_in_them():
    """An infinite loss, even, is worth the clip and moves nothing."""
    hidden = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    head = torch.tensor([[0.0, -torch.inf], [1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    result = weighted_cross_entropy(hidden, head, None, torch.tensor([0, 0]), weights, nll_clip=3.0)
    assert result.loss_sum.item() == -6.0
    assert torch.isinf(result.nll_N).all()
    (by_head,) = torch.autograd.grad(result.loss_sum, [head])
    assert not by_head.any()


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(0, 40),
    chunk_size=st.sampled_from([1, 3, 16, 1000]),
    clip=st.sampled_from([None, 0.5, 3.0]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_loss_and_gradients_equal_naive(num_rows, chunk_size, clip, bias, seed):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, head = random(num_rows, 8).requires_grad_(), random(23, 8).requires_grad_()
    offset = random(23).requires_grad_() if bias else None
    targets = torch.randint(23, (num_rows,), generator=generator)
    weights = random(num_rows) if clip else random(num_rows).abs()
    weights[torch.rand(num_rows, generator=generator) < 0.3] = 0
    penalties = random(num_rows).abs()
    penalties[torch.rand(num_rows, generator=generator) < 0.5] = 0
    ours = weighted_cross_entropy(
        hidden, head, offset, targets, weights,
        penalties_N=penalties, nll_clip=clip, chunk_size=chunk_size,
    )  # fmt: skip
    logits = hidden @ head.t() + (0 if offset is None else offset)
    nll = -logits.log_softmax(-1)[torch.arange(num_rows), targets]
    pushed = -(1 - (-nll).exp()).log()
    kept = nll if clip is None else torch.where(weights < 0, nll.clamp(max=clip), nll)
    expected = (weights * kept + penalties * pushed).sum()
    torch.testing.assert_close(ours.loss_sum, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.nll_N, nll.detach(), rtol=1e-12, atol=1e-12)
    shown = torch.where(penalties == 0, 0.0, pushed.detach())
    torch.testing.assert_close(ours.unlikelihood_N, shown, rtol=1e-9, atol=1e-12)
    wanted = [t for t in (hidden, head, offset) if t is not None]
    for a, b in zip(
        torch.autograd.grad(ours.loss_sum * 0.37, wanted),
        torch.autograd.grad(expected * 0.37, wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


# --- the training module against each trace alone -----------------------------------------------

CASES = {
    "negative": (dict(prefix=1, deviation=-0.4, undo=1, correction=2), dict(nll_clip=4.0)),
    "negative prompt": (
        dict(prompt=-0.2, prefix=1, deviation=0, undo=1, correction=1), dict(nll_clip=4.0)
    ),
    "unlikelihood, masked": (
        dict(prefix=1, deviation=0, undo=1, correction=1), dict(unlikelihood=0.7)
    ),
    "unlikelihood, trained": (
        dict(prefix=1, deviation=0.5, undo=1, correction=1), dict(unlikelihood=0.7)
    ),
    "both": (
        dict(prefix=1, deviation=-0.4, undo=1, correction=1), dict(nll_clip=4.0, unlikelihood=0.7)
    ),
    "nothing else": (
        dict(prefix=0, deviation=0, undo=0, correction=0), dict(unlikelihood=0.7)
    ),
}  # fmt: skip
EACH_CASE = pytest.mark.parametrize("case", CASES)


def _objective(case):
    custom, options = CASES[case]
    options = LossOptions(**options)
    return role_weights("custom", custom, options), options


def _reference(lm, traces, weights, options):
    """Trace by trace, the stock model, and sums written down role by role."""
    loss, pushed, num_beyond = 0.0, 0.0, 0
    for index in range(len(traces)):
        nll, roles = reference_nll(lm, traces, index)
        for role in range(5):
            of_role = nll[torch.from_numpy(roles == role)]
            if weights[role] < 0:
                num_beyond += int((of_role > options.nll_clip).sum())
                of_role = torch.minimum(of_role, torch.tensor(options.nll_clip).to(of_role))
            loss = loss + weights[role] * of_role.sum()
        p = (-nll[torch.from_numpy(roles == DEVIATION)]).exp()
        pushed = pushed - (1 - p).log().sum()
    return loss + options.unlikelihood * pushed, float(pushed.detach()), num_beyond


@EACH_CASE
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("gemma", True), ("phi", False)])
def test_packed_equals_one_by_one_in_float64(case, family, tied):
    traces = Traces(LENGTHS)
    weights, options = _objective(case)
    lm = build(family, tied=tied, dtype=torch.float64, exact=True).train()
    model = UndoTrainingModel(lm, chunk_size=16, options=options)
    ours = run_ours(model, pack(traces, ROWS, LENGTH), weights)
    ours_gradients = gradients(lm, ours.loss_sum)
    alone = build(family, tied=tied, dtype=torch.float64, exact=True, attention="sdpa")
    loss, pushed, num_beyond = _reference(alone, traces, weights, options)
    if options.nll_clip is not None:
        assert num_beyond > 3, "the clip must bite"
    assert ours.loss_sum.item() == pytest.approx(loss.item(), rel=1e-10)
    assert gap(ours_gradients, gradients(alone, loss)) <= 1e-10
    assert ours.unlikelihood_sum.dtype == torch.float64
    expected = pushed if options.unlikelihood else 0.0
    assert ours.unlikelihood_sum.item() == pytest.approx(expected, rel=1e-10)
    assert not ours.unlikelihood_sum.requires_grad


@EACH_CASE
def test_role_sums_stay_plain_losses(case):
    """Neither clipped nor pushed; and the deviations are counted once, trained or not."""
    traces = Traces(LENGTHS)
    weights, options = _objective(case)
    model = UndoTrainingModel(build(dtype=torch.float64), options=options)
    ours = run_ours(model, pack(traces, ROWS, LENGTH), weights, also_untrained=True)
    alone = build(dtype=torch.float64, attention="sdpa")
    sums, counts = np.zeros(5), np.zeros(5, dtype=np.int64)
    for index in range(len(traces)):
        nll, roles = reference_nll(alone, traces, index)
        for role in range(5):
            sums[role] += float(nll[torch.from_numpy(roles == role)].detach().sum())
            counts[role] += (roles == role).sum()
    reported = [role for role in range(5) if role or weights[0]]
    assert [int(ours.role_counts[role]) for role in reported] == [counts[r] for r in reported]
    for role in reported:
        assert float(ours.role_sums[role]) == pytest.approx(sums[role], rel=1e-6)


def test_terms_of_other_roles_are_the_same_with_a_clip():
    """SPEC 4 (a) under the option: take the clipped deviations out, and the rest is untouched."""
    traces = Traces(LENGTHS)
    weights, options = _objective("negative")
    without = weights.copy()
    without[DEVIATION] = 0
    lm = build(dtype=torch.float64, exact=True)
    batch = pack(traces, ROWS, LENGTH)
    whole = run_ours(UndoTrainingModel(lm, options=options), batch, weights)
    plain = run_ours(UndoTrainingModel(lm), batch, without)
    for role in (1, 3, 4):
        assert float(whole.role_sums[role]) == pytest.approx(
            float(plain.role_sums[role]), rel=1e-14
        )
    alone = build(dtype=torch.float64, exact=True, attention="sdpa")
    only = np.zeros(5)
    only[DEVIATION] = weights[DEVIATION]
    loss, _, _ = _reference(alone, traces, only, options)
    rest = [
        a - b for a, b in zip(gradients(lm, whole.loss_sum), gradients(alone, loss), strict=True)
    ]
    assert gap(rest, gradients(lm, plain.loss_sum)) <= 1e-10


def test_pushed_rows_go_through_the_head_and_a_filler_row_still_does(monkeypatch):
    traces = Traces(LENGTHS)
    _, options = _objective("nothing else")
    right, num_rows = training_model.weighted_cross_entropy, []

    def spy(hidden, *arguments, **more):
        num_rows.append(len(hidden))
        return right(hidden, *arguments, **more)

    monkeypatch.setattr(training_model, "weighted_cross_entropy", spy)
    lm = build()
    model = UndoTrainingModel(lm, options=options)
    run_ours(model, pack(traces, [[4]], LENGTH), np.zeros(5))
    out = run_ours(model, pack(traces, [[]], LENGTH), np.zeros(5))
    assert num_rows == [int((traces.roles(4)[1:] == DEVIATION).sum()), 1]
    assert out.loss_sum.item() == 0.0 and out.unlikelihood_sum.item() == 0.0
    out.loss_sum.backward()
    for name, parameter in lm.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_held_out_losses_know_nothing_of_the_options():
    traces = Traces(LENGTHS)
    batch = pack(traces, ROWS, LENGTH)
    lm = build()
    _, options = _objective("both")
    plain, pushed = (
        _nll(UndoTrainingModel(lm, options=o), batch) for o in (LossOptions(), options)
    )
    assert torch.equal(plain, pushed) and plain.max() > options.nll_clip


def test_the_loss_of_an_undo_wherever_a_response_goes_on():
    """Against the stock model's own distribution, each trace alone."""
    traces = Traces(LENGTHS)
    batch = pack(traces, ROWS, LENGTH)
    lm = build()
    of_target, of_undo = _nll(UndoTrainingModel(lm), batch, undo_id=7)
    assert torch.equal(of_target, _nll(UndoTrainingModel(lm), batch))
    lm.set_attn_implementation("eager")
    for trace, start in zip(batch.trace_ids, batch.cu_seqlens, strict=False):
        if trace < 0:
            continue
        ids = torch.from_numpy(traces.ids(int(trace)).astype(np.int64))[None]
        with torch.no_grad():
            log_p = lm(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        for place, role in enumerate(traces.roles(int(trace))[1:].tolist()):
            expected = 0.0 if role == 0 else -float(log_p[place, 7])
            assert float(of_undo[start + place]) == pytest.approx(expected, abs=2e-5)


def _nll(model, batch, **more):
    from nmar_ds.training.loop import forward_arguments

    with torch.no_grad():
        arguments = forward_arguments(batch, np.zeros(5), torch.device("cpu"))
        return model(**arguments, mode="nll", **more)


# --- the canary ---------------------------------------------------------------------------------


def _canary(model, weights, options, dtype=torch.float32):
    return run_canary(
        lambda mode, *inputs, **tensors: model(*inputs, mode=mode, **tensors),
        pack(Traces([9, 14, 6, 1, 20, 11, 5], seed=2), [[0, 1, 2, 3], [4, 5]], 36),
        weights=weights,
        options=options,
        vocab_size=61,
        dtype=dtype,
    )


@EACH_CASE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_the_canary_is_quiet_with_options(case, dtype, family):
    weights, options = _objective(case)
    model = UndoTrainingModel(build(family, dtype=dtype), options=options)
    report = _canary(model, weights, options, dtype)
    assert report.notes == ()
    assert len(report.checks) == 2 + 3 * 2 + 2 * (4 if options.unlikelihood else 3)


@pytest.mark.parametrize("case", ["negative", "unlikelihood, masked", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_canary_sees_a_model_that_was_not_told(case, dtype):
    weights, options = _objective(case)
    model = UndoTrainingModel(build(dtype=dtype))
    with pytest.raises(IsolationError, match=r"loss against naive|unlikelihood of"):
        _canary(model, weights, options, dtype)


@pytest.mark.parametrize("change", ["sign", "sum", "clip all"])
def test_the_canary_sees_wrong_options(monkeypatch, change):
    weights, options = _objective("both")
    right = training_model.weighted_cross_entropy

    def wrong(*arguments, penalties_N, nll_clip, **more):
        if change == "sign":
            return right(*arguments, penalties_N=-penalties_N, nll_clip=nll_clip, **more)
        result = right(*arguments, penalties_N=penalties_N, nll_clip=nll_clip, **more)
        if change == "sum":
            return result._replace(unlikelihood_N=result.unlikelihood_N * 2)
        clipped = (result.nll_N - nll_clip).clamp(min=0)
        positive = arguments[4].clamp(min=0)
        return result._replace(loss_sum=result.loss_sum - (positive * clipped).sum())

    monkeypatch.setattr(training_model, "weighted_cross_entropy", wrong)
    with pytest.raises(IsolationError, match=r"naive cross-entropy|unlikelihood of the deviations"):
        _canary(UndoTrainingModel(build(), options=options), weights, options)
