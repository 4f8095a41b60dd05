"""The role-weighted loss against a naive one in float64, and the scalars around it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmar_ds.errors import ConfigError, VocabularyError
from nmar_ds.model.logits import LogitMap
from nmar_ds.model.objective import (
    default_chunk_size,
    role_sums,
    token_weights,
    weighted_cross_entropy,
)
from nmar_ds.model.weighting import LossOptions, denominator, role_weights, trained_roles
from nmar_ds.traces.schema import NO_ROLE

torch.set_num_threads(1)
V, H = 23, 8


def _problem(num_rows, dtype=torch.float64, seed=0, zero_rows=0.0, bias=True):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = (t.to(dtype).requires_grad_() for t in (random(num_rows, H), random(V, H)))
    offset = random(V).to(dtype).requires_grad_() if bias else None
    targets = torch.randint(V, (num_rows,), generator=generator)
    weights = random(num_rows).abs()
    weights[torch.rand(num_rows, generator=generator) < zero_rows] = 0
    return hidden, weight, offset, targets, weights


def _naive(hidden, weight, bias, targets, weights):
    logits = hidden.double() @ weight.double().t()
    if bias is not None:
        logits = logits + bias.double()
    nll = -logits.log_softmax(-1)[torch.arange(len(targets)), targets]
    return (weights.double() * nll).sum(), nll


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(0, 40),
    chunk_size=st.sampled_from([1, 3, 16, 40, 1000]),
    zero_rows=st.sampled_from([0.0, 0.4, 1.0]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_loss_and_gradients_equal_naive(num_rows, chunk_size, zero_rows, bias, seed):
    inputs = _problem(num_rows, zero_rows=zero_rows, bias=bias, seed=seed)
    loss, nll, _ = weighted_cross_entropy(*inputs, chunk_size=chunk_size)
    expected, expected_nll = _naive(*inputs)
    assert loss.dtype == nll.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(nll, expected_nll.detach(), rtol=1e-12, atol=1e-12)
    wanted = [tensor for tensor in inputs[:3] if tensor is not None]
    # an outer factor, as the engine applies W / D
    ours = torch.autograd.grad(loss * 0.37, wanted)
    naive = torch.autograd.grad(expected * 0.37, wanted)
    for a, b in zip(ours, naive, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("logit_map", [LogitMap(0.3), LogitMap(2.5, 4.0), LogitMap(cap=1.5)])
@pytest.mark.parametrize("chunk_size", [3, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("push", [False, True])
def test_factors_and_soft_caps(logit_map, chunk_size, dtype, push):
    """Against autograd through the same map, clipped and penalised rows among them."""
    hidden, weight, bias, targets, weights = _problem(20, dtype, zero_rows=0.3)
    weights[::4] = -0.5
    penalties = torch.where(torch.arange(20) % 3 == 0, 0.7, 0.0) if push else None
    loss, nll, _ = weighted_cross_entropy(
        hidden, weight, bias, targets, weights, penalties_N=penalties, nll_clip=3.0,
        logit_map=logit_map, chunk_size=chunk_size,
    )  # fmt: skip
    z = (hidden.double() @ weight.double().t() + bias.double()) * logit_map.scale
    if logit_map.cap is not None:
        z = logit_map.cap * torch.tanh(z / logit_map.cap)
    torch.testing.assert_close(
        logit_map(hidden @ weight.t() + bias).double(), z, rtol=1e-5, atol=1e-5
    )
    expected_nll = -z.log_softmax(-1)[torch.arange(20), targets]
    counted = torch.where(weights < 0, expected_nll.clamp(max=3.0), expected_nll)
    expected = (weights.double() * counted).sum()
    if penalties is not None:
        expected = expected - (penalties.double() * torch.log1p(-torch.exp(-expected_nll))).sum()
    bound = (
        {"rtol": 1e-10, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-4}
    )
    torch.testing.assert_close(nll.double(), expected_nll.detach(), **bound)
    torch.testing.assert_close(loss.double(), expected, **bound)
    for a, b in zip(
        torch.autograd.grad(loss, (hidden, weight, bias)),
        torch.autograd.grad(expected, (hidden, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **bound)


def test_gradcheck():
    hidden, weight, bias, targets, weights = _problem(5)
    assert torch.autograd.gradcheck(
        lambda h, w, b: weighted_cross_entropy(h, w, b, targets, weights, chunk_size=2)[0],
        (hidden, weight, bias),
    )


@pytest.mark.parametrize("chunk_size", [7, 64])
def test_float32(chunk_size):
    inputs = _problem(50, torch.float32)
    loss, nll, _ = weighted_cross_entropy(*inputs, chunk_size=chunk_size)
    expected, _ = _naive(*inputs)
    assert loss.dtype == nll.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(
        torch.autograd.grad(loss, inputs[:3]),
        torch.autograd.grad(expected, inputs[:3]),
        strict=True,
    ):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)


def test_bfloat16_sums_in_float32():
    """The loss and the sum over chunks of the weight's gradient keep float32's precision."""
    inputs = _problem(2000, torch.bfloat16)
    loss, nll, _ = weighted_cross_entropy(*inputs, chunk_size=4)
    expected, _ = _naive(*inputs)
    assert loss.dtype == nll.dtype == torch.float32
    # the only error is that of each row's bfloat16 logits
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    assert loss.item() == pytest.approx(float((inputs[4] * nll.double()).sum()), rel=1e-6)
    ours = torch.autograd.grad(loss, inputs[:3])
    naive = torch.autograd.grad(expected, inputs[:3])
    for a, b in zip(ours, naive, strict=True):
        assert a.dtype == torch.bfloat16
        # measured 4e-3; a bfloat16 accumulator over the 500 chunks gives 4e-2 and more
        assert float((a - b).float().norm() / b.float().norm()) < 1e-2


def test_under_bfloat16_gradients_take_the_weight_rounded_and_the_loss_as_it_is():
    """As `objective.weights` says in docs/configuration.md."""
    *inputs, _ = _problem(12, torch.bfloat16)
    found = {}
    for weight in (0.3, 0.30078125, 0.25):
        loss, *_ = weighted_cross_entropy(*inputs, torch.full((12,), weight))
        found[weight] = loss.detach(), torch.autograd.grad(loss, inputs[:3])
    (given, of_given), (rounded, of_rounded) = found[0.3], found[0.30078125]
    assert float(rounded / given) == pytest.approx(0.30078125 / 0.3, rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(of_given, of_rounded, strict=True))
    assert not torch.equal(of_given[1], found[0.25][1][1])


def test_zero_weight_rows_give_exactly_nothing():
    hidden, weight, bias, targets, weights = _problem(12, torch.float32, zero_rows=0.5)
    dead = weights == 0
    assert 0 < dead.sum() < 12
    clean = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    loss, *_ = weighted_cross_entropy(*clean, targets, weights)
    expected = torch.autograd.grad(loss, clean)
    with torch.no_grad():
        hidden[dead] = torch.tensor([torch.inf, torch.nan] * (H // 2))
    loss_beside, nll, _ = weighted_cross_entropy(hidden, weight, bias, targets, weights)
    ours = torch.autograd.grad(loss_beside, (hidden, weight, bias))
    assert torch.equal(loss, loss_beside)
    assert not torch.isfinite(nll[dead]).any()
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert not ours[0][dead].any()


def test_all_rows_of_weight_zero_and_no_rows():
    for num_rows in (0, 3):
        hidden, weight, bias, targets, weights = _problem(num_rows, zero_rows=1.0)
        loss, nll, _ = weighted_cross_entropy(hidden, weight, bias, targets, weights)
        assert loss.item() == 0.0
        assert nll.shape == (num_rows,)
        for gradient in torch.autograd.grad(loss, (hidden, weight, bias)):
            assert not gradient.any()


def test_nll_is_detached():
    hidden, weight, bias, targets, weights = _problem(4)
    loss, nll, _ = weighted_cross_entropy(hidden, weight, bias, targets, weights)
    assert loss.requires_grad
    assert not nll.requires_grad


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_no_gradient_is_formed_where_none_is_wanted(frozen, monkeypatch):
    inputs = list(_problem(6))
    inputs[frozen].requires_grad_(False)
    loss, *_ = weighted_cross_entropy(*inputs)
    wanted = [tensor for tensor in inputs[:3] if tensor.requires_grad]
    expected, _ = _naive(*inputs)
    for a, b in zip(
        torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_no_grad_skips_the_gradient_work(monkeypatch):
    inputs = _problem(6)
    with torch.no_grad():
        monkeypatch.setattr(torch.Tensor, "scatter_", None)  # only the gradients need it
        loss, *_ = weighted_cross_entropy(*inputs)
    assert not loss.requires_grad
    monkeypatch.undo()
    assert loss.item() == pytest.approx(_naive(*inputs)[0].item())
    monkeypatch.setattr(torch.Tensor, "scatter_", None)
    with pytest.raises(TypeError):
        weighted_cross_entropy(*inputs)


@pytest.mark.parametrize("bad", [-1, V, 10**9])
def test_target_outside_the_head_is_named(bad):
    hidden, weight, bias, targets, weights = _problem(5)
    targets[3] = bad
    with pytest.raises(VocabularyError, match=f"target id {bad}: .* from 0 to {V - 1}"):
        weighted_cross_entropy(hidden, weight, bias, targets, weights)


def test_large_logits_do_not_overflow():
    hidden, weight, bias, targets, weights = _problem(5, torch.float32)
    loss, *_ = weighted_cross_entropy(hidden * 1e4, weight, bias, targets, weights)
    assert torch.isfinite(loss)
    (gradient,) = torch.autograd.grad(loss, [weight])
    assert torch.isfinite(gradient).all()


def test_chunk_size_follows_memory():
    cpu = torch.device("cpu")
    assert default_chunk_size(49152, torch.float32, cpu) == (48 << 20) // (4 * 49152)
    assert default_chunk_size(49152, torch.float64, cpu) == (48 << 20) // (8 * 49152)
    assert default_chunk_size(10**7, torch.float32, cpu) == 16


# --- scalars ------------------------------------------------------------------------------------


def test_presets():
    assert role_weights("msft").tolist() == [0, 1, 0, 1, 1]
    assert role_weights("sft").tolist() == [0, 1, 1, 1, 1]
    custom = dict(prefix=1, deviation=0.5, undo=2, correction=1)
    assert role_weights("custom", custom).tolist() == [0, 1, 0.5, 2, 1]
    assert role_weights("custom", {**custom, "prompt": 0.1}).tolist() == [0.1, 1, 0.5, 2, 1]


@pytest.mark.parametrize(
    ("preset", "custom", "message"),
    [
        ("mstf", None, "objective.preset: 'mstf', expected one of msft, sft, custom"),
        ("msft", {"undo": 2}, "beside preset 'msft'"),
        ("custom", None, "prefix: missing"),
        ("custom", dict(prefix=1, deviation=-1, undo=1, correction=1), "deviation: -1.0.*nll_clip"),
        ("custom", dict(prefix=1, deviation=float("nan"), undo=1, correction=1), "finite"),
        ("custom", dict(prefix=0, deviation=0, undo=0, correction=0), "all are 0"),
        ("custom", dict(prefix=-1, deviation=0, undo=1, correction=1), "prefix: -1.0.*nll_clip"),
        ("custom", dict(prefix=1, deviaton=0, undo=0, correction=0), "expected deviation"),
    ],
)
def test_wrong_weights_are_refused(preset, custom, message):
    with pytest.raises(ConfigError, match=message):
        role_weights(preset, custom)


def test_a_negative_weight_needs_a_clip_and_a_clip_a_negative_weight():
    custom = dict(prefix=1, deviation=-0.5, undo=1, correction=1)
    clipped = LossOptions(nll_clip=2.0)
    assert role_weights("custom", custom, clipped).tolist() == [0, 1, -0.5, 1, 1]
    with pytest.raises(ConfigError, match=r"objective.nll_clip: 2.0, but no weight is negative"):
        role_weights("msft", None, clipped)
    with pytest.raises(ConfigError, match=r"deviation: -0.5.*set objective.nll_clip"):
        role_weights("custom", custom, LossOptions(unlikelihood=1.0))


def test_unlikelihood_trains_the_deviations_whatever_their_weight():
    push = LossOptions(unlikelihood=0.3)
    assert trained_roles(role_weights("msft")).tolist() == [False, True, False, True, True]
    assert trained_roles(role_weights("msft"), push).tolist() == [False, True, True, True, True]
    nothing = dict(prefix=0, deviation=0, undo=0, correction=0)
    assert not role_weights("custom", nothing, push).any()  # the push alone is something


def test_denominators_with_options():
    """By hand: N = (x 100, p 10, e 7, b 5, c 3), 4 traces."""
    counts = np.array([100, 10, 7, 5, 3])
    options = LossOptions(unlikelihood=0.25)
    for weights, trained in [
        (role_weights("msft"), 10 + 5 + 3 + 0.25 * 7),
        (role_weights("sft"), 10 + 7 + 5 + 3 + 0.25 * 7),
        (np.array([0, 1, -0.5, 1, 2.0]), 10 + 0.5 * 7 + 5 + 2 * 3 + 0.25 * 7),
    ]:
        assert denominator("trained", counts, weights, 4, options) == trained
        assert denominator("common", counts, weights, 4, options) == 25
        assert denominator("traces", counts, weights, 4, options) == 4
        assert denominator("sum", counts, weights, 4, options) == 1


def test_denominators():
    counts = np.array([100, 10, 7, 5, 3])
    weights = role_weights("msft")
    assert denominator("common", counts, weights, 4) == 25
    assert denominator("common", counts, role_weights("sft"), 4) == 25
    assert denominator("traces", counts, weights, 4) == 4
    assert denominator("sum", counts, weights, 4) == 1
    assert denominator("trained", counts, weights, 4) == 18
    assert denominator("trained", counts, role_weights("sft"), 4) == 25
    half = role_weights("custom", dict(prompt=0.5, prefix=0, deviation=0, undo=0, correction=2))
    assert denominator("trained", counts, half, 4) == 56
    only_masked = np.array([3, 0, 9, 0, 0])
    assert denominator("trained", only_masked, weights, 4) == 1
    assert denominator("common", np.zeros(5), weights, 0) == 1
    with pytest.raises(ConfigError, match="'mean'"):
        denominator("mean", counts, weights, 4)


def test_role_sums_and_token_weights():
    roles = torch.tensor([1, 2, 2, NO_ROLE, 4, 0], dtype=torch.uint8)
    nll = torch.tensor([1.0, torch.inf, 3.0, torch.nan, 5.0, 6.0])
    sums, counts = role_sums(nll, roles)
    assert sums.tolist() == [6.0, 1.0, torch.inf, 0.0, 5.0]
    assert sums.dtype == torch.float64
    assert counts.tolist() == [1, 1, 2, 0, 1]
    weights = token_weights(roles, np.array([0.5, 1, 0, 2, 3]), torch.float32)
    assert weights.tolist() == [1, 0, 0, 0, 3, 0.5]
    assert weights.dtype == torch.float32
    sums, counts = role_sums(nll[:0], roles[:0])
    assert sums.tolist() == [0.0] * 5 and counts.tolist() == [0] * 5
