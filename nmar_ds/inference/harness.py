"""The model class `nmar` of lm-eval: undos are carried out on ids, scores are of plain text.

lm-eval (EleutherAI's lm-evaluation-harness, 0.4) asks a model three things. `generate_until` is
answered by the stack decoder: the text is that of the reduced ids, and `until` texts are looked
for in what is left of the response. `loglikelihood` and `loglikelihood_rolling` score plain text,
which holds no undo, over the whole vocabulary as SPEC 3 does; with `undo="ban"` the model can
neither write nor score an undo. A prompt is encoded as in training: by itself, special-token
parsing off, in the model's own chat template where it has one; a continuation likewise.

Importing this module registers the class; `pip install 'nmar_ds[harness]'` brings lm-eval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from nmar_ds.errors import ConfigError, NmarError, VocabularyError
from nmar_ds.inference.decoding import Decoded, UndoMode, decode, rows_of_no_token
from nmar_ds.inference.exported import chat_of, load_exported_tokenizer, load_model, read_settings
from nmar_ds.inference.generation import encode_prompt, stops_at
from nmar_ds.inference.harness_requests import Generation, draw_numbers, understand
from nmar_ds.inference.rendering import response_text
from nmar_ds.inference.scoring import TextScore, score_texts
from nmar_ds.traces.schema import IdArray


@register_model("nmar")
class NmarLM(LM):  # type: ignore[misc]
    """A folder made by `launcher/export.py`, as lm-eval's model `nmar`.

    Args:
        pretrained: the folder.
        batch_size: sequences side by side; they do not change each other's results.
        undo: "allow", or "ban": `<UNDO>` can be neither written nor scored.
        max_new_tokens: tokens a response may take, undone ones and undos among them; goes before
            what a task says. Without either it is 256.
        undo_bias: and the other guards as `decoding.decode` takes them.
        max_undos: likewise. max_consecutive_undos, max_revisits, tabu: likewise.
        seed: of sampling, where a task or the user asks for a temperature.
        device: where the model computes; by default the accelerator if there is one.

    Raises:
        ConfigError: not an exported folder, or an argument out of range.
        VocabularyError: a tokenizer or a model without `<UNDO>`, or not those that were trained.
    """

    def __init__(
        self,
        pretrained: str | Path,
        *,
        batch_size: int | str = 32,
        undo: UndoMode = "allow",
        max_new_tokens: int | None = None,
        undo_bias: float = 0.0,
        max_undos: int = 256,
        max_consecutive_undos: int = 64,
        max_revisits: int | None = None,
        tabu: bool = False,
        seed: int = 0,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if undo not in ("allow", "ban"):
            raise ConfigError(f"undo: {undo!r}, expected 'allow' or 'ban'")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"batch_size: {batch_size!r}, expected a number, at least 1")
        self.batch_size, self.undo, self.max_new_tokens = int(batch_size), undo, max_new_tokens
        self._guards = {
            "undo_mode": undo,
            "undo_bias": undo_bias,
            "max_undos": max_undos,
            "max_consecutive_undos": max_consecutive_undos,
            "max_revisits": max_revisits,
            "tabu": tabu,
            "seed": seed,
        }
        folder = Path(pretrained)
        self.settings = read_settings(folder)
        self.tokenizer = load_exported_tokenizer(folder, self.settings)
        self.chat = chat_of(self.settings, self.tokenizer)
        self.model = load_model(folder)
        if device is not None:
            self.model.to(device)
        self._device = next(self.model.parameters()).device
        num_known = self.model.get_input_embeddings().weight.shape[0]
        if self.settings.undo_id >= num_known:
            raise VocabularyError(
                f"{folder}: {self.settings.undo_token} has id {self.settings.undo_id}, expected "
                f"less than the {num_known} tokens that the model knows"
            )
        self.counts: Counter[str] = Counter()

    @property
    def max_length(self) -> int | None:
        """Positions that the model was built for; None where it has no limit."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache of requests knows the tokenizer by."""
        return self.settings.tokenizer_fingerprint

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Refused: the model puts the template it was trained with around every prompt itself."""
        raise ConfigError(
            "apply_chat_template: not for this model, which puts the chat template it was trained "
            "with, if any, around every prompt by itself; expected plain prompts"
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The reduced response to each request, without the `until` text that ended it."""
        prompts = [self._prompt(request) for request in requests]
        numbers = draw_numbers([(request.task_name, request.doc_id) for request in requests])
        alike: dict[Generation, list[int]] = {}
        for index, request in enumerate(requests):
            rules = understand(request.args[1], max_new_tokens=self.max_new_tokens)
            alike.setdefault(rules, []).append(index)
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for rules, members in alike.items():
                for chosen in self._batches(members, [len(prompt) for prompt in prompts]):
                    decoded = self._decode(
                        [prompts[i] for i in chosen], rules, [numbers[i] for i in chosen]
                    )
                    for index, found in zip(chosen, decoded, strict=True):
                        text = response_text(self.tokenizer, prompts[index], found.reduced_ids)
                        texts[index] = postprocess_generated_text(text, [*rules.until], None)
                        if rules.temperature == 0:  # a cache would make all samples one
                            self.cache_hook.add_partial(
                                "generate_until", requests[index].args, texts[index]
                            )
                    bar.update(len(chosen))
        return [texts[index] for index in range(len(requests))]

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """For each (context, continuation): log p, and whether greedy decoding would write it."""
        prompts = [self._prompt(request) for request in requests]
        texts = [self._continuation(request) for request in requests]
        sizes = [len(prompt) + len(text) for prompt, text in zip(prompts, texts, strict=True)]
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            for chosen in self._batches(range(len(requests)), sizes):
                scores = self._score([prompts[i] for i in chosen], [texts[i] for i in chosen])
                for index, score in zip(chosen, scores, strict=True):
                    answers[index] = (score.log_probability, score.is_greedy)
                    self.cache_hook.add_partial(
                        "loglikelihood", requests[index].args, answers[index]
                    )
                bar.update(len(chosen))
        return [answers[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log p of each whole text after BOS; longer ones in lm-eval's windows, each token once.

        Raises:
            ConfigError: the model has no BOS, or was trained with a chat template: there is nothing
                before a plain text that it was trained to go on from.
        """
        if requests and (self.chat is not None or not self.tokenizer.add_bos):
            lacking = (
                "was trained with a chat template, never on text without one"
                if self.chat is not None
                else "has no BOS token, so nothing comes before a text's first token"
            )
            raise ConfigError(
                f"{_place(requests[0])}: loglikelihood_rolling: this model {lacking}; expected "
                "tasks that generate or that score continuations (multiple_choice, loglikelihood)"
            )
        totals = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            text = str(request.args[0])
            start = int(self._encode(request, "")[-1])
            ids = self.tokenizer.encode_exactly(text, continuation=False).tolist()
            windows = [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    ids, start, self.max_length or len(ids) + 1, context_len=1
                )
            ]
            scores = self._score(
                [np.array(before, np.int32) for before, _ in windows],
                [np.array(scored, np.int32) for _, scored in windows],
            )
            totals.append(sum(score.log_probability for score in scores))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval keeps in the results' `config`: the settings, and how much was undone."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "nmar": {
                "semantics": self.settings.semantics,
                "context": self.settings.context,
                "tokenizer_fingerprint": self.settings.tokenizer_fingerprint,
                "max_new_tokens": self.max_new_tokens,
                **self._guards,
                "generated": dict(self.counts),
            },
        }

    def _batches(self, members: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
        """Longest first: what does not fit is known at once, and little is padded."""
        order = sorted(members, key=lambda index: -sizes[index])
        return [order[n : n + self.batch_size] for n in range(0, len(order), self.batch_size)]

    def _decode(
        self, prompts: list[IdArray], rules: Generation, numbers: list[int]
    ) -> list[Decoded]:
        decoded = decode(
            self.model,
            prompts,
            machine=self.settings.machine,
            eos_id=self.settings.eos_id,
            pad_id=self.settings.pad_id,
            max_new_tokens=rules.max_new_tokens,
            temperature=rules.temperature,
            top_p=rules.top_p,
            numbers=numbers,
            batch_size=self.batch_size,
            banned_ids=rows_of_no_token(self.model, self.tokenizer),
            should_stop=stops_at(self.tokenizer, rules.until) if rules.until else None,
            **cast(Any, self._guards),
        )
        for found in decoded:
            self.counts.update(
                responses=1,
                responses_with_undo=int(found.num_undos > 0),
                undos=found.num_undos,
                stray_undos=found.num_strays,
                tokens_emitted=len(found.emitted_ids),
                tokens_kept=len(found.reduced_ids),
                undo_limited=int(found.undo_limited),
                loop_limited=int(found.loop_limited),
                cut_off=int(found.stop_reason == "length"),
            )
        return decoded

    def _score(self, prompts: list[IdArray], texts: list[IdArray]) -> list[TextScore]:
        return score_texts(
            self.model,
            prompts,
            texts,
            undo_id=self.settings.undo_id,
            ban_undo=self.undo == "ban",
            batch_size=self.batch_size,
        )

    def _prompt(self, request: Any) -> IdArray:
        return self._encode(request, str(request.args[0]))

    def _encode(self, request: Any, prompt: str) -> IdArray:
        try:
            return encode_prompt(prompt, self.tokenizer, self.chat)
        except NmarError as error:
            raise type(error)(f"{_place(request)}: {error}") from None

    def _continuation(self, request: Any) -> IdArray:
        context, text = request.args
        try:
            # As a response in training: by itself, and as a start of text after an empty prompt.
            ids = self.tokenizer.encode_exactly(text, continuation=bool(context))
        except VocabularyError as error:
            raise VocabularyError(f"{_place(request)}: continuation: {error}") from None
        if len(ids) == 0:
            raise ConfigError(f"{_place(request)}: continuation: empty, expected some text")
        return ids


def _place(request: Any) -> str:
    return f"{request.task_name}: document {request.doc_id}"
