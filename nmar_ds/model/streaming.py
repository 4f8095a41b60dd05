"""A model folder's weights straight into the model, one tensor after the other.

transformers' own path under ZeRO-3 merges every shard into one state dict on rank 0, which then
needs host memory for the whole checkpoint. Here rank 0 reads one parameter at a time in small
chunks, and leaving DeepSpeed's gathering context spreads it. All checks come before the first
collective: names, shapes and headers on every rank, and that all ranks see the same files.

Files are read with seek and readinto, not mapped: mapped pages count as the process's own until
the file is closed.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

import torch
import transformers
from torch import Tensor
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import prevent_arange_dtype_change
from transformers.modeling_utils import set_zero3_state

from nmar_ds.errors import ConfigError, NmarError
from nmar_ds.model.weight_files import DTYPE_BYTES, StoredTensor, digest, read_stored_tensors

CHUNK_BYTES = 4 * 2**20
# Files of old versions carry buffers that are computed from the configuration now.
SKIPPED_SUFFIXES = ("rotary_emb.inv_freq",)
TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NUM_SHOWN = 3


class Peers(Protocol):
    """What loading needs of the other ranks; `engine.ProcessPeers` is one."""

    rank: int

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order of rank."""
        ...

    def share_errors(self) -> contextlib.AbstractContextManager[None]:
        """A block whose `NmarError` on one rank ends it on all."""
        ...


class Alone:
    """The only rank there is."""

    rank = 0

    def gather(self, value: Any) -> list[Any]:
        """The value itself."""
        return [value]

    @contextlib.contextmanager
    def share_errors(self) -> Iterator[None]:
        """Nobody to tell."""
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class FillPlan:
    """Which stored tensor goes where.

    Attributes:
        parameters: (name in the model, tensor), in the order in which they are read; every
            parameter once.
        buffers: the same for buffers that the files hold.
    """

    parameters: list[tuple[str, StoredTensor]]
    buffers: list[tuple[str, StoredTensor]]


def plan_filling(config: Any, folder: Path, *, dtype: torch.dtype, peers: Peers) -> FillPlan:
    """Match a folder's tensors with the model that its configuration describes.

    Nothing but headers is read, except where a tied head stands in the files beside the
    embedding: rank 0 then compares the two. Call it within `peers.share_errors`.

    Args:
        config: the folder's transformers configuration.
        folder: the model's.
        dtype: of the parameters to come.
        peers: the other ranks.

    Raises:
        ConfigError: names tensors that are missing, unexpected or of another shape, and the file.
    """
    stored = read_stored_tensors(folder)
    with torch.device("meta"):
        model = _build(copy.deepcopy(config), dtype, attention="eager")
    groups: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        groups.setdefault(id(parameter), []).append(name)
    buffers = [name for name in model.state_dict() if name not in parameters]
    _check_names(model, folder, stored, list(groups.values()), buffers)
    chosen = {}
    for names in groups.values():
        first, *others = (name for name in names if name in stored)
        for other in others:
            if peers.rank == 0:
                _check_equal(stored[first], stored[other])
        chosen[first] = names[0]
    for name in [*chosen, *(name for name in buffers if name in stored)]:
        target = parameters[name] if name in parameters else model.get_buffer(name)
        _check_fits(stored[name], target, config)
    return FillPlan(
        parameters=[(chosen[name], tensor) for name, tensor in stored.items() if name in chosen],
        buffers=[(name, stored[name]) for name in buffers if name in stored],
    )


def load_streaming(
    config: Any,
    plan: FillPlan,
    *,
    dtype: torch.dtype,
    attention: str,
    deepspeed_settings: dict[str, Any] | None,
    peers: Peers,
) -> Any:
    """Build a model and fill it. Collective under ZeRO-3.

    Every rank holds its partitions and beside them the one parameter that is being read, about
    twice (gathering on a CPU copies it). Measured as growth of VmHWM on two gloo ranks with a
    float32 Llama of 182 MB in 7 shards of at most 28.3 MB, so partitions of 91 MB: 128 and 118 MB
    on ranks 0 and 1; 306 and 230 MB by transformers' own path. Before freed blocks went back to
    the system it was 138 and 140 MB, and with mapped files (safe_open) 148 and 132 MB. A shard
    that is one single tensor of 61 MB costs 2.2 times its size, not 1.5.

    Reading each partition on its own rank would spare the gathering, but it needs DeepSpeed's
    private layout of partitions.

    Args:
        config: the folder's transformers configuration.
        plan: from `plan_filling`, the same on all ranks.
        dtype: of the parameters; under ZeRO-3 the DeepSpeed settings must say the same.
        attention: name of the attention implementation.
        deepspeed_settings: to partition by; None builds a plain model.
        peers: the other ranks.

    Returns:
        The transformers model, in evaluation mode as `from_pretrained` returns it.

    Raises:
        ConfigError: ranks see different files, or a file could not be read to its end.
    """
    with peers.share_errors():
        _check_same(plan, peers)
    with contextlib.ExitStack() as stack:
        if deepspeed_settings is not None:
            import deepspeed

            # else zero.Init computes the frequencies of rotary embeddings in the model's dtype
            stack.enter_context(prevent_arange_dtype_change())
            stack.enter_context(deepspeed.zero.Init(config_dict_or_path=deepspeed_settings))
        model = _build(config, dtype, attention=attention)
    _return_freed_memory()
    _fill_parameters(model, plan, peers)
    with peers.share_errors(), ShardReader() as reader:
        for name, tensor in plan.buffers:
            reader.read_into(model.get_buffer(name), tensor)
        reader.raise_problem()
    _compute_buffers(model, {name for name, _ in plan.buffers})
    return model.eval()


def _build(config: Any, dtype: torch.dtype, *, attention: str) -> Any:
    """A model without values, its tied parameters tied; buffers are computed as usual."""
    with no_init_weights(), set_zero3_state():  # the caller alone decides on partitions
        try:
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention
            )
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"model.path: model_type {config.model_type!r}: transformers cannot build a causal "
                f"language model of it ({reason})"
            ) from None
    model.tie_weights()
    return model


def _check_names(
    model: Any,
    folder: Path,
    stored: dict[str, StoredTensor],
    groups: list[list[str]],
    buffers: list[str],
) -> None:
    known = {name for names in groups for name in names} | set(buffers)
    missing = [names[0] for names in groups if not any(name in stored for name in names)]
    unexpected = [n for n in stored if n not in known and not n.endswith(SKIPPED_SUFFIXES)]
    if not missing and not unexpected:
        return
    parts = []
    if missing:
        parts.append(f"lack {_some(missing)}")
    if unexpected:
        files = sorted({stored[name].file.name for name in unexpected})
        parts.append(f"hold {_some(unexpected)} ({_some(files)}) that it does not have")
    hint = ""
    if [name.rpartition(".")[0] for name in missing] == ["lm_head"]:
        hint = "; tie_word_embeddings is false in config.json, so the head has weights of its own"
    raise ConfigError(
        f"model.path: {folder}: its weights {' and '.join(parts)}, expected exactly those of "
        f"{type(model).__name__}{hint}"
    )


def _some(names: list[str]) -> str:
    more = len(names) - _NUM_SHOWN
    return ", ".join(names[:_NUM_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _check_fits(tensor: StoredTensor, target: Tensor, config: Any) -> None:
    if tensor.shape != tuple(target.shape):
        raise ConfigError(
            f"model.path: {tensor.file}: {tensor.name} has shape {list(tensor.shape)}, but "
            f"config.json asks for {list(target.shape)}"
        )
    if TORCH_DTYPES[tensor.dtype].is_floating_point != target.is_floating_point():
        raise ConfigError(
            f"model.path: {tensor.file}: {tensor.name} has dtype {tensor.dtype}, expected "
            f"{'F32, F16 or BF16' if target.is_floating_point() else 'whole numbers'}"
        )


def _check_equal(one: StoredTensor, other: StoredTensor) -> None:
    """Tied parameters may be stored twice, but only as the same bytes."""
    same = one.num_bytes == other.num_bytes and one.dtype == other.dtype
    if same:
        try:
            with one.file.open("rb") as left, other.file.open("rb") as right:
                left.seek(one.start)
                right.seek(other.start)
                for begin in range(0, one.num_bytes, CHUNK_BYTES):
                    size = min(CHUNK_BYTES, one.num_bytes - begin)
                    same = same and left.read(size) == right.read(size)
        except OSError as error:
            raise ConfigError(f"model.path: {other.file}: {error.strerror or error}") from None
    if not same:
        raise ConfigError(
            f"model.path: {other.file}: {other.name} differs from {one.name}, but config.json ties "
            "them, expected equal ones; say tie_word_embeddings: false there if the head is its own"
        )


def _check_same(plan: FillPlan, peers: Peers) -> None:
    """Ranks that read folders of their own must read the same ones, or their collectives cross."""
    tensors = [tensor for _, tensor in (*plan.parameters, *plan.buffers)]
    digests = peers.gather(digest(tensors))
    for rank, found in enumerate(digests):
        if found != digests[0]:
            raise ConfigError(
                f"model.path: {tensors[0].file.parent}: rank {rank} sees other weights there than "
                "rank 0, expected the same files on every node"
            )


class ShardReader:
    """Reads stored tensors into tensors of any float dtype, with one file open at a time.

    The first fault is kept, and nothing is read after it: under ZeRO-3 the other ranks wait in
    the collectives that still follow.
    """

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._raw = memoryview(bytearray(chunk_bytes))
        self._chunk = torch.frombuffer(self._raw, dtype=torch.uint8)
        self._file: Path | None = None
        self._stream: BinaryIO | None = None
        self._problem: NmarError | None = None

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def raise_problem(self) -> None:
        """Raise the fault that was kept, if there is one."""
        if self._problem is not None:
            raise self._problem

    def read_into(self, target: Tensor, tensor: StoredTensor) -> None:
        """Overwrite a whole contiguous tensor; rounds to its dtype as `Tensor.to` does."""
        if self._problem is not None:
            return
        try:
            self._read(target, tensor)
        except OSError as error:
            self._problem = ConfigError(f"model.path: {tensor.file}: {error.strerror or error}")
        except NmarError as error:
            self._problem = error

    def _read(self, target: Tensor, tensor: StoredTensor) -> None:
        if self._file != tensor.file:
            self._close()
            self._stream, self._file = tensor.file.open("rb"), tensor.file
        assert self._stream is not None
        self._stream.seek(tensor.start)
        flat = target.data.view(-1)
        width = DTYPE_BYTES[tensor.dtype]
        values = self._chunk.view(TORCH_DTYPES[tensor.dtype])
        for begin in range(0, tensor.numel, len(values)):
            end = min(begin + len(values), tensor.numel)
            wanted = self._raw[: (end - begin) * width]
            if self._stream.readinto(wanted) != len(wanted):  # type: ignore[attr-defined]
                raise ConfigError(
                    f"model.path: {tensor.file}: ends inside {tensor.name}; it was whole when the "
                    "loading began, expected nobody to change it"
                )
            flat[begin:end].copy_(values[: end - begin])

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = self._file = None


def _fill_parameters(model: Any, plan: FillPlan, peers: Peers) -> None:
    """Shard by shard; after each, all ranks learn whether it could be read."""
    parameters = dict(model.named_parameters())
    with ShardReader() as reader:
        for _, fills in itertools.groupby(plan.parameters, key=lambda fill: fill[1].file):
            for name, tensor in fills:
                with _whole(parameters[name]):
                    if peers.rank == 0:
                        reader.read_into(parameters[name], tensor)
                if tensor.num_bytes > CHUNK_BYTES:
                    _return_freed_memory()
            with peers.share_errors():
                reader.raise_problem()


def _return_freed_memory() -> None:
    """Hand the C library's freed blocks back to the system, where it is glibc.

    It keeps blocks below 32 MiB for reuse; between gathered parameters of different sizes that
    added up to half a shard.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _whole(parameter: Any) -> contextlib.AbstractContextManager[None]:
    """Gather a partitioned parameter; rank 0's values are spread on leaving."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    gathered: contextlib.AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        [parameter], modifier_rank=0
    )
    return gathered


def _compute_buffers(model: Any, filled: set[str]) -> None:
    """Compute what no file holds (rotary frequencies) as transformers does after loading.

    Inside zero.Init float constants come out in the model's dtype; outside, as they should be.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for name in filled:
        model.get_buffer(name)._is_hf_initialized = True
    with torch.no_grad():
        model.initialize_weights()
