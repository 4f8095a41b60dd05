"""Runs of a few steps under other ZeRO-3 knobs, with what they end as."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nmar_ds.acceptance.measured import (
    small_engine,
    state_bytes,
    step_bytes,
    train_full_rows,
)
from nmar_ds.acceptance.tiny import model_keys
from nmar_ds.config import RunConfig

VOCAB = 61


def run_config(model: dict[str, Any], *, zero: dict[str, Any], **sections: Any) -> RunConfig:
    training = {"steps": 9, "global_batch_rows": 8} | sections.pop("training", {})
    return RunConfig.model_validate(
        {
            "name": "knobs",
            "output": "unused",
            "tokenizer": {"path": "unused"},
            "data": {"train": ["x"], "heldout": ["x"], "store": "x", "sequence_length": 24},
            "model": model,
            "optimizer": {"learning_rate": 0.01},
            "training": training,
            # So small that weights are let go after each layer, as those of a large model are.
            "zero": {"max_live_parameters": 1, "prefetch_bucket_size": 1, **zero},
            **sections,
        }
    )


def knob_run(
    *,
    zero: dict[str, Any],
    folder: str | None = None,
    dtype: str = "float32",
    micro_batches: int = 7,
    vocab: int = VOCAB,
    keys: dict[str, Any] | None = None,
    **sections: Any,
) -> dict[str, Any]:
    """Three optimizer steps of two micro-batches, and half a step. Losses, master weights after them, and bytes of state."""
    from deepspeed.utils import groups

    # One run makes these groups once; several runs of one process are only met here.
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    model = {"config": keys or model_keys(False)} if folder is None else {"path": folder}
    config = run_config({**model, "dtype": dtype}, zero=zero, **sections)
    engine = small_engine(config, vocab=vocab)
    losses = train_full_rows(engine, config, vocab=vocab, micro_batches=micro_batches)
    seconds = [p.ds_secondary_tensor for p in engine.module.parameters()]
    bytes_of = state_bytes(engine)
    devices = {str(t.device) for t in engine._engine.optimizer.fp32_partitioned_groups_flat}
    return {
        "losses": losses,
        "weights": {n: v.float().cpu().numpy() for n, v in engine.full_weights().items()},
        "bytes": bytes_of,
        "copies": sum(tensor is not None for tensor in seconds),
        "partitioned": sum(not p.ds_persist for p in engine.module.parameters()),
        "devices": devices,
        "finite": bool(np.isfinite(losses).all()),
    }


def step_run(
    *, keys: dict[str, Any], vocab: int, dtype: str, as_on_cuda: bool, zero: dict[str, Any],
    **sections: Any,
) -> int:  # fmt: skip
    """Bytes of an optimizer step beside the state.

    As on CUDA: with DeepSpeed's own copy and norm, and AdamW on lists of tensors, as torch takes
    it there.
    """
    config = run_config({"config": keys, "dtype": dtype}, zero=zero, **sections)
    engine = small_engine(config, vocab=vocab)
    if as_on_cuda:
        optimizer = engine._engine.optimizer
        optimizer.flatten = torch._utils._flatten_dense_tensors
        del optimizer.get_grad_norm_direct
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = False, True
    return step_bytes(engine, config, vocab=vocab)


def whole_inside_a_layer(*, keys: dict[str, Any]) -> list[dict[str, list[bool]]]:
    """Whether embedding and head are whole while the second layer runs, micro-batch by micro-batch.

    The norms of the undo row are read before the first and before the third, as at a start and at
    an evaluation.
    """
    from nmar_ds.acceptance.step import undo_row_norms

    config = run_config({"config": keys}, zero={"param_persistence_threshold": 0})
    engine = small_engine(config, vocab=VOCAB)
    lm: Any = engine.module.lm
    watched = [lm.get_input_embeddings().weight, lm.get_output_embeddings().weight]
    seen: dict[str, list[bool]] = {}

    def note(when: str) -> None:
        seen[when] = [parameter.ds_status.name != "NOT_AVAILABLE" for parameter in watched]

    def layer_has_run(module: Any, inputs: Any, output: torch.Tensor) -> None:
        note("forward")
        if output.requires_grad:
            output.register_hook(lambda _: note("backward"))

    lm.get_decoder().layers[1].register_forward_hook(layer_has_run)
    found = []
    for micro_batch in range(4):
        if micro_batch in (0, 2):
            undo_row_norms(engine, VOCAB)
        train_full_rows(engine, config, vocab=VOCAB, micro_batches=1)
        found.append(dict(seen))
        seen.clear()
    return found
