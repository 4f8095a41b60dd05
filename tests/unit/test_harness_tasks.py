"""The data of lm-eval's tasks, scores of plain text, and what is said where lm-eval is missing.

What needs lm-eval itself is in tests/harness.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nmar_ds.errors import ConfigError
from nmar_ds.inference.exported import load_model
from nmar_ds.inference.scoring import score_texts
from nmar_ds.traces.encoding import Tokenizer

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "harness"
torch.set_num_threads(1)


def test_the_data_are_what_their_script_makes(tmp_path: Path) -> None:
    main = runpy.run_path(str(FOLDER / "make_tasks.py"))["main"]
    problems = ROOT / "examples/quickstart/chain_sum.heldout.jsonl"
    assert main(["--problems", str(problems), "--output", str(tmp_path / "made.jsonl")]) == 0
    made = (tmp_path / "made.jsonl").read_bytes()
    assert made == (FOLDER / "chain_sum.jsonl").read_bytes()
    assert made.count(b"\n") == problems.read_bytes().count(b"\n") == 400


def test_one_choice_is_right_and_none_can_be_told_by_its_length() -> None:
    places = [0, 0, 0, 0]
    for line in (FOLDER / "chain_sum.jsonl").read_text("utf-8").splitlines():
        document = json.loads(line)
        choices = document["choices"]
        assert choices[document["right"]] == document["reference"]
        assert len(set(choices)) == 4 and len({len(choice) for choice in choices}) == 1
        places[document["right"]] += 1
        for number, choice in enumerate(choices):
            wrong = []
            total = choice.split("=")[0].lstrip("-").replace("-", "+").split("+")[0]
            total = ("-" if choice.startswith("-") else "") + total
            for step in choice.split(", "):
                left, result = step.split("=")
                assert left.startswith(total), "goes on from the result before"
                term = left[len(total) :]
                wrong.append(int(total) + int(term) != int(result))
                total = result
            assert sum(wrong) == (number != document["right"]), choice
    assert min(places) > 70, places


@pytest.mark.parametrize("ban_undo", [False, True])
def test_texts_are_scored_as_one_by_one(ban_undo: bool, export: Path, tokenizer: Tokenizer) -> None:
    model = load_model(export)
    rng = np.random.default_rng(4)
    sizes = [(int(a), int(b)) for a, b in rng.integers(1, 9, size=(9, 2))]
    prompts = [rng.integers(5, tokenizer.size, size=a).astype(np.int32) for a, _ in sizes]
    texts = [rng.integers(5, tokenizer.size, size=b).astype(np.int32) for _, b in sizes]
    undo = tokenizer.undo_id
    texts = [np.where(text == undo, 5, text) for text in texts]
    keywords = dict(undo_id=undo, ban_undo=ban_undo)
    found = score_texts(model, prompts, texts, batch_size=4, **keywords)
    for prompt, text, score in zip(prompts, texts, found, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, text]).astype(np.int64))
        with torch.no_grad():
            logits = model(ids[None]).logits[0].double()
        if ban_undo:
            logits = torch.cat([logits[:, :undo], logits[:, undo + 1 :]], dim=1)
        wanted = 0.0
        for place in range(len(prompt), len(ids)):
            column = int(ids[place]) - int(ban_undo and ids[place] > undo)
            wanted += float(logits[place - 1].log_softmax(0)[column])
        assert score.log_probability == pytest.approx(wanted, abs=1e-5)
    greedy, prompt = [], prompts[0].tolist()
    for _ in range(4):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + greedy])).logits[0, -1]
        logits[undo] = -torch.inf
        greedy.append(int(logits.argmax()))
    pair = [np.array(greedy, np.int32), np.array([*greedy[:3], (greedy[3] + 1) % 9], np.int32)]
    verdicts = score_texts(model, [prompts[0]] * 2, pair, undo_id=undo, ban_undo=True)
    assert [verdict.is_greedy for verdict in verdicts] == [True, False]


def test_what_cannot_be_scored_is_refused(export: Path, tokenizer: Tokenizer) -> None:
    model, ids = load_model(export), np.arange(5, 8, dtype=np.int32)
    for prompt, text, words in [
        (ids[:0], ids, "prompt: no token"),
        (ids, ids[:0], "continuation: no token"),
        (ids, np.full(511, 7, np.int32), "make 513 inputs, expected at most the model's 512"),
    ]:
        with pytest.raises(ConfigError, match=words):
            score_texts(model, [prompt], [text], undo_id=tokenizer.undo_id)
    fits = score_texts(model, [ids], [np.full(510, 7, np.int32)], undo_id=tokenizer.undo_id)
    assert np.isfinite(fits[0].log_probability)


def test_a_missing_lm_eval_is_one_line(
    export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    main = runpy.run_path(str(ROOT / "launcher/evaluate_harness.py"))["main"]
    assert main(["--model", str(export), "--tasks", "nmar_chain_sum"]) == 2
    error = capsys.readouterr().err
    assert "lm-eval: not installed" in error and "pip install 'nmar_ds[harness]'" in error
    assert error.count("\n") == 1
