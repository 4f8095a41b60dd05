"""The safetensors files of a model folder: which there are, and whether their headers can be true.

Nothing here needs torch, and no tensor is read.

A header is trusted only after every byte of the file is accounted for by exactly one tensor: a
truncated download, a shard of another model and a header that lies are named here, on every rank,
before any rank waits for another. Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from nmar_ds.errors import ConfigError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
# Bytes per element. Sub-byte and 8-bit floats belong to quantised weights.
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_LENGTH_BYTES = 8
_AGAIN = "fetch or save the folder again"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        name: in the file.
        file: where it is.
        dtype: a key of DTYPE_BYTES.
        shape: of the whole tensor.
        start: place of its first byte in the file.
        num_bytes: from there on.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder's weights, file by file and in order of their bytes.

    Raises:
        ConfigError: no safetensors weights, an index that does not fit its files, or a file that
            is not whole; names the file.
    """
    index = folder / INDEX_FILE
    single = folder / SINGLE_FILE
    if not index.is_file():
        if not single.is_file():
            _refuse_other_weights(folder)
        return {tensor.name: tensor for tensor in read_header(single)}
    weight_map = _read_index(index)
    names = sorted(set(weight_map.values()))
    if single.is_file() and SINGLE_FILE not in names:
        raise ConfigError(
            f"model.path: {folder}: holds {SINGLE_FILE} and {INDEX_FILE}, which names other files, "
            "expected one of them; remove the one that is not the model"
        )
    for name in names:
        if not (folder / name).is_file():
            raise ConfigError(
                f"model.path: {folder / name}: is named by {INDEX_FILE} but is not there, expected "
                f"all {len(names)} shards; {_AGAIN}"
            )
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        for tensor in read_header(folder / name):
            if weight_map.get(tensor.name) != name:
                raise ConfigError(
                    f"model.path: {tensor.file}: holds {tensor.name}, which {INDEX_FILE} places in "
                    f"{weight_map.get(tensor.name, 'no file')}, expected both to agree; {_AGAIN}"
                )
            tensors[tensor.name] = tensor
    for name, file in weight_map.items():
        if name not in tensors:
            raise ConfigError(
                f"model.path: {folder / file}: lacks {name}, which {INDEX_FILE} places there, "
                f"expected both to agree; {_AGAIN}"
            )
    return tensors


def read_header(file: Path) -> list[StoredTensor]:
    """Tensors of one file in order of their bytes; together they are the whole file.

    Raises:
        ConfigError: unreadable, truncated, or a header that cannot be true.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(_LENGTH_BYTES)
            if len(head) < _LENGTH_BYTES:
                _fault(file, f"has {size} bytes, too few for a header")
            (length,) = struct.unpack("<Q", head)
            if length > min(MAX_HEADER_BYTES, size - _LENGTH_BYTES):
                _fault(file, f"says its header has {length} bytes, but the file has {size}")
            text = stream.read(length)
    except OSError as error:
        raise ConfigError(f"model.path: {file}: {error.strerror or error}") from None
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        _fault(file, f"has a header that is not JSON ({error})")
    if not isinstance(header, dict):
        _fault(file, f"has a header that is a {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    first = _LENGTH_BYTES + length
    tensors = [_tensor(file, name, entry, first) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.num_bytes))
    place = first
    for tensor in tensors:
        if tensor.start != place:
            kind = "overlaps the tensor before it" if tensor.start < place else "leaves a gap"
            _fault(file, f"has a header that lies: {tensor.name} {kind}")
        place += tensor.num_bytes
    if place != size:
        kind = "truncated" if size < place else "too long"
        _fault(file, f"is {kind}: {size} bytes, but its header describes {place}")
    return tensors


def digest(tensors: Iterable[StoredTensor]) -> str:
    """sha256 over names, files and places, to compare the folders that two ranks see."""
    lines = "\n".join(
        f"{t.file.name} {t.name} {t.dtype} {t.shape} {t.start} {t.num_bytes}" for t in tensors
    )
    return hashlib.sha256(lines.encode()).hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name is given twice")
    return dict(pairs)


def _tensor(file: Path, name: str, entry: Any, first: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        _fault(file, f"has a header whose entry {name} lacks a dtype, a shape or offsets")
    if dtype not in DTYPE_BYTES:
        raise ConfigError(
            f"model.path: {file}: {name} has dtype {dtype}, expected F32, F16 or BF16: quantised "
            "weights cannot be trained; use the unquantised model"
        )
    num_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != num_bytes:
        _fault(
            file,
            f"has a header that lies: {name} {list(shape)} of {dtype} has {num_bytes} bytes, but "
            f"its offsets say {end - begin}",
        )
    return StoredTensor(
        name=name, file=file, dtype=dtype, shape=shape, start=first + begin, num_bytes=num_bytes
    )


def _read_index(index: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        names = weight_map["weight_map"]
        # A plain name: nothing outside the folder is ever opened.
        whole = bool(names) and all(
            isinstance(name, str) and name == Path(name).name for name in names.values()
        )
    except OSError as error:
        raise ConfigError(f"model.path: {index}: {error.strerror or error}") from None
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise ConfigError(
            f"model.path: {index}: is no index of safetensors files, expected an object with a "
            f"weight_map from tensors to file names; {_AGAIN}"
        )
    found: Mapping[str, str] = names
    return found


def _fault(file: Path, problem: str) -> NoReturn:
    raise ConfigError(f"model.path: {file}: {problem}, expected a whole safetensors file; {_AGAIN}")


def _refuse_other_weights(folder: Path) -> NoReturn:
    """Say which weights there are instead, and what to do about it."""
    wanted = f"expected {SINGLE_FILE}, or {INDEX_FILE} and its shards"
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        raise ConfigError(
            f"model.path: {folder}: holds {', '.join(others[:3])} without {INDEX_FILE}, {wanted}; "
            f"{_AGAIN}"
        )
    pickled = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind))
    if pickled:
        raise ConfigError(
            f"model.path: {folder}: holds only pickled weights ({pickled[0]}), which may run code "
            f"when opened, {wanted}; where you trust them, load the folder with transformers and "
            "save it again with save_pretrained"
        )
    packed = sorted(file.name for file in folder.glob("*.gguf"))
    if packed:
        raise ConfigError(
            f"model.path: {folder}: holds quantised weights ({packed[0]}), {wanted}; convert it "
            "once with transformers: from_pretrained(..., gguf_file=...), then save_pretrained"
        )
    raise ConfigError(f"model.path: {folder}: holds no .safetensors weights, {wanted}")
