"""Units of a preparation: a few chunks of the sources, and what building their records gives.

A unit's result depends on the sources, the settings and the tokenizer, never on who builds it or
what was built before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from nmar_ds.data.shards import Arrays, counts_of, ids_dtype, loose_arrays
from nmar_ds.errors import TraceError
from nmar_ds.traces import builders
from nmar_ds.traces.building import BuilderSettings, TraceBuilder
from nmar_ds.traces.chat import ChatTemplate
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.parity import CheckedTokenizer
from nmar_ds.traces.pool import Pool, PoolPart
from nmar_ds.traces.records import Record
from nmar_ds.traces.reduction import Machine
from nmar_ds.traces.schema import IdArray, Trace
from nmar_ds.traces.sources import Chunk, Source
from nmar_ds.traces.together import all_hold
from nmar_ds.traces.turns import encode_record

MAX_UNITS = 4096  # what one folder of results can hold; larger sources have larger units
RECORD_COUNTS = ("read", "refused", "passed_over", "built", "dropped")


@dataclass(frozen=True, slots=True)
class Unit:
    """Chunks that follow each other: (number of the source, chunk)."""

    parts: tuple[tuple[int, Chunk], ...]

    @property
    def num_lines(self) -> int:
        """Lines of all its chunks, good or bad."""
        return sum(chunk.num_lines for _, chunk in self.parts)

    def facts(self) -> list[Any]:
        """As JSON has it; `unit_of` reads it."""
        return [[source, asdict(chunk)] for source, chunk in self.parts]


def unit_of(facts: list[Any]) -> Unit:
    """What `Unit.facts` gave."""
    return Unit(tuple(
        (source, Chunk(**{**chunk, "place": tuple(chunk["place"])})) for source, chunk in facts
    ))  # fmt: skip


def units_of(sources: Sequence[Source]) -> list[Unit]:
    """All units; they depend on the sources alone.

    Raises:
        TraceError: a source cannot be read.
    """
    parts = [(number, chunk) for number, source in enumerate(sources) for chunk in source.chunks()]
    size = -(-len(parts) // MAX_UNITS) or 1
    return [Unit(tuple(parts[n : n + size])) for n in range(0, len(parts), size)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What decides how records become traces.

    Attributes:
        builder: where deviations come from.
        tokenizer: has the undo token.
        machine: what one undo pops.
        chat: put around the prompts of text records.
        max_length: longest trace in tokens.
        overlong: raise on a longer trace, or drop it.
        refused: raise on a bad record, or leave it out.
    """

    builder: BuilderSettings
    tokenizer: Tokenizer
    machine: Machine
    chat: ChatTemplate | None
    max_length: int
    overlong: Literal["error", "drop"]
    refused: Literal["error", "drop"]


@dataclass(slots=True)
class _Building:
    """One unit on its way."""

    recipe: Recipe
    builder: TraceBuilder
    counts: dict[str, int]
    dropped: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)

    def refuse(self, error: TraceError) -> None:
        if self.recipe.refused == "error":
            raise error
        self.counts["refused"] += 1
        self.refused.append({"line": error.line, "path": error.path, "message": str(error)})


def empty_counts(recipe: Recipe) -> dict[str, Any]:
    """All counts of a store without traces."""
    builder = TraceBuilder(
        recipe.builder, recipe.tokenizer, recipe.machine, counts=dict.fromkeys(RECORD_COUNTS, 0)
    )
    return {**builder.counts, **counts_of(loose_arrays([], "<u2"))}


def build(
    recipe: Recipe, sources: Sequence[Source], unit: Unit, pool: Pool | None
) -> tuple[dict[str, Any], Arrays]:
    """Build a unit's traces.

    Args:
        recipe: how.
        sources: all of them.
        unit: which records.
        pool: all references, for `hard`.

    Returns:
        Facts (`counts`, `dropped`, `refused`, `num_compared`, `num_tokens`), and the traces as
        arrays.

    Raises:
        TraceError: the first bad record or trace, where such stop the preparation.
    """
    try:
        built = _build(recipe, sources, unit, pool, together=True)
    except TraceError:
        built = None  # a trace before that record may be wrong as well, and comes first then
    if built is None:
        built = _build(recipe, sources, unit, pool, together=False)
    assert built is not None, "each trace was checked"
    return built


def _build(
    recipe: Recipe, sources: Sequence[Source], unit: Unit, pool: Pool | None, *, together: bool
) -> tuple[dict[str, Any], Arrays] | None:
    """As `build`; None where traces are checked together and something is wrong with one."""
    counts = dict.fromkeys(RECORD_COUNTS, 0)
    tokenizer = recipe.tokenizer
    if isinstance(tokenizer, CheckedTokenizer):
        tokenizer.count_anew()
    unchecked: list[tuple[Trace, IdArray | None]] = []
    builder = TraceBuilder(
        recipe.builder, tokenizer, recipe.machine, recipe.chat, pool, counts,
        unchecked if together else None,
    )  # fmt: skip
    building = _Building(recipe, builder, counts)
    traces = [
        trace
        for number, chunk in unit.parts
        for trace in _traces(building, number, sources[number], chunk)
    ]
    if not all_hold(
        [trace for trace, _ in unchecked], [said for _, said in unchecked],
        tokenizer=tokenizer, machine=recipe.machine,
    ):  # fmt: skip
        return None
    arrays = loose_arrays(traces, ids_dtype(tokenizer.size))
    facts = {
        "counts": {**counts, **counts_of(arrays)},
        "dropped": building.dropped,
        "refused": building.refused,
        "num_compared": tokenizer.num_texts if isinstance(tokenizer, CheckedTokenizer) else 0,
        "num_tokens": len(arrays["ids"]),
    }
    return facts, arrays


def references(
    recipe: Recipe, sources: Sequence[Source], unit: Unit
) -> tuple[dict[str, Any], Arrays]:
    """A unit's share of the pool; bad records are reported when they are built.

    Returns:
        Facts (`names` of groups), and arrays of `PoolPart`.
    """
    part = PoolPart()
    for number, chunk in unit.parts:
        for record in sources[number].records(chunk, lambda error: None):
            if record.segments:
                continue
            try:
                encoded = encode_record(record, recipe.tokenizer.unchecked, recipe.chat)
            except TraceError:
                continue
            for turn in encoded.turns:
                part.add(record.group, turn.reference_ids, (number, record.line))
    return {"names": part.names}, part.arrays()


def pool_of(tokenizer: Tokenizer, parts: Sequence[tuple[Mapping[str, Any], Arrays]]) -> Pool:
    """The pool of all units' shares, in order."""
    return Pool.joined(tokenizer, [
        (facts["names"], {**arrays, "entries": arrays["entries"].reshape(-1, 3)})
        for facts, arrays in parts
    ])  # fmt: skip


def _traces(building: _Building, number: int, source: Source, chunk: Chunk) -> Iterator[Trace]:
    recipe, counts = building.recipe, building.counts
    for record in _read(building, source, chunk):
        try:
            traces = building.builder.traces(record, number, _times(recipe, record, number, source))
        except TraceError as error:
            building.refuse(error)
            continue
        counts["built"] += len(traces)
        counts["passed_over"] += not traces
        for copy, trace in enumerate(traces):
            if len(trace) <= recipe.max_length:
                yield trace
                continue
            problem = f"trace {copy} has {len(trace)} tokens"
            expected = f"at most {recipe.max_length}, or overlong: drop"
            if recipe.overlong == "error":
                raise TraceError(record.path, record.line, "trace", problem, expected)
            counts["dropped"] += 1
            building.dropped.append(
                {"source": number, "line": record.line, "copy": copy, "length": len(trace)}
            )


def _read(building: _Building, source: Source, chunk: Chunk) -> Iterator[Record]:
    def count_bad(error: TraceError) -> None:
        building.counts["read"] += 1
        building.refuse(error)

    for record in source.records(chunk, count_bad):
        building.counts["read"] += 1
        yield record


def _times(recipe: Recipe, record: Record, number: int, source: Source) -> int:
    """How often a record is taken: the weight, its fraction by a draw of the record's own."""
    whole, fraction = divmod(source.settings.weight, 1)
    if not fraction:
        return int(whole)
    drawn = builders.rng_of(recipe.builder.seed, number, record.line, -1).random()
    return int(whole) + (drawn < fraction)
