"""Records to a store in one call: read, encode, build, check, write (SPEC 2).

Traces come in the order (source, line, copy) whatever the builder, and the same input gives a
byte-identical store. Memory: one trace at a time, plus for `hard` the pool of references.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nmar_ds.data.store import write_store
from nmar_ds.errors import ConfigError, TraceError
from nmar_ds.traces import builders
from nmar_ds.traces.boundaries import machine_of
from nmar_ds.traces.building import BuilderSettings, TraceBuilder
from nmar_ds.traces.chat import ChatTemplate
from nmar_ds.traces.encoding import UNDO_TOKEN, Tokenizer
from nmar_ds.traces.records import Record
from nmar_ds.traces.schema import Trace
from nmar_ds.traces.sources import Source
from nmar_ds.traces.turns import encode_record

PROGRESS_EVERY = 1000


@dataclass(slots=True)
class _Job:
    """Settings and running counts of one preparation."""

    builder: TraceBuilder
    counts: dict[str, int]
    max_length: int
    overlong: Literal["error", "drop"]
    refused: Literal["error", "drop"]
    progress: Callable[[int], None] | None
    dropped: list[dict[str, Any]] = field(default_factory=list)
    refusals: list[dict[str, Any]] = field(default_factory=list)


def prepare_store(
    sources: Sequence[Source],
    destination: str | Path,
    tokenizer: Tokenizer,
    *,
    builder: BuilderSettings,
    max_length: int,
    overlong: Literal["error", "drop"] = "error",
    refused: Literal["error", "drop"] = "error",
    semantics: str = "token",
    boundaries: Sequence[str] = (),
    context: str = "linear",
    undo_token: str = UNDO_TOKEN,
    chat: ChatTemplate | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Prepare a trace store.

    Args:
        sources: opened, in order.
        destination: folder of the store; replaced at the very end.
        tokenizer: has the undo token.
        builder: where deviations come from.
        max_length: longest trace in tokens: the rows' sequence length.
        overlong: raise on a longer trace, or drop it, counted and listed in `dropped.jsonl`.
        refused: raise on a bad record, or leave it out, counted and listed in `refused.jsonl`.
        semantics: what one undo pops: "token", "span" or "reset".
        boundaries: texts at which a `span` undo stops; empty under the others.
        context: what a token may see; "linear".
        undo_token: has to be the tokenizer's.
        chat: put around the prompts of text records; records of ids are taken as they are.
        progress: called with the number of records read, every thousand and at the end.

    Returns:
        The manifest. Its counts: read = refused + passed_over (by a weight below 1) + used
        records, built = stored + dropped traces; moved_tokens are right tokens that became
        heads of deviations (0 under `token`); without_donor, deviations for which `hard` or
        `random` found nothing; without_error, traces that were to deviate and have nothing to
        deviate with; respelt and left_out, see `sampled.Departures`.

    Raises:
        TraceError: a bad record or trace.
        ConfigError: settings that contradict each other or are not built.
        StoreError: the destination cannot be written.
    """
    _require_settings(max_length=max_length, overlong=overlong, refused=refused, context=context)
    if tokenizer.undo_token != undo_token:
        raise ConfigError(f"undo.token: {undo_token!r}, expected {tokenizer.undo_token!r}")
    machine = machine_of(tokenizer, semantics, boundaries)
    described = [
        {"path": source.label, "sha256": source.fingerprint(), "asked": source.settings.asked}
        for source in sources
    ]
    pool = builders.Pool(tokenizer) if builder.name == "hard" else None
    counted = dict.fromkeys(("read", "refused", "passed_over", "built", "dropped"), 0)
    job = _Job(
        builder=TraceBuilder(builder, tokenizer, machine, chat, pool, counted), counts=counted,
        max_length=max_length, overlong=overlong, refused=refused, progress=progress,
    )  # fmt: skip
    if pool is not None:
        _fill_pool(sources, job, pool)
    settings = {
        **{name: value for name, value in dataclasses.asdict(builder).items() if name != "seed"},
        "max_length": max_length, "overlong": overlong, "refused": refused,
        "chat": None if chat is None else chat.facts,
    }  # fmt: skip
    manifest = write_store(
        destination, _traces(sources, job), tokenizer=tokenizer, machine=machine,
        boundaries=boundaries, context=context, sources=described, builder=settings,
        seed=builder.seed, counts=job.counts,
        notes={"dropped": job.dropped, "refused": job.refusals},
    )  # fmt: skip
    counts = manifest["counts"]
    assert counts["built"] == counts["stored"] + counts["dropped"], "traces do not add up"
    return manifest


def _traces(sources: Sequence[Source], job: _Job) -> Iterator[Trace]:
    for number, source in enumerate(sources):
        for record in _read(source, job):
            try:
                traces = job.builder.traces(record, number, _times(record, number, source, job))
            except TraceError as error:
                _refuse(error, job)
                continue
            job.counts["built"] += len(traces)
            job.counts["passed_over"] += not traces
            for copy, trace in enumerate(traces):
                if len(trace) <= job.max_length:
                    yield trace
                    continue
                problem = f"trace {copy} has {len(trace)} tokens"
                expected = f"at most {job.max_length}, or overlong: drop"
                if job.overlong == "error":
                    raise TraceError(record.path, record.line, "trace", problem, expected)
                job.counts["dropped"] += 1
                job.dropped.append(
                    {"source": number, "line": record.line, "copy": copy, "length": len(trace)}
                )
    if job.progress is not None:
        job.progress(job.counts["read"])


def _times(record: Record, number: int, source: Source, job: _Job) -> int:
    """How often a record is taken: the weight, its fraction by a draw of the record's own."""
    whole, fraction = divmod(source.settings.weight, 1)
    if not fraction:
        return int(whole)
    drawn = builders.rng_of(job.builder.settings.seed, number, record.line, -1).random()
    return int(whole) + (drawn < fraction)


def _fill_pool(sources: Sequence[Source], job: _Job, pool: builders.Pool) -> None:
    """Read everything once for the references; bad records are reported by the second reading."""
    for number, source in enumerate(sources):
        for record in source.all_records(on_error=lambda error: None):
            if record.segments:
                continue
            try:
                encoded = encode_record(record, job.builder.tokenizer.unchecked, job.builder.chat)
            except TraceError:
                continue
            for turn in encoded.turns:
                pool.add(record.group, turn.reference_ids, (number, record.line))
    pool.finish()


def _read(source: Source, job: _Job) -> Iterator[Record]:
    def count_bad(error: TraceError) -> None:
        job.counts["read"] += 1
        _refuse(error, job)

    for record in source.all_records(on_error=count_bad):
        job.counts["read"] += 1
        if job.progress is not None and job.counts["read"] % PROGRESS_EVERY == 0:
            job.progress(job.counts["read"])
        yield record


def _refuse(error: TraceError, job: _Job) -> None:
    if job.refused == "error":
        raise error
    job.counts["refused"] += 1
    job.refusals.append({"line": error.line, "path": error.path, "message": str(error)})


def _require_settings(*, max_length: int, overlong: str, refused: str, context: str) -> None:
    """Refuse values no preparation can mean."""
    for name, value, values in (
        ("overlong", overlong, ("error", "drop")),
        ("refused", refused, ("error", "drop")),
        ("context", context, ("linear",)),
    ):
        if value not in values:
            raise ConfigError(f"{name}: {value!r}, expected {' or '.join(values)}")
    if max_length < 1:
        raise ConfigError(f"max_length: {max_length}, expected at least 1")
