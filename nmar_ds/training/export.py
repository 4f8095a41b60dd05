"""Checkpoint -> Hugging Face folder: safetensors, configuration, tokenizer, and `nmar.json`."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from nmar_ds.data.store import boundary_ids_of
from nmar_ds.errors import CheckpointError, ConfigError, FolderError, VocabularyError
from nmar_ds.files import EXPORT_SETTINGS, no_room
from nmar_ds.inference.exported import FORMAT_VERSION, TOKENIZER_FOLDER
from nmar_ds.traces.encoding import Tokenizer, assert_parity, load_tokenizer
from nmar_ds.traces.records import Record
from nmar_ds.training.checkpoints import Found, find_newest, folder_name, verify

if TYPE_CHECKING:
    from nmar_ds.training.weights_out import Weights

NUM_PARITY_RECORDS = 200  # per held-out file
MAX_SHARD_SIZE = "5GB"


def export_checkpoint(
    run: Path,
    output: Path,
    *,
    step: int | None = None,
    overwrite: bool = False,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> str:
    """Export one checkpoint of a run, whatever the number of ranks that saved it.

    The weights are streamed: memory does not grow with the model (benchmarks/export_memory.py).

    Args:
        run: the run's folder.
        output: folder to write; written aside and renamed, so it is whole or absent.
        step: which checkpoint; None takes the newest valid one.
        overwrite: replace an earlier export.
        max_shard_size: of a weight file, as `5GB` or `500MB`.

    Returns:
        One line that says what was written.

    Raises:
        CheckpointError: no such checkpoint, or it is damaged.
        ConfigError: `output` exists, or `max_shard_size` is no size.
        VocabularyError: the run's tokenizer is not the one it was trained with.
        TraceError: a held-out text that the exported tokenizer encodes differently.
        FolderError: `output` cannot be written; an earlier export there is untouched.
    """
    check_shard_size(max_shard_size)
    found = _choose(run / "checkpoints", step)
    from nmar_ds.traces.parity import CheckedTokenizer, check_records

    if output.is_file():
        raise ConfigError(f"{output}: is a file, expected a folder to write")
    if output.exists():
        if not overwrite:
            raise ConfigError(f"{output}: exists, expected a new folder, or --overwrite")
        if any(output.iterdir()) and not (output / EXPORT_SETTINGS).is_file():
            raise ConfigError(f"{output}: is no earlier export, so it is not overwritten")
    facts = found.manifest
    tokenizer = load_tokenizer(run / "tokenizer", undo_token=facts["undo_token"])
    if tokenizer.fingerprint != facts["tokenizer"]["fingerprint"]:
        raise VocabularyError(
            f"{run / 'tokenizer'}: is not the tokenizer that {found.folder} was trained with"
        )
    aside = output.with_name(output.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        weights = _write_model(found, aside, max_shard_size)
        _write_tokenizer(tokenizer, run / "tokenizer", facts, aside)
        assert_parity(tokenizer, aside, ())
        check_records(CheckedTokenizer(tokenizer, aside), _sample_records(run))
        if output.exists():
            old = output.with_name(output.name + ".previous")
            shutil.rmtree(old, ignore_errors=True)
            output.rename(old)
            aside.rename(output)
            shutil.rmtree(old)
        else:
            aside.rename(output)
    except (OSError, SafetensorError) as error:
        size = sum(int(entry["size"]) for entry in facts["files"].values()) // 3  # without moments
        raise FolderError(no_room(error, output, size)) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return (
        f"exported  {found.folder} ({weights.num_weights:,} weights, {facts['dtype']}, "
        f"{weights.num_shards} files) to {output}"
    )


def check_shard_size(text: str) -> str:
    """A size as `5GB` or `500MB`.

    Raises:
        ConfigError: it is none.
    """
    if re.fullmatch(r"[1-9]\d*(\.\d+)?(KB|MB|GB|TB)", text) is None:
        raise ConfigError(f"--max-shard-size: is {text!r}, expected a size as 5GB or 500MB")
    return text


def _sample_records(run: Path) -> Iterator[Record]:
    """Held-out records of the run, on whose texts both tokenizers must agree."""
    from nmar_ds.config import load_config
    from nmar_ds.data.prepare import source_settings
    from nmar_ds.traces.sources import opened

    config = load_config(run / "config.yaml")
    found = [s for s in source_settings(config, "heldout") if s.path is None or s.path.exists()]
    with opened(found, Path(tempfile.gettempdir())) as sources:  # the run may be read-only
        for source in sources:
            yield from itertools.islice(source.all_records(), NUM_PARITY_RECORDS)


def _choose(folder: Path, step: int | None) -> Found:
    if step is not None:
        chosen = folder / folder_name(step)
        return Found(folder=chosen, manifest=verify(chosen))
    refused: list[str] = []
    found = find_newest(folder, report=refused.append)
    if found is None:
        raise CheckpointError(f"{folder}: holds no checkpoint")
    for line in refused:
        print(line)
    return found


def full_state(found: Found) -> dict[str, Any]:
    """fp32 master weights of a verified checkpoint by their names in the model, on the CPU.

    Every file is opened without running pickled code.

    Raises:
        CheckpointError: a file of it is no plain data.
    """
    # The engine room, which this imports, sets the process up for safe loading.
    from nmar_ds.training.plain_data import check_plain_data
    from nmar_ds.training.weights_out import MODEL_PREFIX

    assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
    check_plain_data(found.folder)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # It narrates on both streams; what goes wrong it raises.
    noise = io.StringIO()
    with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
        state = get_fp32_state_dict_from_zero_checkpoint(
            str(found.folder.parent), tag=found.folder.name
        )
    return {name.removeprefix(MODEL_PREFIX): tensor.detach() for name, tensor in state.items()}


def _write_model(found: Found, folder: Path, max_shard_size: str) -> Weights:
    from nmar_ds.training import weights_out

    model = weights_out.empty_model(found)
    if weights_out.is_stored_as_it_is(model):
        return weights_out.write_weights(found, model, folder, max_shard_size=max_shard_size)
    print(
        f"{model.config.model_type}: transformers stores its weights by other names or shapes than "
        "it trains, so the whole model is held in memory for the export"
    )
    return write_in_memory(found, folder, max_shard_size)


def write_in_memory(found: Found, folder: Path, max_shard_size: str) -> Weights:
    """The weights by transformers' own `save_pretrained`, which holds the whole model."""
    state = full_state(found)
    import torch
    import transformers
    from transformers.utils import logging

    from nmar_ds.training.weights_out import Weights

    logging.disable_progress_bar()
    keys = dict(found.manifest["model_config"])
    config = transformers.CONFIG_MAPPING[keys.pop("model_type")].from_dict(keys)
    config.use_cache = True
    dtype = getattr(torch, found.manifest["dtype"])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    result = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    allowed = tied if config.get_text_config().tie_word_embeddings else set()
    wrong = [*result.unexpected_keys, *(set(result.missing_keys) - allowed)]
    if wrong:
        raise CheckpointError(f"{found.folder}: weights do not fit the model: {sorted(wrong)[:5]}")
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    return Weights(num_weights, len(list(folder.glob("*.safetensors"))))


def _write_tokenizer(
    tokenizer: Tokenizer, source: Path, facts: dict[str, Any], folder: Path
) -> None:
    tokenizer.save_transformers(folder)
    shutil.copytree(source, folder / TOKENIZER_FOLDER)
    settings = {
        "format_version": FORMAT_VERSION,
        "undo_id": tokenizer.undo_id,
        "undo_token": facts["undo_token"],
        "semantics": facts["semantics"],
        "boundary_ids": boundary_ids_of(facts),
        "context": facts["context"],
        "eos_id": tokenizer.eos_id,
        "bos_id": tokenizer.bos_id,
        "pad_id": tokenizer.pad_id,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "chat": facts.get("chat"),
    }
    text = json.dumps(settings, indent=1) + "\n"
    (folder / EXPORT_SETTINGS).write_text(text, encoding="utf-8")
