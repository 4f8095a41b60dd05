"""One record to its traces: encode, deviate, weave, check (SPEC 2). What preparation runs on.

A trace depends on (seed, source, line, copy), the record and, for `hard`, the pool: whatever
process builds it, in whatever order, it is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from nmar_ds.errors import ConfigError, TraceError
from nmar_ds.traces import builders, sampled, text_builders
from nmar_ds.traces.alignment import TooFarApartError
from nmar_ds.traces.assembly import Turn, assemble, check, move_starts, said_by
from nmar_ds.traces.chat import ChatTemplate
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.records import Record, Sample
from nmar_ds.traces.reduction import Machine
from nmar_ds.traces.schema import IdArray, Trace
from nmar_ds.traces.turns import encode_record, trace_of_ids

BuilderName = Literal["given", "random", "hard", "pairs", "retry", "weak_retry", "on_policy"]
BUILDERS: tuple[BuilderName, ...] = (
    "given", "random", "hard", "pairs", "retry", "weak_retry", "on_policy",
)  # fmt: skip
# What each builder takes of a record beside prompt and reference.
NEEDS = {
    "pairs": ("rejected", "`chosen` and `rejected`"),
    "retry": ("steps", "`steps` with `depends_on`"),
    "weak_retry": ("steps", "`steps`"),
    "on_policy": ("samples", "`samples`, written by launcher/sample.py"),
}
WITH_DELAY = ("pairs", "retry", "weak_retry", "on_policy")
COUNTS = {
    "random": ("without_donor",), "hard": ("without_donor",), "pairs": ("without_error",),
    "retry": ("without_error",), "weak_retry": ("without_error",),
    "on_policy": ("without_error", "respelt", "left_out"),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class BuilderSettings:
    """How records become traces; kept in the manifest of the store.

    Attributes:
        name: of the builder.
        traces_per_record: copies, each with deviations of its own; 1 for `given`.
        clean_share: probability of a trace without deviations; `given` takes no notice of it.
        max_deviations: a trace that is not clean gets 1 to this many (`random`, `hard`), or at
            most this many of its sample's (`on_policy`).
        max_deviation_length: in tokens (`random`, `hard`); lengths are 1 to this, before right
            tokens are moved in.
        retry_rate: probability of a retry before each step, and again after one.
        delay: tokens that a deviation goes on for after its first wrong one, uniform between
            both numbers; None leaves it whole.
        verify: an `on_policy` sample counts as wrong only if the record's answer proves it.
        seed: of all draws.
    """

    name: BuilderName
    traces_per_record: int = 1
    clean_share: float = 0.0
    max_deviations: int = 1
    max_deviation_length: int = 8
    retry_rate: float = 0.1
    delay: tuple[int, int] | None = None
    verify: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values no preparation can mean.

        Raises:
            ConfigError: names the value.
        """
        if self.name not in BUILDERS:
            raise ConfigError(f"builder: {self.name!r}, expected {' or '.join(BUILDERS)}")
        for name in ("traces_per_record", "max_deviations", "max_deviation_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)}, expected at least 1")
        if not 0.0 <= self.clean_share <= 1.0:
            raise ConfigError(f"clean_share: {self.clean_share}, expected 0 to 1")
        if not 0.0 < self.retry_rate <= 1.0:
            raise ConfigError(f"retry_rate: {self.retry_rate}, expected above 0, at most 1")
        if self.delay is not None and not 0 <= self.delay[0] <= self.delay[1]:
            raise ConfigError(f"delay: {list(self.delay)}, expected [from, to], 0 <= from <= to")
        if self.delay is not None and self.name not in WITH_DELAY:
            raise ConfigError(
                f"delay: with builder {self.name!r}, expected {', '.join(WITH_DELAY)}; what random "
                "and hard draw is bounded by max_deviation_length"
            )
        if self.verify and self.name != "on_policy":
            raise ConfigError(f"verify: with builder {self.name!r}, expected on_policy")
        if self.name == "given" and self.traces_per_record != 1:
            raise ConfigError(
                f"traces_per_record: {self.traces_per_record} with builder 'given' would store "
                "equal traces, expected 1"
            )


@dataclass(slots=True)
class TraceBuilder:
    """Builds and checks the traces of records, and counts what happened to them.

    Attributes:
        settings: how.
        tokenizer: encodes them.
        machine: what one undo pops.
        chat: put around the prompts of text records; records of ids are taken as they are.
        pool: the references of all records, for `hard`.
        counts: running: `snaps`, `moved_tokens` and those of the builder in `COUNTS`.
        unchecked: where it is a list, traces and what they have to say are put there for
            `together.all_hold`, and are not checked one by one.
    """

    settings: BuilderSettings
    tokenizer: Tokenizer
    machine: Machine
    chat: ChatTemplate | None = None
    pool: builders.Pool | None = None
    counts: dict[str, int] = field(default_factory=dict)
    unchecked: list[tuple[Trace, IdArray | None]] | None = None

    def __post_init__(self) -> None:
        """Begin to count."""
        for name in ("snaps", "moved_tokens", *COUNTS.get(self.settings.name, ())):
            self.counts.setdefault(name, 0)

    def traces(self, record: Record, source: int, times: int = 1) -> list[Trace]:
        """All traces of one record.

        Args:
            record: as read.
            source: number of its source.
            times: how often the record is taken; each time makes `traces_per_record`.

        Raises:
            TraceError: a record the builder cannot use, or an invariant broken.
        """
        self._require_usable(record)
        if record.segments:
            trace = trace_of_ids(record, source=source)
            self._check(trace, record)
            return [trace] * times
        encoded = encode_record(record, self.tokenizer, self.chat)
        said = said_by(encoded.turns)
        self.counts["snaps"] += encoded.num_snaps
        found = []
        for copy in range(times * self.settings.traces_per_record):
            drawn = self._deviating(encoded.turns, record, source, copy)
            turns = [move_starts(turn, self.machine) for turn in drawn]
            self.counts["moved_tokens"] += _num_wrong(turns) - _num_wrong(drawn)
            trace = assemble(turns, machine=self.machine, line=record.line, source=source)
            self._check(trace, record, said)
            found.append(trace)
        return found

    def _check(self, trace: Trace, record: Record, said: IdArray | None = None) -> None:
        if self.unchecked is not None:
            self.unchecked.append((trace, said))
            return
        check(trace, tokenizer=self.tokenizer, machine=self.machine, path=record.path, said=said)

    def _require_usable(self, record: Record) -> None:
        name = self.settings.name
        if record.marked and name != "given":
            at = "segments" if record.segments or len(record.turns) > 1 else "deviations"
            problem = "the record says itself where its deviations are"
            expected = f"a plain prompt and reference for builder {name!r}, or builder 'given'"
            raise TraceError(record.path, record.line, at, problem, expected)
        if name in NEEDS and not getattr(record, NEEDS[name][0]):
            at, expected = NEEDS[name]
            raise TraceError(
                record.path, record.line, at, "missing", f"{expected} for builder {name!r}"
            )
        if name == "on_policy":
            if record.sampled_with != self.tokenizer.fingerprint:
                raise TraceError(
                    record.path, record.line, "sampled_with",
                    "the samples are ids of another tokenizer",
                    f"that of this run, {self.tokenizer.fingerprint}",
                )  # fmt: skip
            if self.settings.verify and record.answer is None:
                raise TraceError(
                    record.path, record.line, "answer", "missing", "one where `verify` is set"
                )

    def _deviating(
        self, turns: tuple[Turn, ...], record: Record, source: int, copy: int
    ) -> tuple[Turn, ...]:
        """The turns with this copy's deviations."""
        settings = self.settings
        if settings.name == "given":
            return turns
        rng = builders.rng_of(settings.seed, source, record.line, copy)
        if rng.random() < settings.clean_share:
            return turns
        if settings.name in ("random", "hard"):
            return self._drawn(turns, record, source, rng)
        if settings.name == "on_policy":
            deviating: tuple[Turn, ...] = (self._sampled(turns[0], record, copy, rng),)
        else:
            if settings.name == "pairs":
                written = text_builders.pair(record)
            else:
                written = text_builders.retry(
                    record, rng, rate=settings.retry_rate, weak=settings.name == "weak_retry"
                )
            encoded = encode_record(written, self.tokenizer, self.chat)
            self.counts["snaps"] += encoded.num_snaps
            deviating = encoded.turns
        if not deviating[0].deviations:
            self.counts["without_error"] += 1
        return tuple(self._cut_short(turn, rng) for turn in deviating)

    def _drawn(
        self, turns: tuple[Turn, ...], record: Record, source: int, rng: np.random.Generator
    ) -> tuple[Turn, ...]:
        bounds = {"max_deviations": self.settings.max_deviations,
                  "max_deviation_length": self.settings.max_deviation_length}  # fmt: skip
        if self.settings.name == "random":
            built = builders.random(turns, rng, tokenizer=self.tokenizer, **bounds)
        else:
            assert self.pool is not None, "`hard` draws from a pool"
            built = builders.hard(
                turns, rng, pool=self.pool, group=record.group, record=(source, record.line),
                tokenizer=self.tokenizer, **bounds,
            )  # fmt: skip
        self.counts["without_donor"] += built.num_missing
        return built.turns

    def _sampled(self, turn: Turn, record: Record, copy: int, rng: np.random.Generator) -> Turn:
        """The turn with what one of the record's samples has instead; each copy takes the next."""
        for number, sample in enumerate(record.samples):
            self._require_ordinary(record, number, sample)
        samples = sampled.wrong_samples(record, self.tokenizer, verify=self.settings.verify)
        if not samples:
            return turn
        ids = samples[copy % len(samples)].ids
        try:
            found = sampled.departures(ids, turn.reference_ids, self.tokenizer)
        except TooFarApartError as error:
            raise TraceError(
                record.path, record.line, "samples", str(error), "shorter samples"
            ) from None
        self.counts["respelt"] += found.num_respelt
        self.counts["left_out"] += found.num_left_out
        chosen = sampled.choose(found.deviations, rng, max_deviations=self.settings.max_deviations)
        return replace(turn, deviations=chosen)

    def _require_ordinary(self, record: Record, number: int, sample: Sample) -> None:
        """A sample is text: no special, no stop, no undo token, no id the tokenizer lacks."""
        for place, token in enumerate(sample.ids.tolist()):
            if token >= self.tokenizer.size or self.tokenizer.is_special[token]:
                raise TraceError(
                    record.path, record.line, f"samples[{number}].ids[{place}]",
                    f"id {token} is special or not in the tokenizer", "an ordinary token",
                )  # fmt: skip

    def _cut_short(self, turn: Turn, rng: np.random.Generator) -> Turn:
        """Deviations that are noticed after `delay` further tokens."""
        if self.settings.delay is None:
            return turn
        shortest, longest = self.settings.delay
        return replace(
            turn,
            deviations=tuple(
                d._replace(ids=d.ids[: d.onset + 1 + int(rng.integers(shortest, longest + 1))])
                for d in turn.deviations
            ),
        )


def _num_wrong(turns: Sequence[Turn]) -> int:
    return sum(len(deviation.ids) for turn in turns for deviation in turn.deviations)
