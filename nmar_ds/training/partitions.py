"""A checkpoint's weights and optimizer state, read in pieces from ZeRO-3's files of all its ranks.

ZeRO-3 cuts every flattened parameter of n elements into W parts of ceil(n / W); rank r holds the
r-th, and the last ones are filled up with padding that means nothing. A rank lays the parts of a
sub-group (some parameters of one optimizer group, in order) end to end: as one flat tensor of fp32
weights, and one for each moment of the optimizer. What is where is known from `param_shapes`.

Only headers are unpickled, by torch's safe loader and without their tensors; elements are read
with `pread` where they are asked for. Nothing is mapped: mapped pages count as the process's own.
"""

# W ranks that saved, p elements of a parameter's part on each of them

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nmar_ds.errors import CheckpointError

PIECE_BYTES = 4 * 2**20
WEIGHT = "weight"
_MAX_OPEN = 256


@dataclass(frozen=True, slots=True)
class _Stored:
    """A flat tensor inside a file."""

    file: Path
    offset: int
    numel: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a parameter's parts stand, the same on every rank that saved."""

    sub_group: int  # -1: frozen, by its name
    start: int  # elements before it in the sub-group
    numel: int  # of the whole parameter


@dataclass
class _RankFiles:
    """What one rank's files hold: flat tensors by sub-group and kind, or by name where frozen."""

    flat: list[dict[str, _Stored]]
    scalars: list[dict[str, Any]]
    frozen: dict[str, _Stored] = field(default_factory=dict)


class SavedPartitions:
    """A verified checkpoint of any number of ranks.

    Args:
        folder: of the checkpoint.
        manifest: its verified manifest.

    Attributes:
        world_size: ranks that saved it.
        shapes: of every parameter, by its name in the training model.
        frozen: names of those that no optimizer moves.
        shared: further names of tied parameters, and the name each is stored under.
        param_groups: the optimizer's groups without their parameters.

    Raises:
        CheckpointError: its files are not laid out as ZeRO-3 of this version lays them out.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.world_size = int(manifest["world_size"])
        self._names: set[str] = set(manifest["files"])
        self._ranks: dict[int, _RankFiles] = {}
        self._open: dict[Path, int] = {}
        model = _headers(self._file(0, "model_states"))
        try:
            self._sub_groups = [
                {name: tuple(shape) for name, shape in group.items()}
                for group in model["param_shapes"]
            ]
            frozen = {n: tuple(s) for n, s in (model["frozen_param_shapes"] or {}).items()}
            self.shared = dict(model["shared_params"])
            first = _headers(self._file(0, "optim_states"))["optimizer_state_dict"]
            groups = first["optimizer_state_dict"]["param_groups"]
            self.param_groups = [
                {key: value for key, value in group.items() if key != "params"} for group in groups
            ]
            partition_count = first["partition_count"]
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder}: is no ZeRO-3 checkpoint: {error!r}") from None
        counts = partition_count if isinstance(partition_count, list) else [partition_count]
        if set(counts) != {self.world_size}:
            raise CheckpointError(
                f"{folder}: its files are of {partition_count} ranks, expected "
                f"{self.world_size} as its manifest says"
            )
        self.frozen = set(frozen)
        self.shapes = {n: s for group in self._sub_groups for n, s in group.items()} | frozen
        self._places = {name: _Place(-1, 0, _numel(shape)) for name, shape in frozen.items()}
        for index, group in enumerate(self._sub_groups):
            start = 0
            for name, shape in group.items():
                self._places[name] = _Place(index, start, _numel(shape))
                start += self._part(_numel(shape))

    def close(self) -> None:
        """Close what files are open."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def __enter__(self) -> SavedPartitions:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def numel(self, name: str) -> int:
        """Elements of a whole parameter."""
        return self._places[name].numel

    def kinds(self, name: str) -> list[str]:
        """`weight`, and the moments that the optimizer keeps of this parameter."""
        place = self._places[name]
        return [WEIGHT] if place.sub_group < 0 else list(self._rank(0).flat[place.sub_group])

    def dtype(self, name: str, kind: str = WEIGHT) -> torch.dtype:
        """In which the elements are stored: float32 but for frozen parameters."""
        return self._stored(name, kind, 0).dtype

    def scalars(self, name: str) -> dict[str, Any]:
        """What the optimizer keeps once for a sub-group that this parameter was in: its step."""
        found = self._rank(0).scalars[self._places[name].sub_group]
        return {k: self._scalar(v) if isinstance(v, _Stored) else v for k, v in found.items()}

    def pieces(
        self, name: str, kind: str = WEIGHT, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Elements [start, stop) of a flattened parameter, in order and without padding.

        Yields:
            (index of the first element, tensor of at most `PIECE_BYTES`); the tensor is
            overwritten by the next.
        """
        place = self._places[name]
        stop = place.numel if stop is None else stop
        part = self._part(place.numel)
        buffer: torch.Tensor | None = None
        while start < stop:
            rank, inside = divmod(start, part)
            stored = self._stored(name, kind, rank)
            size = stored.dtype.itemsize
            if buffer is None:
                buffer = torch.empty(PIECE_BYTES // size, dtype=stored.dtype)
            count = min(stop - start, part - inside, len(buffer))
            at = 0 if place.sub_group < 0 else place.start
            piece = buffer[:count]
            self._read(stored.file, stored.offset + (at + inside) * size, piece)
            yield start, piece
            start += count

    def model_state(self) -> dict[str, Any]:
        """Rank 0's model file in full: buffers, counters, and empty places of the parameters."""
        loaded: dict[str, Any] = _load(self._file(0, "model_states"))
        return loaded

    def optimizer_header(self) -> dict[str, Any]:
        """Rank 0's optimizer state without its tensors: the loss scaler and flags."""
        state: dict[str, Any] = _headers(self._file(0, "optim_states"))["optimizer_state_dict"]
        return state

    def _part(self, numel: int) -> int:
        return -(-numel // self.world_size)

    def _file(self, rank: int, kind: str) -> Path:
        # DeepSpeed puts `bf16_` before the optimizer's files of bf16 models.
        ending = f"zero_pp_rank_{rank}_mp_rank_00_{kind}.pt"
        found = [name for name in (ending, f"bf16_{ending}") if name in self._names]
        if len(found) != 1:
            raise CheckpointError(f"{self.folder}: {len(found)} files *{ending}, expected one")
        return self.folder / found[0]

    def _stored(self, name: str, kind: str, rank: int) -> _Stored:
        place = self._places[name]
        files = self._rank(rank)
        try:
            return files.frozen[name] if place.sub_group < 0 else files.flat[place.sub_group][kind]
        except KeyError:
            raise CheckpointError(
                f"{self.folder}: rank {rank} has no {kind} of {name}, but rank 0 has"
            ) from None

    def _rank(self, rank: int) -> _RankFiles:
        if rank not in self._ranks:
            self._ranks[rank] = self._read_headers(rank)
        return self._ranks[rank]

    def _read_headers(self, rank: int) -> _RankFiles:
        path = self._file(rank, "optim_states")
        found = _RankFiles([], [])
        try:
            state = _headers(path)["optimizer_state_dict"]
            weights, kept = state["fp32_flat_groups"], state["optimizer_state_dict"]["state"]
            if len(weights) != len(self._sub_groups):
                raise ValueError(f"{len(weights)} sub-groups, expected {len(self._sub_groups)}")
            for index, (group, flat) in enumerate(zip(self._sub_groups, weights, strict=True)):
                length = sum(self._part(_numel(shape)) for shape in group.values())
                # With one element the two cannot be told apart by size.
                items = kept.get(index, {}).items()
                big = {k: v for k, v in items if torch.is_tensor(v) and v.dim() > 0}
                found.flat.append(
                    {k: _stored(path, v, length) for k, v in {WEIGHT: flat, **big}.items()}
                )
                found.scalars.append(
                    {k: _stored(path, v, 1) if torch.is_tensor(v) else v
                     for k, v in items if k not in big}
                )  # fmt: skip
            if self.frozen:
                path = self._file(rank, "model_states")
                fragments = _headers(path)["frozen_param_fragments"]
                found.frozen = {
                    name: _stored(path, fragments[name], self._part(_numel(self.shapes[name])))
                    for name in sorted(self.frozen)
                }
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{path}: is not laid out as expected: {error}") from None
        return found

    def _scalar(self, stored: _Stored) -> torch.Tensor:
        value = torch.empty(1, dtype=stored.dtype)
        self._read(stored.file, stored.offset, value)
        return value[0].clone()

    def _read(self, path: Path, offset: int, into: torch.Tensor) -> None:
        """Fill a contiguous tensor from a place in a file."""
        if path not in self._open:
            if len(self._open) >= _MAX_OPEN:
                self.close()
            self._open[path] = os.open(path, os.O_RDONLY)
        array: Any = into.view(torch.uint8).numpy()
        view = memoryview(array)
        while len(view) > 0:
            count = os.preadv(self._open[path], [view], offset)
            if count == 0:
                raise CheckpointError(f"{path}: ends before byte {offset + len(view)}")
            view, offset = view[count:], offset + count


def _numel(shape: tuple[int, ...]) -> int:
    number = 1
    for size in shape:
        number *= size
    return number


def _stored(path: Path, tensor: torch.Tensor, numel: int) -> _Stored:
    if tensor.numel() != numel or not tensor.is_contiguous():
        raise ValueError(f"a tensor of {tensor.numel()} elements, expected {numel} in a row")
    storage: Any = tensor.untyped_storage()
    start = storage._checkpoint_offset + tensor.storage_offset() * tensor.dtype.itemsize
    return _Stored(path, start, numel, tensor.dtype)


def _headers(path: Path) -> Any:
    """A file's content with tensors that know their place in it but hold nothing."""
    with FakeTensorMode():
        return _load(path)


def _load(path: Path) -> Any:
    # The engine room lists which types a file may name.
    from nmar_ds.training import engine  # noqa: F401
    from nmar_ds.training.plain_data import not_plain_data

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(not_plain_data(path, error)) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
