"""What an examination refuses, and that it does so before anything is decoded."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import examined
import pytest
from oracles import settings_of
from tiny_stores import prepare_store

from nmar_ds import files
from nmar_ds.errors import TraceError
from nmar_ds.inference import evaluation
from nmar_ds.inference.evaluation import Examination, allowed_tokens
from nmar_ds.inference.probes import load_problems
from nmar_ds.traces.encoding import Tokenizer

LAUNCHERS = Path(__file__).parents[2] / "launcher"


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
    for paths in ([empty], [full, empty], [empty, full]):
        with pytest.raises(TraceError, match=r"empty\.jsonl: file: holds no record, expected at"):
            load_problems(paths, tokenizer)


def limited(export: Path, folder: Path, positions: int) -> Path:
    """A copy with fewer positions."""
    shutil.copytree(export, folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = positions
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_a_model_has_no_room_for_is_refused_before_decoding(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A refusal after it would cost hours, and the report with them."""
    heldout = examined.write(tmp_path / "h.jsonl", examined.records(20, seed=9))
    prepare_store([heldout], tmp_path / "store", tokenizer, builder="hard", max_length=256)
    (problems,) = load_problems([heldout], tokenizer).values()
    longest = max(len(problem.prompt_ids) for problem in problems)
    export = examined.make_export(tmp_path / "export", tokenizer)
    fitting = limited(export, tmp_path / "fitting", longest + 1)
    short = limited(export, tmp_path / "short", longest)
    main: Any = runpy.run_path(str(LAUNCHERS / "evaluate_undo.py"))["main"]

    class DecodedError(Exception):
        pass

    def decoding(*_: Any, **__: Any) -> None:
        raise DecodedError

    monkeypatch.setattr(evaluation, "decode", decoding)
    common = ["--heldout", str(heldout), "--num-problems", "20", "--max-new-tokens", "1"]
    store = ["--store", str(tmp_path / "store")]
    capsys.readouterr()
    for model, more, words in (
        (fitting, store, f"tokens, expected at most the model's {longest + 1} positions"),
        (export, ["--baseline", str(short)], f"short: {longest} prompt tokens and 1 new ones make"),
        # Prompts would fit, a deviation after them does not.
        (fitting, [], f"new ones make .*, expected at most the model's {longest + 1} positions"),
    ):
        assert main(["--model", str(model), *common, *more]) == 2
        error = capsys.readouterr().err
        assert re.search(words, error) and error.count("\n") == 1, error
    with pytest.raises(DecodedError):
        main(["--model", str(export), *common, *store, "--baseline", str(fitting)])


def test_places_without_permission_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permission is asked of the system, which gives root all of it; so its answer is ours here."""
    assert files.why_no_file(tmp_path / "r.json") is None
    assert files.why_no_folder(tmp_path / "a" / "b") is None
    asked: list[Any] = []
    monkeypatch.setattr(os, "access", lambda place, mode: asked.append((place, mode)))
    words = f"no permission to write in {tmp_path}, expected a writable folder"
    assert files.why_no_file(tmp_path / "r.json") == words
    assert files.why_no_folder(tmp_path / "a" / "b") == words
    assert asked == [(tmp_path, os.W_OK | os.X_OK)] * 2
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert (
        files.why_no_folder(tmp_path / "gone") == f"{tmp_path / 'gone'} is no folder, expected one"
    )
