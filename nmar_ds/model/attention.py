"""Attention that cannot look across trace boundaries (SPEC section 6).

Packed rows are cut back into their traces before attention and joined again after it: traces of
near lengths are right-padded into one batch and run through causal SDPA. There is no mask to get
wrong, the work is the sum of squared trace lengths instead of the squared row length, and a
trace's result cannot depend on its neighbours, not even in the last bit: a causal kernel reads
padding for no real query, and the padding is zeros.

Plain transformers isolates packed rows by `position_ids` only while no `attention_mask` and no
cache is passed, and leaks silently otherwise (huggingface/transformers#46634); this module
does not rely on it.
"""

# B rows, T tokens per row, N = B*T, M attended tokens of a bucket, h heads (k key/value heads),
# d head width, n segments of a bucket, L padded length of a bucket

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from nmar_ds.errors import ConfigError
from nmar_ds.model.backends import OTHERS
from nmar_ds.model.segments import Bucket, SegmentLayout

__all__ = [
    "ATTENTION_NAME",
    "SegmentLayout",
    "attention_name",
    "check_supported",
    "refuse_mask",
    "segment_attention",
]


def attention_name(backend: str) -> str:
    """What transformers knows a backend by; with "flash" in it, it would be taken for its own."""
    return f"nmar_{backend}"


ATTENTION_NAME = attention_name("segments")

# What transformers hands to every attention function and what changes nothing here.
_HARMLESS_KWARGS = frozenset(
    {"position_ids", "position_embeddings", "use_cache", "cache_position", "layer_idx"}
    | {"output_hidden_states", "return_dict"}
)
# Under layerdrop ranks would skip different layers, and with them ZeRO-3's collectives.
_DROPOUTS = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "resid_pdrop",
    "resid_dropout",
    "residual_dropout",
    "embd_pdrop",
    "emb_pdrop",
    "embed_dropout",
    "embedding_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "activation_dropout",
    "dropout",
    "layerdrop",
    "router_jitter_noise",
    "input_jitter_noise",
)


def segment_attention(  # noqa: PLR0917 (one signature for all backends)
    query_BhTd: Tensor,
    key_BkTd: Tensor,
    value_BkTd: Tensor,
    layout: SegmentLayout,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention inside each segment and nowhere else, by SDPA on bucketed segments.

    Args:
        query_BhTd: [B, h, T, d].
        key_BkTd: [B, k, T, d] with h a multiple of k (grouped queries).
        value_BkTd: [B, k, T, d'].
        layout: segments of the B*T tokens.
        scale: factor on the scores.
        window: a token sees itself and the window - 1 before it; None: all before it.

    Returns:
        [B, T, h, d'], zeros at padding.
    """
    B, h, T, _ = query_BhTd.shape
    grouped = key_BkTd.shape[1] != h
    sizes = [bucket.num_tokens for bucket in layout.buckets]
    # one gather for all buckets; the pieces of unpadded buckets are views of it
    gathered = [
        torch.split_with_sizes(
            tensor.transpose(1, 2).flatten(0, 1).index_select(0, layout.order), sizes
        )
        for tensor in (query_BhTd, key_BkTd, value_BkTd)
    ]
    outputs = []
    for bucket, q, k, v in zip(layout.buckets, *gathered, strict=True):
        out_nhLd = F.scaled_dot_product_attention(
            _pad(q, bucket).transpose(1, 2),
            _pad(k, bucket).transpose(1, 2),
            _pad(v, bucket).transpose(1, 2),
            attn_mask=_band(bucket.padded_length, window, q.device),
            is_causal=window is None or bucket.padded_length <= window,
            scale=scale,
            enable_gqa=grouped,
        )
        out = out_nhLd.transpose(1, 2).flatten(0, 1)
        outputs.append(out if bucket.slots is None else out.index_select(0, bucket.slots))
    empty_Nhd = query_BhTd.new_zeros(B * T, h, value_BkTd.shape[-1])
    return empty_Nhd.index_copy(0, layout.order, torch.cat(outputs)).view(B, T, h, -1)


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """bool[L, L]: the pairs a window lets through, None where it lets all of them."""
    if window is None or length <= window:
        return None
    at_L = torch.arange(length, device=device)
    distance_LL = at_L[:, None] - at_L
    return (distance_LL >= 0) & (distance_LL < window)


def _pad(tokens_Mhd: Tensor, bucket: Bucket) -> Tensor:
    """Place a bucket's tokens in its [n, L, h, d] block; the rest is zeros."""
    shape = (bucket.num_segments, bucket.padded_length, *tokens_Mhd.shape[1:])
    if bucket.slots is None:
        return tokens_Mhd.reshape(shape)
    # zeros, not a clamped index: a masked key still enters the kernel as 0 * value, and a NaN in
    # another trace must not come through
    block = tokens_Mhd.new_zeros(shape[0] * shape[1], *shape[2:])
    return block.index_copy(0, bucket.slots, tokens_Mhd).view(shape)


def _forward(  # noqa: PLR0917 (transformers' signature)
    backend: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    segment_layout: SegmentLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The signature transformers calls attention functions with; refuses what it would ignore."""
    if segment_layout is None:
        raise ConfigError("attention: got no segment_layout, expected one")
    if attention_mask is not None:
        raise ConfigError("attention: got an attention_mask, expected none")
    if dropout:
        raise ConfigError(f"attention: dropout is {dropout}, expected 0")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise ConfigError("attention: layer is not causal, expected causal")
    if key.shape[2] != query.shape[2]:
        raise ConfigError("attention: keys come from a cache, expected none")
    for name, setting in kwargs.items():
        if name not in _HARMLESS_KWARGS and setting is not None and setting is not False:
            raise ConfigError(
                f"attention: the model passes {name!r}, which this attention "
                "does not know, expected an architecture without it"
            )
    if segment_layout.num_tokens != query.shape[0] * query.shape[2]:
        raise ValueError(
            f"layout of {segment_layout.num_tokens} tokens for a batch of "
            f"{query.shape[0]} x {query.shape[2]}"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    attend = segment_attention if backend == "segments" else OTHERS[backend]
    return attend(query, key, value, segment_layout, scale, sliding_window), None


def refuse_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A decoder's pre-hook: isolation comes from the layout, and a mask would do nothing."""
    if kwargs.get("attention_mask") is not None:
        raise ConfigError("attention: got an attention_mask, expected none")


def check_supported(config: Any) -> None:
    """Refuse, before training, architectures whose result this package would change.

    Args:
        config: the model's transformers configuration.

    Raises:
        ConfigError: names the setting, its value and what was expected.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_causal", True) is False:
        raise ConfigError("model: not a causal decoder, expected a causal language model")
    for name in _DROPOUTS:
        if getattr(config, name, None):
            raise ConfigError(f"model.{name}: {getattr(config, name)}, expected 0.0")
    if getattr(config, "output_router_logits", None):
        raise ConfigError(
            f"model.output_router_logits: {config.output_router_logits}, expected false: a mixture "
            "of experts' balancing loss is not part of the loss trained here; set it to false in "
            "the model's configuration to train without that loss"
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ConfigError(
            f"model.attn_logit_softcapping: {config.attn_logit_softcapping}, expected none: "
            "attention soft-caps are not supported yet"
        )
    layer_types = getattr(config, "layer_types", None) or ()
    for layer_type in sorted(set(layer_types) - {"full_attention", "sliding_attention"}):
        raise ConfigError(
            f"model.layer_types: {layer_type!r}, expected full_attention or sliding_attention"
        )


def register() -> None:
    """Make every backend known to transformers under its name; harmless to repeat.

    They have no mask builder: transformers then builds none, and does not look at the position
    ids, for which it would wait for the device in every forward.
    """
    for backend in ("segments", *OTHERS):
        AttentionInterface.register(attention_name(backend), functools.partial(_forward, backend))


register()
