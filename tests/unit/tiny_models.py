"""Tiny random models of several families, packed batches, and an independent reference loss."""

# B rows, T tokens per row, N = B*T

from __future__ import annotations

import numpy as np
import torch
import transformers

from nmar_ds.acceptance.exact import remove_upcasts
from nmar_ds.acceptance.packed import run_ours  # noqa: F401 (tests take them from here)
from nmar_ds.acceptance.reference import (  # noqa: F401
    gradients,
    reference_nll,
    reference_sums,
)
from nmar_ds.acceptance.reference import worst_gap as gap  # noqa: F401
from nmar_ds.data.loader import Batch, make_batch

VOCAB = 61
_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    pad_token_id=0,
    initializer_range=0.2,  # so that attention is far from uniform and a leak is far from rounding
)
FAMILIES = {
    "llama": (transformers.LlamaConfig, dict(num_key_value_heads=2)),
    "qwen2": (transformers.Qwen2Config, dict(num_key_value_heads=4)),
    "qwen3": (transformers.Qwen3Config, dict(num_key_value_heads=2, head_dim=16)),
    "mistral": (transformers.MistralConfig, dict(num_key_value_heads=1, sliding_window=128)),
    "gemma": (transformers.GemmaConfig, dict(num_key_value_heads=1, head_dim=16)),
    "granite": (transformers.GraniteConfig, dict(num_key_value_heads=2, logits_scaling=4.0)),
    "cohere": (transformers.CohereConfig, dict(num_key_value_heads=2, logit_scale=0.25)),
    "gemma2": (
        transformers.Gemma2Config,
        dict(
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=6,
            attn_logit_softcapping=None,
            final_logit_softcapping=2.0,
        ),
    ),
    "phi": (transformers.PhiConfig, dict(num_key_value_heads=4)),
}


def build(family="llama", *, tied=False, dtype=torch.float32, attention=None, exact=False, **more):
    """A random model; the same arguments give the same weights whatever the attention."""
    config_class, own = FAMILIES[family]
    config = config_class(**{**_COMMON, **own, "tie_word_embeddings": tied, **more})
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # else 0 or 1, where much goes unseen
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model = model.to(dtype)
    if attention:
        model.set_attn_implementation(attention)
    if exact:
        remove_upcasts(model)
    return model


class Traces:
    """A source of random traces for the loader; `roles` may be set by a test."""

    def __init__(self, lengths, seed=0):
        rng = np.random.default_rng(seed)
        self._ids = [rng.integers(1, VOCAB, size=length) for length in lengths]
        self._roles = [rng.integers(0, 5, size=length).astype(np.uint8) for length in lengths]

    def ids(self, index):
        return self._ids[index]

    def roles(self, index):
        return self._roles[index]

    def __len__(self):
        return len(self._ids)


def pack(traces, rows, length) -> Batch:
    rows = [np.array(row, dtype=np.int64) for row in rows]
    return make_batch(traces, rows, length=length, pad_id=0)
