"""One prompt in, one response out: raw beside reduced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.text import Text

from nmar_ds.errors import ConfigError, VocabularyError
from nmar_ds.inference.decoding import Decoded, UndoMode, decode
from nmar_ds.inference.exported import ExportSettings
from nmar_ds.inference.rendering import Run, as_plain, as_rich, response_text, runs
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
    max_new_tokens: int,
    undo_mode: UndoMode = "allow",
    undo_bias: float = 0.0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Generated:
    """Answer one prompt; the arguments are those of `encode_prompt` and `decoding.decode`.

    The prompt is encoded as in training: whole, with special-token parsing off.
    """
    prompt_ids = encode_prompt(prompt, tokenizer, chat)
    decoded = decode(
        model,
        [prompt_ids],
        machine=settings.machine,
        eos_id=settings.eos_id,
        pad_id=settings.pad_id,
        max_new_tokens=max_new_tokens,
        undo_mode=undo_mode,
        undo_bias=undo_bias,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )[0]
    return Generated(
        decoded=decoded,
        runs=list(runs(tokenizer, prompt_ids, decoded.raw_ids, settings.machine)),
        reduced=response_text(tokenizer, prompt_ids, decoded.reduced_ids),
        undo_token=settings.undo_token,
    )


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
        print(
            f"--- {len(decoded.raw_ids)} tokens emitted, {len(decoded.reduced_ids)} kept, "
            f"{decoded.num_undos} undos ({decoded.num_strays} stray){limited}, "
            f"stopped by {decoded.stop_reason}"
        )
