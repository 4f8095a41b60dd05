"""All references by group and piece class: where `hard` takes its plausible wrong values from.

Parts are collected record by record, by any process; joined once; then only read, so that all
processes of a machine can share one copy, mapped from disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nmar_ds.traces.encoding import PIECE_CLASSES, Tokenizer
from nmar_ds.traces.schema import IdArray

NUM_CLASSES = len(PIECE_CLASSES)
DIGEST = "S32"  # sha256 of a reference's ids
# Of a joined pool; D references, T tokens, G groups. Places count from the group's first token.
ARRAYS = {
    "ids": "<i4", "ends": "<i8", "texts": "<i8", "records": "<i8", "places": "<i8", "firsts": "<i4",
    "digests": DIGEST, "first_token": "<i8", "first_reference": "<i8", "first_place": "<i8",
    "has_choice": "|b1",
}  # fmt: skip
GROUPS = "groups.json"
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(slots=True)
class PoolPart:
    """References in order, not indexed yet.

    Attributes:
        names: of the groups, in order of their first reference here.
    """

    names: list[str] = field(default_factory=list)
    _numbers: dict[str, int] = field(default_factory=dict)
    _ids: list[IdArray] = field(default_factory=list)
    _digests: list[bytes] = field(default_factory=list)
    _entries: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, group: str, reference_ids: IdArray, record: tuple[int, int]) -> None:
        """Add a reference (with its stop token, which is left out)."""
        if group not in self._numbers:
            self._numbers[group] = len(self.names)
            self.names.append(group)
        self._digests.append(hashlib.sha256(reference_ids.tobytes()).digest())
        self._ids.append(reference_ids[:-1])
        self._entries.append((self._numbers[group], *record))

    def arrays(self) -> Arrays:
        """`ids`, `lengths`, `digests`, and `entries`: group and record of each reference."""
        return {
            "ids": np.concatenate([np.empty(0, dtype=np.int32), *self._ids]),
            "lengths": np.array([len(ids) for ids in self._ids], dtype=np.int64),
            "digests": np.array(self._digests, dtype=DIGEST),
            "entries": np.array(self._entries, dtype=np.int64).reshape(-1, 3),
        }


class Pool:
    """All references, indexed: about 20 bytes a token.

    Args:
        tokenizer: whose ids they are.
        names: of the groups.
        arrays: as ARRAYS names them.
    """

    def __init__(
        self, tokenizer: Tokenizer, names: Sequence[str] = (), arrays: Arrays | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._groups = {name: number for number, name in enumerate(names)}
        self._arrays = arrays or {}
        self._part = PoolPart()

    def add(self, group: str, reference_ids: IdArray, record: tuple[int, int]) -> None:
        """Add a reference (with its stop token, which is left out)."""
        self._part.add(group, reference_ids, record)

    def finish(self) -> None:
        """Index what was added."""
        self._join([(self._part.names, self._part.arrays())])
        self._part = PoolPart()

    @classmethod
    def joined(cls, tokenizer: Tokenizer, parts: Sequence[tuple[list[str], Arrays]]) -> Pool:
        """A pool of parts, given as names and arrays, in order."""
        pool = cls(tokenizer)
        pool._join(parts)
        return pool

    def save(self, folder: Path) -> None:
        """Write the arrays into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ARRAYS:
            np.save(folder / f"{name}.npy", self._arrays[name])
        (folder / GROUPS).write_text(json.dumps(list(self._groups)), encoding="ascii")

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer) -> Pool:
        """Map what `save` wrote: every process of a machine reads the same pages."""
        names = json.loads((folder / GROUPS).read_text(encoding="ascii"))
        arrays = {
            # A plain array over the mapped bytes: views of a memmap cost several times more.
            name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")).view(np.ndarray)
            for name in ARRAYS
        }
        return cls(tokenizer, names, arrays)

    def _join(self, parts: Sequence[tuple[list[str], Arrays]]) -> None:
        numbers: dict[str, int] = {}
        groups = [np.empty(0, dtype=np.int64)]
        for names, arrays in parts:
            known = np.array(
                [numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64
            )
            groups.append(known[arrays["entries"][:, 0]])
        self._groups = numbers
        group = np.concatenate(groups)
        joined = {
            name: np.concatenate([empty, *(arrays[name] for _, arrays in parts)])
            for name, empty in PoolPart().arrays().items()
        }
        order = np.argsort(group, kind="stable")
        begins = np.cumsum(joined["lengths"]) - joined["lengths"]
        lengths, group = joined["lengths"][order], group[order]
        ids = joined["ids"][_ranges(begins[order], lengths)]
        digests, texts = np.unique(joined["digests"][order], return_inverse=True)
        self._arrays = {
            "ids": ids, "texts": texts, "records": joined["entries"][order, 1:],
            "digests": digests, **self._index(ids, lengths, group, texts),
        }  # fmt: skip

    def _index(
        self,
        ids: IdArray,
        lengths: npt.NDArray[np.int64],
        group: npt.NDArray[np.int64],
        texts: npt.NDArray[np.int64],
    ) -> Arrays:
        num = len(self._groups)
        first_reference = np.searchsorted(group, np.arange(num + 1))
        ends = np.cumsum(lengths)
        first_token = np.concatenate([[0], ends])[first_reference]
        group_of_token = np.repeat(group, lengths)
        classes = self._tokenizer.class_of[ids]
        order = np.lexsort((ids, classes, group_of_token))  # stable: equal ones stay in order
        key = group_of_token * NUM_CLASSES + classes
        sizes = np.bincount(key, minlength=num * NUM_CLASSES)
        # A group has a choice where two of its references differ.
        lowest = np.full(num, np.iinfo(np.int64).max)
        highest = np.full(num, -1)
        np.minimum.at(lowest, group, texts)
        np.maximum.at(highest, group, texts)
        return {
            "ends": ends - first_token[group],
            "places": order - first_token[group_of_token[order]],
            "firsts": ids[order],
            "first_token": first_token,
            "first_reference": first_reference,
            "first_place": np.concatenate([[0], np.cumsum(sizes)]),
            "has_choice": lowest < highest,
        }

    def number_of(self, reference_ids: IdArray) -> int:
        """Return the number under which references that read the same are known, -1 if none."""
        digests = self._arrays["digests"]
        asked = np.array(hashlib.sha256(reference_ids.tobytes()).digest(), dtype=DIGEST)
        number = int(digests.searchsorted(asked))
        return number if number < len(digests) and digests[number] == asked else -1

    def draw(
        self,
        *,
        group: str,
        right_id: int,
        rng: np.random.Generator,
        length: int,
        own: int,
        record: tuple[int, int],
    ) -> IdArray | None:
        """Take a stretch whose first piece has the class of the right one but is another.

        Uniform over all such places of the group.

        Returns:
            int32[0 to length], empty where the draw fell on the record itself or on a reference
            that reads the same; None where the group has nothing to offer.
        """
        entry = self._groups.get(group)
        if entry is None or not self._arrays["has_choice"][entry]:
            return None
        piece_class = int(self._tokenizer.class_of[right_id])
        place, end = self._arrays["first_place"][entry * NUM_CLASSES + piece_class :][:2].tolist()
        firsts = self._arrays["firsts"][place:end]
        # Places are sorted by their first piece, so those of the right piece are one stretch.
        # Asked in their own dtype: another would copy all of them for each question.
        asked = np.array([right_id, right_id + 1], dtype=firsts.dtype)
        left, right = firsts.searchsorted(asked).tolist()
        num_others = len(firsts) - (right - left)
        if num_others == 0:
            return None
        drawn = int(rng.integers(num_others))
        start = int(
            self._arrays["places"][place + (drawn if drawn < left else drawn + right - left)]
        )
        return self._stretch(entry, start, length, own, record)

    def _stretch(
        self, entry: int, start: int, length: int, own: int, record: tuple[int, int]
    ) -> IdArray:
        """Up to `length` ids of a group from a place on, as long as its reference goes."""
        first, last = self._arrays["first_reference"][entry : entry + 2].tolist()
        ends = self._arrays["ends"][first:last]
        donor = int(ends.searchsorted(start, side="right"))
        known = first + donor
        base = int(self._arrays["first_token"][entry])
        stop = min(start + length, int(ends[donor]))
        if (
            self._arrays["texts"][known] == own
            or tuple(self._arrays["records"][known].tolist()) == record
        ):
            stop = start
        taken: IdArray = self._arrays["ids"][base + start : base + stop]
        return taken


def _ranges(begins: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The indices of stretches on end."""
    starts = np.cumsum(lengths) - lengths
    return np.repeat(begins - starts, lengths) + np.arange(int(lengths.sum()))
