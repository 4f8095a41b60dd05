"""One prompt in, one response out: raw beside reduced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.text import Text

from nmar_ds.errors import ConfigError, VocabularyError
from nmar_ds.inference.decoding import Decoded, OnEvent, decode, rows_of_no_token
from nmar_ds.inference.exported import ExportSettings
from nmar_ds.inference.rendering import Run, as_plain, as_rich, response_text, runs
from nmar_ds.inference.streaming import TextStream
from nmar_ds.traces.chat import ChatTemplate, TemplateError
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.schema import IdArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """A response with its two readings.

    Attributes:
        decoded: ids and counts.
        runs: the raw response, in runs of tokens that were kept, undone, or undos.
        reduced: the text that is meant.
        undo_token: how an undo is shown.
    """

    decoded: Decoded
    runs: list[Run]
    reduced: str
    undo_token: str


def encode_prompt(prompt: str, tokenizer: Tokenizer, chat: ChatTemplate | None = None) -> IdArray:
    """Encode a prompt as training does: whole, special-token parsing off, BOS where one is set.

    Args:
        prompt: the text; with `chat` it is the user's message.
        tokenizer: of the model.
        chat: the chat template the model was trained with, if any.

    Raises:
        ConfigError: nothing to start from.
        VocabularyError: the tokenizer cannot give the text back.
    """
    if chat is not None:
        if not prompt:
            raise ConfigError("prompt: empty, expected a message for the chat template")
        try:
            return chat.prompts([(prompt, "")])[0]
        except TemplateError as error:
            raise ConfigError(f"prompt: the chat template {error}") from None
    ids = tokenizer.encode(prompt, continuation=False)
    spelled = tokenizer.decode(ids)
    if spelled != prompt:
        raise VocabularyError(f"prompt: {tokenizer.difference(prompt, spelled)}")
    if tokenizer.add_bos:
        ids = np.concatenate([np.array([tokenizer.bos_id], np.int32), ids])
    if len(ids) == 0:
        raise ConfigError("prompt: empty, expected some text (this model has no BOS token)")
    return ids


def generate(
    model: Any,
    tokenizer: Tokenizer,
    settings: ExportSettings,
    prompt: str,
    *,
    chat: ChatTemplate | None = None,
    begun: str = "",
    stop_texts: Sequence[str] = (),
    stream: Callable[[TextStream], AbstractContextManager[OnEvent]] | None = None,
    banned_ids: Sequence[int] = (),
    **rules: Any,
) -> Generated:
    """Answer one prompt.

    The prompt is encoded as in training: whole, with special-token parsing off.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        settings: of its folder.
        prompt: as `encode_prompt` takes it, and
        chat: likewise.
        begun: the beginning of the response; the model goes on from there, and may undo it.
        stop_texts: texts that end the response where they come up in it; they stay.
        stream: gives whoever shows the response as it comes, such as `streaming.shown`.
        banned_ids: never emitted; neither are the model's rows beyond the tokenizer.
        **rules: as `decoding.decode` takes them, `max_new_tokens` among them.

    Raises:
        ConfigError: as `encode_prompt`, and as `decoding.decode`.
        VocabularyError: likewise, or the tokenizer cannot give `begun` back.
    """
    prompt_ids = encode_prompt(prompt, tokenizer, chat)
    try:
        # As a response in training: after an empty prompt it starts the text, BOS or not.
        begun_ids = tokenizer.encode_exactly(begun, continuation=bool(prompt))
    except VocabularyError as error:
        raise VocabularyError(f"begun: {error}") from None
    follows = TextStream(tokenizer, prompt_ids, settings.machine, begun_ids)
    with contextlib.nullcontext() if stream is None else stream(follows) as on_event:
        decoded = decode(
            model,
            [prompt_ids],
            machine=settings.machine,
            eos_id=settings.eos_id,
            pad_id=settings.pad_id,
            forced=[begun_ids],
            banned_ids=[*banned_ids, *rows_of_no_token(model, tokenizer)],
            on_event=on_event,
            should_stop=stops_at(tokenizer, stop_texts) if stop_texts else None,
            **rules,
        )[0]
    found = runs(
        tokenizer, prompt_ids, decoded.raw_ids, settings.machine, num_forced=decoded.num_forced
    )
    return Generated(
        decoded=decoded,
        runs=list(found),
        reduced=response_text(tokenizer, prompt_ids, decoded.reduced_ids),
        undo_token=settings.undo_token,
    )


def stops_at(tokenizer: Tokenizer, texts: Sequence[str]) -> Callable[[Sequence[int]], bool]:
    """A test for `decode`: whether the token written last completes one of the texts.

    Args:
        tokenizer: of the model.
        texts: one at least, none of them empty.
    """
    wanted = [text.encode("utf-8") for text in texts]
    longest = max(map(len, wanted))

    def stops(ids: Sequence[int]) -> bool:
        # Ordinary tokens have a byte at least; the last one may bring more than the text.
        spelled = tokenizer.decode_bytes(ids[-longest:])
        last = len(tokenizer.decode_bytes(ids[-1:]))
        return any(text in spelled[-(len(text) + last - 1) :] for text in wanted)

    return stops


def show(generated: Generated, what: Literal["raw", "reduced", "both"]) -> None:
    """Print raw, reduced or both; what is not the response itself goes only with "both"."""
    console = Console()
    if what in ("raw", "both"):
        if what == "both":
            print("--- raw")
        if console.is_terminal:
            console.print(as_rich(iter(generated.runs), generated.undo_token), soft_wrap=True)
        else:
            print(as_plain(iter(generated.runs), generated.undo_token))
    if what in ("reduced", "both"):
        if what == "both":
            print("--- reduced")
        if console.is_terminal:
            console.print(Text(generated.reduced), soft_wrap=True)
        else:
            print(generated.reduced)
    if what == "both":
        decoded = generated.decoded
        limited = ", undo limit reached" if decoded.undo_limited else ""
        limited += ", undo banned for going in circles" if decoded.loop_limited else ""
        print(
            f"--- {len(decoded.emitted_ids)} tokens emitted, {len(decoded.reduced_ids)} kept, "
            f"{decoded.num_undos} undos ({decoded.num_strays} stray){limited}, "
            f"stopped by {decoded.stop_reason}"
        )
