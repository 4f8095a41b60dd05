"""Everything `launcher/prepare.py` does for one run configuration: tokenizer, then both stores."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from nmar_ds.config import RunConfig
from nmar_ds.data.crew import Crew
from nmar_ds.data.store import read_manifest
from nmar_ds.data.work import Work, drop
from nmar_ds.errors import (
    ConfigError,
    LaunchError,
    NoUndoTokenError,
    StoreError,
    TraceError,
    shared,
)
from nmar_ds.traces.building import BuilderSettings
from nmar_ds.traces.chat import ChatTemplate
from nmar_ds.traces.encoding import Tokenizer, add_undo, load_tokenizer, train_sentencepiece
from nmar_ds.traces.json_vocabulary import JsonVocabulary
from nmar_ds.traces.parity import CheckedTokenizer, checked
from nmar_ds.traces.prepare import Preparation, Progress, preparation
from nmar_ds.traces.sources import Source, SourceSettings, open_source, opened
from nmar_ds.training.planning import asked_settings, made_settings, store_folder
from nmar_ds.training.run_folder import RunLock

PARTS = ("train", "heldout")


def source_settings(config: RunConfig, part: str) -> list[SourceSettings]:
    """The entries of `data.train` or `data.heldout`."""
    return [
        SourceSettings(
            path=None if entry.path is None else Path(entry.path),
            columns=entry.columns,
            weight=entry.weight,
            max_records=entry.max_records,
            generator=None if entry.generator is None else entry.generator.model_dump(mode="json"),
            asked=entry.model_dump(mode="json"),
        )
        for entry in getattr(config.data, part)
    ]


def _texts(sources: Sequence[Source], refused: Literal["error", "drop"]) -> list[str]:
    """All texts, read before the trainer starts: it would swallow the error of a bad record."""
    return [
        text
        for source in sources
        for record in source.all_records(_pass_over if refused == "drop" else None)
        for turn in record.turns
        for text in (turn.prompt, turn.reference)
    ]


def _pass_over(error: TraceError) -> None:
    """The preparation itself will count and list it."""


def _training_facts(config: RunConfig, sources: Sequence[Source]) -> dict[str, Any]:
    """What a tokenizer trained here depends on; kept beside it."""
    assert config.tokenizer.train is not None
    return {
        "undo_token": config.undo.token,
        "seed": config.seed,
        **config.tokenizer.train.model_dump(),
        "sources": {source.label: source.fingerprint() for source in sources},
    }


def _train_tokenizer(
    config: RunConfig, path: Path, facts: dict[str, Any], sources: Sequence[Source]
) -> Tokenizer:
    training = config.tokenizer.train
    assert training is not None
    tokenizer = train_sentencepiece(
        _texts(sources, config.data.refused),
        path,
        vocab_size=training.vocab_size,
        model_type=training.model_type,
        undo_token=config.undo.token,
        seed=config.seed,
        phrases=training.phrases,
    )
    if tokenizer.size != training.vocab_size:
        path.unlink()
        raise ConfigError(
            f"tokenizer.train.vocab_size: {training.vocab_size}, but the training records give "
            f"{tokenizer.size} pieces, expected {tokenizer.size} or less"
        )
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
    return tokenizer


def _trained_tokenizer(
    config: RunConfig, path: Path, sources: Sequence[Source]
) -> tuple[Tokenizer, str]:
    """Trained on the sources, now or before."""
    facts, beside = _training_facts(config, sources), path.with_suffix(".json")
    if path.exists() and not beside.exists():
        raise ConfigError(
            f"tokenizer.path: {path}: was not trained here; drop tokenizer.train, or choose "
            "another path"
        )
    if path.exists() and json.loads(beside.read_text(encoding="utf-8")) == facts:
        return load_tokenizer(path, undo_token=config.undo.token), "trained before"
    return _train_tokenizer(config, path, facts, sources), "trained on the training records"


def ready_tokenizer(config: RunConfig) -> tuple[Tokenizer, str]:
    """The run's tokenizer with `<UNDO>` in it, and one line on where it came from.

    One that is trained here is trained again when its settings or the records changed; stores
    and runs keep copies of their own. One without `<UNDO>` is extended as a copy; the original
    stays as it was.
    """
    path = Path(config.tokenizer.path)
    if config.tokenizer.train is not None:
        if path.suffix != ".model":
            raise ConfigError(f"tokenizer.path: {path}: expected a .model file to train")
        with opened(source_settings(config, "train"), Path(config.data.store)) as sources:
            return _trained_tokenizer(config, path, sources)
    if not path.exists():
        raise ConfigError(f"tokenizer.path: {path}: no such file or folder")
    try:
        return load_tokenizer(path, undo_token=config.undo.token), "as it was"
    except NoUndoTokenError:
        extended = Path(config.data.store) / "tokenizer"
        reserved = config.undo.reserved_token
        tokenizer = add_undo(path, extended, undo_token=config.undo.token, reserved=reserved)
        how = "added as" if reserved is None else f"takes the place of {reserved},"
        return tokenizer, f"{config.undo.token} {how} id {tokenizer.undo_id}"


def chat_template(config: RunConfig, tokenizer: Tokenizer) -> ChatTemplate | None:
    """What a run puts around its prompts."""
    asked = config.data.chat
    return None if asked is None else ChatTemplate(tokenizer, system=asked.system)


def _up_to_date(asked: Preparation, settings: dict[str, object]) -> bool:
    """Whether a store holds what would be prepared now, sources' content included."""
    chat = asked.recipe.chat
    try:
        manifest = read_manifest(asked.destination)
        made = made_settings(manifest)
        same = all(made[name] == value for name, value in settings.items())
        same = same and manifest["tokenizer"]["fingerprint"] == asked.recipe.tokenizer.fingerprint
        same = same and manifest["builder"]["chat"] == (None if chat is None else chat.facts)
        kept = [source["sha256"] for source in manifest["sources"]]
        return same and kept == [open_source(each).fingerprint() for each in asked.sources]
    except (StoreError, OSError, KeyError):
        return False


def prepare_run(
    config: RunConfig, crew: Crew | None = None, bars: Callable[[str], Progress] | None = None
) -> Iterator[str]:
    """Prepare a run's stores, yielding lines for people (in the process that leads).

    Args:
        config: of the run.
        crew: all who take part; by default this process alone.
        bars: gives a store's progress to whoever shows it.

    Raises:
        TraceError: a record is bad, the first in order; nothing is left under the stores' names
            but what was there.
        ConfigError, VocabularyError: settings or tokenizer do not fit.
        LockedError: another preparation is writing there.
        WorkerLostError: another process ended in the middle of its work.
    """
    crew = crew or Crew()
    if crew.rank > 0:
        yield from _take_part(config, crew)
        return
    lock = RunLock(Path(config.data.store), "data.store")
    started: list[Work] = []
    try:
        try:
            _require_sources(config)
            if (unlocked := lock.claim()) is not None:
                yield f"lock      {unlocked}"
            tokenizer, origin = ready_tokenizer(config)
            yield f"tokenizer {config.tokenizer.path}: {tokenizer.size} ids, {origin}"
            with _compared(tokenizer) as used:
                yield from _lead(config, crew, used, bars, started)
        except BaseException:
            for work in started:
                work.stop()
            if not started:
                crew.share(None)
            raise
    finally:
        lock.release()


def _require_sources(config: RunConfig) -> None:
    for part in PARTS:
        for settings in source_settings(config, part):
            if settings.path is not None and not settings.path.exists():
                raise StoreError(f"data.{part}: {settings.path}: no such file or folder")


@contextlib.contextmanager
def _compared(tokenizer: Tokenizer) -> Iterator[Tokenizer]:
    """The tokenizer, checked against its export unless it is exported as it is."""
    if isinstance(tokenizer, JsonVocabulary):
        yield tokenizer
        return
    with checked(tokenizer) as compared:
        yield compared


def _lead(
    config: RunConfig,
    crew: Crew,
    tokenizer: Tokenizer,
    bars: Callable[[str], Progress] | None,
    started: list[Work],
) -> Iterator[str]:
    """Lay out what is not up to date, tell the others, and take part."""
    preparations = {part: preparation_of(config, part, tokenizer) for part in PARTS}
    attempts: dict[str, str | None] = {}
    works: dict[str, Work] = {}
    for part, each in preparations.items():
        attempts[part] = None
        if _up_to_date(each, asked_settings(config, part)):
            drop(each.work_folder)
        else:
            works[part] = each.begin()
            attempts[part] = works[part].attempt
    crew.share({"tokenizer": str(tokenizer.path), "attempts": attempts})
    started.extend(works.values())
    num_compared = 0
    for part, each in preparations.items():
        if part not in works:
            yield f"{part:9} {each.destination}: up to date"
            continue
        manifest = each.run(works[part], crew, None if bars is None else bars(part))
        if isinstance(tokenizer, CheckedTokenizer):
            num_compared += tokenizer.num_texts
        yield f"{part:9} {each.destination}: {_counts(manifest)}"
    if num_compared:
        yield f"parity    {num_compared:,} texts equal in tokenizer.json"


def _take_part(config: RunConfig, crew: Crew) -> Iterator[str]:
    """What a process does that does not lead."""
    told = crew.share(None)
    if told is None:
        raise shared(LaunchError("the leading process ended before the work began"))
    tokenizer = load_tokenizer(told["tokenizer"], undo_token=config.undo.token)
    with _compared(tokenizer) as used:
        for part, attempt in told["attempts"].items():
            if attempt is not None:
                each = preparation_of(config, part, used)
                each.run(Work(each.work_folder, attempt), crew)
    yield from ()


def builder_settings(config: RunConfig) -> BuilderSettings:
    """Where a run's deviations come from."""
    section = config.data.traces
    return BuilderSettings(
        name=section.builder,
        traces_per_record=section.per_record,
        clean_share=section.clean_share,
        max_deviations=section.max_deviations,
        max_deviation_length=section.max_deviation_length,
        retry_rate=section.retry_rate,
        delay=section.delay,
        verify=section.verify,
        seed=config.seed,
    )


def preparation_of(config: RunConfig, part: str, tokenizer: Tokenizer) -> Preparation:
    """One of a run's two stores, as it is to be prepared."""
    return preparation(
        source_settings(config, part),
        store_folder(config, part),
        tokenizer,
        builder=builder_settings(config),
        max_length=config.data.sequence_length,
        overlong=config.data.overlong,
        refused=config.data.refused,
        semantics=config.undo.semantics,
        boundaries=config.undo.boundaries,
        context=config.context,
        undo_token=config.undo.token,
        chat=chat_template(config, tokenizer),
    )


def _counts(manifest: dict[str, object]) -> str:
    counts = manifest["counts"]
    assert isinstance(counts, dict)
    return ", ".join(
        f"{name} {value:,}" for name, value in counts.items() if isinstance(value, int)
    )
