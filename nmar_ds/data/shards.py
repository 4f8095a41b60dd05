"""Traces as arrays: what a shard consists of, and the one place that writes it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nmar_ds.traces.schema import NUM_ROLES, Role, RoleArray, Trace

# What a shard of n traces and t tokens consists of: type, and number of entries. `onsets` holds
# the onsets of all traces on end, `onset_offsets` where each trace's begin.
ARRAYS = {
    "ids": "", "roles": "|u1", "offsets": "<i8", "onsets": "<i4", "onset_offsets": "<i8",
    "lines": "<i8", "sources": "<i4", "role_counts": "<i4",
}  # fmt: skip
# The same of traces that are in no shard yet, so that no entry depends on what lies before.
LOOSE = {
    "ids": "", "roles": "|u1", "lengths": "<i8", "onsets": "<i4", "num_onsets": "<i8",
    "lines": "<i8", "sources": "<i4", "role_counts": "<i4",
}  # fmt: skip
Arrays = Mapping[str, npt.NDArray[Any]]


def ids_dtype(vocabulary_size: int) -> str:
    """The narrowest of the two types of ids."""
    return "<u2" if vocabulary_size <= 2**16 else "<i4"


def loose_arrays(traces: Sequence[Trace], dtype: str) -> dict[str, npt.NDArray[Any]]:
    """Turn traces into the arrays of LOOSE: a handful of large operations.

    Args:
        traces: any number.
        dtype: of the ids.
    """
    nothing = np.empty(0, dtype=np.int32)
    lengths = np.array([len(trace) for trace in traces], dtype=np.int64)
    roles = np.concatenate([nothing.astype(np.uint8), *(trace.roles for trace in traces)])
    found = {
        "ids": np.concatenate([nothing, *(trace.ids for trace in traces)]),
        "roles": roles,
        "lengths": lengths,
        "onsets": np.array([n for trace in traces for n in trace.onsets], dtype=np.int32),
        "num_onsets": np.array([len(trace.onsets) for trace in traces], dtype=np.int64),
        "lines": np.array([trace.line for trace in traces], dtype=np.int64),
        "sources": np.array([trace.source for trace in traces], dtype=np.int32),
        "role_counts": role_counts(roles, lengths),
    }
    return {name: values.astype(LOOSE[name] or dtype) for name, values in found.items()}


def counts_of(arrays: Arrays) -> dict[str, Any]:
    """What a manifest counts of traces."""
    by_role = np.bincount(arrays["roles"], minlength=NUM_ROLES)
    return {
        "stored": len(arrays["lengths"]),
        "clean": int((arrays["num_onsets"] == 0).sum()),
        "deviations": int(arrays["num_onsets"].sum()),
        "tokens": {role.label: int(by_role[role]) for role in Role},
    }


def add_counts(total: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add counts, those of roles included."""
    for name, value in more.items():
        if isinstance(value, Mapping):
            add_counts(total.setdefault(name, {}), value)
        else:
            total[name] = total.get(name, 0) + value


class ShardWriter:
    """One shard, written part by part and hashed as it is written.

    Attributes:
        entry: counts, for the manifest.
        dtype: of the ids.
    """

    def __init__(self, folder: Path, number: int, dtype: str) -> None:
        self.entry = {"num_traces": 0, "num_tokens": 0, "num_onsets": 0}
        self.dtype, self._number = dtype, number
        self._open = {
            array: ((folder / shard_file(number, array)).open("wb"), hashlib.sha256())
            for array in ARRAYS
        }
        self._put("offsets", np.zeros(1, dtype=np.int64))
        self._put("onset_offsets", np.zeros(1, dtype=np.int64))

    def add(self, arrays: Arrays) -> None:
        """Append the arrays of LOOSE."""
        lengths, num_onsets = arrays["lengths"], arrays["num_onsets"]
        self._put("offsets", self.entry["num_tokens"] + np.cumsum(lengths))
        self._put("onset_offsets", self.entry["num_onsets"] + np.cumsum(num_onsets))
        for array in ARRAYS:
            if array in LOOSE:
                self._put(array, arrays[array])
        self.entry["num_traces"] += len(lengths)
        self.entry["num_tokens"] += int(lengths.sum())
        self.entry["num_onsets"] += int(num_onsets.sum())

    def close(self) -> dict[str, dict[str, Any]]:
        """Size and sha256 of each file."""
        files = {}
        for array, (file, digest) in self._open.items():
            files[shard_file(self._number, array)] = {
                "size": file.tell(), "sha256": digest.hexdigest(),
            }  # fmt: skip
            file.close()
        return files

    def _put(self, array: str, values: npt.NDArray[Any]) -> None:
        content = values.astype(ARRAYS[array] or self.dtype).tobytes()
        file, digest = self._open[array]
        file.write(content)
        digest.update(content)


def role_counts(roles: RoleArray, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Count targets by role.

    Args:
        roles: uint8[sum of lengths], traces on end.
        lengths: int64[N], none of them 0.

    Returns:
        int64[N, 5]; the first token of each trace is left out.
    """
    starts = np.cumsum(lengths) - lengths
    counts = np.empty((len(lengths), NUM_ROLES), dtype=np.int64)
    for role in range(NUM_ROLES if len(lengths) else 0):
        is_role = roles == role
        counts[:, role] = np.add.reduceat(is_role, starts, dtype=np.int64) - is_role[starts]
    return counts


def shard_file(number: int, array: str) -> str:
    """Return the name of a shard's file."""
    return f"shard-{number:05d}.{array}.bin"
