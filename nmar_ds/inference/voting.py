"""Accuracy at equal compute: the examined model against the majority of a baseline's samples.

A model that undoes writes more than it keeps. What could a model without the undo have done with
as many tokens? It answers each problem k times and the majority counts (maj@k, self-consistency,
Wang et al., arXiv 2203.11171). k is the largest number whose tokens, over all problems of a family,
are no more than those the examined model wrote, undone tokens, undos and stop tokens included.
"""

# P problems, K samples of each

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nmar_ds.inference.decoding import Decoded, decode
from nmar_ds.inference.evaluation import Examination, FamilyResult, Sample, allowed_tokens
from nmar_ds.inference.exported import ExportSettings
from nmar_ds.inference.intervals import Mean
from nmar_ds.inference.metrics import Rate
from nmar_ds.inference.own_samples import ids_of_no_text
from nmar_ds.inference.probes import Problem
from nmar_ds.inference.rendering import response_text
from nmar_ds.traces.answers import answered
from nmar_ds.traces.encoding import Tokenizer

TIES = "the answer that was sampled first"
Draw = Callable[[Sequence[Problem], int | None], list[Decoded]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """How to vote.

    Attributes:
        max_k: samples a problem at most, however many would fit.
        temperature: of the baseline's draws.
    """

    max_k: int
    temperature: float = 1.0


def ballot(text: str, *, stopped: bool, problem: Problem) -> str | None:
    """What a response votes for; None where it was cut off and has no answer.

    Where the record has an answer, all right responses vote for it, and the others for their last
    words, as many as the answer has: fewer ("apples" of "12 apples") would unite what is wrong in
    different ways against the baseline. Where it has none, responses vote for themselves, to the
    character.
    """
    if not stopped:
        return None
    if problem.answer is None:
        return text
    if answered(text, stopped=True, reference=problem.reference, answer=problem.answer):
        return problem.answer
    # With the white space between them, or what is wrong for its white space would become right.
    words = re.findall(r"\S+\s*", text)
    return "".join(words[-len(problem.answer.split()) :]).strip()


def is_right(choice: str | None, problem: Problem) -> bool:
    """Whether a ballot is for the right answer."""
    return choice == (problem.reference if problem.answer is None else problem.answer)


def majority(ballots: Sequence[str | None]) -> str | None:
    """The most frequent ballot; of several, the one that was sampled first. None where none is."""
    counts = Counter(choice for choice in ballots if choice is not None)
    # A Counter keeps the order of first occurrence, and max takes the first of equals.
    return max(counts, key=lambda choice: counts[choice]) if counts else None


def compare(
    model: list[Sample], draw: Draw, text: Callable[[Problem, Decoded], str], vote: Vote
) -> dict[str, Any]:
    """One family: the examined model's free responses against votes of as many tokens.

    Args:
        model: the free decodes of the examined model.
        draw: problems and the number of a sample (None: greedy) -> the baseline's responses.
        text: of a response of the baseline.
        vote: how to.

    Returns:
        k; tokens of both, and what one sample more would have made; accuracies with Wilson
        intervals (None of no sample); their difference, paired by problem, with a bootstrap
        interval (None where it is the same everywhere); the baseline's greedy accuracy; and the
        whole curve up to k.
    """
    problems = [sample.problem for sample in model]
    budget = sum(len(sample.decoded.emitted_ids) for sample in model)
    ballots: list[list[str | None]] = [[] for _ in problems]
    right: list[bool] = []
    curve: list[dict[str, Any]] = []
    spent, one_more = 0, None
    for number in range(vote.max_k):
        drawn = draw(problems, number)
        total = spent + sum(len(decoded.emitted_ids) for decoded in drawn)
        if total > budget:
            one_more = total
            break
        spent = total
        for own, problem, decoded in zip(ballots, problems, drawn, strict=True):
            own.append(_vote_of(problem, decoded, text))
        right = [is_right(majority(own), p) for own, p in zip(ballots, problems, strict=True)]
        curve.append({"k": number + 1, "tokens": spent, "accuracy": Rate.over(right).as_dict()})
    greedy = draw(problems, None)
    greedy_right = [
        is_right(_vote_of(*pair, text), pair[0]) for pair in zip(problems, greedy, strict=True)
    ]
    pairs = zip(model, right, strict=True) if curve else ()
    return {
        "k": len(curve),
        "max_k": vote.max_k,
        "limited_by_max_k": len(curve) == vote.max_k,
        "temperature": vote.temperature,
        "ties": TIES,
        "tokens": {"model": budget, "baseline": spent, "baseline_with_one_more": one_more},
        "accuracy": {
            "model": Rate.over(sample.right for sample in model).as_dict(),
            "baseline": curve[-1]["accuracy"] if curve else None,
        },
        "difference": Mean.of(float(ours.right) - float(its) for ours, its in pairs).as_dict(),
        "greedy": {
            "tokens": sum(len(decoded.emitted_ids) for decoded in greedy),
            "accuracy": Rate.over(greedy_right).as_dict(),
        },
        "curve": curve,
    }


def _vote_of(
    problem: Problem, decoded: Decoded, text: Callable[[Problem, Decoded], str]
) -> str | None:
    return ballot(text(problem, decoded), stopped=decoded.stop_reason == "eos", problem=problem)


def equal_compute(
    results: Mapping[str, FamilyResult],
    baseline: Any,
    *,
    tokenizer: Tokenizer,
    settings: ExportSettings,
    examination: Examination,
    vote: Vote,
) -> dict[str, dict[str, Any]]:
    """Compare family by family; see `compare`.

    The baseline writes text only: `<UNDO>`, whether it has a row for it or not, and all other
    special tokens but the stop token are banned. It may write as many tokens a response.

    Args:
        results: of `evaluation.evaluate`.
        baseline: a causal language model of transformers, in evaluation mode, with the same ids.
        tokenizer: of both.
        settings: of the examined model.
        examination: that gave the results.
        vote: how to.
    """
    banned = ids_of_no_text(baseline, tokenizer)

    def text(problem: Problem, decoded: Decoded) -> str:
        return response_text(tokenizer, problem.prompt_ids, decoded.reduced_ids)

    def draw(settled: Any, problems: Sequence[Problem], number: int | None) -> list[Decoded]:
        first = (number or 0) * len(problems)
        found: list[Decoded] = settled(
            [problem.prompt_ids for problem in problems],
            temperature=0.0 if number is None else vote.temperature,
            numbers=range(first, first + len(problems)),
        )
        return found

    found = {}
    for name, result in results.items():
        problems = [sample.problem for sample in result.free]
        settled = partial(
            decode, baseline, machine=settings.machine, eos_id=settings.eos_id,
            pad_id=settings.pad_id, undo_mode="ban", banned_ids=banned, seed=examination.seed,
            batch_size=examination.batch_size,
            max_new_tokens=allowed_tokens(problems, settings, examination),
        )  # fmt: skip
        found[name] = compare(result.free, partial(draw, settled), text, vote)
    return found


def lines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line or two per family, for people."""
    shown = []
    for name, family in found.items():
        tokens, k = family["tokens"], family["k"]
        ours = f"{name}: {_share(family['accuracy']['model'])} with {tokens['model']:,} tokens"
        if k == 0:
            shown.append(
                f"{ours}; one sample of the baseline already takes "
                f"{tokens['baseline_with_one_more']:,}: nothing to compare"
            )
            continue
        shown.append(
            f"{ours}; baseline maj@{k} {_share(family['accuracy']['baseline'])} with "
            f"{tokens['baseline']:,}; difference {_share(family['difference'])}"
        )
        if family["limited_by_max_k"]:
            shown.append(f"{name}: k is the limit of --vote; more samples might have fitted")
    return shown


def _share(measure: Mapping[str, float | None]) -> str:
    if measure["low"] is None:
        return f"{measure['value']:.3f}"
    return f"{measure['value']:.3f} [{measure['low']:.3f}, {measure['high']:.3f}]"
