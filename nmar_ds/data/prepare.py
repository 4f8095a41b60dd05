"""Everything `launcher/prepare.py` does for one run configuration: tokenizer, then both stores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nmar_ds.config import RunConfig
from nmar_ds.data.store import read_manifest
from nmar_ds.errors import ConfigError, StoreError, VocabularyError
from nmar_ds.traces.encoding import Tokenizer, add_undo, load_tokenizer, train_sentencepiece
from nmar_ds.traces.prepare import prepare_store
from nmar_ds.traces.records import read_records
from nmar_ds.training.planning import asked_settings, made_settings, store_folder


def _texts(sources: list[Path]) -> Iterator[str]:
    for source in sources:
        for record in read_records(source):
            for turn in record.turns:
                yield turn.prompt
                yield turn.reference


def ready_tokenizer(config: RunConfig) -> tuple[Tokenizer, str]:
    """The run's tokenizer with `<UNDO>` in it, and one line on where it came from.

    A tokenizer that is trained here is trained again only when it is not there yet: its ids are
    in the stores. One without `<UNDO>` is extended as a copy; the original stays as it was.
    """
    path = Path(config.tokenizer.path)
    training = config.tokenizer.train
    if training is not None and not path.exists():
        tokenizer = train_sentencepiece(
            _texts([Path(source) for source in config.data.train]),
            path,
            vocab_size=training.vocab_size,
            model_type=training.model_type,
            undo_token=config.undo.token,
            seed=config.seed,
            phrases=training.phrases,
        )
        return tokenizer, f"trained {training.model_type} on the training records"
    if not path.exists():
        raise ConfigError(f"tokenizer.path: {path}: no such file or folder")
    try:
        tokenizer = load_tokenizer(path, undo_token=config.undo.token)
        origin = "as it was"
    except VocabularyError:
        extended = Path(config.data.store) / "tokenizer"
        tokenizer = add_undo(path, extended, undo_token=config.undo.token)
        origin = f"{config.undo.token} added as id {tokenizer.undo_id}"
    if training is not None and tokenizer.size != training.vocab_size:
        raise ConfigError(
            f"tokenizer.train.vocab_size: {training.vocab_size}, but {path} exists and has "
            f"{tokenizer.size} ids; remove it to train another"
        )
    return tokenizer, origin


def _up_to_date(folder: Path, settings: dict[str, object], fingerprint: str) -> bool:
    """Whether a store holds what would be prepared now, sources' content included."""
    from nmar_ds.training.checkpoints import sha256_file

    try:
        manifest = read_manifest(folder)
        made = made_settings(manifest)
        same = all(made[name] == value for name, value in settings.items())
        same = same and manifest["tokenizer"]["fingerprint"] == fingerprint
        return same and all(
            sha256_file(Path(source["path"])) == source["sha256"] for source in manifest["sources"]
        )
    except (StoreError, OSError, KeyError):
        return False


def prepare_run(config: RunConfig) -> Iterator[str]:
    """Prepare a run's stores, yielding lines for people.

    Raises:
        TraceError: a record is bad; nothing is left under the stores' names but what was there.
        ConfigError, VocabularyError: settings or tokenizer do not fit.
    """
    tokenizer, origin = ready_tokenizer(config)
    yield f"tokenizer {config.tokenizer.path}: {tokenizer.size} ids, {origin}"
    for part in ("train", "heldout"):
        folder = store_folder(config, part)
        if _up_to_date(folder, asked_settings(config, part), tokenizer.fingerprint):
            yield f"{part:9} {folder}: up to date"
            continue
        for source in getattr(config.data, part):
            if not Path(source).is_file():
                raise StoreError(f"data.{part}: {source}: no such file")
        section = config.data.traces
        manifest = prepare_store(
            [Path(source) for source in getattr(config.data, part)],
            folder,
            tokenizer,
            builder=section.builder,
            traces_per_record=section.per_record,
            clean_share=section.clean_share,
            max_deviations=section.max_deviations,
            max_deviation_length=section.max_deviation_length,
            max_length=config.data.sequence_length,
            overlong=config.data.overlong,
            seed=config.seed,
            semantics=config.undo.semantics,
            context=config.context,
            undo_token=config.undo.token,
        )
        yield f"{part:9} {folder}: {_counts(manifest)}"


def _counts(manifest: dict[str, object]) -> str:
    counts = manifest["counts"]
    assert isinstance(counts, dict)
    return ", ".join(
        f"{name} {value:,}" for name, value in counts.items() if isinstance(value, int)
    )
