"""Records to a store: read, encode, build, check, write (SPEC 2), by any number of processes.

Traces come in the order (source, line, copy) whatever the builder, and the same input gives a
byte-identical store whoever took part. Three kinds of units are shared out one after the other:
`pool` (references, for `hard` alone), `unit` (traces) and `shard`. One process leads: it lays the
work out, says when the next kind may begin, and publishes. Memory: a unit at a time; the pool is
mapped from disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nmar_ds
from nmar_ds.data.audit import Statistics, audit
from nmar_ds.data.crew import Crew
from nmar_ds.data.shards import Arrays, ShardWriter, add_counts, ids_dtype
from nmar_ds.data.statistics import write_pages
from nmar_ds.data.store import SHARD_TOKENS, Content, publish_store, require_replaceable
from nmar_ds.data.work import AttemptOverError, Work, drop
from nmar_ds.errors import ConfigError, NmarError, StoreError
from nmar_ds.files import free_bytes, sha256_file
from nmar_ds.traces.boundaries import machine_of
from nmar_ds.traces.building import BuilderSettings
from nmar_ds.traces.chat import ChatTemplate
from nmar_ds.traces.encoding import UNDO_TOKEN, Tokenizer
from nmar_ds.traces.parity import CheckedTokenizer
from nmar_ds.traces.pool import Pool
from nmar_ds.traces.sources import Source, SourceSettings, open_source
from nmar_ds.traces.units import (
    Recipe,
    Unit,
    build,
    empty_counts,
    pool_of,
    references,
    unit_of,
    units_of,
)

Progress = Callable[[int, int], None]
SHARDS = "shards"
# Their versions may change what is built.
LIBRARIES = ("numpy", "sentencepiece", "tokenizers", "jinja2", "reasoning-gym")


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """One store to be prepared; every process that takes part has an equal one.

    Attributes:
        sources: in order.
        destination: folder of the store.
        recipe: how records become traces.
        boundaries: texts at which a `span` undo stops.
        context: what a token may see.
    """

    sources: Sequence[SourceSettings]
    destination: Path
    recipe: Recipe
    boundaries: Sequence[str] = ()
    context: str = "linear"

    @property
    def work_folder(self) -> Path:
        """Beside the store, on the same disk."""
        return work_folder(self.destination)

    def begin(self) -> Work:
        """Lay the work out; for the process that leads.

        Raises:
            TraceError: a source cannot be read.
            StoreError: something else is at the destination, or nothing can be written there.
        """
        require_replaceable(self.destination)
        opened = [open_source(each) for each in self.sources]
        described = [
            {"path": source.label, "sha256": source.fingerprint(), "asked": source.settings.asked}
            for source in opened
        ]
        with _disk(self.destination):
            work = Work.begin(self.work_folder, self._facts(described))
            self._keep_whole_shards(work)
            units = units_of(self._opened(work))
            layout = {"described": described, "units": [unit.facts() for unit in units]}
            work.say("plan", layout)
        return work

    def _keep_whole_shards(self, work: Work) -> None:
        """A shard's result goes with its files: publishing may have taken them away."""
        kept = set()
        for number in work.finished("shard"):
            facts = work.facts_of("shard", number)
            folder = work.folder / SHARDS / facts["folder"]
            if all(
                (folder / name).is_file() and sha256_file(folder / name) == entry["sha256"]
                for name, entry in facts["files"].items()
            ):
                kept.add(facts["folder"])
            else:
                work.forget("shard", number)
        for folder in (work.folder / SHARDS).glob("*"):
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def run(self, work: Work, crew: Crew, progress: Progress | None = None) -> dict[str, Any]:
        """Take part.

        Args:
            work: an attempt that `begin` began.
            crew: all who take part.
            progress: called by the leading process, with lines done and lines in all.

        Returns:
            The manifest; nothing in it where another process leads.

        Raises:
            TraceError, WorkerLostError, StoreError: see `prepare_store`.
        """
        try:
            with _disk(self.destination):
                plan = work.heard("plan", crew)
                units = [unit_of(facts) for facts in plan["units"]]
                part = _Part(self, work, crew, units, self._opened(work), progress)
                part.build_all()
                return part.assemble(plan["described"])
        except AttemptOverError:
            if crew.rank == 0:
                raise StoreError(f"{work.folder}: was taken away meanwhile") from None
            return {}

    def _opened(self, work: Work) -> list[Source]:
        return [
            open_source(each, work.unpacked(number)) for number, each in enumerate(self.sources)
        ]

    def settings(self) -> dict[str, Any]:
        """As the manifest keeps them."""
        recipe = self.recipe
        fields = dataclasses.asdict(recipe.builder)
        return {
            **{name: value for name, value in fields.items() if name != "seed"},
            "max_length": recipe.max_length, "overlong": recipe.overlong,
            "refused": recipe.refused, "chat": None if recipe.chat is None else recipe.chat.facts,
        }  # fmt: skip

    def _facts(self, described: list[dict[str, Any]]) -> dict[str, Any]:
        """All that results depend on."""
        recipe = self.recipe
        return {
            "sources": described,
            "weights": [
                [each.weight, each.max_records, dict(each.columns)] for each in self.sources
            ],
            "settings": self.settings(),
            "seed": recipe.builder.seed,
            "tokenizer": recipe.tokenizer.fingerprint,
            "compared": isinstance(recipe.tokenizer, CheckedTokenizer),
            "machine": [recipe.machine.semantics, sorted(recipe.machine.boundary_ids)],
            "code": _code(),
        }


@dataclass(slots=True)
class _Part:
    """One process at work on one store."""

    asked: Preparation
    work: Work
    crew: Crew
    units: list[Unit]
    sources: list[Source]
    progress: Progress | None

    def build_all(self) -> None:
        """All traces of all units."""
        recipe, pool = self.asked.recipe, None
        if recipe.builder.name == "hard":
            self._do("pool", lambda number: references(recipe, self.sources, self.units[number]))
            place = self.work.place / "pool"
            if self.crew.rank == 0:
                parts = [self.work.result("pool", number) for number in range(len(self.units))]
                pool_of(recipe.tokenizer, parts).save(place)
                self.work.say("pool", True)
            self.work.heard("pool", self.crew)
            pool = Pool.load(place, recipe.tokenizer)
        self._do("unit", lambda number: build(recipe, self.sources, self.units[number], pool))

    def assemble(self, described: list[dict[str, Any]]) -> dict[str, Any]:
        """All shards, and the store of them."""
        if self.crew.rank == 0:
            facts = [self.work.facts_of("unit", number) for number in range(len(self.units))]
            self.work.say("shards", list(_shards([fact["num_tokens"] for fact in facts])))
        stretches = self.work.heard("shards", self.crew)
        self._do("shard", lambda number: self._shard(number, *stretches[number]), len(stretches))
        if self.crew.rank > 0:
            return {}
        counts = empty_counts(self.asked.recipe)
        for fact in facts:
            add_counts(counts, fact["counts"])
        tokenizer = self.asked.recipe.tokenizer
        if isinstance(tokenizer, CheckedTokenizer):
            tokenizer.num_texts = sum(fact["num_compared"] for fact in facts)
        notes = {
            name: [row for fact in facts for row in fact[name]] for name in ("dropped", "refused")
        }
        _require_traces(self.asked.destination, counts, notes)
        return self._publish(described, Content(
            ids_dtype=ids_dtype(tokenizer.size), counts=counts, notes=dict(notes)
        ), len(stretches))  # fmt: skip

    def _shard(self, number: int, first: int, end: int) -> tuple[dict[str, Any], Arrays]:
        folder = self.work.folder / SHARDS / f"{number:05d}-{self.work.attempt}"
        folder.mkdir(parents=True, exist_ok=True)
        writer = ShardWriter(folder, number, ids_dtype(self.asked.recipe.tokenizer.size))
        for unit in range(first, end):
            _, arrays = self.work.result("unit", unit)
            writer.add(arrays)
        return {"files": writer.close(), "entry": writer.entry, "folder": folder.name}, {}

    def _publish(
        self, described: list[dict[str, Any]], content: Content, num_shards: int
    ) -> dict[str, Any]:
        def fill(partial: Path) -> Content:
            for number in range(num_shards):
                facts = self.work.facts_of("shard", number)
                for name in facts["files"]:
                    file = self.work.folder / SHARDS / facts["folder"] / name
                    file.rename(partial / name)
                content.files |= facts["files"]
                content.shards.append(facts["entry"])
            return content

        asked, found = self.asked, list[Statistics]()
        manifest = publish_store(
            asked.destination, fill, tokenizer=asked.recipe.tokenizer,
            machine=asked.recipe.machine, boundaries=asked.boundaries, context=asked.context,
            sources=described, builder=asked.settings(), seed=asked.recipe.builder.seed,
            inspect=lambda store: found.append(audit(store)),
        )  # fmt: skip
        write_pages(found[0], asked.destination)
        counts = manifest["counts"]
        assert counts["built"] == counts["stored"] + counts["dropped"], "traces do not add up"
        drop(self.work.base)
        return manifest

    def _do(
        self,
        phase: str,
        make: Callable[[int], tuple[dict[str, Any], Arrays]],
        num: int | None = None,
    ) -> None:
        """This process's share of a phase; the leading one waits for the others'."""
        num = len(self.units) if num is None else num
        for number in self.work.take(phase, num):
            try:
                facts, arrays = make(number)
            except NmarError as error:
                self.work.fail(phase, number, error)
                break
            self.work.put(phase, number, facts, arrays)
            self._look(phase)
            self.crew.check()
        if self.crew.rank == 0:
            self.work.wait(phase, num, self.crew, lambda: self._look(phase))

    def _look(self, phase: str) -> None:
        if self.progress is not None and self.crew.rank == 0 and phase == "unit":
            done = sum(self.units[number].num_lines for number in self.work.finished("unit"))
            self.progress(done, sum(unit.num_lines for unit in self.units))


def prepare_store(
    sources: Sequence[SourceSettings],
    destination: str | Path,
    tokenizer: Tokenizer,
    *,
    progress: Progress | None = None,
    **asked: Any,
) -> dict[str, Any]:
    """Prepare a trace store in this process.

    Args:
        sources: in order.
        destination: folder of the store; replaced at the very end.
        tokenizer: has the undo token.
        progress: called with the lines done and the lines in all.
        asked: see `preparation`.

    Returns:
        The manifest. Its counts: read = refused + passed_over (by a weight below 1) + used
        records, built = stored + dropped traces; moved_tokens are right tokens that became
        heads of deviations (0 under `token`); without_donor, deviations for which `hard` or
        `random` found nothing; without_error, traces that were to deviate and have nothing to
        deviate with; respelt and left_out, see `sampled.Departures`.

    Raises:
        TraceError: a bad record or trace: the first in order.
        ConfigError: settings that contradict each other or are not built.
        StoreError: the destination cannot be written.
    """
    preparing = preparation(sources, destination, tokenizer, **asked)
    return preparing.run(preparing.begin(), Crew(), progress)


def preparation(
    sources: Sequence[SourceSettings],
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
) -> Preparation:
    """What is to be prepared.

    Args:
        sources: in order.
        destination: folder of the store.
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

    Raises:
        ConfigError: settings that contradict each other or are not built.
    """
    for name, value, values in (
        ("overlong", overlong, ("error", "drop")),
        ("refused", refused, ("error", "drop")),
        ("context", context, ("linear",)),
    ):
        if value not in values:
            raise ConfigError(f"{name}: {value!r}, expected {' or '.join(values)}")
    if max_length < 1:
        raise ConfigError(f"max_length: {max_length}, expected at least 1")
    if tokenizer.undo_token != undo_token:
        raise ConfigError(f"undo.token: {undo_token!r}, expected {tokenizer.undo_token!r}")
    recipe = Recipe(
        builder=builder, tokenizer=tokenizer, machine=machine_of(tokenizer, semantics, boundaries),
        chat=chat, max_length=max_length, overlong=overlong, refused=refused,
    )  # fmt: skip
    return Preparation(
        sources=sources, destination=Path(destination), recipe=recipe, boundaries=boundaries,
        context=context,
    )  # fmt: skip


def work_folder(destination: Path) -> Path:
    """Where a store's preparation keeps what it has until the store is whole."""
    return destination.with_name(destination.name + ".work")


def _require_traces(folder: Path, counts: dict[str, int], notes: dict[str, Any]) -> None:
    """A preparation that leaves everything out has gone wrong, whatever it may leave out."""
    if counts["read"] and counts["built"] == counts["dropped"]:
        refused = notes["refused"]
        first = refused[0]["message"] if refused else "every trace is longer than a row"
        raise StoreError(
            f"{folder}: none of {counts['read']:,} records gave a trace to store; the first: "
            f"{first}"
        )


def _shards(num_tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Units [first, end) of each shard: it is closed once it has SHARD_TOKENS."""
    first = total = 0
    for number, tokens in enumerate(num_tokens):
        total += tokens
        if total >= SHARD_TOKENS:
            yield first, number + 1
            first, total = number + 1, 0
    if total:
        yield first, len(num_tokens)


class _disk:
    """Turns what the disk says into one line."""

    def __init__(self, destination: Path) -> None:
        self._destination = destination

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            place = work_folder(self._destination)
            raise StoreError(
                f"{self._destination}: {error.strerror or error}; {free_bytes(place):,} bytes are "
                f"free, expected a writable place with room; {place} keeps what is done, and the "
                "same command goes on from there"
            ) from error


def _code() -> dict[str, str]:
    """What builds the results: our own modules, and the libraries that may change them."""
    root = Path(nmar_ds.__file__).parent
    files = sorted([*(root / "traces").glob("*.py"), *(root / "data").glob("*.py")])
    text = "".join(sha256_file(file) for file in files)
    found = {"nmar_ds": hashlib.sha256(text.encode()).hexdigest()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
