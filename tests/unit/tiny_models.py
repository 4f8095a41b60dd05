"""Tiny random models of several families, packed batches, and an independent reference loss."""

# B rows, T tokens per row, N = B*T

from __future__ import annotations

import types

import numpy as np
import torch
import transformers

from nmar_ds.data.loader import Batch, make_batch
from nmar_ds.model.objective import token_weights
from nmar_ds.model.segments import SegmentLayout
from nmar_ds.model.training_model import UndoTrainingModel

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
        _remove_upcasts(model)
    return model


def _remove_upcasts(model):
    """Norms in float64: stock ones go through float32 and stop comparisons at 1e-7."""
    offset = 1.0 if "Gemma" in type(model).__name__ else 0.0

    def forward(self, x):
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (self.weight + offset)

    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    assert norms or "Phi" in type(model).__name__
    for norm in norms:
        norm.forward = types.MethodType(forward, norm)


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


def run_ours(model: UndoTrainingModel, batch: Batch, weights, *, also_untrained=False):
    """Forward of the training module on a batch."""
    dtype = torch.float64 if model.lm.dtype == torch.float64 else torch.float32
    roles_N = torch.from_numpy(batch.target_roles)
    return model(
        torch.from_numpy(batch.input_ids),
        torch.from_numpy(batch.position_ids),
        SegmentLayout.from_cu_seqlens(batch.cu_seqlens, padding=batch.trace_ids < 0),
        torch.from_numpy(batch.targets),
        token_weights(roles_N, weights, dtype),
        roles_N,
        also_untrained=also_untrained,
    )


def reference_nll(model, traces, index):
    """Naive per-target losses of one trace, alone, by the stock model; and the targets' roles."""
    ids = torch.from_numpy(traces.ids(index))
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_p = torch.log_softmax(logits.to(exact), dim=-1)
    return -log_p[torch.arange(len(ids) - 1), ids[1:]], traces.roles(index)[1:]


def reference_sums(model, traces, indices):
    """S_k of SPEC 3 as five differentiable scalars, trace by trace."""
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(5)]
    for index in indices:
        nll, roles = reference_nll(model, traces, index)
        for role in range(5):
            sums[role] = sums[role] + nll[torch.from_numpy(roles == role)].double().sum()
    return sums


def gradients(model, loss):
    """Full gradients of a loss, one tensor per parameter in order; zeros where unused."""
    parameters = [p for _, p in sorted(model.named_parameters())]
    return torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)


def gap(ours, reference):
    """max|a - b| / max|b|, per parameter; the worst."""
    worst = 0.0
    for a, b in zip(ours, reference, strict=True):
        scale = float(b.abs().max())
        difference = float((a - b).abs().max())
        worst = max(worst, difference / scale if scale else difference)
    return worst
