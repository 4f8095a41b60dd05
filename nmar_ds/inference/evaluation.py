"""One model examined on held-out problems and on forced deviations (SPEC 7).

Per family there are three passes, greedy or sampled. *Free*: the prompt alone. *Banned*: the same
with the undo made impossible; under greedy decoding only problems whose free response holds an undo
are decoded again, since it is the same without it up to the first undo. (A draw is not: banning a
token gives its mass to the others.) *Forced*: a clean prefix and a plausible wrong value are given,
and the model goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from nmar_ds.inference.decoding import Decoded, decode, rows_of_no_token
from nmar_ds.inference.exported import ExportSettings
from nmar_ds.inference.fitting import check_positions
from nmar_ds.inference.intervals import Auroc
from nmar_ds.inference.measuring import Measures, Verdicts, measure_forced, measure_free
from nmar_ds.inference.metrics import Rate
from nmar_ds.inference.probes import Probe, Problem, make_probes, select
from nmar_ds.inference.rendering import response_text, without_undos
from nmar_ds.inference.scoring import UndoScores, score_undo
from nmar_ds.traces.answers import answered
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.schema import IdArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A decode worth showing: free if nothing was forced. `right` is the verdict on it."""

    problem: Problem
    decoded: Decoded
    right: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyResult:
    """The measures of one family (see docs/evaluation.md) and its decodes."""

    measures: Measures
    free: list[Sample]
    forced: list[Sample]


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """How to examine; see `evaluate`."""

    num_problems: int = 200
    seed: int = 0
    max_length: int = 6
    batch_size: int = 128
    max_new_tokens: int | None = None
    allow_fewer: bool = False
    temperature: float = 0.0


def evaluate(
    model: Any,
    tokenizer: Tokenizer,
    settings: ExportSettings,
    families: Mapping[str, list[Problem]],
    examination: Examination,
) -> dict[str, FamilyResult]:
    """Examine a model family by family.

    Args:
        model: as loaded by `exported.load_model`.
        tokenizer: of the model.
        settings: ids and semantics of the model.
        families: held-out problems by family, from `probes.load_problems`.
        examination: `num_problems` per family drawn with `seed`; deviations of 1 to `max_length`
            wrong tokens; `max_new_tokens` None allows twice the longest reference (four times under
            `span` and `reset`) and some more; `temperature` 0 is greedy, otherwise responses are
            drawn with `seed`, one per problem and pass.

    Raises:
        ConfigError: fewer held-out problems than asked for, without `allow_fewer`, or one that is
            too long for the model; nothing was decoded then.
    """
    chosen = select(
        families,
        num_problems=examination.num_problems,
        seed=examination.seed,
        allow_fewer=examination.allow_fewer,
    )
    # All of them before the first is decoded: what a later one lacks room for shows at once.
    exams = {
        name: _Family(model, tokenizer, settings, examination, _Given(name, problems, families))
        for name, problems in chosen.items()
    }
    return {name: exam.run() for name, exam in exams.items()}


def allowed_tokens(
    problems: Sequence[Problem], settings: ExportSettings, examination: Examination
) -> int:
    """Tokens a response may have; see `evaluate`."""
    if examination.max_new_tokens is not None:
        return examination.max_new_tokens
    longest = max(len(problem.reference_ids) for problem in problems)
    # A span or a whole response is written again after each undo, not its wrong end only.
    num_times = 2 if settings.semantics == "token" else 4
    return num_times * longest + 4 * examination.max_length


class _Given(NamedTuple):
    """The problems drawn of one family, and all there are."""

    name: str
    problems: list[Problem]
    families: Mapping[str, list[Problem]]


class _Family:
    """The examination of one family."""

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        settings: ExportSettings,
        examination: Examination,
        given: _Given,
    ) -> None:
        problems = given.problems
        self.model = model
        self.tokenizer = tokenizer
        self.problems = problems
        self.examination = examination
        self.machine = settings.machine
        self.probes = make_probes(
            problems,
            given.families[given.name],
            tokenizer,
            machine=self.machine,
            name=given.name,
            seed=examination.seed,
            max_length=examination.max_length,
        )
        num_new = allowed_tokens(problems, settings, examination)
        contexts = [problem.prompt_ids for problem in problems]
        contexts += [np.concatenate([p.problem.prompt_ids, p.forced_ids]) for p in self.probes]
        check_positions("the examined model", model, contexts, num_new)
        self.decode = partial(
            decode,
            model,
            machine=settings.machine,
            eos_id=settings.eos_id,
            pad_id=settings.pad_id,
            max_new_tokens=num_new,
            batch_size=examination.batch_size,
            temperature=examination.temperature,
            seed=examination.seed,
            banned_ids=rows_of_no_token(model, tokenizer),
        )

    def run(self) -> FamilyResult:
        """Decode free, banned and forced, and measure."""
        exam = self.examination
        free = self.decode([problem.prompt_ids for problem in self.problems])
        again = [i for i, decoded in enumerate(free) if decoded.num_undos or exam.temperature]
        banned = list(free)
        redone = self.decode(
            [self.problems[i].prompt_ids for i in again], undo_mode="ban", numbers=again
        )
        for index, decoded in zip(again, redone, strict=True):
            banned[index] = decoded
        probes = self.probes
        forced = self.decode(
            [probe.problem.prompt_ids for probe in probes],
            forced=[probe.forced_ids for probe in probes],
        )
        right = [self._right(p.problem, d) for p, d in zip(probes, forced, strict=True)]
        measures = measure_free(self.problems, free, self._verdicts(free, banned), self.machine)
        measures |= measure_forced(probes, forced, right, self.machine)
        measures |= self._measure_scores(probes)
        return FamilyResult(
            measures=measures,
            free=[self._sample(*pair) for pair in zip(self.problems, free, strict=True)],
            forced=[
                self._sample(probe.problem, d) for probe, d in zip(probes, forced, strict=True)
            ],
        )

    def _sample(self, problem: Problem, decoded: Decoded) -> Sample:
        return Sample(problem=problem, decoded=decoded, right=self._right(problem, decoded))

    def _right(self, problem: Problem, decoded: Decoded, ids: IdArray | None = None) -> bool:
        """Whether a response is right; `ids` stands in for the reduced ones (the raw reading)."""
        text = self._text(problem, decoded.reduced_ids if ids is None else ids)
        return answered(
            text,
            stopped=decoded.stop_reason == "eos",
            reference=problem.reference,
            answer=problem.answer,
        )

    def _text(self, problem: Problem, ids: IdArray) -> str:
        return response_text(self.tokenizer, problem.prompt_ids, ids)

    def _verdicts(self, free: list[Decoded], banned: list[Decoded]) -> Verdicts:
        pairs = list(zip(self.problems, free, strict=True))
        undo_id = self.machine.undo_id
        return Verdicts(
            raw=[self._right(p, d, without_undos(d.raw_ids, undo_id)) for p, d in pairs],
            reduced=[self._right(problem, decoded) for problem, decoded in pairs],
            banned=[self._right(*pair) for pair in zip(self.problems, banned, strict=True)],
            exact=[
                d.stop_reason == "eos" and self._text(p, d.reduced_ids) == p.reference
                for p, d in pairs
            ],
        )

    def _measure_scores(self, probes: list[Probe]) -> Measures:
        """Undo after clean prefixes (every one of each reference), and after each deviation."""
        scores = partial(score_undo, self.model, undo_id=self.machine.undo_id)
        starts = [len(problem.prompt_ids) - 1 for problem in self.problems]
        clean = scores(
            [np.concatenate([p.prompt_ids, p.reference_ids[:-1]]) for p in self.problems]
        )
        wrong = scores([np.concatenate([p.problem.prompt_ids, p.forced_ids]) for p in probes])
        tops = [score.is_top[start:] for score, start in zip(clean, starts, strict=True)]
        return {
            "false_undo_prefix": Rate.spread((int(top.sum()) for top in tops), map(len, tops)),
            "undo_auroc": self._auroc(probes, clean, wrong),
        }

    def _auroc(
        self, probes: list[Probe], clean: list[UndoScores], wrong: list[UndoScores]
    ) -> Auroc:
        """p(UNDO) right after a deviation against p(UNDO) at the place where it went wrong."""
        by_line = {(p.path, p.line): score for p, score in zip(self.problems, clean, strict=True)}
        negatives = [
            float(
                by_line[probe.problem.path, probe.problem.line].probability[
                    len(probe.problem.prompt_ids) - 1 + probe.onset
                ]
            )
            for probe in probes
        ]
        positives = [float(score.probability[-1]) for score in wrong]
        return Auroc(np.asarray(positives, np.float64), np.asarray(negatives, np.float64))
