"""A checkpoint's weights as safetensors shards, written in pieces: no tensor is ever held whole.

The headers are known beforehand from a model without storage, so a shard is written from front to
back: each tensor's parts are read from the old ranks' files 4 MiB at a time, rounded to the model's
dtype, and appended. The bytes are those that transformers' `save_pretrained` writes; a test
compares whole files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from nmar_ds.errors import CheckpointError
from nmar_ds.training import engine  # noqa: F401 (before transformers: it sets up safe loading)
from nmar_ds.training.checkpoints import Found
from nmar_ds.training.partitions import SavedPartitions
from nmar_ds.training.plain_data import check_plain_data

MODEL_PREFIX = "lm."  # the model's name inside UndoTrainingModel
SHARD_NAMES = "model{suffix}.safetensors"
INDEX = "model.safetensors.index.json"
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
# Larger dtypes stand first in a file, then names: so safetensors keeps every tensor aligned.
_ORDER = ["BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64"]


@dataclass(frozen=True, slots=True)
class Weights:
    """What was written.

    Attributes:
        num_weights: parameters of the model, tied ones once.
        num_shards: files of them.
    """

    num_weights: int
    num_shards: int


def empty_model(found: Found) -> Any:
    """The checkpoint's transformers model without storage."""
    import transformers

    keys = dict(found.manifest["model_config"])
    config = transformers.CONFIG_MAPPING[keys.pop("model_type")].from_dict(keys)
    config.use_cache = True
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, found.manifest["dtype"])
        )
    model.tie_weights()
    return model


def is_stored_as_it_is(model: Any) -> bool:
    """Whether transformers keeps the model's tensors in files by their own names and shapes.

    It does for dense models; experts, for one, are stacked in memory and stored one by one.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    return not get_model_conversion_mapping(model, add_legacy=False)


def write_weights(found: Found, model: Any, folder: Path, *, max_shard_size: str) -> Weights:
    """Write the weights and configuration of a verified checkpoint into a folder.

    Args:
        found: the checkpoint, of any number of ranks.
        model: from `empty_model`; one that `is_stored_as_it_is`.
        folder: to write into.
        max_shard_size: of a file; a tensor that is larger gets one of its own.

    Raises:
        CheckpointError: the checkpoint does not hold the model's tensors.
        OSError: a file cannot be written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    check_plain_data(found.folder)
    wanted = remove_tied_weights_from_state_dict(dict(model.state_dict()), model)
    for name in model._keys_to_ignore_on_save or ():
        wanted.pop(name, None)
    shards = split_torch_state_dict_into_shards(
        wanted, filename_pattern=SHARD_NAMES, max_shard_size=max_shard_size
    )
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    with SavedPartitions(found.folder, found.manifest) as saved:
        source = _Source(saved, model, wanted)
        for file_name, names in shards.filename_to_tensors.items():
            with (folder / file_name).open("xb") as file:
                _write_shard(file, {name: wanted[name] for name in names}, source)
    if shards.is_sharded:
        index = {
            "metadata": {"total_parameters": num_weights, **shards.metadata},
            "weight_map": shards.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")
    model.config.dtype = found.manifest["dtype"]
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    return Weights(num_weights, len(shards.filename_to_tensors))


class _Source:
    """Where the elements of each of the model's tensors come from."""

    def __init__(self, saved: SavedPartitions, model: Any, wanted: dict[str, Any]) -> None:
        self._saved = saved
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._buffers = {}
        if wanted.keys() - parameters:
            stored = saved.model_state()["module"]
            for name in wanted.keys() - parameters:
                self._buffers[name] = stored.get(MODEL_PREFIX + name)
        self._names = {name: self._stored_name(name) for name in wanted if name in parameters}
        wrong = [name for name, tensor in wanted.items() if self._shape(name) != tensor.shape]
        every = {self._stored_name(name) for name in parameters}
        wrong += sorted(saved.shapes.keys() - every)
        if wrong:
            raise CheckpointError(
                f"{saved.folder}: weights do not fit the model: {sorted(wrong)[:5]}"
            )

    def _stored_name(self, name: str) -> str:
        return str(self._saved.shared.get(MODEL_PREFIX + name, MODEL_PREFIX + name))

    def _shape(self, name: str) -> tuple[int, ...] | None:
        if name in self._names:
            return self._saved.shapes.get(self._names[name])
        buffer = self._buffers[name]
        return None if buffer is None else tuple(buffer.shape)

    def append(self, name: str, dtype: torch.dtype, file: BinaryIO) -> None:
        """Write a tensor's bytes."""
        if name in self._buffers:
            file.write(_bytes(self._buffers[name].to(dtype).flatten()))
            return
        for _, piece in self._saved.pieces(self._names[name]):
            file.write(_bytes(piece.to(dtype)))


def _write_shard(file: BinaryIO, tensors: dict[str, Any], source: _Source) -> None:
    order = sorted(tensors, key=lambda n: (-_ORDER.index(DTYPE_NAMES[tensors[n].dtype]), n))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        size = tensors[name].numel() * tensors[name].dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        source.append(name, tensors[name].dtype, file)


def _bytes(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.contiguous().view(torch.uint8).numpy()
    return memoryview(array)
