"""A model's own responses to records, as ids: what `on_policy` deviations are made of.

The ids are those the model drew. They are never decoded and encoded again, and the fingerprint of
their tokenizer goes with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from nmar_ds.errors import ConfigError, TraceError
from nmar_ds.files import sha256_file
from nmar_ds.inference.decoding import Decoded, decode, rows_of_no_token
from nmar_ds.inference.limits import check_draws
from nmar_ds.model.folder import check_model_folder
from nmar_ds.model.own_tokenizer import check_own_tokenizer
from nmar_ds.traces.chat import ChatTemplate
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.records import Record, read_records
from nmar_ds.traces.reduction import Machine
from nmar_ds.traces.schema import IdArray
from nmar_ds.traces.turns import encode_record


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How responses are drawn; see `decoding.decode`.

    Attributes:
        num_samples: responses to each record.
        max_new_tokens: of each; one that is longer is cut off, and kept as such.
        temperature, top_p: of the draws; 0 is greedy, for which one sample is enough.
        seed: with the number of a sample it fixes its draws, whatever the batch.
        batch_size: sequences side by side.
    """

    num_samples: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ConfigError: names the value.
        """
        for name in ("num_samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)}, expected at least 1")
        check_draws("", temperature=self.temperature, top_p=self.top_p)
        if self.temperature == 0 and self.num_samples > 1:
            raise ConfigError(
                f"num_samples: {self.num_samples} with temperature 0 would be equal, expected 1"
            )


def sample_file(
    records: Path,
    output: Path,
    load_model: Callable[[], Any],
    tokenizer: Tokenizer,
    *,
    settings: SamplingSettings,
    chat: ChatTemplate | None,
    model: dict[str, Any],
    num_positions: int | None,
) -> Iterator[int]:
    """Write the records of a file with a model's samples in them, and yield how many are done.

    A call that died is continued by the next: lines that are complete stay, and the rest gets the
    samples it would have got.

    Args:
        records: JSON lines with a prompt and a reference each.
        output: JSON lines, the same records with `samples` and `sampled_with`; appears whole.
        load_model: called once, before the first sample.
        tokenizer: of model and data, with the undo token.
        settings: how to draw.
        chat: put around the prompts, as in training.
        model: from `model_facts`; kept beside a part, so that no other model continues it.
        num_positions: from `positions_of`: prompt and response have to fit. None: no limit.

    Raises:
        TraceError: a bad record, one that is too long among them; nothing is written for any of
            the file, and no part is begun.
        ConfigError: the output exists, or its part was begun with other settings.
    """
    if output.exists():
        raise ConfigError(f"{output}: exists already, expected a new file")
    most = None if num_positions is None else num_positions - settings.max_new_tokens
    prompts = [_prompt(record, tokenizer, chat, most) for record in read_records(records)]
    if not prompts:
        raise TraceError(records, None, "file", "holds no record", "at least one")
    lines = [line for line in records.read_bytes().split(b"\n") if line.strip()]
    assert len(lines) == len(prompts), "a record is a line"
    facts = {**asdict(settings), "records": sha256_file(records), "model": model,
             "tokenizer": tokenizer.fingerprint, "chat": chat.facts if chat else None}  # fmt: skip
    del facts["batch_size"]
    part, beside = _parts(output)
    num_done = _begin(part, beside, facts)
    yield num_done
    sampler = load_model() if num_done < len(prompts) else None
    num_records = max(1, settings.batch_size // settings.num_samples)
    with part.open("ab") as file:
        for first in range(num_done, len(prompts), num_records):
            chosen = range(first, min(first + num_records, len(prompts)))
            responses = _draw(sampler, [prompts[n] for n in chosen], first, tokenizer, settings)
            for place, number in enumerate(chosen):
                own = responses[place * settings.num_samples :][: settings.num_samples]
                fields = json.loads(lines[number])
                fields["sampled_with"] = tokenizer.fingerprint
                fields["samples"] = [_described(response) for response in own]
                file.write(json.dumps(fields, ensure_ascii=False).encode() + b"\n")
            file.flush()
            yield chosen[-1] + 1
    part.replace(output)
    beside.unlink()


def model_facts(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """What tells one model folder from another without reading its weights.

    Raises:
        ConfigError, VocabularyError: a folder that cannot be sampled from, or one whose ids mean
            something else than the tokenizer's.
    """
    exported = check_model_folder(
        folder, tokenizer_size=tokenizer.size, tokenizer_fingerprint=tokenizer.fingerprint
    )
    if not exported:
        check_own_tokenizer(folder, tokenizer.path, undo_id=tokenizer.undo_id)
    weights = sorted(folder.glob("*.safetensors"))
    return {
        "folder": str(folder),
        "config": sha256_file(folder / "config.json"),
        "weights": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in weights},
    }


def positions_of(folder: Path) -> int | None:
    """Positions that a model was built for, None where it has no limit; reads no weights.

    Raises:
        ConfigError: transformers does not know the folder's kind of model.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{folder / 'config.json'}: not a model's configuration ({line})"
        ) from None
    positions: int | None = getattr(config, "max_position_embeddings", None)
    return positions


def _parts(output: Path) -> tuple[Path, Path]:
    return output.with_name(output.name + ".part"), output.with_name(output.name + ".part.json")


def _begin(part: Path, beside: Path, facts: dict[str, Any]) -> int:
    """Number of lines a former call has left whole; a line cut short is taken off."""
    if not part.exists():
        beside.write_text(json.dumps(facts, sort_keys=True) + "\n", encoding="utf-8")
        part.touch()
        return 0
    found = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    differing = sorted(name for name in facts if found.get(name) != facts[name])
    if differing:
        raise ConfigError(
            f"{part}: was begun with other {', '.join(differing)}; remove it and {beside.name} to "
            "begin afresh"
        )
    content = part.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        part.write_bytes(whole)
    return whole.count(b"\n")


def _prompt(
    record: Record, tokenizer: Tokenizer, chat: ChatTemplate | None, most: int | None
) -> IdArray:
    """The prompt's ids, exactly as preparation will have them; `most` of them at most."""
    if len(record.turns) != 1 or record.marked or record.rejected is not None or record.steps:
        raise TraceError(
            record.path, record.line, "record", "not a plain prompt and reference",
            "`prompt` and `reference`",
        )  # fmt: skip
    prompt = encode_record(record, tokenizer, chat).turns[0].prompt_ids
    if not len(prompt):
        raise TraceError(
            record.path, record.line, "prompt", "empty, and the tokenizer sets no BOS", "some text"
        )
    if most is not None and len(prompt) > most:
        raise TraceError(
            record.path, record.line, "prompt", f"{len(prompt)} tokens",
            f"at most {max(most, 0)}, the model's positions less those of a response; leave the "
            "record out, or see --max-new-tokens",
        )  # fmt: skip
    return prompt


def _draw(
    model: Any,
    prompts: Sequence[IdArray],
    first: int,
    tokenizer: Tokenizer,
    settings: SamplingSettings,
) -> list[Decoded]:
    """Responses, those to one prompt on end; samples are numbered from the start of the file."""
    num = settings.num_samples
    return decode(
        model,
        [prompt for prompt in prompts for _ in range(num)],
        machine=Machine(tokenizer.undo_id),
        eos_id=tokenizer.eos_id,
        pad_id=None,
        undo_mode="ban",
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
        batch_size=settings.batch_size,
        banned_ids=ids_of_no_text(model, tokenizer),
        numbers=[first * num + place for place in range(len(prompts) * num)],
    )


def ids_of_no_text(model: Any, tokenizer: Tokenizer) -> list[int]:
    """Rows of a model that are never a response: all but text, the stop token and the undo.

    Padded rows beyond the tokenizer are no tokens; special ones but the stop token are no text. The
    undo is banned by itself, since a model may have no row for it.
    """
    num_rows = int(model.get_input_embeddings().weight.shape[0])
    special = [i for i in tokenizer.is_special.nonzero()[0].tolist() if i < num_rows]
    banned = [*special, *rows_of_no_token(model, tokenizer)]
    return [i for i in banned if i not in (tokenizer.eos_id, tokenizer.undo_id)]


def _described(response: Decoded) -> dict[str, Any]:
    ids = response.emitted_ids.tolist()
    stopped = response.stop_reason == "eos"
    return {"ids": ids[:-1] if stopped else ids, "stopped": stopped}
