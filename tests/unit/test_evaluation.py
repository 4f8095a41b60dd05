"""The whole examination, on models whose every measure can be worked out by hand."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import examined
import numpy as np
import pytest
import torch
from oracles import blind, careful, examine, settings_of, values
from rich.console import Console
from tiny_stores import prepare_store

from nmar_ds.errors import ConfigError, TraceError
from nmar_ds.inference import evaluation, report
from nmar_ds.inference.bars import MEASURES, missed, parse_bar
from nmar_ds.inference.decoding import decode
from nmar_ds.inference.exported import ExportSettings
from nmar_ds.inference.metrics import Rate
from nmar_ds.inference.picture import NATS, PROBABILITIES
from nmar_ds.inference.probes import (
    Probe,
    Problem,
    count_overlap,
    load_problems,
    make_probes,
    select,
)
from nmar_ds.inference.scoring import score_undo
from nmar_ds.traces.boundaries import machine_of
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.reduction import Machine, num_undos, reduce, start_of

LAUNCHER = Path(__file__).parents[2] / "launcher" / "evaluate_undo.py"
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return examined.write(tmp_path_factory.mktemp("data") / "h.jsonl", examined.records(40, seed=9))


@pytest.fixture(scope="module")
def families(heldout: Path, tokenizer: Tokenizer) -> dict[str, list[Problem]]:
    return load_problems([heldout], tokenizer)


def test_evaluate_a_model_that_is_always_right(
    tokenizer: Tokenizer, families: dict[str, list[Problem]]
) -> None:
    found = values(examine(tokenizer, families, careful(tokenizer.undo_id)))
    assert tuple(found) == MEASURES
    ones = ("raw", "reduced", "banned", "exact", "undone", "exact_k", "corrected", "noticed",
            "forced_undo_precision", "forced_undo_recall", "overhead", "undo_auroc")  # fmt: skip
    zeros = ("false_undo", "false_undo_prefix", "over_undo", "parrot", "stray_undo", "loop",
             "undo_limited", "unfinished", "with_undo", "mean_delay", "right_to_wrong")  # fmt: skip
    assert {name: found[name] for name in ones} == dict.fromkeys(ones, 1.0)
    assert {name: found[name] for name in zeros} == dict.fromkeys(zeros, 0.0)
    assert found["n"] == found["num_probes"] == 30
    assert found["wrong_to_right"] is None and found["undo_precision"] is None
    assert 1 <= found["mean_latency"] <= 6


def test_evaluate_a_model_that_never_undoes(
    tokenizer: Tokenizer, families: dict[str, list[Problem]]
) -> None:
    found = values(examine(tokenizer, families, blind))
    zeros = ("undone", "exact_k", "over_undo", "corrected", "noticed", "forced_undo_recall")
    assert {name: found[name] for name in zeros} == dict.fromkeys(zeros, 0.0)
    assert found["reduced"] == 1.0 and found["undo_auroc"] == 0.5
    assert found["parrot"] is None and found["mean_latency"] is None
    assert found["correction_success"] is None and found["free_latency"] is None
    assert (found["erred"], found["mean_undos"], found["repaired"]) == (0.0, 0.0, None)


def test_evaluate_a_model_that_errs_once_and_repairs(
    tokenizer: Tokenizer, families: dict[str, list[Problem]]
) -> None:
    undo_id = tokenizer.undo_id

    def policy(response: list[int], stack: list[int], reference: list[int]) -> int:
        if len(response) == 1:  # the second token is wrong, whatever the first was
            return reference[0] if reference[1] != reference[0] else reference[-2]
        return careful(undo_id)(response, stack, reference)

    result = examine(tokenizer, families, policy)
    found = values(result)
    assert (found["raw"], found["reduced"], found["banned"]) == (0.0, 1.0, 0.0)
    assert (found["wrong_to_right"], found["right_to_wrong"]) == (1.0, None)
    assert (found["with_undo"], found["undo_precision"], found["undo_recall"]) == (1.0, 1.0, 1.0)
    assert found["false_undo"] == 0.0
    assert (found["erred"], found["free_noticed"], found["repaired"]) == (1.0, 1.0, 1.0)
    assert (found["free_latency"], found["mean_undos"]) == (1.0, 1.0)
    num_kept = sum(len(sample.problem.reference_ids) for sample in result.free)
    assert found["overhead"] == pytest.approx((num_kept + 2 * 30) / num_kept)


def test_evaluate_by_sampling(tokenizer: Tokenizer, families: dict[str, list[Problem]]) -> None:
    """Now and then a token is drawn amiss, and the careful model takes it back."""
    policy = careful(tokenizer.undo_id)
    settings: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 400}
    result = examine(tokenizer, families, policy, **settings)
    found = values(result)
    assert found["raw"] < found["reduced"] and 0 < found["with_undo"] < 1
    emitted = [sample.decoded.emitted_ids.tolist() for sample in result.free]

    def again(**changes: Any) -> list[list[int]]:
        free = examine(tokenizer, families, policy, **(settings | changes)).free
        return [sample.decoded.emitted_ids.tolist() for sample in free]

    assert again() == emitted and again(batch_size=7) == emitted
    assert again(seed=1) != emitted and again(temperature=0.0) != emitted


def test_evaluate_never_draws_a_row_that_is_no_token(
    tokenizer: Tokenizer, families: dict[str, list[Problem]]
) -> None:
    """Vocabularies are padded; what such a row would say nobody knows."""
    settings: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 100, "num_problems": 10}
    result = examine(
        tokenizer, families, careful(tokenizer.undo_id), num_spare=2000, **settings
    )  # fmt: skip
    samples = [*result.free, *result.forced]
    written = np.concatenate([sample.decoded.raw_ids for sample in samples])
    assert written.max() < tokenizer.size
    assert any(sample.decoded.num_undos for sample in result.free), "drawn amiss now and then"


def test_a_draw_without_the_undo_is_another_draw(
    tokenizer: Tokenizer, families: dict[str, list[Problem]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled, all problems are decoded again with the undo banned; greedily, those with an undo."""
    num_banned: list[int] = []

    def counting(model: Any, prompts: list[Any], **settings: Any) -> Any:
        if settings.get("undo_mode") == "ban":
            num_banned.append(len(prompts))
        return decode(model, prompts, **settings)

    monkeypatch.setattr(evaluation, "decode", counting)
    examine(tokenizer, families, careful(tokenizer.undo_id), temperature=1.0, max_new_tokens=400)
    examine(tokenizer, families, careful(tokenizer.undo_id))
    assert num_banned == [30, 0]


def test_evaluate_a_model_that_takes_back_one_token_too_many(
    tokenizer: Tokenizer, families: dict[str, list[Problem]]
) -> None:
    undo_id = tokenizer.undo_id

    def policy(response: list[int], stack: list[int], reference: list[int]) -> int:
        right = stack == reference[: len(stack)]
        num_undos = response.count(undo_id)
        if right and 0 < num_undos == len(response) - next_plain(response):
            wrong = first_wrong_run(response, reference)
            if num_undos == wrong:  # exactly enough so far
                return undo_id
        return careful(undo_id)(response, stack, reference)

    def next_plain(response: list[int]) -> int:
        return response.index(undo_id) if undo_id in response else len(response)

    def first_wrong_run(response: list[int], reference: list[int]) -> int:
        written = response[: next_plain(response)]
        shared = 0
        while shared < len(written) and written[shared] == reference[shared]:
            shared += 1
        return len(written) - shared

    found = values(examine(tokenizer, families, policy))
    assert (found["undone"], found["exact_k"], found["over_undo"]) == (1.0, 0.0, 1.0)
    assert found["corrected"] == 1.0 and found["forced_undo_recall"] == 1.0
    assert 0 < found["forced_undo_precision"] < 1
    assert found["false_undo"] == 0.0  # nothing to take back in free decoding


def test_evaluate_a_model_that_notices_late_or_never(
    tokenizer: Tokenizer, families: dict[str, list[Problem]]
) -> None:
    """The second token is wrong, and two more; then those with an odd first token undo."""
    undo_id = tokenizer.undo_id

    def policy(response: list[int], stack: list[int], reference: list[int]) -> int:
        if len(response) == 1:
            return reference[0] if reference[1] != reference[0] else reference[-2]
        if len(response) < 4 or reference[0] % 2 == 0:
            return blind(response, stack, reference)
        return careful(undo_id)(response, stack, reference)

    result = examine(tokenizer, families, policy)
    found = values(result)
    num_odd = sum(sample.problem.reference_ids[0] % 2 == 1 for sample in result.free)
    assert 0 < num_odd < 30
    assert (found["erred"], found["free_noticed"]) == (1.0, num_odd / 30)
    assert (found["free_latency"], found["mean_undos"]) == (3.0, 3 * num_odd / 30)
    assert result.measures["repaired"] == Rate(num_odd, num_odd)
    # Of 3 wrong tokens those who notice take back 3; the others' whole rest is wrong.
    references = [sample.problem.reference_ids for sample in result.free]
    wrong = [3 if ids[0] % 2 else len(ids) - 1 for ids in references]
    units = sum(wrong) ** 2 / sum(num * num for num in wrong)
    assert result.measures["undo_recall"] == Rate(3 * num_odd, sum(wrong), units) and units < 30
    assert result.measures["undo_precision"] == Rate(3 * num_odd, 3 * num_odd, num_odd)


def test_evaluate_correction_success_is_of_what_was_taken_back(
    tokenizer: Tokenizer, families: dict[str, list[Problem]]
) -> None:
    """A third undoes and goes on rightly, a third undoes and errs again, a third does not undo."""
    undo_id = tokenizer.undo_id

    def policy(response: list[int], stack: list[int], reference: list[int]) -> int:
        kind = reference[0] % 3
        right = stack == reference[: len(stack)]
        erred_again = undo_id in response and response[-1] != undo_id and not right
        if kind == 0 or (kind == 1 and erred_again):
            return blind(response, stack, reference)
        if kind == 1 and right and undo_id in response:
            at = len(stack)
            return reference[0] if reference[at] != reference[0] else reference[-2]
        return careful(undo_id)(response, stack, reference)

    result = examine(tokenizer, families, policy)
    kinds = [int(sample.problem.reference_ids[0]) % 3 for sample in result.forced]
    num = [kinds.count(kind) for kind in range(3)]
    assert min(num) > 0
    assert result.measures["correction_success"] == Rate(num[2], num[1] + num[2])
    assert result.measures["corrected"] == Rate(num[2], 30)
    assert values(result)["exact_k"] == pytest.approx((num[1] + num[2]) / 30)


def test_evaluate_a_nervous_model_undoes_right_tokens(
    tokenizer: Tokenizer, families: dict[str, list[Problem]]
) -> None:
    undo_id = tokenizer.undo_id

    def policy(response: list[int], stack: list[int], reference: list[int]) -> int:
        if len(response) == 2:
            return undo_id
        return careful(undo_id)(response, stack, reference)

    result = examine(tokenizer, families, policy)
    found = values(result)
    assert (found["false_undo"], found["undo_precision"]) == (1.0, 0.0)
    assert (found["raw"], found["reduced"], found["banned"], found["loop"]) == (0.0, 1.0, 1.0, 1.0)
    # p(UNDO) is as high at clean places after two tokens as after a deviation: ties, so half.
    problems = [sample.problem for sample in result.free]
    family = families["words"]
    probes = make_probes(
        problems,
        family,
        tokenizer,
        machine=Machine(tokenizer.undo_id),
        name="words",
        seed=0,
        max_length=6,
    )
    share = sum(probe.start == 2 for probe in probes) / len(probes)
    assert share > 0 and found["undo_auroc"] == pytest.approx(1 - share / 2)
    # One clean prefix of each reference, that of two tokens, is answered with an undo.
    rate = result.measures["false_undo_prefix"]
    assert isinstance(rate, Rate)
    num_prefixes = sum(len(sample.problem.reference_ids) for sample in result.free)
    assert (rate.num, rate.of) == (30, num_prefixes)


def test_evaluate_weighs_clean_references_by_their_length(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = examined.records(40, seed=9)
    for number, row in enumerate(rows):
        row["reference"] = " ".join(row["reference"].split()[: 1 + number % 4])
    families = load_problems([examined.write(tmp_path / "h.jsonl", rows)], tokenizer)
    result = examine(tokenizer, families, careful(tokenizer.undo_id))
    rate = result.measures["false_undo_prefix"]
    sizes = [len(sample.problem.reference_ids) for sample in result.free]
    units = sum(sizes) ** 2 / sum(size * size for size in sizes)
    assert rate == Rate(0, sum(sizes), units) and units < 29


def test_evaluate_corrected_needs_the_deviation_gone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    # With an answer, a right ending would do; but the forced wrong step still stands there.
    rows = [row | {"answer": row["reference"].split()[-1]} for row in examined.records(40, seed=9)]
    families = load_problems([examined.write(tmp_path / "a.jsonl", rows)], tokenizer)
    result = examine(tokenizer, families, blind)
    assert values(result)["corrected"] == 0.0
    assert any(sample.right for sample in result.forced)


# -- span and reset ------------------------------------------------------------------------------


def facts_of(tokenizer: Tokenizer, semantics: str) -> ExportSettings:
    texts = [" ", "e"] if semantics == "span" else []
    ids = machine_of(tokenizer, semantics, texts).boundary_ids
    return replace(settings_of(tokenizer), semantics=semantics, boundary_ids=tuple(sorted(ids)))


def probes_of(
    tokenizer: Tokenizer, families: dict[str, list[Problem]], machine: Machine
) -> list[Probe]:
    """Those of `examine`: of the 30 problems it draws."""
    chosen = select(families, num_problems=30, seed=0, allow_fewer=False)["words"]
    return make_probes(
        chosen, families["words"], tokenizer, machine=machine, name="words", seed=0, max_length=6
    )


@pytest.mark.parametrize("semantics", ["span", "reset"])
def test_evaluate_a_careful_model_under_other_semantics(
    semantics: str, tokenizer: Tokenizer, families: dict[str, list[Problem]]
) -> None:
    facts = facts_of(tokenizer, semantics)
    found = values(examine(tokenizer, families, careful(tokenizer.undo_id), facts))
    ones = ("reduced", "undone", "exact_k", "corrected", "noticed", "forced_undo_precision",
            "forced_undo_recall", "undo_auroc")  # fmt: skip
    zeros = ("false_undo", "over_undo", "parrot", "loop", "stray_undo", "unfinished", "mean_delay")
    assert {name: found[name] for name in ones} == dict.fromkeys(ones, 1.0)
    assert {name: found[name] for name in zeros} == dict.fromkeys(zeros, 0.0)
    # Tokens from the first wrong one on: what was moved is none of them.
    probes = probes_of(tokenizer, families, facts.machine)
    lengths = [len(probe.forced_ids) - probe.onset for probe in probes]
    assert found["mean_latency"] == np.mean(lengths) and max(lengths) <= 6


@pytest.mark.parametrize("semantics", ["span", "reset"])
def test_evaluate_free_errors_that_are_repaired(
    semantics: str, tokenizer: Tokenizer, families: dict[str, list[Problem]]
) -> None:
    undo_id, facts = tokenizer.undo_id, facts_of(tokenizer, semantics)

    def policy(response: list[int], stack: list[int], reference: list[int]) -> int:
        if len(response) == 2:
            return reference[0] if reference[2] != reference[0] else reference[-2]
        return careful(undo_id)(response, stack, reference)

    result = examine(tokenizer, families, policy, facts)
    found = values(result)
    assert (found["raw"], found["reduced"], found["with_undo"]) == (0.0, 1.0, 1.0)
    assert (found["undo_precision"], found["undo_recall"]) == (1.0, 1.0)
    assert (found["false_undo"], found["loop"]) == (0.0, 0.0)
    kept = [sample.problem.reference_ids for sample in result.free]
    starts = [start_of(ids, 2, facts.machine) for ids in kept]
    assert max(starts) == (2 if semantics == "span" else 0) and min(starts) == 0
    num_kept = sum(map(len, kept))
    again = sum(2 + 2 - start for start in starts)  # the wrong token, its undo, what went along
    assert found["overhead"] == pytest.approx((num_kept + again) / num_kept)


@pytest.mark.parametrize("semantics", ["span", "reset"])
def test_evaluate_one_undo_too_many_under_other_semantics(
    semantics: str, tokenizer: Tokenizer, families: dict[str, list[Problem]]
) -> None:
    undo_id, facts = tokenizer.undo_id, facts_of(tokenizer, semantics)

    def policy(response: list[int], stack: list[int], reference: list[int]) -> int:
        last = [place for place, token in enumerate(response) if token != undo_id][-1:]
        run = len(response) - sum(last) - len(last)
        written = response[: len(response) - run]
        before = reduce(response[:-1], facts.machine).tolist()
        just_done = run > 0 and before != reference[: len(before)]
        right = stack == reference[: len(stack)]
        if undo_id not in written and right and just_done:
            return undo_id
        return careful(undo_id)(response, stack, reference)

    found = values(examine(tokenizer, families, policy, facts))
    assert (found["undone"], found["exact_k"], found["over_undo"]) == (1.0, 0.0, 1.0)
    assert (found["corrected"], found["forced_undo_recall"]) == (1.0, 1.0)
    starts = [probe.start for probe in probes_of(tokenizer, families, facts.machine)]
    if semantics == "span":  # the span before went needlessly
        assert any(starts) and 0 < found["forced_undo_precision"] < 1
    else:  # there was nothing left to take
        assert not any(starts) and found["forced_undo_precision"] == 1.0


def test_evaluate_one_undo_leaves_what_stands_before_a_boundary(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [row | {"answer": row["reference"].split()[-1]} for row in examined.records(40, seed=9)]
    families = load_problems([examined.write(tmp_path / "a.jsonl", rows)], tokenizer)
    undo_id, facts = tokenizer.undo_id, facts_of(tokenizer, "span")

    def lazy(response: list[int], stack: list[int], reference: list[int]) -> int:
        if undo_id in response:
            return blind(response, stack, reference)
        return careful(undo_id)(response, stack, reference)

    found = values(examine(tokenizer, families, lazy, facts))
    probes = probes_of(tokenizer, families, facts.machine)
    share = np.mean([num_undos(probe.deviation_ids, facts.machine) == 1 for probe in probes])
    assert 0 < share < 1
    assert found["exact_k"] == found["corrected"] == pytest.approx(share)


def test_evaluate_compares_p_undo_at_the_place_that_went_wrong(
    tokenizer: Tokenizer, families: dict[str, list[Problem]]
) -> None:
    """Under `reset` a deviation starts at base; where it goes wrong is another place."""
    undo_id, facts = tokenizer.undo_id, facts_of(tokenizer, "reset")

    def policy(response: list[int], stack: list[int], reference: list[int]) -> int:
        return undo_id if not response else careful(undo_id)(response, stack, reference)

    found = values(examine(tokenizer, families, policy, facts))
    onsets = [probe.onset for probe in probes_of(tokenizer, families, facts.machine)]
    share = np.mean([onset == 0 for onset in onsets])
    assert found["undo_auroc"] == pytest.approx(1 - share / 2) and share < 0.5
    assert (found["stray_undo"], found["exact_k"]) == (1.0, 1.0)


@pytest.mark.parametrize("semantics", ["span", "reset"])
def test_probes_start_where_undos_come_back_to(
    semantics: str, tokenizer: Tokenizer, families: dict[str, list[Problem]]
) -> None:
    machine = facts_of(tokenizer, semantics).machine
    plain = probes_of(tokenizer, families, Machine(tokenizer.undo_id))
    moved = probes_of(tokenizer, families, machine)
    assert len(plain) == len(moved) == 30
    for probe, other in zip(plain, moved, strict=True):
        # The same text is forced; only what is called the deviation is longer.
        assert probe.forced_ids.tolist() == other.forced_ids.tolist()
        assert probe.start == probe.onset == other.onset >= other.start
        below = other.problem.reference_ids[: other.start][-1:].tolist()
        assert not below or (semantics == "span" and below[0] in machine.boundary_ids)
        undos = [machine.undo_id] * num_undos(other.deviation_ids, machine)
        left = reduce([*other.forced_ids.tolist(), *undos], machine)
        assert left.tolist() == other.problem.reference_ids[: other.start].tolist()
    assert any(other.start < other.onset for other in moved)


def test_probes_are_plausible_reproducible_and_uniform(
    tokenizer: Tokenizer, families: dict[str, list[Problem]]
) -> None:
    family = families["words"]
    probes = make_probes(
        family,
        family,
        tokenizer,
        machine=Machine(tokenizer.undo_id),
        name="words",
        seed=1,
        max_length=6,
    )
    again = make_probes(
        family[5:],
        family,
        tokenizer,
        machine=Machine(tokenizer.undo_id),
        name="words",
        seed=1,
        max_length=6,
    )
    assert [p.forced_ids.tolist() for p in probes[5:]] == [p.forced_ids.tolist() for p in again]
    other = make_probes(
        family,
        family,
        tokenizer,
        machine=Machine(tokenizer.undo_id),
        name="words",
        seed=2,
        max_length=6,
    )
    assert [p.forced_ids.tolist() for p in probes] != [p.forced_ids.tolist() for p in other]
    assert len(probes) == len(family)
    everything = " ".join(p.reference for p in family)
    for probe in probes:
        reference = probe.problem.reference_ids
        assert probe.deviation_ids[0] != reference[probe.start]
        assert tokenizer.piece_class(int(probe.deviation_ids[0])) == tokenizer.piece_class(
            int(reference[probe.start])
        )
        assert 1 <= len(probe.deviation_ids) <= 6
        assert tokenizer.decode(probe.deviation_ids, continuation=True).strip() in everything
        assert probe.forced_ids[: probe.start].tolist() == reference[: probe.start].tolist()
    assert len({len(probe.deviation_ids) for probe in probes}) > 2
    assert len({probe.start for probe in probes}) > 2


def test_select_wants_enough_problems_and_draws_without_repeats(
    families: dict[str, list[Problem]],
) -> None:
    with pytest.raises(ConfigError, match=r"'words': 40 held-out problems, expected at least 41"):
        select(families, num_problems=41, seed=0, allow_fewer=False)
    assert len(select(families, num_problems=41, seed=0, allow_fewer=True)["words"]) == 40
    drawn = [problem.line for problem in
             select(families, num_problems=25, seed=0, allow_fewer=False)["words"]]  # fmt: skip
    assert len(set(drawn)) == 25
    other = select(families, num_problems=25, seed=1, allow_fewer=False)["words"]
    assert drawn != [problem.line for problem in other]


def test_count_overlap_is_of_exact_prompts(
    families: dict[str, list[Problem]], tmp_path: Path
) -> None:
    rows = [*examined.records(3, seed=9), *examined.records(50, seed=10, first=100)]
    rows.append({"prompt": rows[0]["prompt"].strip(), "reference": "sun"})
    assert count_overlap(families, [examined.write(tmp_path / "t.jsonl", rows)]) == {"words": 3}


def test_load_problems_groups_by_record_or_file_and_refuses_ids(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [{k: v for k, v in row.items() if k != "group"} for row in examined.records(2)]
    rows[1]["group"] = "other"
    file = examined.write(tmp_path / "mats.heldout.jsonl", rows)
    assert {name: len(items) for name, items in load_problems([file], tokenizer).items()} == {
        "mats": 1, "other": 1,
    }  # fmt: skip
    ids = examined.write(
        tmp_path / "ids.jsonl",
        [{"segments": [{"role": "prompt", "ids": [5]}, {"role": "prefix", "ids": [6]}]}],
    )
    with pytest.raises(TraceError, match="not a single text turn"):
        load_problems([ids], tokenizer)


def test_score_undo_equals_a_forward_of_each_prefix(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from nmar_ds.inference.exported import load_model

    model = load_model(examined.make_export(tmp_path / "export", tokenizer))
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, tokenizer.size, size=n).astype(np.int32) for n in (4, 9, 1)]
    for sequence, score in zip(
        sequences, score_undo(model, sequences, undo_id=tokenizer.undo_id), strict=True
    ):
        assert score.probability.shape == score.is_top.shape == sequence.shape
        for end in range(1, len(sequence) + 1):
            with torch.inference_mode():
                logits = model(torch.tensor([sequence[:end].tolist()])).logits[0, -1]
            wanted = float(logits.softmax(0)[tokenizer.undo_id])
            assert score.probability[end - 1] == pytest.approx(wanted, abs=1e-5)
            assert bool(score.is_top[end - 1]) == (int(logits.argmax()) == tokenizer.undo_id)


def test_bars_are_parsed_and_missed_in_one_line_each() -> None:
    bars = [parse_bar(text) for text in ("reduced>=0.95", "false-undo <= .05", "parrot<=0.1")]
    measures: dict[str, Any] = {
        "reduced": Rate(19, 20), "false_undo": Rate(1, 10), "parrot": Rate(0, 0),
    }  # fmt: skip
    assert missed({"a": measures}, bars) == [
        "a: false_undo 0.100 (1 of 10), required false_undo<=0.05",
        "a: parrot nothing counted, required parrot<=0.1",
    ]
    assert parse_bar("raw<=0.5").cleared(0.5) and parse_bar("raw>=0.5").cleared(0.5)
    for text, words in [
        ("reduced>0.9", "expected MEASURE>=NUMBER"),
        ("redused>=0.9", "did you mean 'reduced'"),
        ("reduced>=high", "not a number"),
        ("reduced>=nan", "not a number"),
    ]:
        with pytest.raises(ConfigError, match=words):
            parse_bar(text)


def test_report_has_counts_intervals_and_samples(
    tokenizer: Tokenizer, families: dict[str, list[Problem]], capsys: pytest.CaptureFixture[str]
) -> None:
    results = {"words": examine(tokenizer, families, careful(tokenizer.undo_id))}
    settings = settings_of(tokenizer)
    whole = json.loads(
        json.dumps(
            report.as_json(
                results, about={"seed": 0}, overlap={"words": 2}, missed=[], num_samples=2,
                tokenizer=tokenizer, settings=settings,
            )
        )
    )  # fmt: skip
    family = whole["families"]["words"]
    assert family["measures"]["reduced"] == Rate(30, 30).as_dict()
    assert family["prompts_also_in_training"] == 2
    assert [sample["kind"] for sample in family["samples"]] == ["free"] * 2 + [
        "forced deviation"
    ] * 2
    forced = family["samples"][-1]
    assert "[-" in forced["raw"] and "<UNDO>" in forced["raw"]
    assert forced["reduced"] == forced["reference"] and forced["right"] is True
    console = Console(force_terminal=False)
    report.print_table(results, console)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "family" and "undo-banned" in lines[0]
    assert lines[1].split() == ["words", "1.000", "1.000", "1.000", "0.000", "1.000", "1.000",
                                "1.000", "30"]  # fmt: skip
    report.print_samples(results, num=1, tokenizer=tokenizer, settings=settings, console=console)
    out = capsys.readouterr().out
    assert out.count("raw    : ") == 2 and "[words, forced deviation: right]" in out


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(LAUNCHER), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=90,
    )


def test_launcher_reports_and_fails_on_a_missed_bar(
    tokenizer: Tokenizer, heldout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = examined.make_export(tmp_path / "export", tokenizer)
    prepare_store([heldout], tmp_path / "store", tokenizer, builder="hard", max_length=256)
    arguments = [
        "--model", str(export), "--heldout", str(heldout), "--train", str(heldout),
        "--num-problems", "10", "--max-new-tokens", "8", "--samples", "1",
        "--output", str(tmp_path / "report.json"), "--png", str(tmp_path / "report.png"),
        "--tensorboard", str(tmp_path / "tb"), "--step", "9",
        "--store", str(tmp_path / "store"), "--num-traces", "20",
        "--require", "reduced>=0.95", "raw<=0.5",
    ]  # fmt: skip
    main = runpy.run_path(str(LAUNCHER))["main"]
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert "words: 10 of 10 held-out prompts also stand in training files" in out
    assert "MISSED words: reduced 0.000 (0 of 10), required reduced>=0.95" in out
    assert out.count("MISSED") == 1
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["families"]["words"]["measures"]["n"] == 10
    assert written["max_new_tokens"] == 8
    assert len(written["missed"]) == 1
    traces = written["teacher_forced"]
    assert traces["store"] == str(tmp_path / "store")
    loss = traces["measures"]["heldout/loss_undo"]
    assert loss["of"] == 20 and loss["low"] < loss["value"] < loss["high"]
    line = next(line for line in out.splitlines() if line.startswith("heldout/loss_undo"))
    assert line.split()[1] == f"{loss['value']:.3f}" and line.endswith(f"{loss['high']:.3f}]")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "tb").glob("events.*"))) == 1
    assert main([*arguments[:-2], "raw<=0.5"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--require", "redused>=1"], "did you mean 'reduced'"),
        (["--model", "/nowhere"], "/nowhere: --model: no such folder"),
        (["--num-problems", "41"], "40 held-out problems, expected at least 41"),
        (["--output", "/nowhere/r.json"], "--output: no folder /nowhere"),
        (["--png", "/nowhere/r.png"], "--png: no folder /nowhere"),
        (["--output", "TMP"], " is a folder, expected a file"),
        (["--png", "TMP/export"], "/export is a folder, expected a file"),
        (["--tensorboard", "TMP/empty.jsonl"], "/empty.jsonl is no folder, expected one"),
        (["--tensorboard", "TMP/empty.jsonl/tb"], "/empty.jsonl is no folder, expected one"),
        (["--baseline", "/nowhere"], "--baseline: /nowhere: no such folder"),
        (["--store", "/nowhere"], "/nowhere/manifest.json: missing, expected a trace store"),
        (["--heldout", "/nowhere/h.jsonl"], "/nowhere/h.jsonl: file: No such file"),
        (["--heldout", "TMP/empty.jsonl"], "empty.jsonl: file: holds no record, expected at least"),
        (["--train", "/nowhere/t.jsonl"], "/nowhere/t.jsonl: file: No such file"),
    ],
)
def test_launcher_refuses_in_one_line_before_torch(
    tokenizer: Tokenizer, heldout: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    # No weights in it: the error must come before anyone looks for them.
    export = tmp_path / "export"
    export.mkdir()
    facts = {name: getattr(settings_of(tokenizer), name) for name in ExportSettings.__slots__}
    (export / "nmar.json").write_text(json.dumps(facts | {"format_version": 1}))
    tokenizer.save(export / "nmar_tokenizer")
    (tmp_path / "empty.jsonl").touch()
    arguments = [argument.replace("TMP", str(tmp_path)) for argument in arguments]
    done = launch("--model", str(export), "--heldout", str(heldout), "--num-problems", "10",
                  *arguments)  # fmt: skip
    assert done.returncode == 2
    assert words in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--temperature", "--vote-temperature"])
@pytest.mark.parametrize("value", ["inf", "nan", "-1", "1e-40", "1e39"])
def test_launcher_refuses_temperatures_that_nothing_can_be_drawn_at(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the examination: its decodes, and the vote after them, would be lost."""
    main = runpy.run_path(str(LAUNCHER))["main"]
    with pytest.raises(SystemExit) as caught:
        main(["--model", "x", "--heldout", "y", "--output", "z", f"{option}={value}"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert f"error: {option} must be " in error and "0.0001 to 10000" in error


def test_the_page_defines_every_measure() -> None:
    page = (LAUNCHER.parents[1] / "docs" / "evaluation.md").read_text("utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    defined = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(defined) == sorted(set(MEASURES) - {"n", "num_probes"})
    tags = [tag for row in rows for tag in re.findall(r"`heldout/(\w+)`", row)]
    (losses,) = re.findall(r"`heldout/loss_ROLE` \| -log p per token of (.*) \|", page)
    tags += [f"loss_{role}" for role in losses.split(", ")]
    assert sorted(tags) == sorted([*PROBABILITIES, *NATS, "loss_ROLE"])
