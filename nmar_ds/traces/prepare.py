"""Records to a store in one call: read, encode, build, check, write (SPEC 2).

Traces come in the order (source, line, copy) whatever the builder, and the same input gives a
byte-identical store. Memory: one trace at a time, plus for `hard` the pool of references.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nmar_ds.data.store import write_store
from nmar_ds.errors import ConfigError, TraceError
from nmar_ds.files import sha256_file
from nmar_ds.traces import builders
from nmar_ds.traces.assembly import assemble, check, move_starts, said_by
from nmar_ds.traces.boundaries import machine_of
from nmar_ds.traces.chat import ChatTemplate
from nmar_ds.traces.encoding import UNDO_TOKEN, Tokenizer
from nmar_ds.traces.records import Record, read_records
from nmar_ds.traces.reduction import Machine
from nmar_ds.traces.schema import Trace
from nmar_ds.traces.turns import encode_record, trace_of_ids

BuilderName = Literal["given", "random", "hard"]
PROGRESS_EVERY = 1000


@dataclass(slots=True)
class _Job:
    """Settings and running counts of one preparation."""

    tokenizer: Tokenizer
    machine: Machine
    builder: BuilderName
    traces_per_record: int
    clean_share: float
    max_deviations: int
    max_deviation_length: int
    max_length: int
    overlong: Literal["error", "drop"]
    refused: Literal["error", "drop"]
    seed: int
    progress: Callable[[int], None] | None
    pool: builders.Pool
    chat: ChatTemplate | None
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("read", "refused", "built", "dropped", "snaps", "moved_tokens", "without_donor"), 0
        )
    )
    dropped: list[dict[str, Any]] = field(default_factory=list)
    refusals: list[dict[str, Any]] = field(default_factory=list)


def prepare_store(
    sources: Sequence[str | Path],
    destination: str | Path,
    tokenizer: Tokenizer,
    *,
    builder: BuilderName,
    max_length: int,
    traces_per_record: int = 1,
    clean_share: float = 0.0,
    max_deviations: int = 1,
    max_deviation_length: int = 8,
    overlong: Literal["error", "drop"] = "error",
    refused: Literal["error", "drop"] = "error",
    seed: int = 0,
    semantics: str = "token",
    boundaries: Sequence[str] = (),
    context: str = "linear",
    undo_token: str = UNDO_TOKEN,
    chat: ChatTemplate | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Prepare a trace store.

    Args:
        sources: JSON-lines files, in order.
        destination: folder of the store; replaced at the very end.
        tokenizer: has the undo token.
        builder: `given` takes records as they are; `random` and `hard` add deviations to
            records without any.
        max_length: longest trace in tokens: the rows' sequence length.
        traces_per_record: copies, each with deviations of its own; 1 for `given`.
        clean_share: probability of a trace without deviations; `given` takes no notice of it.
        max_deviations: a trace that is not clean gets 1 to this many.
        max_deviation_length: in tokens; lengths are 1 to this, before right tokens are moved in.
        overlong: raise on a longer trace, or drop it, counted and listed in `dropped.jsonl`.
        refused: raise on a bad record, or leave it out, counted and listed in `refused.jsonl`.
        seed: of the builders.
        semantics: what one undo pops: "token", "span" or "reset".
        boundaries: texts at which a `span` undo stops; empty under the others.
        context: what a token may see; "linear".
        undo_token: has to be the tokenizer's.
        chat: put around the prompts of text records; records of ids are taken as they are.
        progress: called with the number of records read, every thousand and at the end.

    Returns:
        The manifest. Its counts: read = refused + used records, built = used records x
        traces_per_record, built = stored + dropped; moved_tokens are right tokens that became
        heads of deviations (0 under `token`).

    Raises:
        TraceError: a bad record or trace.
        ConfigError: settings that contradict each other or are not built.
        StoreError: the destination cannot be written.
    """
    _require_settings(
        builder=builder, traces_per_record=traces_per_record, clean_share=clean_share,
        max_deviations=max_deviations, max_deviation_length=max_deviation_length,
        max_length=max_length, overlong=overlong, refused=refused, context=context,
    )  # fmt: skip
    if tokenizer.undo_token != undo_token:
        raise ConfigError(f"undo.token: {undo_token!r}, expected {tokenizer.undo_token!r}")
    machine = machine_of(tokenizer, semantics, boundaries)
    paths = [Path(source) for source in sources]
    described = [{"path": str(path), "sha256": _sha256(path)} for path in paths]
    job = _Job(
        tokenizer=tokenizer, machine=machine, builder=builder,
        traces_per_record=traces_per_record, clean_share=clean_share,
        max_deviations=max_deviations, max_deviation_length=max_deviation_length,
        max_length=max_length, overlong=overlong, refused=refused, seed=seed, progress=progress,
        pool=builders.Pool(tokenizer), chat=chat,
    )  # fmt: skip
    if builder == "hard":
        _fill_pool(paths, job)
    settings = {
        "name": builder, "traces_per_record": traces_per_record, "clean_share": clean_share,
        "max_deviations": max_deviations, "max_deviation_length": max_deviation_length,
        "max_length": max_length, "overlong": overlong,
        "chat": None if chat is None else chat.facts,
    }  # fmt: skip
    manifest = write_store(
        destination, _traces(paths, job), tokenizer=tokenizer, machine=machine,
        boundaries=boundaries, context=context, sources=described, builder=settings, seed=seed,
        counts=job.counts, notes={"dropped": job.dropped, "refused": job.refusals},
    )  # fmt: skip
    counts = manifest["counts"]
    used = counts["read"] - counts["refused"]
    assert counts["built"] == used * traces_per_record, "records and traces do not add up"
    assert counts["built"] == counts["stored"] + counts["dropped"], "traces do not add up"
    return manifest


def _traces(paths: Sequence[Path], job: _Job) -> Iterator[Trace]:
    for source, path in enumerate(paths):
        for record in _read(path, job):
            try:
                traces = list(_build(record, source, job))
            except TraceError as error:
                _refuse(error, job)
                continue
            job.counts["built"] += len(traces)
            for copy, trace in enumerate(traces):
                if len(trace) <= job.max_length:
                    yield trace
                    continue
                problem = f"trace {copy} has {len(trace)} tokens"
                expected = f"at most {job.max_length}, or overlong: drop"
                if job.overlong == "error":
                    raise TraceError(path, record.line, "trace", problem, expected)
                job.counts["dropped"] += 1
                job.dropped.append(
                    {"source": source, "line": record.line, "copy": copy, "length": len(trace)}
                )
    if job.progress is not None:
        job.progress(job.counts["read"])


def _build(record: Record, source: int, job: _Job) -> Iterator[Trace]:
    """Make and check the traces of one record."""
    tokenizer = job.tokenizer
    if record.marked and job.builder != "given":
        field = "segments" if record.segments or len(record.turns) > 1 else "deviations"
        problem = "the record says itself where its deviations are"
        expected = f"a plain prompt and reference for builder {job.builder!r}, or builder 'given'"
        raise TraceError(record.path, record.line, field, problem, expected)
    if record.segments:
        trace = trace_of_ids(record, source=source)
        check(trace, tokenizer=tokenizer, machine=job.machine, path=record.path)
        yield trace
        return
    encoded = encode_record(record, tokenizer, job.chat)
    said = said_by(encoded.turns)
    job.counts["snaps"] += encoded.num_snaps
    for copy in range(job.traces_per_record):
        drawn = _deviating(encoded.turns, record, source, copy, job)
        turns = [move_starts(turn, job.machine) for turn in drawn]
        job.counts["moved_tokens"] += _num_wrong(turns) - _num_wrong(drawn)
        trace = assemble(turns, machine=job.machine, line=record.line, source=source)
        check(trace, tokenizer=tokenizer, machine=job.machine, path=record.path, said=said)
        yield trace


def _num_wrong(turns: Sequence[builders.Turn]) -> int:
    return sum(len(deviation.ids) for turn in turns for deviation in turn.deviations)


def _deviating(
    turns: tuple[builders.Turn, ...], record: Record, source: int, copy: int, job: _Job
) -> tuple[builders.Turn, ...]:
    if job.builder == "given":
        return turns
    rng = builders.rng_of(job.seed, source, record.line, copy)
    if rng.random() < job.clean_share:
        return turns
    if job.builder == "random":
        built = builders.random(
            turns, rng, tokenizer=job.tokenizer, max_deviations=job.max_deviations,
            max_deviation_length=job.max_deviation_length,
        )  # fmt: skip
    else:
        built = builders.hard(
            turns, rng, pool=job.pool, group=record.group, record=(source, record.line),
            tokenizer=job.tokenizer, max_deviations=job.max_deviations,
            max_deviation_length=job.max_deviation_length,
        )  # fmt: skip
    job.counts["without_donor"] += built.num_missing
    return built.turns


def _fill_pool(paths: Sequence[Path], job: _Job) -> None:
    """Read everything once for the references; bad records are reported by the second reading."""
    for source, path in enumerate(paths):
        for record in read_records(path, on_error=lambda error: None):
            if record.segments:
                continue
            try:
                encoded = encode_record(record, job.tokenizer.unchecked, job.chat)
            except TraceError:
                continue
            for turn in encoded.turns:
                job.pool.add(record.group, turn.reference_ids, (source, record.line))
    job.pool.finish()


def _read(path: Path, job: _Job) -> Iterator[Record]:
    def count_bad(error: TraceError) -> None:
        job.counts["read"] += 1
        _refuse(error, job)

    for record in read_records(path, on_error=count_bad):
        job.counts["read"] += 1
        if job.progress is not None and job.counts["read"] % PROGRESS_EVERY == 0:
            job.progress(job.counts["read"])
        yield record


def _refuse(error: TraceError, job: _Job) -> None:
    if job.refused == "error":
        raise error
    job.counts["refused"] += 1
    job.refusals.append({"line": error.line, "path": error.path, "message": str(error)})


def _require_settings(**settings: Any) -> None:
    """Refuse values no preparation can mean."""
    allowed = {
        "builder": ("given", "random", "hard"),
        "overlong": ("error", "drop"),
        "refused": ("error", "drop"),
        "context": ("linear",),
    }
    for name, values in allowed.items():
        if settings[name] not in values:
            raise ConfigError(f"{name}: {settings[name]!r}, expected {' or '.join(values)}")
    for name in ("traces_per_record", "max_deviations", "max_deviation_length", "max_length"):
        if settings[name] < 1:
            raise ConfigError(f"{name}: {settings[name]}, expected at least 1")
    if not 0.0 <= settings["clean_share"] <= 1.0:
        raise ConfigError(f"clean_share: {settings['clean_share']}, expected 0 to 1")
    if settings["builder"] == "given" and settings["traces_per_record"] != 1:
        raise ConfigError(
            f"traces_per_record: {settings['traces_per_record']} with builder 'given' would store "
            "equal traces, expected 1"
        )


def _sha256(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        problem = error.strerror or str(error)
        raise TraceError(path, None, "file", problem, "a readable file") from error
