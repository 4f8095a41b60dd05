"""Votes of as many tokens, on responses that are written down."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import examined as examples
import numpy as np
import pytest
import torch
from tiny_tokenizers import sums, write_bpe
from transformers import LlamaConfig, LlamaForCausalLM

from nmar_ds.inference import voting
from nmar_ds.inference.bars import number
from nmar_ds.inference.decoding import Decoded, decode
from nmar_ds.inference.evaluation import Examination, Sample, evaluate
from nmar_ds.inference.exported import load_model, read_settings
from nmar_ds.inference.intervals import Mean
from nmar_ds.inference.metrics import Rate
from nmar_ds.inference.probes import Problem, load_problems, select
from nmar_ds.inference.voting import Vote, ballot, compare, is_right, lines, majority
from nmar_ds.traces.encoding import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
torch.set_num_threads(1)
NO_IDS = np.empty(0, np.int32)


def problem(reference: str, answer: str | None = None) -> Problem:
    return Problem(prompt="?", prompt_ids=NO_IDS, reference=reference, reference_ids=NO_IDS,
                   answer=answer, path="p", line=1)  # fmt: skip


def written(num_tokens: int, *, stopped: bool = True, kept: int | None = None) -> Decoded:
    """A response of so many tokens."""
    ids = np.arange(num_tokens, dtype=np.int32)
    return Decoded(raw_ids=ids, num_forced=0, reduced_ids=ids[:kept], num_undos=0, num_strays=0,
                   undo_limited=False, loop_limited=False,
                   stop_reason="eos" if stopped else "length")  # fmt: skip


def test_ballots() -> None:
    plain, answer = problem("1+1=2"), problem("1+1=2", "2")
    assert ballot("1+1=2", stopped=True, problem=plain) == "1+1=2"
    assert ballot("1+1=2 ", stopped=True, problem=plain) == "1+1=2 "
    assert ballot("1+1=2", stopped=False, problem=plain) is None
    # All ways to the right answer are one; wrong ones vote for their last word.
    assert ballot("1+1=2", stopped=True, problem=answer) == "2"
    assert ballot("so it is 2\n", stopped=True, problem=answer) == "2"
    assert ballot("so it is 12", stopped=True, problem=answer) == "12"
    assert ballot("", stopped=True, problem=answer) == ""


def test_what_is_wrong_in_different_ways_is_not_united() -> None:
    asked = problem("so 16 apples", "16 apples")
    texts = ["16 apples", "in all 16 apples", "12 apples", "so 13 apples.", "14 apples\n"]
    ballots = [ballot(text, stopped=True, problem=asked) for text in texts]
    assert ballots == ["16 apples", "16 apples", "12 apples", "13 apples.", "14 apples"]
    assert is_right(majority(ballots), asked)  # their last word alone would have three votes
    assert ballot("apples", stopped=True, problem=asked) == "apples"
    assert ballot(" ", stopped=True, problem=asked) == ""
    # Wrong to `answered`, so no vote for the answer.
    assert not is_right(ballot("16  apples", stopped=True, problem=asked), asked)


def test_majority_breaks_ties_by_the_order_of_sampling() -> None:
    assert majority(["a", "b", "b"]) == "b"
    assert majority(["b", "a", "a", "b"]) == "b"
    assert majority(["a", "b", "b", "a", None, None, None]) == "a"
    assert majority([None, None]) is None and majority([]) is None


PROBLEMS = [problem("yes", "yes"), problem("no", "no"), problem("so", "so")]
# Answers and numbers of tokens, sample by sample; one cut off.
SAMPLES = [
    [("yes", 4), ("hm", 4), ("hm", 4)],
    [("hm", 3), ("no", 3), ("so", 3)],
    [("yes", 2), ("no", 2), ("so", 2)],
    [("hm", 1), ("hm", 1), ("hm", 1)],
]
GREEDY = [("yes", 5), ("no", 5), ("so", 5)]
LATE = [("hm", 9), ("hm", 9), ("hm", 9)]


def examined(*responses: tuple[int, bool]) -> list[Sample]:
    return [
        # The examined model keeps one token of each response: all that it wrote counts.
        Sample(problem=one, decoded=written(num, kept=1), right=right)
        for one, (num, right) in zip(PROBLEMS, responses, strict=True)
    ]


def versus(
    model: list[Sample], max_k: int, samples: Sequence[Any] = SAMPLES
) -> tuple[dict[str, Any], list[int | None]]:
    asked: list[int | None] = []
    texts: dict[int, str] = {}

    def draw(problems: Sequence[Problem], number: int | None) -> list[Decoded]:
        assert list(problems) == PROBLEMS
        asked.append(number)
        found = [written(num) for _, num in (GREEDY if number is None else samples[number])]
        answers = [word for word, _ in (GREEDY if number is None else samples[number])]
        texts.update({id(one): word for one, word in zip(found, answers, strict=True)})
        kept.extend(found)
        return found

    kept: list[Decoded] = []  # alive, so that no id is given twice
    return compare(model, draw, lambda _, one: texts[id(one)], Vote(max_k=max_k)), asked


def test_k_is_the_largest_that_costs_no_more() -> None:
    # Totals of the baseline: 12, 21, 27, 30.
    for budget, k in ((12, 1), (20, 1), (21, 2), (26, 2), (27, 3), (29, 3), (30, 4), (99, 4)):
        found, asked = versus(examined((budget - 2, True), (1, True), (1, True)), 4)
        assert found["k"] == k, budget
        assert found["tokens"]["model"] == budget
        assert found["tokens"]["baseline"] == (12, 21, 27, 30)[k - 1]
        assert found["tokens"]["baseline_with_one_more"] == (21, 27, 30, None)[k - 1]
        assert found["limited_by_max_k"] is (k == 4)
        assert asked == [*range(min(k + 1, 4)), None]  # no sample that is not needed


def test_accuracies_and_their_difference_by_hand() -> None:
    model = examined((25, True), (1, False), (1, True))
    found, _ = versus(model, 4)
    assert found["k"] == 3
    # maj@1: yes hm hm; maj@2: ties go to the first: yes hm hm; maj@3: yes no so.
    shares = [entry["accuracy"] for entry in found["curve"]]
    assert shares == [Rate(1, 3).as_dict(), Rate(1, 3).as_dict(), Rate(3, 3).as_dict()]
    assert [entry["tokens"] for entry in found["curve"]] == [12, 21, 27]
    assert found["accuracy"] == {"model": Rate(2, 3).as_dict(), "baseline": Rate(3, 3).as_dict()}
    assert found["difference"] == Mean.of([0, -1, 0]).as_dict()
    assert found["greedy"] == {"tokens": 15, "accuracy": Rate(3, 3).as_dict()}
    assert found["ties"] == "the answer that was sampled first"
    (line,) = lines({"f": found})
    assert line.startswith("f: 0.667 [0.208, 0.939] with 27 tokens; baseline maj@3 1.000")
    limited, _ = versus(model, 2)
    assert limited["difference"] == Mean.of([0, 0, 1]).as_dict()
    assert lines({"f": limited})[1].startswith("f: k is the limit of --vote")


def test_nothing_is_compared_where_one_sample_costs_more() -> None:
    found, asked = versus(examined((9, True), (1, True), (1, True)), 4)
    assert (found["k"], found["accuracy"]["baseline"], asked) == (0, None, [0, None])
    assert found["difference"]["value"] is None and found["curve"] == []
    assert found["tokens"] == {"model": 11, "baseline": 0, "baseline_with_one_more": 12}
    assert lines({"f": found}) == [
        "f: 1.000 [0.439, 1.000] with 11 tokens; one sample of the baseline already takes 12: "
        "nothing to compare"
    ]


def test_a_response_that_was_cut_off_has_no_vote() -> None:
    cut = written(3, stopped=False)
    found = compare(
        examined((9, True), (9, True), (9, True)),
        lambda problems, number: [cut] * 3,
        lambda one, _: one.reference,  # its text would be right
        Vote(max_k=2),
    )
    assert found["k"] == 2 and found["accuracy"]["baseline"] == Rate(0, 3).as_dict()
    assert found["difference"]["value"] == 1.0
    assert (found["difference"]["low"], found["difference"]["high"]) == (None, None)


# -- with models -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, bpe_tokenizer: Tokenizer) -> Path:
    """An exported model, and one of the kind that never heard of `<UNDO>`."""
    place = tmp_path_factory.mktemp("vote")
    examples.make_export(place / "model", bpe_tokenizer)
    examples.write(place / "h.jsonl", sums(60, seed=3))
    assert bpe_tokenizer.undo_id == bpe_tokenizer.size - 1
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=bpe_tokenizer.size - 1, hidden_size=32, intermediate_size=48,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=128,
        initializer_range=0.3, eos_token_id=bpe_tokenizer.eos_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place / "plain")
    write_bpe(place / "plain", add_prefix_space=False)
    return place


def examine(place: Path, baseline: Path, *more: str) -> int:
    main = runpy.run_path(str(ROOT / "launcher" / "evaluate_undo.py"))["main"]
    found: int = main([
        "--model", str(place / "model"), "--heldout", str(place / "h.jsonl"), "--num-problems",
        "5", "--samples", "0", "--max-new-tokens", "9", "--baseline", str(baseline), *more,
    ])  # fmt: skip
    return found


def test_a_baseline_without_the_undo(
    place: Path, tmp_path: Path, bpe_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ("--output", str(tmp_path / "r.json"), "--tensorboard", str(tmp_path / "tb"))
    assert examine(place, place / "plain", "--vote", "3", "--seed", "2", *output) == 0
    written = json.loads((tmp_path / "r.json").read_text())["equal_compute"]
    model, plain = load_model(place / "model"), load_model(place / "plain")
    assert written["num_weights"] == {
        "model": model.num_parameters(), "baseline": plain.num_parameters(),
    }  # fmt: skip
    settings = read_settings(place / "model")
    groups = load_problems([place / "h.jsonl"], bpe_tokenizer)
    assert sorted(written["families"]) == sorted(groups) == ["g0", "g1"]
    special = [n for n in bpe_tokenizer.is_special.nonzero()[0].tolist()
               if n not in (bpe_tokenizer.eos_id, bpe_tokenizer.undo_id)]  # fmt: skip
    for name, problems in select(groups, num_problems=5, seed=2, allow_fewer=False).items():
        prompts = [problem.prompt_ids for problem in problems]
        ids = {"machine": settings.machine, "eos_id": settings.eos_id, "pad_id": settings.pad_id}
        budget = sum(len(d.emitted_ids) for d in decode(model, prompts, max_new_tokens=9, **ids))
        costs = [
            sum(
                len(d.emitted_ids)
                for d in decode(
                    plain, prompts, max_new_tokens=9, temperature=1.0, seed=2, undo_mode="ban",
                    banned_ids=special, numbers=range(5 * n, 5 * n + 5), **ids,
                )
            )
            for n in range(3)
        ]  # fmt: skip
        k = sum(sum(costs[: n + 1]) <= budget for n in range(3))
        family = written["families"][name]
        assert (family["k"], family["tokens"]["baseline"]) == (k, sum(costs[:k]))
        assert family["tokens"]["model"] == budget and family["max_k"] == 3
    assert "at equal compute:\ng" in capsys.readouterr().out
    assert any((tmp_path / "tb").iterdir())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("tokenizer", r"tokenizer.json: id \d+ is "),
        ("export", "trained with another tokenizer than the data's"),
        ("chat", "chat: another template than the examined model's"),
        ("nothing", "config.json: No such file"),
        ("temperature", "--vote-temperature must be 0.0001 to 10000; at 0 all samples"),
    ],
)
def test_a_baseline_that_cannot_be_compared_is_one_line(  # noqa: PLR0917 (fixtures)
    kind: str, words: str, place: Path, tmp_path: Path, bpe_tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "baseline"
    if kind == "tokenizer":
        shutil.copytree(place / "plain", folder)
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace('"</s>"', '"</t>"'))
    elif kind == "export":
        examples.variant(place / "model", folder, tokenizer_fingerprint="0" * 64)
    elif kind == "chat":
        chat = {"system": None, "template_sha256": "a" * 64}
        examples.variant(place / "model", folder, chat=chat)
    else:
        folder.mkdir()
    if kind == "temperature":
        with pytest.raises(SystemExit):
            examine(place, place / "plain", "--vote-temperature", "0")
    else:
        assert examine(place, folder) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and (kind == "temperature" or error.count("\n") == 1), error


def test_an_exported_baseline_never_undoes(
    place: Path, bpe_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same model as its own baseline: greedily it writes what it writes with the undo banned."""
    settings, model = read_settings(place / "model"), load_model(place / "model")
    groups = load_problems([place / "h.jsonl"], bpe_tokenizer)
    examination = Examination(num_problems=5, max_new_tokens=9)
    # All its mass on the undo: without the ban it would write nothing else.
    head = model.get_output_embeddings()
    real = head.forward

    def loving(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = real(hidden)
        return logits.index_fill(-1, torch.tensor([settings.undo_id]), 99.0)

    monkeypatch.setattr(head, "forward", loving)
    results = evaluate(model, bpe_tokenizer, settings, groups, examination)
    assert all(number(result.measures["mean_undos"]) == 9.0 for result in results.values())
    seen: list[Any] = []

    def keeping(*arguments: Any, **changes: Any) -> list[Decoded]:
        seen.extend(found := decode(*arguments, **changes))
        return found

    monkeypatch.setattr(voting, "decode", keeping)
    voting.equal_compute(
        results, model, tokenizer=bpe_tokenizer, settings=settings, examination=examination,
        vote=Vote(max_k=2),
    )  # fmt: skip
    assert len(seen) == 2 * 3 * 5 and all(one.num_undos == 0 for one in seen)
    # Two samples of each problem, and greedily, family by family: other draws every time.
    first, second, greedy = (
        [one.emitted_ids.tolist() for one in seen[start : start + 5]] for start in (0, 5, 10)
    )
    assert all(one != other for one, other in zip(first, second, strict=True))
    prompts = [sample.problem.prompt_ids for sample in results["g0"].free]
    banned = decode(model, prompts, machine=settings.machine, eos_id=settings.eos_id,
                    pad_id=settings.pad_id, max_new_tokens=9, undo_mode="ban")  # fmt: skip
    assert greedy == [one.emitted_ids.tolist() for one in banned]
