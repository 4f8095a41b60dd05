"""Proof 1: a packed row means what its traces mean one by one (SPEC section 6)."""

# T tokens per trace, M chosen positions

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

from nmar_ds.acceptance.reference import gradients, reference_sums, worst_gap
from nmar_ds.acceptance.tiny import LENGTH, VOCAB, ListSource, make_traces, model_keys
from nmar_ds.data.loader import Batch, make_batch
from nmar_ds.data.packing import pack
from nmar_ds.model.attention import ATTENTION_NAME
from nmar_ds.model.objective import token_weights
from nmar_ds.model.segments import SegmentLayout
from nmar_ds.model.training_model import MicroBatchLoss, UndoTrainingModel
from nmar_ds.model.weighting import FloatArray, role_weights

# Largest accepted max|a - b| / max|b| (SPEC section 6).
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


def run_ours(
    model: UndoTrainingModel, batch: Batch, weights: FloatArray, *, also_untrained: bool = False
) -> MicroBatchLoss:
    """Forward of the training module on a batch, where the model is."""
    device = next(model.parameters()).device
    dtype = torch.float64 if model.lm.dtype == torch.float64 else torch.float32
    roles_N = torch.from_numpy(batch.target_roles).to(device)
    result: MicroBatchLoss = model(
        *inputs(batch, device),
        torch.from_numpy(batch.targets).to(device),
        token_weights(roles_N, weights, dtype),
        roles_N,
        also_untrained=also_untrained,
    )
    return result


def inputs(batch: Batch, device: torch.device) -> tuple[Any, ...]:
    """Ids, positions and segments of a batch, as the training module takes them."""
    return (
        torch.from_numpy(batch.input_ids).to(device),
        torch.from_numpy(batch.position_ids).to(device),
        SegmentLayout.from_cu_seqlens(batch.cu_seqlens, device, padding=batch.trace_ids < 0),
    )


def _model(device: torch.device, dtype: torch.dtype, attention: str) -> Any:
    """The same weights whatever the attention."""
    keys = model_keys(True)
    del keys["model_type"]
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**keys, vocab_size=VOCAB, use_cache=False)
    )
    model.set_attn_implementation(attention)
    return model.to(device, dtype).train()


def packed_gaps(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Gaps between a packed micro-batch and its traces one by one, in one process.

    Returns:
        Relative gaps of logits, loss and gradients.
    """
    traces = make_traces()
    source = ListSource(traces)
    plan = pack([len(ids) for ids, _ in traces], LENGTH)
    rows = [np.asarray(plan.row(row), dtype=np.int64) for row in range(plan.num_rows)]
    batch = make_batch(source, rows, length=LENGTH, pad_id=0)
    ours = UndoTrainingModel(_model(device, dtype, ATTENTION_NAME))
    stock = _model(device, dtype, "eager")
    weights = role_weights("msft")
    out = run_ours(ours, batch, weights)
    sums = reference_sums(stock, source, [int(index) for row in rows for index in row])
    loss = torch.stack([w * s for w, s in zip(weights.tolist(), sums, strict=True)]).sum()
    return {
        "logits": _logits_gap(ours, stock, batch, source),
        "loss": worst_gap([out.loss_sum.detach().double()], [loss.detach()]),
        "gradients": worst_gap(gradients(ours.lm, out.loss_sum), gradients(stock, loss)),
    }


def _logits_gap(
    ours: UndoTrainingModel, stock: Any, batch: Batch, source: ListSource
) -> float:  # fmt: skip
    """Of every position of every trace."""
    device = next(ours.parameters()).device
    packed, alone = [], []
    with torch.no_grad():
        for segment, index in enumerate(batch.trace_ids.tolist()):
            if index < 0:
                continue
            start, end = (int(batch.cu_seqlens[segment + k]) for k in (0, 1))
            places = torch.arange(start, end, device=device)
            packed.append(ours(*inputs(batch, device), mode="logits", positions_M=places))
            ids = torch.from_numpy(source.ids(index)).to(device, torch.int64)
            alone.append(stock(input_ids=ids[None], use_cache=False).logits[0])
    return worst_gap([torch.cat(packed).float()], [torch.cat(alone).float()])
