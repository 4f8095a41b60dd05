"""What the model writes on held-out prompts, at every evaluation: a table for TensorBoard.

Each prompt is answered twice: by itself, and after the trace's own error was put in the model's
mouth. The second answer shows whether it takes an error back; a good model seldom makes one.
The sequences are dealt to the ranks, and every rank runs as many forwards as the others: what all
of them found is put together after each, and who is done is read off that.
"""

# N tokens of this rank's row, M tokens asked of it, K known ids

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from nmar_ds.data.loader import TraceSource
from nmar_ds.inference.decoding import Decoded
from nmar_ds.inference.drafted import Asked, decode_drafted
from nmar_ds.inference.rendering import Run, as_plain, response_text, runs
from nmar_ds.model.attention import SegmentLayout
from nmar_ds.traces.answers import answered
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.reduction import Machine, reduce
from nmar_ds.traces.schema import IdArray, Role

MAX_NEW_TOKENS = 64
SHOWN_CHARACTERS = 400  # of a cell
LOOKED_AT = 200  # traces for one that will do


class HeldoutTraces(TraceSource, Protocol):
    """What is needed of a store."""

    @property
    def role_counts(self) -> npt.NDArray[np.int32]:
        """int32[traces, NUM_ROLES]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exercise:
    """A held-out prompt, and what may have been written already.

    Attributes:
        prompt_ids: int32, one id at least.
        forced_ids: int32, a prefix and a deviation of the trace; empty where nothing is forced.
        draft_ids: int32, how the trace goes on.
        reference_ids: int32, what is left of the trace's response in the end.
    """

    prompt_ids: IdArray
    forced_ids: IdArray
    draft_ids: IdArray
    reference_ids: IdArray


def choose(traces: HeldoutTraces, num_prompts: int, machine: Machine) -> list[Exercise]:
    """Prompts spread over the held-out traces, always the same ones.

    Args:
        traces: held-out; those with a deviation come first, and those without a prompt not at all.
        num_prompts: at most; each gives one exercise, or two where the trace has a deviation.
        machine: of the traces.
    """
    counts = traces.role_counts
    candidates = np.flatnonzero(counts[:, Role.DEVIATION] > 0)
    if len(candidates) == 0:
        candidates = np.arange(len(counts))
    found: dict[int, list[Exercise]] = {}
    for number in range(num_prompts):
        first = number * len(candidates) // num_prompts
        for index in candidates[first : first + LOOKED_AT].tolist():
            made = _exercises(traces, index, machine) if index not in found else []
            if made:
                found[index] = made
                break
    return [exercise for made in found.values() for exercise in made]


def _exercises(traces: HeldoutTraces, index: int, machine: Machine) -> list[Exercise]:
    """Those of a trace's first turn."""
    ids, roles = np.asarray(traces.ids(index), np.int32), traces.roles(index)
    is_prompt = roles == Role.PROMPT
    if not is_prompt[0] or is_prompt.all():
        return []
    begin = int(np.argmin(is_prompt))
    later = np.flatnonzero(is_prompt[begin:])
    end = begin + int(later[0]) if len(later) else len(ids)
    prompt, response, roles = ids[:begin], ids[begin:end], roles[begin:end]
    reference = reduce(response, machine)
    nothing = np.empty(0, np.int32)
    made = [
        Exercise(
            prompt_ids=prompt, forced_ids=nothing, draft_ids=reference, reference_ids=reference
        )
    ]
    undos = np.flatnonzero(roles == Role.UNDO)
    if len(undos):
        cut = int(undos[0])
        made.append(
            Exercise(
                prompt_ids=prompt,
                forced_ids=response[:cut],
                draft_ids=response[cut:],
                reference_ids=reference,
            )
        )
    return made


def decode_exercises(
    engine: Any,
    exercises: Sequence[Exercise],
    *,
    machine: Machine,
    eos_id: int,
    num_known: int,
    max_length: int,
    max_forwards: int,
    rank: int,
    world_size: int,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
) -> list[Decoded]:
    """Decode greedily under the present weights. Collective; the same result on every rank.

    Args:
        engine: called as the training step calls it, with mode "greedy".
        exercises: the same on every rank, one at least.
        machine: of the model.
        eos_id: its stop token.
        num_known: ids below it may be written; a model's spare rows may not.
        max_length: of prompt and response; each response has the room that its own context leaves.
        max_forwards: of each rank.
        rank: of this process.
        world_size: how many share the sequences.
        sum_over_ranks: of a tensor, in place or not.
    """
    contexts = [len(each.prompt_ids) + len(each.forced_ids) for each in exercises]
    engine.train(False)
    with torch.no_grad():
        decoded = decode_drafted(
            partial(
                next_ids_of,
                engine,
                num_known=num_known,
                rank=rank,
                world_size=world_size,
                sum_over_ranks=sum_over_ranks,
            ),
            [each.prompt_ids for each in exercises],
            [each.draft_ids for each in exercises],
            machine=machine,
            eos_id=eos_id,
            max_new_tokens=[min(MAX_NEW_TOKENS, max_length - length) for length in contexts],
            max_forwards=max_forwards,
            forced=[each.forced_ids for each in exercises],
        )
    engine.train(True)
    return decoded


def next_ids_of(
    engine: Any,
    asked: Sequence[Asked],
    *,
    num_known: int,
    rank: int,
    world_size: int,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
) -> list[IdArray]:
    """One forward on every rank, each for its share; arguments as for `decode_exercises`."""
    # A rank without a sequence of its own runs one that others run too, and is silent.
    mine = [*range(rank, len(asked), world_size)]
    found_M = engine(
        **_packed([asked[index] for index in mine or [0]], engine.device),
        mode="greedy",
        known_K=torch.ones(num_known, dtype=torch.bool, device=engine.device),
    )
    cuts = np.cumsum([0, *(question.num_wanted for question in asked)]).tolist()
    every = torch.zeros(cuts[-1], dtype=torch.int64, device=engine.device)
    at = 0
    for index in mine:
        num = asked[index].num_wanted
        every[cuts[index] : cuts[index + 1]] = found_M[at : at + num]
        at += num
    shared = sum_over_ranks(every).cpu().numpy().astype(np.int32)
    return [shared[start:end] for start, end in pairwise(cuts)]


def _packed(asked: Sequence[Asked], device: torch.device) -> dict[str, Any]:
    """Sequences in one row, isolated from each other as training isolates traces."""
    lengths = [len(question.ids) for question in asked]
    borders = np.cumsum([0, *lengths])
    wanted = [
        np.arange(start + question.first, start + len(question.ids))
        for start, question in zip(borders, asked, strict=False)
    ]
    ids_N = np.concatenate([question.ids for question in asked]).astype(np.int64)
    places_N = np.concatenate([np.arange(length) for length in lengths])
    return {
        "input_ids_BT": torch.from_numpy(ids_N)[None].to(device),
        "position_ids_BT": torch.from_numpy(places_N)[None].to(device),
        "layout": SegmentLayout.from_cu_seqlens(borders, device),
        "positions_M": torch.from_numpy(np.concatenate(wanted)).to(device),
    }


def table(
    tokenizer: Tokenizer,
    machine: Machine,
    exercises: Sequence[Exercise],
    decoded: Sequence[Decoded],
) -> str:
    """The decodes in Markdown, one a row.

    A response is right when it is the trace's own, to the character; a record may allow others,
    which `launcher/evaluate_undo.py` knows. "Cut off" is what was not done after MAX_NEW_TOKENS
    tokens, at the end of a row's length or in all forwards that there might be.
    """
    lines = [
        "| prompt | error forced on it | raw | reduced | |",
        "|---|---|---|---|---|",
    ]
    for exercise, found in zip(exercises, decoded, strict=True):
        prompt_ids = exercise.prompt_ids
        parts = list(
            runs(tokenizer, prompt_ids, found.raw_ids, machine, num_forced=found.num_forced)
        )
        reduced = response_text(tokenizer, prompt_ids, found.reduced_ids)
        reference = response_text(tokenizer, prompt_ids, exercise.reference_ids)
        stopped = found.stop_reason == "eos"
        right = answered(reduced, stopped=stopped, reference=reference, answer=None)
        verdict = "right" if right else "wrong" if stopped else "cut off"
        if not right:
            verdict += f", expected {_cell(reference)}"
        cells = [
            _cell(tokenizer.decode(prompt_ids), from_end=True),
            _marked([part for part in parts if part.forced], tokenizer.undo_token),
            _marked([part for part in parts if not part.forced], tokenizer.undo_token),
            _cell(reduced),
            verdict,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _marked(parts: list[Run], undo_token: str) -> str:
    """What was undone and the undos, as `generate` prints them."""
    return _cell(as_plain(iter(parts), undo_token))


def _cell(text: str, *, from_end: bool = False) -> str:
    """Text that Markdown leaves as it is, on one line.

    What TensorBoard shows has passed a Markdown reader and a filter of tags; a response is neither.
    """
    if len(text) > SHOWN_CHARACTERS:
        kept = text[-SHOWN_CHARACTERS:] if from_end else text[:SHOWN_CHARACTERS]
        text = f"…{kept}" if from_end else f"{kept}…"
    text = text.strip("\n").replace("\n", " ⏎ ")
    return re.sub(r"[^\w\s⏎…]|_", lambda found: f"&#{ord(found[0])};", text)
