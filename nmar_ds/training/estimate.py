"""What a run will need, reckoned before torch is imported: memory, work, hours, checkpoints.

Bytes follow from which tensors DeepSpeed and autograd keep, not from a fit: state agrees with a
real engine's to the byte, saved activations with autograd's to a few percent (tests, and
benchmarks/estimates.py). What the allocator loses to fragments, and what CUDA, NCCL and kernels
take for themselves, is not in it: leave a tenth of the device free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nmar_ds.config import RunConfig
from nmar_ds.data.store import read_manifest
from nmar_ds.errors import ConfigError, NmarError, StoreError
from nmar_ds.model.architecture import (
    Architecture,
    architecture_of,
    read_folder_config,
    rows_with_undo,
)
from nmar_ds.model.weighting import CHUNK_BYTES
from nmar_ds.training.planning import RunPlan
from nmar_ds.training.run_folder import checkpoint_bytes

FP32, FP64 = 4, 8
# Elements of which a CPU takes the gradient's norm at once: 2 MB in float64, which a core's cache
# holds. It stands here and not in cpu_step because this module imports no torch.
NORM_BLOCK = 1 << 18
PEAK_TFLOPS = 989.0  # dense bfloat16 of an H100 or H200 SXM, by its data sheet
MFU = 0.4


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank, by part.

    Attributes:
        weights: this rank's partitions and the small weights that every rank keeps whole.
        second_copy: hpZ's copy, spread over the node.
        gradients: partitions, in fp32.
        optimizer: fp32 master weights, which weights in fp32 have too, and moments.
        saved: what autograd keeps of a micro-batch's forward through the layers.
        recomputed: one layer's activations, formed again in the backward; 0 without checkpointing.
        loss: gradients that the loss forms in the forward, and logits of a chunk.
        buffers: gathered weights, and gradients on their way to their partitions.
        step: what is there in an optimizer step beside the state: the bucket of gradients and what
            the optimizer forms for itself, while nothing else of the last four is there.
        host: what lies in host memory instead, per rank.
    """

    weights: int
    second_copy: int
    gradients: int
    optimizer: int
    saved: int
    recomputed: int
    loss: int
    buffers: int
    step: int
    host: int

    @property
    def activations(self) -> int:
        """Saved and recomputed ones together."""
        return self.saved + self.recomputed

    @property
    def state(self) -> int:
        """What is there all the time."""
        return self.weights + self.second_copy + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """State, and the larger of a backward and an optimizer step."""
        return self.state + max(self.activations + self.loss + self.buffers, self.step)


def memory_of(
    config: RunConfig, shape: Architecture, *, world_size: int, device: str = "cuda"
) -> Memory:
    """Bytes of one rank on `cuda` or `cpu`, for full rows of which every token is trained."""
    zero, item = config.zero, _item(config)
    pieces = [(-(-numel // world_size), count) for numel, count in shape.parameters()]
    tokens = config.training.micro_batch_rows * config.data.sequence_length
    part = sum(piece * count for piece, count in pieces)
    limit = zero.param_persistence_threshold
    whole = sum(  # gathered from padded partitions
        -(-numel // world_size) * world_size * count
        for numel, count in shape.parameters()
        if numel <= limit
    )
    hpz = zero.hpz_partition_size
    second = sum(
        -(-numel // world_size) * world_size // hpz * count
        for numel, count in shape.parameters()
        if hpz > 1 and numel > limit
    )
    moments = {"adamw": 2, "sgd": 0}[config.optimizer.name]
    offloaded = zero.offload_optimizer is not None
    optimizer = FP32 * part * (1 + moments)  # master weights are a copy even of fp32 weights
    return Memory(
        weights=item * (part + whole),
        second_copy=item * second,
        gradients=0 if offloaded else FP32 * part,
        optimizer=0 if offloaded else optimizer,
        saved=saved_bytes(shape, tokens, item, recompute=config.model.activation_checkpointing),
        recomputed=layer_bytes(shape, tokens, item) if config.model.activation_checkpointing else 0,
        loss=loss_bytes(shape, tokens, item, device),
        buffers=_buffer_bytes(config, shape, device),
        step=FP32 * zero.reduced_at_once(device)
        + (0 if offloaded else step_bytes(config, pieces, device)),
        # DeepSpeed copies the gradients once more for the optimizer.
        host=optimizer + 2 * FP32 * part if offloaded else 0,
    )


def step_bytes(config: RunConfig, pieces: Sequence[tuple[int, int]], device: str) -> int:
    """What DeepSpeed and torch form in an optimizer step on this device, at its peak.

    DeepSpeed copies a sub-group's gradients into one tensor on CUDA; a CPU reads them where they
    lie. AdamW's denominator is one more on CUDA, where torch works on lists of tensors; on a CPU
    it runs fused and forms nothing. Weight decay costs SGD the decayed gradients. The norm comes
    before all this, in float64: a piece at a time on CUDA, on a CPU `NORM_BLOCK` elements.

    Args:
        config: of the run; its optimizer does not live in host memory.
        pieces: this rank's elements of a parameter, and of how many parameters.
        device: `cuda` or `cpu`.
    """
    part, largest = sum(piece * count for piece, count in pieces), max(pieces)[0]
    # A sub-group is closed by the parameter that fills it.
    group = min(config.zero.sub_group_size - 1 + largest, part)
    if config.optimizer.name == "adamw":
        formed = 0 if device == "cpu" else 1
    else:
        formed = 1 if config.optimizer.weight_decay else 0
    copied = 0 if device == "cpu" else 1
    norm = FP64 * (min(largest, NORM_BLOCK) if device == "cpu" else largest)
    return max(FP32 * group * (copied + formed), norm)


def layer_bytes(shape: Architecture, tokens: int, item: int) -> int:
    """What autograd keeps of one decoder layer.

    RMS norms keep their input in fp32 (the very input, where that is fp32), the normalised values
    and the result; attention keeps queries, keys, values, its result once as it came and once in
    the rows' order, and what the output matrix reads; the MLP four blocks of its inner width.
    """
    per_token = 2 * (shape.hidden * (FP32 + 2 * item) + FP32)
    per_token += 4 * item * shape.queries + 2 * item * shape.keys + FP32 * shape.heads
    per_token += 4 * item * shape.intermediate
    if shape.head_norms:
        per_token += (shape.queries + shape.keys) * (FP32 + item)
        per_token += FP32 * (shape.heads + shape.kv_heads)
    return tokens * per_token


def saved_bytes(shape: Architecture, tokens: int, item: int, *, recompute: bool) -> int:
    """What autograd keeps of a forward up to the loss; of checkpointed layers their input alone."""
    layer = tokens * item * shape.hidden if recompute else layer_bytes(shape, tokens, item)
    final_norm = tokens * (shape.hidden * (FP32 + item) + FP32)
    rotary = 2 * tokens * item * shape.head_dim
    indices = 3 * 8 * tokens
    return shape.layers * layer + final_norm + rotary + indices


def loss_kept_bytes(shape: Architecture, tokens: int, item: int) -> int:
    """Gradients of head and hidden states, from the loss's forward to its backward."""
    return FP32 * shape.rows * shape.hidden + item * tokens * shape.hidden


def loss_bytes(shape: Architecture, tokens: int, item: int, device: str) -> int:
    """The loss at its peak: a chunk's logits in the forward, and a narrow head's gradient."""
    head = shape.rows * shape.hidden
    chunk = min(max(16, CHUNK_BYTES[device] // (FP32 * shape.rows)), tokens)
    narrow = 0 if item == FP32 else item
    # beside the logits a device holds those of the log-sum-exp; a CPU works in place
    logits = chunk * shape.rows * (FP32 * (1 if device == "cpu" else 2) + narrow)
    return loss_kept_bytes(shape, tokens, item) + logits + narrow * head


def _buffer_bytes(config: RunConfig, shape: Architecture, device: str) -> int:
    """Gathered weights, one large gradient, and the buffers through which it is reduced."""
    zero, item = config.zero, _item(config)
    head = shape.rows * shape.hidden
    together = shape.num_layer_weights if zero.gather_whole_layers else max(shape.layer_matrices())
    largest = max(head, together)
    ahead = max(zero.max_live_parameters, largest + zero.prefetch_bucket_size)
    gathered = item * min(ahead, shape.num_weights)
    # The bucket is always there, in fp32; what leaves it is flattened once more. A matrix that
    # does not fit is turned to fp32 by itself.
    alone = max(head, *shape.layer_matrices())
    bucket = zero.reduced_at_once(device)
    leaving = min(bucket, shape.num_weights) if alone <= bucket else 2 * alone
    return gathered + item * alone + FP32 * (bucket + leaving)


def _item(config: RunConfig) -> int:
    return {"bfloat16": 2, "float32": FP32}[config.model.dtype]


@dataclass(frozen=True, kw_only=True)
class Work:
    """One optimizer step on average.

    Attributes:
        tokens: that are not padding.
        flops: of forward and backward, by the model's mathematics: nothing that is recomputed, no
            padding, and of attention the half that a causal model needs.
    """

    tokens: float
    flops: float


def work_of(shape: Architecture, *, tokens: float, squares: float) -> Work:
    """Work of a step.

    Args:
        shape: of the model.
        tokens: of a step.
        squares: sum over its traces of their squared lengths.
    """
    matrices = shape.layers * sum(shape.layer_matrices()) + shape.rows * shape.hidden
    attention = 6 * shape.layers * shape.queries * squares
    return Work(tokens=tokens, flops=6 * matrices * tokens + attention)


def shape_of(config: RunConfig, tokenizer_size: int | None) -> Architecture:
    """The model of a run, with the rows it will have.

    Raises:
        ConfigError: of a kind that has no estimate, or its size is not known yet.
    """
    multiple = config.model.pad_vocab_to_multiple_of
    if config.model.path is not None:
        keys: Mapping[str, object] = read_folder_config(Path(config.model.path))
        rows = int(str(keys["vocab_size"]))
        if tokenizer_size is not None:
            rows = rows_with_undo(rows, tokenizer_size, multiple)
        place = f"model.path: {config.model.path}"
    else:
        assert config.model.config is not None
        keys, place = config.model.config, "model.config"
        if tokenizer_size is None:
            raise ConfigError("data.store: the vocabulary is not known before the data is prepared")
        rows = -(-tokenizer_size // multiple) * multiple
    return architecture_of(keys, rows=rows, place=place)


def _tokenizer_size(config: RunConfig) -> int | None:
    try:
        return int(read_manifest(Path(config.data.store) / "train")["tokenizer"]["size"])
    except StoreError:
        return None if config.tokenizer.train is None else config.tokenizer.train.vocab_size


def estimate_lines(
    config: RunConfig,
    plan: RunPlan | None,
    *,
    world_size: int,
    device: str = "cuda",
    mfu: float = MFU,
    peak_tflops: float = PEAK_TFLOPS,
) -> list[str]:
    """Lines for `--dry-run`.

    Args:
        config: of the run.
        plan: None where there are no data (or weights) yet: then full rows are reckoned with.
        world_size: ranks.
        device: `cuda` or `cpu`, whose memory is reckoned.
        mfu: share of the peak that the model's own work reaches.
        peak_tflops: of one device, in 10^12 operations a second.
    """
    try:
        shape = shape_of(config, _tokenizer_size(config))
    except NmarError as error:
        return [f"estimate  none: {error}"]
    memory = memory_of(config, shape, world_size=world_size, device=device)
    size = checkpoint_bytes(shape.num_weights, config.optimizer.name)
    return [
        f"model     {shape.num_weights:,} weights: {shape.model_type}, {shape.layers} layers of "
        f"{shape.hidden}, {shape.rows:,} rows{' (tied)' if shape.tied else ''}",
        *_memory_lines(memory, world_size, device),
        *_work_lines(config, plan, shape, world_size=world_size, mfu=mfu, peak_tflops=peak_tflops),
        f"saving    a checkpoint takes {_shown(size)}, {config.checkpoint.keep} are kept and one "
        f"more lies beside them while it is written",
    ]


def _memory_lines(memory: Memory, world_size: int, device: str) -> list[str]:
    parts = {
        "weights": memory.weights,
        "their second copy (hpZ)": memory.second_copy,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
    }
    if memory.step < memory.peak - memory.state:
        parts |= {
            "activations": memory.activations,
            "loss": memory.loss,
            "buffers": memory.buffers,
        }
    else:
        parts["the optimizer's step"] = memory.step
    listed = ", ".join(f"{name} {_shown(size)}" for name, size in parts.items() if size)
    ranks = f"{world_size} {'GPUs' if device == 'cuda' else 'ranks'}"
    lines = [f"memory    {_shown(memory.peak)} on each of {ranks} at most: {listed}"]
    if memory.host:
        lines.append(f"host      {_shown(memory.host)} for each rank: gradients and optimizer")
    return lines


def _work_lines(
    config: RunConfig,
    plan: RunPlan | None,
    shape: Architecture,
    *,
    world_size: int,
    mfu: float,
    peak_tflops: float,
) -> list[str]:
    length = config.data.sequence_length
    rows = config.training.global_batch_rows
    if plan is None:
        work = work_of(shape, tokens=rows * length, squares=rows * length**2)
        steps, basis = config.training.steps, "full rows, each one trace"
    else:
        squares = float((plan.store.lengths.astype(np.float64) ** 2).sum())
        each = plan.steps_per_epoch
        work = work_of(shape, tokens=plan.num_tokens / each, squares=squares / each)
        steps, basis = plan.total_steps, "on average"
    seconds = work.flops / (world_size * peak_tflops * 1e12 * mfu)
    pace = f"{mfu:.0%} of {peak_tflops:g} TFLOP/s on each of {world_size} GPUs"
    lines = [
        f"work      a step is {work.tokens:,.0f} tokens and {work.flops / 1e15:.4g} PFLOP "
        f"({basis}): {seconds:.3g} s at {pace}"
    ]
    if steps is not None:
        hours, tokens = steps * seconds / 3600, steps * work.tokens
        lines.append(
            f"hours     {hours:.3g} for {steps:,} steps, {tokens:,.0f} tokens, without evaluations "
            "and checkpoints"
        )
    return lines


def _shown(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
