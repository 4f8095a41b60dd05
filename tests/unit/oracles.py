"""Models whose every decode, and so every measure, can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import examined
import torch

from nmar_ds.inference.bars import number
from nmar_ds.inference.evaluation import Examination, FamilyResult, evaluate
from nmar_ds.inference.exported import ExportSettings
from nmar_ds.inference.probes import Problem
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.reduction import Machine, reduce

Policy = Callable[[list[int], list[int], list[int]], int]


def settings_of(tokenizer: Tokenizer) -> ExportSettings:
    return ExportSettings(
        undo_id=tokenizer.undo_id, undo_token="<UNDO>", semantics="token", context="linear",
        eos_id=tokenizer.eos_id, bos_id=tokenizer.bos_id, pad_id=tokenizer.pad_id,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )  # fmt: skip


class Oracle(torch.nn.Module):
    """Looks the problem up and follows a policy(response, stack, reference) -> next token.

    The ids of a row are kept in the key-value cache, where a model keeps its past, so dropping
    rows and padding have to be right for it to answer at all.
    """

    def __init__(
        self, tokenizer: Tokenizer, problems: list[Problem], policy: Policy, machine: Machine,
        num_spare: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embedding = torch.nn.Embedding(tokenizer.size + num_spare, 1)
        self.config = examined.LlamaConfig(
            vocab_size=tokenizer.size, num_hidden_layers=1, max_position_embeddings=4096
        )
        self.machine = machine
        self.references = {tuple(p.prompt_ids.tolist()): p.reference_ids.tolist() for p in problems}
        self.policy = policy

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding

    def forward(
        self, input_ids: Any, attention_mask: Any = None, past_key_values: Any = None, **_: Any
    ) -> Any:
        past = input_ids[:, None, :, None].float()
        if past_key_values is not None:
            past, _ = past_key_values.update(past, past, 0)
        mask = torch.ones_like(past[:, 0, :, 0]) if attention_mask is None else attention_mask
        size = input_ids.shape[1]
        logits = torch.zeros(*input_ids.shape, self.embedding.num_embeddings)
        for row in range(len(past)):
            for place in range(size) if past_key_values is None else [size - 1]:
                seen = past[row, 0, : past.shape[2] - size + place + 1, 0]
                ids = seen[mask[row, : len(seen)] > 0].long().tolist()
                choices = self._next(ids)
                for rank, token in enumerate(choices):
                    logits[row, place, token] = 9.0 - rank
        return SimpleNamespace(logits=logits)

    def _next(self, ids: list[int]) -> list[int]:
        """The policy's token, then what to do where that one is banned: go on by count."""
        for size in range(len(ids), 0, -1):
            reference = self.references.get(tuple(ids[:size]))
            if reference is not None:
                response = ids[size:]
                stack = reduce(response, self.machine).tolist()
                return [self.policy(response, stack, reference), blind(response, stack, reference)]
        return [0]


def blind(_response: list[int], stack: list[int], reference: list[int]) -> int:
    """Never takes anything back: the reference's token at this place, right or not so far."""
    return reference[min(len(stack), len(reference) - 1)]


def examine(
    tokenizer: Tokenizer,
    families: dict[str, list[Problem]],
    policy: Policy,
    facts: ExportSettings | None = None,
    num_spare: int = 0,
    **changes: Any,
) -> FamilyResult:
    facts = facts or settings_of(tokenizer)
    model = Oracle(tokenizer, families["words"], policy, facts.machine, num_spare)
    settings: dict[str, Any] = {"num_problems": 30, "batch_size": 16}
    examination = Examination(**(settings | changes))
    return evaluate(model, tokenizer, facts, families, examination)["words"]


def values(result: FamilyResult) -> dict[str, Any]:
    return {name: number(measure) for name, measure in result.measures.items()}


def careful(undo_id: int) -> Policy:
    def policy(response: list[int], stack: list[int], reference: list[int]) -> int:
        right = stack == reference[: len(stack)]
        return blind(response, stack, reference) if right else undo_id

    return policy
