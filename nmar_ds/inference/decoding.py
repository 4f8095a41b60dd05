"""The stack decoder: batched greedy or sampled decoding with undo carried out on ids (SPEC 7).

Under `context: linear` every emitted token, undone or not and the undos too, stays in the key-value
cache, exactly as in training: the model sees its mistake and its retraction. So nothing is ever
rolled back while decoding; the stack machine of `traces.reduction` runs once over the finished
response, with its base at the end of the prompt (an undo there is a counted no-op). Text is made
by the caller, once, from the reduced ids.

Ragged prompts are padded on the left, with an attention mask and explicit position ids that start
at 0 on a row's first real token, so a sequence is decoded as if it were alone. Cost: padding, which
sorting by length keeps small, and one `index_select` of the cache each time a quarter of the batch
has finished.
"""

# B sequences in a batch, T padded prompt length, N tokens emitted at most, V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache

from nmar_ds.errors import ConfigError, VocabularyError
from nmar_ds.inference.limits import MAX_UNDO_BIAS, check_draws
from nmar_ds.inference.sampling import sample, uniform_draws
from nmar_ds.inference.stack import Event, Stack
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.reduction import Machine, walk
from nmar_ds.traces.schema import IdArray

UndoMode = Literal["allow", "ban"]
StopReason = Literal["eos", "stop", "length"]
OnEvent = Callable[[int, Event], None]
ShouldStop = Callable[[Sequence[int]], bool]

COMPACT_SHARE = 0.25  # finished share of a batch at which the finished rows are dropped


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """One finished response.

    Attributes:
        raw_ids: int32[num_forced + emitted] the whole response as it stands in the cache: forced
            ids, then every emitted token, undone tokens, undos and the stop token among them.
        num_forced: how many leading ids of `raw_ids` were given, not emitted.
        reduced_ids: int32[R] what is left after the undos; ends with the stop token if one came.
        num_undos: undos the model emitted.
        num_strays: undos (forced ones too) that found the stack at its base.
        undo_limited: an undo limit was reached, and `<UNDO>` was banned from there on.
        loop_limited: the response came back to what it had undone too often, and `<UNDO>` was
            banned from there on.
        stop_reason: "eos"; "stop" where `should_stop` said so; or "length" when `max_new_tokens`
            were emitted without either.
    """

    raw_ids: IdArray
    num_forced: int
    reduced_ids: IdArray
    num_undos: int
    num_strays: int
    undo_limited: bool
    loop_limited: bool
    stop_reason: StopReason

    @property
    def emitted_ids(self) -> IdArray:
        """int32[emitted] what the model itself wrote."""
        return self.raw_ids[self.num_forced :]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rules:
    """The settings a batch is decoded under; see `decode`."""

    undo_id: int
    eos_id: int
    pad_id: int
    max_new_tokens: int
    max_undos: int
    max_consecutive_undos: int
    undo_bias: float
    temperature: float
    top_p: float
    seed: int
    banned_ids: tuple[int, ...]
    machine: Machine
    tabu: bool
    max_revisits: int | None
    on_event: OnEvent | None
    should_stop: ShouldStop | None

    @property
    def watched(self) -> bool:
        """Whether anything asks for the stack while it is decoded; else it is left to the end."""
        return (
            self.tabu
            or self.max_revisits is not None
            or self.on_event is not None
            or self.should_stop is not None
        )


def decode(
    model: Any,
    prompts: Sequence[IdArray],
    *,
    machine: Machine,
    eos_id: int,
    pad_id: int | None,
    max_new_tokens: int,
    max_undos: int = 256,
    max_consecutive_undos: int = 64,
    undo_mode: UndoMode = "allow",
    undo_bias: float = 0.0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    forced: Sequence[IdArray] | None = None,
    batch_size: int = 128,
    banned_ids: Sequence[int] = (),
    numbers: Sequence[int] | None = None,
    tabu: bool = False,
    max_revisits: int | None = None,
    on_event: OnEvent | None = None,
    should_stop: ShouldStop | None = None,
) -> list[Decoded]:
    """Decode every prompt; a result does not depend on its neighbours in the batch.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        prompts: int arrays, at least one id each (BOS included where the model was trained so).
        machine: the id of `<UNDO>`, and what one of them undoes in this model (SPEC 2).
        eos_id: the stop token; emitting it ends a sequence.
        pad_id: fills masked positions; any valid id does (None: the stop token).
        max_new_tokens: tokens emitted at most, undos and undone tokens included.
        max_undos: undos emitted per sequence, after which `<UNDO>` is banned for it.
        max_consecutive_undos: the same for undos in a row; not below the longest deviation.
        undo_mode: "ban" makes `<UNDO>` impossible.
        undo_bias: added to the logit of `<UNDO>` (large values force it, up to the limits); a
            million in either direction at most.
        temperature: 0 is greedy, otherwise logits are divided by it and sampled; 0.0001 to 10000.
        top_p: nucleus: the smallest set of likeliest tokens with at least this mass.
        seed: with the number of a sequence it fixes the draws of that sequence.
        forced: int arrays, appended to the prompts as response already written (a prefix, a
            deviation). The base stays at the end of the prompt, so these can be undone.
        batch_size: sequences decoded side by side.
        banned_ids: never emitted; `rows_of_no_token` belong here.
        numbers: with the seed they fix the draws of each sequence; by default its index.
        tabu: a token right after which an undo came is not written at the same place again, after
            just the same content; otherwise a model may repeat the error it has undone. Right
            tokens that `span` and `reset` take along with an error may come again.
        max_revisits: how often writing may lead back to a content that an undo had left; after
            one more `<UNDO>` is banned for that sequence, which ends any loop.
        on_event: called with the index of a prompt and what happened to its response, token by
            token, as it happens; forced ids make no events.
        should_stop: called with what is left of a response after each token that it wrote; True
            ends it there.

    Returns:
        One `Decoded` per prompt, in the order of `prompts`.

    Raises:
        ConfigError: a setting out of range, or prompt and new tokens that exceed the positions
            the model was built for.
        VocabularyError: an id beyond the model's vocabulary.
    """
    rules = _Rules(
        undo_id=machine.undo_id,
        eos_id=eos_id,
        pad_id=eos_id if pad_id is None else pad_id,
        max_new_tokens=max_new_tokens,
        # A limit of no undos is a ban from the first step, so "ban" needs no path of its own.
        max_undos=0 if undo_mode == "ban" else max_undos,
        max_consecutive_undos=max_consecutive_undos,
        undo_bias=undo_bias,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        banned_ids=tuple(banned_ids),
        machine=machine,
        tabu=tabu,
        max_revisits=max_revisits,
        on_event=on_event,
        should_stop=should_stop,
    )
    starts = [np.empty(0, np.int32)] * len(prompts) if forced is None else list(forced)
    assert len(starts) == len(prompts), "one forced array per prompt"
    contexts = [
        np.concatenate([prompt, start]).astype(np.int64)
        for prompt, start in zip(prompts, starts, strict=True)
    ]
    _check(model, contexts, rules, batch_size, undo_mode)
    order = sorted(range(len(contexts)), key=lambda index: -len(contexts[index]))
    results: list[Decoded | None] = [None] * len(contexts)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        drawn_by = chosen if numbers is None else [numbers[index] for index in chosen]
        watch = None
        if rules.watched:
            watch = _Watch(rules, chosen, [starts[index].tolist() for index in chosen])
        batch = _Batch(model, [contexts[index] for index in chosen], drawn_by, rules, watch)
        for row, (emitted, num_undos, limited) in enumerate(batch.run()):
            index = chosen[row]
            looped = watch is not None and row in watch.looped
            ended = watch is not None and row in watch.stopped
            raw = np.concatenate([starts[index], emitted]).astype(np.int32)
            stopped = len(emitted) > 0 and int(emitted[-1]) == eos_id
            carried = walk(raw, machine)
            results[index] = Decoded(
                raw_ids=raw,
                num_forced=len(starts[index]),
                reduced_ids=raw[carried.kept],
                num_undos=num_undos,
                num_strays=carried.num_strays,
                undo_limited=limited and not looped and undo_mode != "ban",
                loop_limited=looped,
                stop_reason="eos" if stopped else "stop" if ended else "length",
            )
    return [result for result in results if result is not None]


def rows_of_no_token(model: Any, tokenizer: Tokenizer) -> list[int]:
    """Rows of a model beyond its tokenizer, where a vocabulary was padded; for `banned_ids`.

    Such a row means nothing and cannot be spelled, yet a model may like it as any other.
    """
    return [*range(tokenizer.size, model.get_input_embeddings().weight.shape[0])]


class _Watch:
    """The stacks of a batch's responses while they are decoded, for guards and streams.

    Costs a wait for the device and a little Python a token, so it is there only where asked for.

    Attributes:
        looped, stopped: rows whose undos were banned for looping, and rows that were ended.
    """

    def __init__(self, rules: _Rules, indices: Sequence[int], starts: list[list[int]]) -> None:
        self._rules, self._indices = rules, indices
        self._stacks = [Stack(rules.machine, start) for start in starts]
        self._revisits = [stack.num_revisits for stack in self._stacks]  # of what was forced
        self.looped: set[int] = set()
        self.stopped: set[int] = set()

    def write(self, row: int, token: int) -> None:
        """Carry out a token of a row."""
        rules, stack = self._rules, self._stacks[row]
        event = stack.write(token)
        if rules.on_event is not None:
            rules.on_event(self._indices[row], event)
        if rules.max_revisits is not None:
            if stack.num_revisits - self._revisits[row] > rules.max_revisits:
                self.looped.add(row)
        if rules.should_stop is not None and token != rules.undo_id:
            if rules.should_stop(stack.ids):
                self.stopped.add(row)

    def tabu(self, row: int) -> list[int]:
        """Tokens that a row may not write next."""
        return sorted(self._stacks[row].taken_back) if self._rules.tabu else []


class _Batch:
    """The state of one batch; rows that have finished are dropped now and then."""

    def __init__(
        self, model: Any, contexts: list[npt.NDArray[np.int64]], indices: list[int], rules: _Rules,
        watch: _Watch | None,
    ) -> None:  # fmt: skip
        self.model = model
        self.rules = rules
        self.watch = watch
        num_rows, longest = len(contexts), max(len(context) for context in contexts)
        device = next(model.parameters()).device
        ids_BT = np.full((num_rows, longest), rules.pad_id, np.int64)
        mask_BT = np.zeros((num_rows, longest), np.int64)
        for row, context in enumerate(contexts):
            ids_BT[row, longest - len(context) :] = context
            mask_BT[row, longest - len(context) :] = 1
        self.input_BT = torch.from_numpy(ids_BT).to(device)
        self.mask_BT = torch.from_numpy(mask_BT).to(device)
        # Padding gets position 0; the mask hides it, the number must only be valid.
        self.position_BT = (self.mask_BT.cumsum(dim=1) - 1).clamp(min=0)
        self.cache = DynamicCache(config=model.config)
        self.rows_B = torch.arange(num_rows, device=device)  # row of each sequence in the outputs
        self.num_undos_B = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.run_B = torch.zeros_like(self.num_undos_B)
        self.banned_B = torch.full_like(self.num_undos_B, rules.max_undos <= 0, dtype=torch.bool)
        self.done_B = torch.zeros_like(self.banned_B)
        self.draws_BN: torch.Tensor | None = None
        if rules.temperature > 0:
            draws = uniform_draws(rules.seed, indices, rules.max_new_tokens)
            self.draws_BN = torch.from_numpy(draws).to(device)
        self.emitted_BN = torch.full(
            (num_rows, rules.max_new_tokens), -1, dtype=torch.int64, device=device
        )
        self.undos_out_B = torch.zeros_like(self.num_undos_B)
        self.limited_out_B = torch.zeros_like(self.banned_B)

    @torch.inference_mode()
    def run(self) -> list[tuple[npt.NDArray[np.int64], int, bool]]:
        """Decode to the end; per row: emitted ids, number of undos, whether a limit was hit."""
        for step in range(self.rules.max_new_tokens):
            logits_BV = self._forward()
            tokens_B = self._choose(logits_BV, step)
            self._account(tokens_B, step)
            num_done = int(self.done_B.sum())
            if num_done == len(self.done_B):
                break
            if num_done >= COMPACT_SHARE * len(self.done_B):
                self._compact(~self.done_B)
        self._retire()
        emitted_BN = self.emitted_BN.cpu().numpy()
        undos, limited = self.undos_out_B.tolist(), self.limited_out_B.tolist()
        return [
            (row[row >= 0], num, hit)
            for row, num, hit in zip(emitted_BN, undos, limited, strict=True)
        ]

    def _forward(self) -> torch.Tensor:
        """float32[B, V] logits of the next token, with the undo rules applied."""
        output = self.model(
            input_ids=self.input_BT,
            attention_mask=self.mask_BT,
            position_ids=self.position_BT,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: torch.Tensor = output.logits[:, -1].float()
        undo_id = self.rules.undo_id
        if undo_id < logits_BV.shape[1]:  # a model that was never taught to undo may lack the row
            logits_BV[:, undo_id] += self.rules.undo_bias
            logits_BV[:, undo_id] = logits_BV[:, undo_id].masked_fill(self.banned_B, -math.inf)
        if self.rules.banned_ids:
            logits_BV[:, list(self.rules.banned_ids)] = -math.inf
        if self.watch is not None and self.rules.tabu:
            for place, row in enumerate(self.rows_B.tolist()):
                logits_BV[place, self.watch.tabu(row)] = -math.inf
        return logits_BV

    def _choose(self, logits_BV: torch.Tensor, step: int) -> torch.Tensor:
        """int64[B] the next token of each row."""
        if self.draws_BN is None:
            return logits_BV.argmax(dim=1)
        rules = self.rules
        draws_B = self.draws_BN[:, step]
        return sample(logits_BV, draws_B, temperature=rules.temperature, top_p=rules.top_p)

    def _account(self, tokens_B: torch.Tensor, step: int) -> None:
        """Record the tokens, keep the undo counts, and prepare the next forward."""
        rules = self.rules
        alive_B = ~self.done_B
        self.emitted_BN[self.rows_B[alive_B], step] = tokens_B[alive_B]
        undone_B = (tokens_B == rules.undo_id) & alive_B
        self.num_undos_B += undone_B
        self.run_B = torch.where(undone_B, self.run_B + 1, 0)
        self.banned_B |= self.num_undos_B >= rules.max_undos
        self.banned_B |= self.run_B >= rules.max_consecutive_undos
        self.done_B |= tokens_B == rules.eos_id
        if self.watch is not None:
            self._watch(tokens_B, alive_B)
        self.input_BT = tokens_B[:, None]
        self.position_BT = self.position_BT[:, -1:] + 1
        self.mask_BT = torch.cat([self.mask_BT, torch.ones_like(self.mask_BT[:, :1])], dim=1)

    def _watch(self, tokens_B: torch.Tensor, alive_B: torch.Tensor) -> None:
        """Carry the tokens out, and obey what that leads to."""
        assert self.watch is not None
        rows, alive = self.rows_B.tolist(), alive_B.tolist()
        for row, token, is_alive in zip(rows, tokens_B.tolist(), alive, strict=True):
            if is_alive:
                self.watch.write(row, token)
        device = self.done_B.device
        self.banned_B |= torch.tensor([row in self.watch.looped for row in rows], device=device)
        self.done_B |= torch.tensor([row in self.watch.stopped for row in rows], device=device)

    def _retire(self) -> None:
        """Copy the counts of the rows at hand to where they outlive the batch."""
        self.undos_out_B[self.rows_B] = self.num_undos_B
        self.limited_out_B[self.rows_B] = self.banned_B

    def _compact(self, keep_B: torch.Tensor) -> None:
        """Drop all rows but those of `keep_B`, from the cache too."""
        self._retire()
        kept = keep_B.nonzero()[:, 0]
        self.cache.batch_select_indices(kept)
        for name in ("input_BT", "mask_BT", "position_BT", "rows_B", "num_undos_B", "run_B"):
            setattr(self, name, getattr(self, name)[kept])
        self.banned_B, self.done_B = self.banned_B[kept], self.done_B[kept]
        if self.draws_BN is not None:
            self.draws_BN = self.draws_BN[kept]


def _check(
    model: Any,
    contexts: list[npt.NDArray[np.int64]],
    rules: _Rules,
    batch_size: int,
    undo_mode: str,
) -> None:
    """Refuse settings that cannot mean what the user wants, before the first forward."""
    wrong = [
        ("max_new_tokens", rules.max_new_tokens, "at least 1", rules.max_new_tokens < 1),
        ("batch_size", batch_size, "at least 1", batch_size < 1),
        ("undo_mode", undo_mode, "'allow' or 'ban'", undo_mode not in ("allow", "ban")),
        ("undo_bias", rules.undo_bias, f"{-MAX_UNDO_BIAS:g} to {MAX_UNDO_BIAS:g}",
         not abs(rules.undo_bias) <= MAX_UNDO_BIAS),
        ("max_consecutive_undos", rules.max_consecutive_undos, "at least 1",
         rules.max_consecutive_undos < 1),
        ("max_revisits", rules.max_revisits, "0 or more, or None",
         rules.max_revisits is not None and rules.max_revisits < 0),
    ]  # fmt: skip
    for name, value, expected, bad in wrong:
        if bad:
            raise ConfigError(f"decoding: {name}: {value!r}, expected {expected}")
    check_draws("decoding: ", temperature=rules.temperature, top_p=rules.top_p)
    num_known = model.get_input_embeddings().weight.shape[0]
    num_positions = getattr(model.config, "max_position_embeddings", None)
    highest = max(rules.eos_id, rules.pad_id, *rules.banned_ids)
    if undo_mode != "ban":
        highest = max(highest, rules.undo_id)
    for context in contexts:
        if len(context) == 0:
            raise ConfigError("decoding: prompt: no token, expected at least one")
        highest = max(highest, int(context.max()))
        needed = len(context) + rules.max_new_tokens
        if num_positions is not None and needed > num_positions:
            raise ConfigError(
                f"decoding: max_new_tokens: {len(context)} prompt tokens and "
                f"{rules.max_new_tokens} new ones make {needed}, expected at most the model's "
                f"{num_positions} positions"
            )
    if highest >= num_known:
        raise VocabularyError(
            f"decoding: id {highest}: beyond the model's vocabulary, expected less than {num_known}"
        )
