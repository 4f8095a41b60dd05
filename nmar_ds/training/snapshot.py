"""A copy in host memory of what a checkpoint file will hold, and the file itself.

The copy costs as many bytes of host memory as the file will have on disk: per rank, a checkpoint's
size divided by the number of ranks. The memory is kept for the next save: to be given fresh pages
by the kernel takes longer than to fill them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from nmar_ds.errors import SaveError
from nmar_ds.files import no_room


class HostMemory:
    """Storages in host memory that are free to be filled, by size."""

    def __init__(self) -> None:
        self._free: dict[int, list[torch.UntypedStorage]] = {}

    def copy_of(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """The bytes of a storage, wherever that lies, in host memory."""
        free = self._free.get(storage.nbytes())
        source = torch.empty(0, dtype=torch.uint8, device=storage.device)
        source.set_(storage)
        twin = torch.empty(0, dtype=torch.uint8)
        twin.set_(free.pop()) if free else twin.resize_(source.shape)
        return twin.copy_(source).untyped_storage()

    def take_back(self, storages: Iterable[torch.UntypedStorage]) -> None:
        """They are needed no more. May be called by another thread than `copy_of`."""
        for storage in storages:
            self._free.setdefault(storage.nbytes(), []).append(storage)


def host_copy(state: Any, memory: HostMemory) -> tuple[Any, list[torch.UntypedStorage]]:
    """A deep copy whose tensors lie in host memory and share storages as the originals do.

    So saving it writes, where the originals are in host memory too, the very bytes that saving
    them would. Gradients that hang on a tensor are left behind.

    Args:
        state: nested dictionaries, lists and tuples of tensors and small plain objects.
        memory: to copy into.

    Returns:
        The copy, and the storages that it lies in.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    copies: dict[int, Any] = {}
    tensors = _tensors(state)
    for tensor in tensors:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in storages:
            storages[key] = memory.copy_of(storage)
        twin = torch.empty(0, dtype=tensor.dtype)
        twin.set_(storages[key], tensor.storage_offset(), tensor.size(), tensor.stride())
        if isinstance(tensor, torch.nn.Parameter):
            copies[id(tensor)] = torch.nn.Parameter(twin, requires_grad=tensor.requires_grad)
        else:
            copies[id(tensor)] = twin.requires_grad_(tensor.requires_grad)
    for tensor in tensors:  # DeepSpeed hangs names on some, and they are saved too
        copies[id(tensor)].__dict__.update(copy.deepcopy(tensor.__dict__, copies))
    twins = list(storages.values())
    return copy.deepcopy(state, copies), twins  # the rest; tensors are already "copied"


def _tensors(state: Any) -> list[torch.Tensor]:
    """All tensors in nested containers."""
    if isinstance(state, torch.Tensor):
        return [state]
    items = state.values() if isinstance(state, dict) else state
    nested = isinstance(state, dict | list | tuple)
    return [tensor for item in items for tensor in _tensors(item)] if nested else []


def num_bytes(state: Any) -> int:
    """Bytes of all tensors in nested containers."""
    return sum(tensor.nbytes for tensor in _tensors(state))


def write_file(state: Any, path: Path) -> None:
    """Save one file. Through Python's file, so that an error has the system's number.

    Raises:
        SaveError: names the file, the bytes it needs and those that are free.
    """
    try:
        with open(path, "wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        raise SaveError(no_room(error, path, num_bytes(state))) from None


class Snapshot:
    """One rank's files of a checkpoint, held until `write`.

    Args:
        memory: to copy into; gets its storages back when their file is written.
    """

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self._files: list[tuple[Path, Any, list[torch.UntypedStorage]]] = []

    def add(self, state: Any, path: Path) -> None:
        """Copy one file's content.

        Raises:
            SaveError: there is no memory for it.
        """
        try:
            self._files.append((path, *host_copy(state, self._memory)))
        except (RuntimeError, MemoryError) as error:
            why = (str(error) or "out of memory").splitlines()[0]
            raise SaveError(
                f"{path}: no host memory for a copy of {num_bytes(state):,} bytes: {why}; "
                "checkpoint.asynchronous: false needs none"
            ) from None

    def write(self) -> None:
        """Write the files, each freed when it is written. Talks to no other rank.

        Raises:
            SaveError: a file could not be written.
        """
        try:
            for path, state, _ in self._files:
                write_file(state, path)
        finally:
            for _, _, storages in self._files:
                self._memory.take_back(storages)
            self._files.clear()
