"""Segments, buckets, and what the attention refuses."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, VOCAB, build

from nmar_ds.errors import ConfigError
from nmar_ds.model.attention import (
    ATTENTION_NAME,
    attention_name,
    check_supported,
    segment_attention,
)
from nmar_ds.model.backends import OTHERS, choose
from nmar_ds.model.segments import _PAIRS_PER_LAUNCH, _PAIRS_PER_TOKEN, SegmentLayout, _partition
from nmar_ds.model.training_model import UndoTrainingModel

torch.set_num_threads(1)
lengths_strategy = st.lists(st.integers(1, 90), min_size=1, max_size=12)


def _borders(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _qkv(num_rows, length, heads, groups, width, dtype=torch.float64, *, seed=0):  # noqa: PLR0917
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_rows, count, length, width) for count in (heads, groups, groups)]
    return [
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes
    ]


def _naive(q, k, v, borders, scale, window=None):  # noqa: PLR0917
    """Every segment by itself, with written-out softmax."""
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    repeat = q.shape[1] // k.shape[1]
    out = torch.zeros_like(flat[0][..., : v.shape[-1]])
    pieces = []
    for start, end in pairwise(borders):
        qs, ks, vs = (x[start:end].transpose(0, 1) for x in flat)
        ks, vs = (x.repeat_interleave(repeat, dim=0) for x in (ks, vs))
        scores = qs @ ks.transpose(1, 2) * scale
        every = torch.ones(end - start, end - start, dtype=torch.bool)
        future = every.triu(1) | every.tril(-(window or len(every)))
        pieces.append((scores.masked_fill(future, -torch.inf).softmax(-1) @ vs).transpose(0, 1))
    out = torch.cat(pieces)
    return out.view(q.shape[0], q.shape[2], *out.shape[1:])


@settings(max_examples=25, deadline=None)
@given(lengths=lengths_strategy, groups=st.sampled_from([1, 2, 4]), seed=st.integers(0, 9))
def test_equals_naive_attention_per_segment(lengths, groups, seed):
    borders = _borders(lengths)
    q, k, v = _qkv(1, int(borders[-1]), 4, groups, 8, seed=seed)
    layout = SegmentLayout.from_cu_seqlens(borders)
    ours = segment_attention(q, k, v, layout, 0.3)
    naive = _naive(q, k, v, borders, 0.3)
    torch.testing.assert_close(ours, naive, rtol=1e-11, atol=1e-11)
    upstream = torch.randn_like(naive)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), upstream),
        torch.autograd.grad(naive, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


HERE = {"segments": segment_attention, **{name: OTHERS[name] for name in ("flex", "masked")}}


@pytest.mark.parametrize("backend", HERE)
@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=6),
    groups=st.sampled_from([1, 4]),
    window=st.sampled_from([None, 1, 5, 30]),
)
def test_every_backend_equals_naive_attention(backend, lengths, groups, window):
    """Forward and backward, in two rows, whatever the window."""
    total = sum(lengths)
    borders = np.concatenate([_borders(lengths), total + _borders(lengths[::-1])[1:]])
    q, k, v = _qkv(2, total, 4, groups, 8, torch.float32)
    layout = SegmentLayout.from_cu_seqlens(borders)
    if backend == "flex":  # it has no backward on a CPU
        q, k, v = (x.detach() for x in (q, k, v))
    ours = HERE[backend](q, k, v, layout, 0.3, window)
    naive = _naive(q, k, v, borders, 0.3, window)
    torch.testing.assert_close(ours, naive, rtol=2e-5, atol=2e-5)
    for other in (7, window):  # other layers of the same layout
        again = HERE[backend](q, k, v, layout, 0.3, other)
        expected = _naive(q, k, v, borders, 0.3, other)
        torch.testing.assert_close(again, expected, rtol=2e-5, atol=2e-5)
    if backend == "flex":
        return
    upstream = torch.randn_like(naive)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), upstream),
        torch.autograd.grad(naive, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("backend", ["fa_varlen", "torch_varlen"])
@pytest.mark.parametrize("window", [None, 3])
def test_what_gpu_kernels_are_told(backend, window, monkeypatch):
    """Stand-ins that compute what the kernels' documentation says of the arguments they get.

    This shows that borders, window, scale and heads are passed on rightly, not that the kernels
    run: for that a GPU is needed.
    """
    import sys
    import types

    def kernel(q, k, v, borders, scale, left):  # noqa: PLR0917
        shaped = [x.transpose(0, 1)[None] for x in (q, k, v)]
        seen = None if left == -1 else left + 1
        return _naive(*shaped, borders.tolist(), scale, seen)[0]

    def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                               softmax_scale, causal, window_size):  # fmt: skip
        assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        assert window_size[1] == (-1 if window is None else 0)
        return kernel(q, k, v, cu_seqlens_q, softmax_scale, window_size[0])

    def varlen_attn(  # noqa: PLR0917
        q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa
    ):
        assert window_size[1] == 0 and enable_gqa and max_q == int(cu_seq_q.diff().max())
        assert torch.equal(cu_seq_q, cu_seq_k) and cu_seq_q.dtype == torch.int32
        return kernel(q, k, v, cu_seq_q, scale, window_size[0])

    fake = types.ModuleType("flash_attn")
    fake.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    borders = np.array([0, 5, 20, 31, 40])
    q, k, v = _qkv(2, 20, 4, 2, 8)
    padding = np.array([False, False, False, True])
    layout = SegmentLayout.from_cu_seqlens(borders, padding=padding)
    ours = OTHERS[backend](q, k, v, layout, 0.4, window)
    torch.testing.assert_close(ours, _naive(q, k, v, borders, 0.4, window))


def test_the_backend_is_chosen_by_hardware(monkeypatch):
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose("auto", cpu, torch.bfloat16) == "segments"
    assert choose("masked", cpu, torch.float32) == "masked"
    with pytest.raises(ConfigError, match=r"'fa_varlen' does not run on cpu, expected auto or"):
        choose("fa_varlen", cpu, torch.bfloat16)
    assert choose("auto", gpu, torch.bfloat16) == "torch_varlen"  # flash_attn is not here
    assert choose("auto", gpu, torch.float32) == "flex"
    with pytest.raises(ConfigError, match="'fa_varlen' needs the package flash_attn; auto takes"):
        choose("fa_varlen", gpu, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"'torch_varlen' needs model\.dtype bfloat16"):
        choose("torch_varlen", gpu, torch.float32)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert choose("auto", gpu, torch.bfloat16) == "fa_varlen"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 5))
    assert choose("auto", gpu, torch.bfloat16) == "flex"
    with pytest.raises(ConfigError, match="a GPU of compute capability 8"):
        choose("torch_varlen", gpu, torch.bfloat16)


def test_without_triton_auto_takes_the_mask(monkeypatch):
    """Compiling would end the first forward."""
    gpu = torch.device("cuda")
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert choose("auto", gpu, torch.float32) == "masked"
    with pytest.raises(ConfigError, match="'flex' needs Triton and a GPU that it compiles for"):
        choose("flex", gpu, torch.float32)


@pytest.mark.parametrize("lacking", ["scale", "window_size", "enable_gqa"])
def test_an_older_torch_whose_varlen_kernel_takes_less_is_passed_over(lacking, monkeypatch):
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    gpu, names = torch.device("cuda"), {"scale", "window_size", "enable_gqa"} - {lacking}
    scope: dict = {}
    exec(f"def varlen_attn(query, *, {', '.join(sorted(names))}): ...", scope)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", scope["varlen_attn"])
    assert choose("auto", gpu, torch.bfloat16) == "flex"
    with pytest.raises(ConfigError, match=f"newer torch, whose varlen_attn takes {lacking}"):
        choose("torch_varlen", gpu, torch.bfloat16)


def test_segments_of_several_rows_and_padding():
    """Two rows of 20; the second ends in 6 tokens of padding, whose output is zero."""
    borders = np.array([0, 12, 20, 21, 34, 40])
    q, k, v = _qkv(2, 20, 4, 2, 8)
    padding = np.array([False, False, False, False, True])
    ours = segment_attention(q, k, v, SegmentLayout.from_cu_seqlens(borders, padding=padding), 0.5)
    naive = _naive(q, k, v, borders, 0.5)
    torch.testing.assert_close(ours.flatten(0, 1)[:34], naive.flatten(0, 1)[:34])
    assert not ours[1, 14:].any()
    # the tail influences nothing, not even as NaN
    with torch.no_grad():
        for tensor in (q, k, v):
            tensor[1, :, 14:] = torch.nan
    again = segment_attention(q, k, v, SegmentLayout.from_cu_seqlens(borders, padding=padding), 0.5)
    assert torch.equal(again.flatten(0, 1)[:34], ours.flatten(0, 1)[:34])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("lengths", [[5, 6, 7, 8], [16, 16, 16], [1, 1, 60, 3], [40, 41, 90]])
def test_neighbours_change_no_bit(dtype, lengths):
    borders = _borders(lengths)
    layout = SegmentLayout.from_cu_seqlens(borders)
    q, k, v = _qkv(1, int(borders[-1]), 4, 2, 8, dtype)
    before = segment_attention(q, k, v, layout, 0.35)
    for index, (start, end) in enumerate(pairwise(borders)):
        for broken in (False, True):
            others = _qkv(1, int(borders[-1]), 4, 2, 8, dtype, seed=index + 1)
            with torch.no_grad():
                for mine, other in zip((q, k, v), others, strict=True):
                    if broken:  # 0 * NaN is NaN: a kernel that merely weighs them by 0 leaks
                        other.fill_(torch.nan)
                    other[:, :, start:end] = mine[:, :, start:end]
            after = segment_attention(*others, layout, 0.35)
            assert torch.equal(after[:, start:end], before[:, start:end])


def test_value_width_may_differ():
    borders = np.array([0, 5, 12])
    q, k, _ = _qkv(1, 12, 4, 4, 8)
    v = torch.randn(1, 4, 12, 6, dtype=torch.float64)
    ours = segment_attention(q, k, v, SegmentLayout.from_cu_seqlens(borders), 0.3)
    torch.testing.assert_close(ours, _naive(q, k, v, borders, 0.3))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 700), min_size=1, max_size=9))
def test_buckets_are_the_cheapest_runs(lengths):
    """Against brute force over all ways to cut the sorted lengths."""
    ordered = np.sort(np.array(lengths, dtype=np.int64))

    def cost(runs):
        return sum(
            _PAIRS_PER_LAUNCH
            + (end - first) * (ordered[end - 1] ** 2 + _PAIRS_PER_TOKEN * ordered[end - 1])
            for first, end in runs
        )

    runs = _partition(ordered)
    assert [0, *(end for _, end in runs)] == [*(first for first, _ in runs), len(ordered)]
    num = len(ordered)
    best = np.inf
    for bits in range(1 << (num - 1)):
        cuts = [0, *(i + 1 for i in range(num - 1) if bits >> i & 1), num]
        best = min(best, cost(list(pairwise(cuts))))
    assert cost(runs) == best


def test_equal_lengths_are_one_unpadded_kernel_call():
    layout = SegmentLayout.from_cu_seqlens(_borders([32] * 8))
    assert [bucket.num_segments for bucket in layout.buckets] == [8]
    assert layout.buckets[0].slots is None


def test_one_long_trace_does_not_pad_the_short_ones():
    layout = SegmentLayout.from_cu_seqlens(_borders([900, *([60] * 10), 61]))
    assert [bucket.padded_length for bucket in layout.buckets] == [61, 900]


def test_padding_only_micro_batch_keeps_one_token():
    layout = SegmentLayout.from_cu_seqlens(np.array([0, 500]), padding=np.array([True]))
    assert layout.order.tolist() == [0]
    assert layout.longest == 500
    q, k, v = _qkv(1, 500, 2, 2, 4)
    segment_attention(q, k, v, layout, 1.0).sum().backward()
    assert q.grad is not None and k.grad is not None and v.grad is not None


@pytest.mark.parametrize("borders", [[1, 4], [0, 4, 4], [0, 5, 3], [0], []])
def test_wrong_borders_are_refused(borders):
    with pytest.raises(ValueError, match="must rise strictly from 0"):
        SegmentLayout.from_cu_seqlens(np.array(borders, dtype=np.int32))


def test_tensor_borders():
    layout = SegmentLayout.from_cu_seqlens(torch.tensor([0, 3, 5], dtype=torch.int32))
    assert layout.num_tokens == 5
    assert layout.longest == 3


# --- inside a model -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(FAMILIES))
def test_neighbours_change_no_bit_of_a_model_s_logits(family):
    model = UndoTrainingModel(build(family))
    borders = _borders([9, 1, 17, 13])
    layout = SegmentLayout.from_cu_seqlens(borders)
    positions = torch.cat([torch.arange(n) for n in np.diff(borders)])[None]
    ids = torch.randint(VOCAB, (1, 40), generator=torch.Generator().manual_seed(1))
    everywhere = torch.arange(40)
    with torch.no_grad():
        before = model(ids, positions, layout, mode="logits", positions_M=everywhere)
        for start, end in pairwise(borders):
            other = (ids + 1 + torch.arange(40) % 7) % VOCAB
            other[:, start:end] = ids[:, start:end]
            after = model(other, positions, layout, mode="logits", positions_M=everywhere)
            assert torch.equal(after[start:end], before[start:end])
            assert not torch.equal(after, before)


def _call(model, **more):
    ids = torch.arange(12)[None]
    arguments = dict(input_ids=ids, position_ids=ids, use_cache=False)
    return model(**{**arguments, **more})


def _segments(*lengths, **more):
    return SegmentLayout.from_cu_seqlens(_borders(lengths), **more)


def test_a_call_without_layout_or_with_a_mask_is_refused():
    model = UndoTrainingModel(build()).lm
    with pytest.raises(ConfigError, match="no segment_layout"):
        _call(model)
    with pytest.raises(ConfigError, match="attention_mask"):
        _call(model, segment_layout=_segments(12), attention_mask=torch.ones(1, 12))
    with pytest.raises(ConfigError, match="attention_mask"):
        _call(model, segment_layout=_segments(12), attention_mask=torch.zeros(1, 1, 12, 12))
    with pytest.raises(ConfigError, match="'output_attentions'"):
        _call(model, segment_layout=_segments(12), output_attentions=True)
    with pytest.raises(ValueError, match="layout of 9 tokens for a batch of 1 x 12"):
        _call(model, segment_layout=_segments(9))


def test_keys_from_a_cache_are_refused():
    model = build(attention=ATTENTION_NAME)
    cache = transformers.DynamicCache(config=model.config)
    _call(model, segment_layout=_segments(12), use_cache=True, past_key_values=cache)
    with pytest.raises(ConfigError, match="cache"):
        _call(model, segment_layout=_segments(12), use_cache=True, past_key_values=cache)


@pytest.mark.parametrize("backend", ["segments", "flex", "masked"])
@pytest.mark.parametrize("window", [1, 4, 6, 12])
def test_sliding_windows_are_those_of_the_model(backend, window):
    """Against the stock model on each trace alone."""
    model = build("mistral", sliding_window=window, attention=attention_name(backend))
    stock = build("mistral", sliding_window=window, attention="eager")
    with torch.no_grad():
        ours = _call(model, segment_layout=_segments(5, 7)).logits
    ids = torch.arange(12)[None]
    for start, end in ((0, 5), (5, 12)):
        alone = stock(input_ids=ids[:, start:end], position_ids=ids[:, start:end], use_cache=False)
        torch.testing.assert_close(ours[:, start:end], alone.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (transformers.Gemma2Config(), "attn_logit_softcapping: 50.0"),
        (transformers.LlamaConfig(attention_dropout=0.1), "attention_dropout: 0.1"),
        (transformers.PhiConfig(resid_pdrop=0.2), "resid_pdrop: 0.2"),
        (
            transformers.MixtralConfig(output_router_logits=True),
            "output_router_logits: True.*false",
        ),
        (transformers.T5Config(), "not a causal decoder"),
        (transformers.LlamaConfig(is_causal=False), "not a causal decoder"),
        (
            transformers.LlamaConfig(num_hidden_layers=1, layer_types=["linear_attention"]),
            "layer_types: 'linear_attention'",
        ),
    ],
)
def test_unsupported_architectures_are_refused_by_name(config, name):
    with pytest.raises(ConfigError, match=name):
        check_supported(config)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("GPTNeo", "embed_dropout"),
        ("GPTNeo", "resid_dropout"),
        ("BioGpt", "hidden_dropout_prob"),
        ("BioGpt", "attention_probs_dropout_prob"),
        ("BioGpt", "activation_dropout"),
        ("OPT", "dropout"),
        ("OPT", "layerdrop"),
        ("Mpt", "emb_pdrop"),
        ("Mixtral", "router_jitter_noise"),
        ("Phimoe", "input_jitter_noise"),
    ],
)
def test_randomness_is_refused_by_name(kind, name):
    """A layer skipped on one rank alone would leave the others waiting for its collectives."""
    config = getattr(transformers, f"{kind}Config")()
    dropouts = [key for key in config.to_dict() if "drop" in key or "noise" in key]
    assert name in dropouts
    for key in dropouts:
        setattr(config, key, 0.0)
    check_supported(config)
    setattr(config, name, 0.1)
    with pytest.raises(ConfigError, match=rf"model.{name}: 0.1, expected 0.0"):
        check_supported(config)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_supported_families_pass(family):
    config_class, own = FAMILIES[family]
    check_supported(config_class(**own))


def test_unknown_keywords_of_a_layer_are_refused():
    """gpt-oss hands its sinks over as `s_aux`; ignoring them would train another model."""
    model = build(attention=ATTENTION_NAME)
    with pytest.raises(ConfigError, match="'s_aux'"):
        _call(model, segment_layout=_segments(12), s_aux=torch.zeros(4))
    model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ConfigError, match=r"dropout is 0.1"):
        _call(model.train(), segment_layout=_segments(12))
    model = build(attention=ATTENTION_NAME)
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(ConfigError, match="not causal"):
        _call(model, segment_layout=_segments(12))


def test_models_without_attention_interface_are_refused():
    config = transformers.BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)
    with pytest.raises(ConfigError, match="AttentionInterface"):
        UndoTrainingModel(transformers.BloomForCausalLM(config))


def test_scores_use_the_model_s_scale():
    """A model may set another scale than 1/sqrt(d)."""
    borders = np.array([0, 4])
    q, k, v = _qkv(1, 4, 2, 2, 8)
    ours = segment_attention(q, k, v, SegmentLayout.from_cu_seqlens(borders), 0.9)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.9).transpose(1, 2)
    torch.testing.assert_close(ours, expected)
