"""Teacher-forced probabilities: of undo and text at every place, and of a text as a whole."""

# B sequences in a batch, T padded length, C ids of one continuation, V vocabulary

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nmar_ds.errors import ConfigError
from nmar_ds.traces.schema import IdArray

MAX_LOGITS = 2**26  # logits held at once; 256 MiB in fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class UndoScores:
    """The undo as next token, after each token of one sequence.

    Attributes:
        probability: float32[T] p(UNDO).
        is_top: bool[T] whether greedy decoding would emit an undo here.
    """

    probability: npt.NDArray[np.float32]
    is_top: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetScores:
    """Each token but the first of one sequence as the continuation of those before it.

    Attributes:
        nll: float64[T - 1] -log p of the token.
        undo_nll: float64[T - 1] -log p of `<UNDO>` in its place.
        is_top: bool[T - 1] whether greedy decoding would emit the token.
    """

    nll: npt.NDArray[np.float64]
    undo_nll: npt.NDArray[np.float64]
    is_top: npt.NDArray[np.bool_]


@torch.inference_mode()
def score_undo(model: Any, sequences: Sequence[IdArray], *, undo_id: int) -> list[UndoScores]:
    """Score the undo after every token of every sequence, in whole forwards without a cache.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        sequences: int arrays, one id at least.
        undo_id: id of `<UNDO>`.
    """
    results: dict[int, UndoScores] = {}
    for chosen, _, logits_BTV in _forwards(model, sequences):
        top_BT = (logits_BTV.argmax(dim=-1) == undo_id).cpu().numpy()
        undo_BT = logits_BTV[..., undo_id].float() - logits_BTV.float().logsumexp(dim=-1)
        probability_BT = undo_BT.exp().cpu().numpy()
        for row, index in enumerate(chosen):
            size = len(sequences[index])
            results[index] = UndoScores(
                probability=probability_BT[row, :size], is_top=top_BT[row, :size]
            )
    return [results[index] for index in range(len(sequences))]


@torch.inference_mode()
def score_targets(model: Any, sequences: Sequence[IdArray], *, undo_id: int) -> list[TargetScores]:
    """Score every token of every sequence, and the undo in its place; see `score_undo`."""
    results: dict[int, TargetScores] = {}
    for chosen, ids_BT, all_logits_BTV in _forwards(model, sequences):
        logits_BTV = all_logits_BTV[:, :-1].float()
        targets_BT = ids_BT[:, 1:]
        all_BT = logits_BTV.logsumexp(dim=-1).double()
        own_BT = logits_BTV.gather(2, targets_BT[..., None])[..., 0].double()
        nll_BT = (all_BT - own_BT).cpu().numpy()
        undo_BT = (all_BT - logits_BTV[..., undo_id].double()).cpu().numpy()
        top_BT = (logits_BTV.argmax(dim=-1) == targets_BT).cpu().numpy()
        for row, index in enumerate(chosen):
            size = len(sequences[index]) - 1
            results[index] = TargetScores(
                nll=nll_BT[row, :size], undo_nll=undo_BT[row, :size], is_top=top_BT[row, :size]
            )
    return [results[index] for index in range(len(sequences))]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScore:
    """How likely a model is to write a given text, and nothing else, after a prompt.

    Attributes:
        log_probability: natural logarithm, summed over the text's tokens.
        is_greedy: whether greedy decoding would write just this text.
    """

    log_probability: float
    is_greedy: bool


@torch.inference_mode()
def score_texts(
    model: Any,
    prompts: Sequence[IdArray],
    continuations: Sequence[IdArray],
    *,
    undo_id: int,
    ban_undo: bool = False,
    batch_size: int = 128,
) -> list[TextScore]:
    """Score plain texts, each after its prompt.

    A probability is that of SPEC 3, over the whole vocabulary: where the model would rather undo,
    a text that goes on loses what `<UNDO>` gets. With `ban_undo` it is that of a decoder which
    may not undo: the logit of `<UNDO>` is minus infinity before the softmax.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        prompts: int arrays, one id at least each.
        continuations: int arrays, one id at least each; one per prompt.
        undo_id: id of `<UNDO>`.
        ban_undo: see above.
        batch_size: sequences in one forward at most; long ones are fewer (`MAX_LOGITS`).

    Raises:
        ConfigError: an empty prompt or text, or more ids than the model has positions.
    """
    _check_texts(model, prompts, continuations)
    # The last id is nobody's input.
    inputs = [np.concatenate(pair)[:-1] for pair in zip(prompts, continuations, strict=True)]
    results: dict[int, TextScore] = {}
    for chosen, ids_BT, logits_BTV in _forwards(model, inputs, batch_size):
        for row, index in enumerate(chosen):
            ids_C = torch.from_numpy(continuations[index].astype(np.int64)).to(ids_BT)
            logits_CV = logits_BTV[row, len(prompts[index]) - 1 : len(inputs[index])].float()
            if ban_undo:
                logits_CV[:, undo_id] = -torch.inf
            log_probs_C = logits_CV.log_softmax(dim=1).gather(1, ids_C[:, None])[:, 0]
            results[index] = TextScore(
                log_probability=float(log_probs_C.double().sum()),
                is_greedy=bool((logits_CV.argmax(dim=1) == ids_C).all()),
            )
    return [results[index] for index in range(len(inputs))]


def _forwards(
    model: Any, sequences: Sequence[IdArray], batch_size: int | None = None
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Batches, longest sequences first: their indices, ids int64[B, T] and logits [B, T, V].

    At most `batch_size` side by side. Sequences are padded on the right, where a causal model needs
    no mask: nothing looks ahead.
    """
    device = next(model.parameters()).device
    num_classes = model.get_input_embeddings().weight.shape[0]
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    while order:
        longest = len(sequences[order[0]])
        num_rows = max(1, min(batch_size or len(order), MAX_LOGITS // (longest * num_classes)))
        chosen, order = order[:num_rows], order[num_rows:]
        ids_BT = np.zeros((len(chosen), longest), np.int64)
        for row, index in enumerate(chosen):
            ids_BT[row, : len(sequences[index])] = sequences[index]
        input_BT = torch.from_numpy(ids_BT).to(device)
        yield chosen, input_BT, model(input_ids=input_BT, use_cache=False).logits


def _check_texts(model: Any, prompts: Sequence[IdArray], continuations: Sequence[IdArray]) -> None:
    num_positions = getattr(model.config, "max_position_embeddings", None)
    for prompt, continuation in zip(prompts, continuations, strict=True):
        for name, ids in (("prompt", prompt), ("continuation", continuation)):
            if len(ids) == 0:
                raise ConfigError(f"scoring: {name}: no token, expected at least one")
        num_inputs = len(prompt) + len(continuation) - 1
        if num_positions is not None and num_inputs > num_positions:
            raise ConfigError(
                f"scoring: {len(prompt)} prompt tokens and {len(continuation)} more make "
                f"{num_inputs} inputs, expected at most the model's {num_positions} positions"
            )
