"""What a model is examined on: held-out problems, and deviations forced upon it.

A probe is a problem whose response was begun rightly and then went wrong: a random clean prefix
of the reference, then a plausible wrong value, built by the same functions as the `hard`
deviations of training (`traces.builders`), so that there is one definition of "plausible", and of
where a deviation starts under the model's semantics.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nmar_ds.errors import ConfigError, TraceError
from nmar_ds.traces.assembly import Turn
from nmar_ds.traces.builders import Pool, encode_record, hard, move_starts
from nmar_ds.traces.chat import ChatTemplate
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.records import Record, read_records
from nmar_ds.traces.reduction import Machine
from nmar_ds.traces.schema import IdArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A held-out problem with its one right response.

    Attributes:
        prompt: text; prompt_ids: int32[P], BOS included where the tokenizer wants one.
        reference: text; reference_ids: int32[R], stop token included.
        answer: the checkable answer, where the record has one.
        path, line: where it stands.
    """

    prompt: str
    prompt_ids: IdArray
    reference: str
    reference_ids: IdArray
    answer: str | None
    path: str
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A problem with a deviation.

    Attributes:
        problem: whose reference it departs from.
        start: number of right tokens before the deviation: where the right undos come back to.
        deviation_ids: int32[k]; under `span` and `reset` it begins with right tokens that have
            to go with the wrong ones.
        onset: index in the response of its first wrong token; `start` or later.
    """

    problem: Problem
    start: int
    deviation_ids: IdArray
    onset: int

    @property
    def forced_ids(self) -> IdArray:
        """int32[start + k]: the response as it is forced on the model."""
        prefix = self.problem.reference_ids[: self.start]
        return np.concatenate([prefix, self.deviation_ids]).astype(np.int32)


def load_problems(
    paths: Sequence[str | Path], tokenizer: Tokenizer, chat: ChatTemplate | None = None
) -> dict[str, list[Problem]]:
    """Read held-out records by family: the record's `group`, or else the file's name.

    Args:
        paths: JSON-lines files.
        tokenizer: of the model.
        chat: the chat template the model was trained with, if any.

    Deviations that a record carries are not used here: probes get their own.

    Raises:
        TraceError: a bad record, one that is not a single prompt and reference in text, one with an
            empty answer, or a file without any: no bar is missed where nothing is examined.
    """
    groups: dict[str, list[Problem]] = {}
    for path in paths:
        record = None
        for record in read_records(path):
            if len(record.turns) != 1:
                raise TraceError(
                    path, record.line, "record", "not a single text turn", "`prompt`, `reference`"
                )
            name = record.group or Path(path).name.split(".")[0]
            groups.setdefault(name, []).append(_problem(record, tokenizer, chat))
        if record is None:
            raise TraceError(path, None, "file", "holds no record", "at least one")
    return groups


def _problem(record: Record, tokenizer: Tokenizer, chat: ChatTemplate | None) -> Problem:
    if record.answer is not None and not record.answer.strip():
        # No response ends with it, so all would be wrong, and the vote for it right.
        raise TraceError(record.path, record.line, "answer", "empty", "a text, or no such field")
    (turn,), (text,) = encode_record(record, tokenizer, chat).turns, record.turns
    return Problem(
        prompt=text.prompt,
        prompt_ids=turn.prompt_ids,
        reference=text.reference,
        reference_ids=turn.reference_ids,
        answer=record.answer,
        path=record.path,
        line=record.line,
    )


def select(
    groups: Mapping[str, list[Problem]], *, num_problems: int, seed: int, allow_fewer: bool
) -> dict[str, list[Problem]]:
    """Draw the problems to evaluate, the same number of every family.

    Raises:
        ConfigError: a family has fewer than asked for, and `allow_fewer` is not set.
    """
    chosen: dict[str, list[Problem]] = {}
    for name, problems in sorted(groups.items()):
        if len(problems) < num_problems and not allow_fewer:
            raise ConfigError(
                f"{problems[0].path}: family {name!r}: {len(problems)} held-out problems, "
                f"expected at least {num_problems} (--num-problems)"
            )
        order = generator(seed, "problems", name).permutation(len(problems))[:num_problems]
        chosen[name] = [problems[index] for index in sorted(order.tolist())]
    return chosen


def count_overlap(
    groups: Mapping[str, list[Problem]], train: Iterable[str | Path]
) -> dict[str, int]:
    """Count, per family, the problems whose exact prompt stands in a training file.

    Training records given as ids hold no prompt text and are compared with nothing.
    """
    seen = {turn.prompt for path in train for rec in read_records(path) for turn in rec.turns}
    return {name: sum(p.prompt in seen for p in items) for name, items in sorted(groups.items())}


def make_probes(
    problems: Sequence[Problem],
    family: Sequence[Problem],
    tokenizer: Tokenizer,
    *,
    machine: Machine,
    name: str,
    seed: int,
    max_length: int,
) -> list[Probe]:
    """Build one forced deviation per problem.

    Args:
        problems: to be probed.
        family: every held-out problem of the family: wrong values are slices of their references.
        tokenizer: for the classes of pieces.
        machine: what one undo of the model pops.
        name: of the family.
        seed: with the family and the record's place it fixes a probe.
        max_length: deviations have 1 to this many wrong tokens, uniformly.

    Returns:
        The probes; fewer than the problems where a family offers no plausible wrong value.
    """
    sources = {path: number for number, path in enumerate(sorted({p.path for p in family}))}
    pool = Pool(tokenizer)
    for problem in family:
        pool.add(name, problem.reference_ids, (sources[problem.path], problem.line))
    pool.finish()
    probes = []
    for problem in problems:
        turn = Turn(prompt_ids=problem.prompt_ids, reference_ids=problem.reference_ids)
        built = hard(
            (turn,),
            generator(seed, "probe", name, sources[problem.path], problem.line),
            pool=pool,
            group=name,
            record=(sources[problem.path], problem.line),
            tokenizer=tokenizer,
            max_deviations=1,
            max_deviation_length=max_length,
        )
        probes += [
            Probe(
                problem=problem,
                start=found.cut,
                deviation_ids=found.ids,
                onset=found.cut + found.onset,
            )
            for found in move_starts(built.turns[0], machine).deviations
        ]
    return probes


def generator(seed: int, *place: object) -> np.random.Generator:
    """A stream of its own for every place, whatever was drawn elsewhere."""
    digest = hashlib.sha256("\x1f".join(map(str, (seed, *place))).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
