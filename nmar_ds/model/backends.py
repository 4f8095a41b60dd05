"""Kernels that can stand behind segment attention, and which one this machine gets.

All compute causal attention inside each trace, with a sliding window where the layer has one; the
start-up canary compares whichever was chosen with traces alone, in the run's own dtype. On a CPU
that is SDPA on bucketed traces (`attention.segment_attention`); here are the others. Those for GPUs
have not yet been run on one: flash-attn and torch's varlen kernels exist for CUDA alone, and take
the borders of traces explicitly, since transformers' own detection of packed rows works for one row
only. `masked` runs anywhere; `flex` has no backward on a CPU, where its forward is tested.
"""

# B rows, T tokens per row, N = B*T, h heads (k key/value heads), d head width

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _triton

from nmar_ds.errors import ConfigError
from nmar_ds.model.segments import SegmentLayout

Attend = Callable[[Tensor, Tensor, Tensor, SegmentLayout, float, int | None], Tensor]
HALF = (torch.float16, torch.bfloat16)
# Best first. What each needs is asked of the machine by `_missing`.
ON_CUDA = ("fa_varlen", "torch_varlen", "flex", "masked")
ON_CPU = ("segments", "masked")  # flex has no backward there
COSTS = {
    "masked": "scores of T x T pairs a row, a mask of as many bytes, and no flash kernel: for rows "
    "of 8,192 tokens 64 MB of mask, and up to sixteen times the work of traces of 500",
}  # fmt: skip


def choose(asked: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend.

    Args:
        asked: "auto", or a name.
        device: where the model runs.
        dtype: of the model.

    Raises:
        ConfigError: what was asked for cannot run here.
    """
    usable = ON_CUDA if device.type == "cuda" else ON_CPU
    if device.type == "cuda":
        usable = (*usable, "segments")
    if asked == "auto":
        return next(name for name in usable if _missing(name, dtype) is None)
    if asked not in usable:
        raise ConfigError(
            f"model.attention: {asked!r} does not run on {device.type}, expected auto or one of "
            f"{', '.join(usable)}"
        )
    missing = _missing(asked, dtype)
    if missing is not None:
        raise ConfigError(f"model.attention: {asked!r} needs {missing}; auto takes what is there")
    return asked


def _missing(name: str, dtype: torch.dtype) -> str | None:
    """What a backend lacks here, None where it can run."""
    if name in ("fa_varlen", "torch_varlen") and dtype not in HALF:
        return "model.dtype bfloat16"
    if name == "fa_varlen" and importlib.util.find_spec("flash_attn") is None:
        return "the package flash_attn"
    if name == "torch_varlen":
        from torch.nn.attention import varlen

        wanted = ("scale", "window_size", "enable_gqa")
        lacking = [w for w in wanted if w not in inspect.signature(varlen.varlen_attn).parameters]
        if lacking:
            return f"a newer torch, whose varlen_attn takes {', '.join(lacking)}"
        if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
            return "a GPU of compute capability 8.0 or newer"
    if name == "flex" and not _triton.has_triton():
        return "Triton and a GPU that it compiles for"
    return None


def _flat(*tensors_BhTd: Tensor) -> list[Tensor]:
    """[B*T, h, d] of each [B, h, T, d]."""
    return [tensor.transpose(1, 2).flatten(0, 1) for tensor in tensors_BhTd]


def fa_varlen(  # noqa: PLR0917 (one signature for all)
    query_BhTd: Tensor, key_BkTd: Tensor, value_BkTd: Tensor,
    layout: SegmentLayout, scale: float, window: int | None,
) -> Tensor:  # fmt: skip
    """Flash attention 2 (Dao, 2307.08691) by the package flash_attn. Not yet run on a GPU."""
    from flash_attn import flash_attn_varlen_func

    query, key, value = _flat(query_BhTd, key_BkTd, value_BkTd)
    out_Nhd: Tensor = flash_attn_varlen_func(
        query, key, value,
        cu_seqlens_q=layout.borders, cu_seqlens_k=layout.borders,
        max_seqlen_q=layout.longest, max_seqlen_k=layout.longest,
        softmax_scale=scale, causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )  # fmt: skip
    return out_Nhd.view(query_BhTd.shape[0], query_BhTd.shape[2], *out_Nhd.shape[1:])


def torch_varlen(  # noqa: PLR0917
    query_BhTd: Tensor, key_BkTd: Tensor, value_BkTd: Tensor,
    layout: SegmentLayout, scale: float, window: int | None,
) -> Tensor:  # fmt: skip
    """Flash attention as torch brings it. Not yet run on a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = _flat(query_BhTd, key_BkTd, value_BkTd)
    out_Nhd = varlen_attn(
        query, key, value, layout.borders, layout.borders,
        layout.longest, layout.longest, scale=scale,
        window_size=(-1, 0) if window is None else (window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    assert isinstance(out_Nhd, Tensor)
    return out_Nhd.view(query_BhTd.shape[0], query_BhTd.shape[2], *out_Nhd.shape[1:])


def flex(  # noqa: PLR0917
    query_BhTd: Tensor, key_BkTd: Tensor, value_BkTd: Tensor,
    layout: SegmentLayout, scale: float, window: int | None,
) -> Tensor:  # fmt: skip
    """Flex attention over all tokens in one row; blocks that hold no pair are skipped on a GPU."""
    from torch.nn.attention.flex_attention import create_block_mask

    query, key, value = (
        tensor.transpose(0, 1)[None] for tensor in _flat(query_BhTd, key_BkTd, value_BkTd)
    )
    segment_N = layout.segment_of_token()

    def sees(_: Tensor, __: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        seen = (segment_N[q] == segment_N[kv]) & (q >= kv)
        return seen if window is None else seen & (q - kv < window)

    num = layout.num_tokens
    mask = layout.kept(
        ("flex", window), lambda: create_block_mask(sees, None, None, num, num, str(query.device))
    )
    out_1hNd = _flex_attention(query.device.type)(
        query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    out_Nhd: Tensor = out_1hNd[0].transpose(0, 1)
    return out_Nhd.reshape(query_BhTd.shape[0], query_BhTd.shape[2], *out_Nhd.shape[1:])


@functools.cache
def _flex_attention(device_type: str) -> Callable[..., Any]:
    """Compiled on a GPU: as it is, all scores are written out."""
    from torch.nn.attention.flex_attention import flex_attention

    if device_type != "cuda":
        return flex_attention
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    return compiled


def masked(  # noqa: PLR0917
    query_BhTd: Tensor, key_BkTd: Tensor, value_BkTd: Tensor,
    layout: SegmentLayout, scale: float, window: int | None,
) -> Tensor:  # fmt: skip
    """SDPA with a mask of every pair of a row: what runs where nothing else does."""
    B, h, T, _ = query_BhTd.shape

    def pairs() -> Tensor:
        segment_BT = layout.segment_of_token().view(B, T)
        at_T = torch.arange(T, device=query_BhTd.device)
        distance_TT = at_T[:, None] - at_T
        near_TT = (distance_TT >= 0) & (distance_TT < (T if window is None else window))
        return ((segment_BT[:, :, None] == segment_BT[:, None, :]) & near_TT)[:, None]

    out_BhTd = F.scaled_dot_product_attention(
        query_BhTd, key_BkTd, value_BkTd,
        attn_mask=layout.kept(("masked", window), pairs), scale=scale,
        enable_gqa=key_BkTd.shape[1] != h,
    )  # fmt: skip
    return out_BhTd.transpose(1, 2)


OTHERS: dict[str, Attend] = {
    "fa_varlen": fa_varlen, "torch_varlen": torch_varlen, "flex": flex, "masked": masked,
}  # fmt: skip
