"""What an examination refuses, and that it does so before anything is decoded."""

from __future__ import annotations

import runpy
from pathlib import Path

import examined
import pytest
from oracles import settings_of

from nmar_ds.errors import TraceError
from nmar_ds.inference.evaluation import Examination, allowed_tokens
from nmar_ds.inference.probes import load_problems
from nmar_ds.traces.encoding import Tokenizer

LAUNCHERS = Path(__file__).parents[2] / "launcher"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return examined.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("launcher", "needed"),
    [
        ("evaluate_undo", ["--model", "m", "--heldout", "h"]),
        ("generate", ["--model", "m", "--prompt", "p"]),
        ("sample", ["--config", "c", "--model", "m", "--records", "r", "--output", "o"]),
    ],
)
def test_seeds_beyond_what_the_generator_takes_are_refused(
    launcher: str, needed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    parse = runpy.run_path(str(LAUNCHERS / f"{launcher}.py"))["parse"]
    for seed in (2**63, 2**64):
        with pytest.raises(SystemExit) as ended:
            parse([*needed, "--seed", str(seed)])
        assert ended.value.code == 2
        assert "--seed must be below 2^63" in capsys.readouterr().err
    assert parse([*needed, "--seed", str(2**63 - 1)]).seed == 2**63 - 1


def test_no_new_tokens_are_refused_and_never_taken_for_the_default(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parse = runpy.run_path(str(LAUNCHERS / "evaluate_undo.py"))["parse"]
    with pytest.raises(SystemExit):
        parse(["--model", "m", "--heldout", "h", "--max-new-tokens", "0"])
    assert "--max-new-tokens must be at least 1" in capsys.readouterr().err
    file = examined.write(tmp_path / "h.jsonl", examined.records(3))
    (problems,) = load_problems([file], tokenizer).values()
    settings = settings_of(tokenizer)
    assert allowed_tokens(problems, settings, Examination(max_new_tokens=0)) == 0
    assert allowed_tokens(problems, settings, Examination(max_new_tokens=5)) == 5
    assert allowed_tokens(problems, settings, Examination()) > 5


def test_an_empty_answer_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """No response is right by it; an empty one would vote for it."""
    rows = examined.records(2)
    for answer in ("", " \n"):
        file = examined.write(tmp_path / "h.jsonl", [rows[0], rows[1] | {"answer": answer}])
        with pytest.raises(TraceError, match=r"h\.jsonl:2: answer: empty, expected a text"):
            load_problems([file], tokenizer)


def test_each_heldout_file_has_to_hold_a_record(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Of no problems there would be no family, and no family misses a bar."""
    full = examined.write(tmp_path / "full.jsonl", examined.records(3))
    empty = examined.write(tmp_path / "empty.jsonl", [])
    for files in ([empty], [full, empty], [empty, full]):
        with pytest.raises(TraceError, match=r"empty\.jsonl: file: holds no record, expected at"):
            load_problems(files, tokenizer)
