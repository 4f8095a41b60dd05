"""Packed = padded = one by one, in loss and in every gradient (SPEC 6)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import Traces, build, gap, gradients, pack, reference_nll, reference_sums, run_ours

from nmar_ds.model import training_model
from nmar_ds.model.segments import SegmentLayout
from nmar_ds.model.training_model import UndoTrainingModel
from nmar_ds.model.weighting import role_weights

torch.set_num_threads(1)

LENGTHS = [7, 1, 19, 2, 30, 11, 1, 24]
ROWS = [[0, 1, 2, 3], [4, 6], [5, 7]]  # with padding of 11, 9 and 5
LENGTH = 40
FAMILIES = [
    ("llama", True),
    ("llama", False),
    ("qwen2", True),
    ("qwen3", False),
    ("mistral", False),
    ("gemma", True),
    ("phi", False),
]
MSFT = role_weights("msft")


def _ours(family, tied, dtype, weights, *, traces, rows=ROWS, checkpointing=False, **more):
    lm = build(family, tied=tied, dtype=dtype, **more)
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        assert lm.is_gradient_checkpointing
    lm.train()
    out = run_ours(UndoTrainingModel(lm, chunk_size=16), pack(traces, rows, LENGTH), weights)
    return out, gradients(lm, out.loss_sum)


def _alone(family, tied, dtype, weights, *, traces, rows=ROWS, attention="sdpa", **more):
    lm = build(family, tied=tied, dtype=dtype, attention=attention, **more)
    sums = reference_sums(lm, traces, [index for row in rows for index in row])
    loss = sum(weight * total for weight, total in zip(weights, sums, strict=True))
    return loss, sums, gradients(lm, loss)


def _padded(family, tied, dtype, weights, *, traces, **more):
    """All traces right-padded into one batch under a stock attention mask."""
    lm = build(family, tied=tied, dtype=dtype, attention="eager", **more)
    ids = torch.zeros(len(traces), max(LENGTHS), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index in range(len(traces)):
        trace = torch.from_numpy(traces.ids(index))
        ids[index, : len(trace)] = trace
        mask[index, : len(trace)] = 1
    log_p = lm(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    loss = 0.0
    for index in range(len(traces)):
        for place, role in enumerate(traces.roles(index)[1:]):
            loss = loss - weights[role] * log_p[index, place, ids[index, place + 1]]
    return loss, gradients(lm, loss)


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "exact", "bound"),
    [(torch.float32, False, 1e-5), (torch.float64, False, 1e-6), (torch.float64, True, 1e-10)],
    ids=["float32", "float64-stock", "float64-exact"],
)
def test_packed_equals_one_by_one(family, tied, dtype, exact, bound):
    traces = Traces(LENGTHS)
    ours, ours_gradients = _ours(family, tied, dtype, MSFT, traces=traces, exact=exact)
    loss, sums, expected = _alone(family, tied, dtype, MSFT, traces=traces, exact=exact)
    assert ours.loss_sum.dtype == dtype
    assert ours.loss_sum.item() == pytest.approx(loss.item(), rel=bound)
    for role in (1, 3, 4):
        assert float(ours.role_sums[role]) == pytest.approx(sums[role].item(), rel=bound)
    assert gap(ours_gradients, expected) <= bound


@pytest.mark.parametrize(
    ("family", "tied"), [("granite", False), ("cohere", True), ("gemma2", True)]
)
def test_models_that_change_their_logits(family, tied):
    """A factor, or a soft cap and sliding windows, as transformers' own forward has them."""
    traces = Traces(LENGTHS)
    ours, ours_gradients = _ours(family, tied, torch.float32, MSFT, traces=traces)
    loss, sums, expected = _alone(
        family, tied, torch.float32, MSFT, traces=traces, attention="eager"
    )
    assert ours.loss_sum.item() == pytest.approx(loss.item(), rel=1e-5)
    for role in (1, 3, 4):
        assert float(ours.role_sums[role]) == pytest.approx(sums[role].item(), rel=1e-5)
    assert gap(ours_gradients, expected) <= 1e-5


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gemma", True)])
def test_packed_equals_padded(family, tied):
    traces = Traces(LENGTHS)
    ours, ours_gradients = _ours(family, tied, torch.float32, MSFT, traces=traces)
    loss, expected = _padded(family, tied, torch.float32, MSFT, traces=traces)
    assert ours.loss_sum.item() == pytest.approx(loss.item(), rel=1e-5)
    assert gap(ours_gradients, expected) <= 1e-5


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", True), ("qwen3", False), ("mistral", False)]
)
def test_gradient_checkpointing_changes_nothing(family, tied):
    traces = Traces(LENGTHS)
    plain, plain_gradients = _ours(family, tied, torch.float32, MSFT, traces=traces)
    ours, ours_gradients = _ours(
        family, tied, torch.float32, MSFT, traces=traces, checkpointing=True
    )
    assert torch.equal(ours.loss_sum, plain.loss_sum)
    assert all(torch.equal(a, b) for a, b in zip(ours_gradients, plain_gradients, strict=True))
    _, _, expected = _alone(family, tied, torch.float32, MSFT, traces=traces, attention="eager")
    assert gap(ours_gradients, expected) <= 1e-5


def test_custom_weights_and_prompt_loss():
    weights = role_weights(
        "custom", dict(prompt=0.25, prefix=1, deviation=0.1, undo=3, correction=0.7)
    )
    traces = Traces(LENGTHS)
    ours, ours_gradients = _ours("llama", False, torch.float64, weights, traces=traces, exact=True)
    loss, _, expected = _alone("llama", False, torch.float64, weights, traces=traces, exact=True)
    assert ours.loss_sum.item() == pytest.approx(loss.item(), rel=1e-10)
    assert gap(ours_gradients, expected) <= 1e-10


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [[[0, 1]], [[1]], [[]]], ids=["masked", "one token", "filler"])
def test_nothing_trained_gives_zero_gradients_for_every_parameter(tied, rows):
    traces = Traces(LENGTHS)
    for roles in traces._roles:
        roles[:] = 2  # deviations only: masked under mSFT
    lm = build("llama", tied=tied).train()
    out = run_ours(UndoTrainingModel(lm), pack(traces, rows, LENGTH), MSFT)
    assert out.loss_sum.item() == 0.0
    assert out.role_counts.tolist() == [0] * 5
    out.loss_sum.backward()
    # every parameter has one, or ZeRO-3 waits for it on this rank for ever
    for name, parameter in lm.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_one_row_goes_through_the_head_where_nothing_is_trained(monkeypatch):
    """SPEC 3: the same collectives on every rank, whatever its targets."""
    right, num_rows = training_model.weighted_cross_entropy, []

    def spy(hidden, *arguments, **more):
        num_rows.append(len(hidden))
        return right(hidden, *arguments, **more)

    monkeypatch.setattr(training_model, "weighted_cross_entropy", spy)
    run_ours(UndoTrainingModel(build()), pack(Traces(LENGTHS), [[]], LENGTH), MSFT)
    assert num_rows == [1]


def test_masked_targets_do_not_go_through_the_head(monkeypatch):
    traces = Traces(LENGTHS)
    right, num_rows = training_model.weighted_cross_entropy, []

    def spy(hidden, *arguments, **more):
        num_rows.append(len(hidden))
        return right(hidden, *arguments, **more)

    monkeypatch.setattr(training_model, "weighted_cross_entropy", spy)
    run_ours(UndoTrainingModel(build()), pack(traces, [[4]], LENGTH), MSFT)
    assert num_rows == [int(np.isin(traces.roles(4)[1:], [1, 3, 4]).sum())]


def test_untrained_roles_are_reported_on_demand_and_change_nothing():
    traces = Traces(LENGTHS)
    lm = build("qwen2")
    model = UndoTrainingModel(lm)
    batch = pack(traces, ROWS, LENGTH)
    plain = run_ours(model, batch, MSFT)
    full = run_ours(model, batch, MSFT, also_untrained=True)
    assert torch.equal(plain.loss_sum, full.loss_sum)
    plain_gradients, full_gradients = gradients(lm, plain.loss_sum), gradients(lm, full.loss_sum)
    assert all(torch.equal(a, b) for a, b in zip(plain_gradients, full_gradients, strict=True))
    sums = reference_sums(build("qwen2", attention="sdpa"), traces, range(len(LENGTHS)))
    counts = [
        sum(int((traces.roles(i)[1:] == role).sum()) for i in range(len(LENGTHS)))
        for role in range(5)
    ]
    assert plain.role_counts.tolist() == [0, counts[1], 0, counts[3], counts[4]]
    assert full.role_counts.tolist() == [0, *counts[1:]]
    assert not full.role_sums.requires_grad
    for role in range(1, 5):
        assert float(full.role_sums[role]) == pytest.approx(sums[role].item(), rel=1e-5)
    assert plain.role_sums[2] == 0.0


def test_the_head_is_read_once_whatever_the_targets():
    """Under ZeRO-3 each read is a collective (trl#6696)."""
    lm = build("llama")
    model = UndoTrainingModel(lm, chunk_size=3)
    reads = []

    class Head:
        bias = None

        @property
        def weight(self):
            reads.append(1)
            return lm.lm_head.weight

    lm.get_output_embeddings = Head
    traces = Traces(LENGTHS)
    for rows in (ROWS, [[]], [[1], [0, 2]]):
        for also_untrained in (False, True):
            reads.clear()
            run_ours(model, pack(traces, rows, LENGTH), MSFT, also_untrained=also_untrained)
            assert len(reads) == 1


def test_logits_modes_agree_with_the_stock_model():
    traces = Traces(LENGTHS)
    lm = build("phi")
    model = UndoTrainingModel(lm)
    batch = pack(traces, ROWS, LENGTH)
    inputs = (
        torch.from_numpy(batch.input_ids),
        torch.from_numpy(batch.position_ids),
        SegmentLayout.from_cu_seqlens(batch.cu_seqlens, padding=batch.trace_ids < 0),
    )
    start = 8  # trace 2 begins after 7 + 1 tokens
    places = torch.arange(start, start + LENGTHS[2])
    with torch.no_grad():
        ours = model(*inputs, mode="logits", positions_M=places)
        stock = model(*inputs, mode="stock_logits", positions_M=places)
        alone = build("phi", attention="eager")(
            input_ids=torch.from_numpy(traces.ids(2))[None], use_cache=False
        ).logits[0]
    torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stock, alone, rtol=1e-5, atol=1e-5)


def test_reference_is_not_trivial():
    """The gradients compared above are far from zero and differ between objectives."""
    traces = Traces(LENGTHS)
    lm = build("llama", attention="sdpa")
    nll, roles = reference_nll(lm, traces, 4)
    assert nll.std().item() > 0.5
    assert set(roles.tolist()) == {0, 1, 2, 3, 4}
    _, _, masked = _alone("llama", False, torch.float32, MSFT, traces=traces)
    _, _, full = _alone("llama", False, torch.float32, role_weights("sft"), traces=traces)
    assert gap(masked, full) > 0.05
