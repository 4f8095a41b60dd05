"""The canary: quiet on healthy models, loud on every leak and every wrong loss."""

# ruff: noqa: PLR0917 (stand-ins have the signatures of what they replace)

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import FAMILIES, VOCAB, Traces, build, pack
from transformers import AttentionInterface

from nmar_ds.errors import IsolationError
from nmar_ds.model import training_model
from nmar_ds.model.attention import ATTENTION_NAME, register
from nmar_ds.model.canary import NUM_CALLS, run_canary
from nmar_ds.model.probe import sampled_positions
from nmar_ds.model.training_model import UndoTrainingModel
from nmar_ds.model.weighting import role_weights

torch.set_num_threads(1)

LENGTHS = [9, 14, 6, 1, 20, 11, 5]
ROWS = [[0, 1, 2, 3], [4, 5]]
LENGTH = 36


@pytest.fixture(autouse=True)
def _restore():
    yield
    register()


def _batch(rows=ROWS, lengths=LENGTHS, length=LENGTH):
    return pack(Traces(lengths, seed=2), rows, length)


def _run(model, batch=None, *, dtype=torch.float32, weights="msft", calls=None, **more):
    def call(mode, input_ids, position_ids, layout, **tensors):
        if calls is not None:
            calls.append(mode)
        return model(input_ids, position_ids, layout, mode=mode, **tensors)

    return run_canary(
        call,
        batch or _batch(),
        weights=role_weights(weights),
        vocab_size=VOCAB,
        dtype=dtype,
        **more,
    )


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weights", ["msft", "sft"])
def test_healthy_models_pass(family, dtype, weights):
    model = UndoTrainingModel(build(family, dtype=dtype))
    report = _run(model, dtype=dtype, weights=weights)
    assert report.notes == ()
    assert len(report.checks) == 2 + 3 * 2 + 2 * 3
    for name in ("trace 1 of 6", "trace 4 of 6", "trace 6 of 6", "naive cross-entropy"):
        assert name in str(report)


def test_gradients_are_not_recorded_and_the_model_is_not_changed():
    model = UndoTrainingModel(build())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _run(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("rows", "note"),
    [
        (ROWS, None),
        ([[0], []], "1 traces in the batch: checked on 9 tokens, twice"),
        ([[4]], "1 traces in the batch: checked on 18 tokens, twice"),
        ([[]], "0 traces in the batch: checked on 18 tokens, twice"),
        ([[3, 3]], "the loss could not be checked"),
    ],
)
def test_number_of_calls_is_fixed_and_gaps_are_reported(rows, note):
    calls = []
    report = _run(UndoTrainingModel(build()), _batch(rows), calls=calls)
    assert len(calls) == NUM_CALLS
    assert calls.count("loss") == 2
    assert "; ".join(report.notes).endswith(note or "")
    assert bool(report.notes) == (note is not None)


def test_rows_of_one_token_are_reported_as_unchecked():
    calls = []
    report = _run(UndoTrainingModel(build()), _batch([[3]], length=1), calls=calls)
    assert len(calls) == NUM_CALLS
    assert "isolation could not be checked" in report.notes[0]


def test_number_of_calls_is_fixed_when_checks_fail():
    calls = []
    with _leak(_plain_causal), pytest.raises(IsolationError):
        _run(UndoTrainingModel(build()), calls=calls)
    assert len(calls) == NUM_CALLS


def test_a_single_trace_still_finds_a_leak():
    with _leak(_plain_causal), pytest.raises(IsolationError, match="trace 2 of 2"):
        _run(UndoTrainingModel(build()), _batch([[0]]))


def test_masked_rows_get_weights_to_check_the_loss_with():
    batch = _batch()
    roles = np.where(batch.roles == 255, 255, 2).astype(np.uint8)
    target_roles = np.where(batch.target_roles == 255, 255, 2).astype(np.uint8)
    batch = dataclasses.replace(batch, roles=roles, target_roles=target_roles)
    report = _run(UndoTrainingModel(build()), batch)
    assert "no row has a trained target" in report.notes[0]


@pytest.mark.parametrize(("start", "end"), [(0, 1), (3, 67), (10, 75), (100, 5000)])
def test_sampled_positions_hold_both_ends(start, end):
    places = sampled_positions(start, end)
    assert len(places) <= 64
    assert (np.diff(places) > 0).all()
    edge = min(16, end - start)
    assert places[:edge].tolist() == list(range(start, start + edge))
    assert places[-edge:].tolist() == list(range(end - edge, end))
    assert np.diff(places).max(initial=1) <= (end - start) / 25 + 1


def test_long_traces_are_sampled():
    batch = _batch([[0, 1, 2]], lengths=[100, 120, 80], length=300)
    model = UndoTrainingModel(build())
    sizes = []

    def call(mode, *inputs, **tensors):
        sizes.append(tensors.get("positions_M", torch.zeros(0)).numel())
        return model(*inputs, mode=mode, **tensors)

    run_canary(call, batch, weights=role_weights("sft"), vocab_size=VOCAB, dtype=torch.float32)
    assert max(sizes[:7]) <= 3 * 64
    with _leak(_off_by_one), pytest.raises(IsolationError):
        _run(model, batch)


# --- leaks --------------------------------------------------------------------------------------


class _leak:
    """Replace the registered attention for a while."""

    def __init__(self, attention):
        self.attention = attention

    def __enter__(self):
        AttentionInterface.register(ATTENTION_NAME, self.attention)

    def __exit__(self, *_):
        register()


def _sdpa(query, key, value, allowed, scaling):
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scaling)
    return out.transpose(1, 2), None


def _segment_of(layout, shape):
    """Segment number of each token, -1 for padding, from the layout's own index tensors."""
    segment = torch.full((layout.num_tokens,), -1)
    at = number = 0
    for bucket in layout.buckets:
        slots = torch.arange(bucket.num_tokens) if bucket.slots is None else bucket.slots
        places = layout.order[at : at + bucket.num_tokens]
        segment[places] = number + slots // bucket.padded_length
        at, number = at + bucket.num_tokens, number + bucket.num_segments
    return segment.view(shape)


def _plain_causal(module, query, key, value, mask, scaling=None, segment_layout=None, **_):
    T = query.shape[2]
    return _sdpa(query, key, value, torch.ones(T, T, dtype=torch.bool).tril(), scaling)


def _masked(visible):
    def attention(module, query, key, value, mask, scaling=None, segment_layout=None, **_):
        B, _, T, _ = query.shape
        segment = _segment_of(segment_layout, (B, T))
        allowed = visible(segment[:, :, None], segment[:, None, :])
        allowed = allowed & torch.ones(T, T, dtype=torch.bool).tril()
        return _sdpa(
            query, key, value, (allowed | torch.eye(T, dtype=torch.bool))[:, None], scaling
        )

    return attention


def _off_by_one(module, query, key, value, mask, scaling=None, segment_layout=None, **_):
    """The last token of a trace is taken for the next one's first."""
    B, _, T, _ = query.shape
    segment = _segment_of(segment_layout, (B, T))
    shifted = torch.cat([segment[:, 1:], segment[:, -1:]], dim=1)
    allowed = (segment[:, :, None] == shifted[:, None, :]) & torch.ones(
        T, T, dtype=torch.bool
    ).tril()
    return _sdpa(query, key, value, (allowed | torch.eye(T, dtype=torch.bool))[:, None], scaling)


def _future(module, query, key, value, mask, scaling=None, segment_layout=None, **_):
    """Isolated, but not causal."""
    B, _, T, _ = query.shape
    segment = _segment_of(segment_layout, (B, T))
    return _sdpa(query, key, value, (segment[:, :, None] == segment[:, None, :])[:, None], scaling)


def _tiny_leak(module, query, key, value, mask, scaling=None, segment_layout=None, **_):
    """Right to seven digits, and still touched by the neighbours."""
    out, _ = _masked(torch.eq)(
        module, query, key, value, mask, scaling=scaling, segment_layout=segment_layout
    )
    return out + 1e-7 * out.mean(dim=1, keepdim=True), None


@pytest.mark.parametrize("family", ["llama", "gemma", "phi"])
@pytest.mark.parametrize("attention", [_plain_causal, _off_by_one], ids=["row", "off by one"])
def test_leaks_are_caught(family, attention):
    model = UndoTrainingModel(build(family))
    with _leak(attention), pytest.raises(IsolationError) as caught:
        _run(model)
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(
        r"^canary: attention segments on cpu in torch.float32: trace \d of 6 \(row \d, token "
        r"\d+ on\): change of its logits with its neighbours: [\d.e-]+, expected <= 0",
        message,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_leaks_are_caught_in_other_precisions(dtype):
    with _leak(_plain_causal), pytest.raises(IsolationError, match="neighbours"):
        _run(UndoTrainingModel(build(dtype=dtype)), dtype=dtype)


def test_a_leak_below_rounding_is_caught():
    with _leak(_tiny_leak), pytest.raises(IsolationError, match="neighbours"):
        _run(UndoTrainingModel(build()))


def test_correct_masks_pass_and_so_do_not_hide_the_others():
    """The stand-ins above fail for their leak, not for being stand-ins."""
    with _leak(_masked(torch.eq)):
        _run(UndoTrainingModel(build()))


def test_attention_that_forgets_part_of_a_trace_is_caught():
    """Isolated from the neighbours in every bit, and yet not the trace's own result."""
    attention = _masked(lambda query, key: torch.zeros_like(query == key))

    def first_only(module, query, key, value, mask, scaling=None, segment_layout=None, **more):
        if query.shape[0] * query.shape[2] < 2 * LENGTH:  # the trace alone: as it should be
            right = _masked(torch.eq)
            return right(
                module, query, key, value, mask, scaling=scaling, segment_layout=segment_layout
            )
        return attention(
            module, query, key, value, mask, scaling=scaling, segment_layout=segment_layout
        )

    with _leak(first_only), pytest.raises(IsolationError, match="packed against alone"):
        _run(UndoTrainingModel(build()))


def test_stock_sdpa_with_an_all_ones_mask_is_caught():
    """huggingface/transformers#46634: position ids isolate only while no mask is given."""
    lm = build(attention="sdpa")

    def call(mode, input_ids, position_ids, layout, *, positions_M=None, **_):
        mask = torch.ones_like(input_ids)
        logits = lm(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False
        ).logits.flatten(0, 1)
        if mode != "loss":
            return logits[positions_M]
        return torch.zeros(()), torch.zeros(5), torch.zeros(5), torch.zeros(())

    with pytest.raises(IsolationError, match=r"attention sdpa .* neighbours"):
        run_canary(
            call,
            _batch(),
            weights=role_weights("msft"),
            vocab_size=VOCAB,
            dtype=torch.float32,
            backend="sdpa",
        )


def test_broken_numbers_do_not_pass():
    lm = build()
    with torch.no_grad():
        lm.lm_head.weight[5] = torch.nan
    with pytest.raises(IsolationError, match="nan"):
        _run(UndoTrainingModel(lm))


# --- wrong losses -------------------------------------------------------------------------------


def _with_loss(monkeypatch, change):
    """Wrap the loss that the training module calls."""
    right = training_model.weighted_cross_entropy

    def wrong(hidden, weight, bias, targets, weights, **more):
        return change(right, hidden, weight, bias, targets, weights, **more)

    monkeypatch.setattr(training_model, "weighted_cross_entropy", wrong)


def _shifted(right, hidden, weight, bias, targets, weights, **more):
    return right(hidden, weight, bias, targets.roll(1), weights, **more)


def _factor(right, hidden, weight, bias, targets, weights, **more):
    loss, *rest = right(hidden, weight, bias, targets, weights, **more)
    return loss * 2, *rest


def _mean(right, hidden, weight, bias, targets, weights, **more):
    loss, *rest = right(hidden, weight, bias, targets, weights, **more)
    return loss / max(len(targets), 1), *rest


def _unweighted(right, hidden, weight, bias, targets, weights, **more):
    return right(hidden, weight, bias, targets, (weights != 0).to(weights), **more)


def _no_bias(right, hidden, weight, bias, targets, weights, **more):
    return right(hidden, weight, None, targets, weights, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [_shifted, _factor, _mean])
def test_wrong_losses_are_caught(monkeypatch, change, dtype):
    model = UndoTrainingModel(build(dtype=dtype, initializer_range=0.02))
    _run(model, dtype=dtype)
    _with_loss(monkeypatch, change)
    with pytest.raises(IsolationError, match=r"row \d, .*targets: loss"):
        _run(model, dtype=dtype)


def test_a_shift_that_hides_within_bfloat16_is_caught_by_the_likeliest_targets(monkeypatch):
    """In a fresh model all true targets cost about ln(V), whichever row they are taken from."""
    lm = build(dtype=torch.bfloat16, initializer_range=0.02, vocab_size=2000)
    batch = _batch([[0, 1, 2]], lengths=[100, 120, 70], length=300)
    _with_loss(monkeypatch, _shifted)
    with pytest.raises(IsolationError, match="the likeliest targets: loss against naive"):
        _run(UndoTrainingModel(lm), batch, dtype=torch.bfloat16, weights="sft")


def test_a_forgotten_head_bias_is_caught(monkeypatch):
    _with_loss(monkeypatch, _no_bias)
    with pytest.raises(IsolationError, match="naive cross-entropy"):
        _run(UndoTrainingModel(build("phi")))


def test_forgotten_weights_are_caught(monkeypatch):
    _with_loss(monkeypatch, _unweighted)

    def run(weights):
        run_canary(
            lambda mode, *inputs, **tensors: model(*inputs, mode=mode, **tensors),
            _batch(),
            weights=np.array(weights),
            vocab_size=VOCAB,
            dtype=torch.float32,
        )

    model = UndoTrainingModel(build())
    run([0, 1.0, 0, 1, 1])
    with pytest.raises(IsolationError, match="naive cross-entropy"):
        run([0, 1, 0, 2, 1])


def test_a_loss_on_other_tokens_is_caught(monkeypatch):
    """The mask one place off: the right weights at the wrong targets."""
    right = training_model._or_one
    monkeypatch.setattr(
        training_model,
        "_or_one",
        lambda rows, targets, weights, roles: right(
            (rows + 1)[targets[rows + 1] >= 0], targets, weights.roll(1) * (targets >= 0), roles
        ),
    )
    with pytest.raises(IsolationError, match=r"row \d, its targets: loss"):
        _run(UndoTrainingModel(build()))


def test_a_wrong_hidden_state_is_caught(monkeypatch):
    """The loss path skips something the model's own forward does."""
    right = UndoTrainingModel._hidden
    monkeypatch.setattr(UndoTrainingModel, "_hidden", lambda *a: right(*a) * 1.001)
    with pytest.raises(IsolationError, match="naive cross-entropy"):
        _run(UndoTrainingModel(build()))


@pytest.mark.parametrize("name", ["targets", "target_roles", "position_ids"])
def test_a_loader_s_mistake_is_caught(name):
    batch = _batch()
    wrong = np.roll(getattr(batch, name), 1)
    with pytest.raises(IsolationError, match=r"targets that|position ids that"):
        _run(UndoTrainingModel(build()), dataclasses.replace(batch, **{name: wrong}))
