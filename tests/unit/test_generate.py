"""Exported folders, generation, rendering, and the launcher's exit codes."""

from __future__ import annotations

import copy
import io
import json
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import examined
import numpy as np
import pytest
import sentencepiece
import torch

from nmar_ds.errors import ConfigError, VocabularyError
from nmar_ds.inference.exported import (
    ExportSettings,
    load_exported_tokenizer,
    load_model,
    read_settings,
)
from nmar_ds.inference.generation import encode_prompt, generate, show
from nmar_ds.inference.rendering import Run, as_plain, as_rich, response_text, runs
from nmar_ds.inference.stack import Stack
from nmar_ds.inference.streaming import TextStream, shown
from nmar_ds.traces.builders import encode_record
from nmar_ds.traces.encoding import Tokenizer, add_undo, train_sentencepiece
from nmar_ds.traces.records import Record, TextTurn
from nmar_ds.traces.reduction import Machine, reduce

LAUNCHER = Path(__file__).parents[2] / "launcher" / "generate.py"
torch.set_num_threads(1)


def test_read_settings_returns_the_facts(export: Path, tokenizer: Tokenizer) -> None:
    settings = read_settings(export)
    assert settings == ExportSettings(
        undo_id=tokenizer.undo_id, undo_token="<UNDO>", semantics="token", context="linear",
        eos_id=tokenizer.eos_id, bos_id=tokenizer.bos_id, pad_id=tokenizer.pad_id,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )  # fmt: skip
    assert load_exported_tokenizer(export, settings).undo_id == tokenizer.undo_id


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context": "pruned"}, "context: 'pruned', expected 'linear'"),
        ({"semantics": "spam"}, "semantics: 'spam', expected one of token, span, reset"),
        ({"semantics": "span"}, "boundary_ids: 0 under semantics 'span', expected some"),
        ({"boundary_ids": [4, 9]}, "boundary_ids: 2 under semantics 'token', expected"),
        ({"semantics": "span", "boundary_ids": [9, 4]}, "boundary_ids: [9, 4], expected a list"),
        ({"semantics": "span", "boundary_ids": [4, "9"]}, "expected a list of token ids"),
        ({"semantics": "span", "boundary_ids": 4}, "boundary_ids: 4, expected a list"),
        ({"format_version": 2}, "format_version: 2, expected 1"),
        ({"format_version": "absent"}, "format_version: None, expected 1"),
        ({"eos_id": "absent"}, "eos_id: missing, expected a token id"),
        ({"eos_id": None}, "eos_id: None, expected a token id"),
        ({"undo_id": True}, "undo_id: True, expected a token id"),
        ({"pad_id": -1}, "pad_id: -1, expected a token id or null"),
        ({"undo_token": ""}, "undo_token: '', expected a string"),
    ],
)
def test_read_settings_refuses_what_cannot_be_decoded(
    export: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(examined.variant(export, tmp_path / "other", **changes))
    assert words in str(caught.value) and "nmar.json: " in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe"])
def test_read_settings_refuses_a_broken_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "nmar.json").write_bytes(content)
    with pytest.raises(ConfigError, match="expected a JSON object") as caught:
        read_settings(tmp_path)
    assert "\n" not in str(caught.value)


def test_read_settings_names_a_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        read_settings(tmp_path / "none")
    with pytest.raises(
        ConfigError, match=r"nmar.json: missing, .*<UNDO>.*, expected a folder made by"
    ):
        read_settings(tmp_path)


def test_load_exported_tokenizer_refuses_another_one(
    export: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    other = examined.variant(export, tmp_path / "a", tokenizer_fingerprint="0" * 64)
    with pytest.raises(VocabularyError, match="fingerprint"):
        load_exported_tokenizer(other, read_settings(other))
    other = examined.variant(export, tmp_path / "b", undo_id=5)
    with pytest.raises(VocabularyError, match="undo_id: 5"):
        load_exported_tokenizer(other, read_settings(other))
    for token in (tokenizer.eos_id, tokenizer.size):
        other = examined.variant(
            export, tmp_path / f"c{token}", semantics="span", boundary_ids=[token]
        )
        with pytest.raises(VocabularyError, match=f"boundary_ids: {token}, expected ordinary"):
            load_exported_tokenizer(other, read_settings(other))


def test_load_model_refuses_a_folder_without_weights(export: Path, tmp_path: Path) -> None:
    other = examined.variant(export, tmp_path / "other")
    (other / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="not loadable as a model") as caught:
        load_model(other)
    assert "\n" not in str(caught.value)


def spell(tokenizer: Tokenizer, *texts: str | int) -> np.ndarray:
    """Ids of a response: texts, and numbers of undos."""
    parts = [
        np.full(text, tokenizer.undo_id) if isinstance(text, int)
        else tokenizer.encode(text, continuation=True)
        for text in texts
    ]  # fmt: skip
    return np.concatenate(parts).astype(np.int32)


def test_runs_split_a_response_by_fate_and_origin(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("Reverse: sun\n", continuation=False)
    wrong = tokenizer.encode(" lamp", continuation=True)
    ids = spell(tokenizer, "sun", " lamp", len(wrong), " mat", 0)
    num_forced = len(ids) - len(spell(tokenizer, len(wrong), " mat"))
    found = list(runs(tokenizer, prompt, ids, Machine(tokenizer.undo_id), num_forced=num_forced))
    assert [(run.kind, run.forced, run.text) for run in found] == [
        ("kept", True, "sun"),
        ("undone", True, " lamp"),
        ("undo", False, ""),
        ("kept", False, " mat"),
    ]
    assert sum(run.num_tokens for run in found) == len(ids)
    two = spell(tokenizer, "sun mat")
    assert len(two) > 1
    inside = list(runs(tokenizer, prompt, two, Machine(tokenizer.undo_id), num_forced=1))
    assert [(run.kind, run.forced) for run in inside] == [("kept", True), ("kept", False)]
    assert list(runs(tokenizer, prompt, ids[:0], Machine(tokenizer.undo_id))) == []


def test_plain_and_rich_show_what_was_undone() -> None:
    parts = [
        Run("kept", True, "sun", 1), Run("undone", True, " lamp", 3), Run("undo", False, "", 3),
        Run("kept", False, " mat", 1), Run("undo", False, "", 1),
    ]  # fmt: skip
    assert as_plain(iter(parts), "<UNDO>") == "sun[- lamp-]<UNDO>{3} mat<UNDO>"
    line = as_rich(iter(parts), "<UNDO>")
    assert line.plain == "sun lamp<UNDO>{3} mat<UNDO>"
    styles = {line.plain[span.start : span.end]: str(span.style) for span in line.spans}
    assert styles[" lamp"] == "red strike underline" and styles["<UNDO>{3}"] == "bold magenta"


def test_generate_equals_transformers_where_no_undo_is_emitted(
    export: Path, tokenizer: Tokenizer
) -> None:
    settings, model = read_settings(export), load_model(export)
    prompt = "7. Reverse: sun mat lamp tree\n"
    found = generate(model, tokenizer, settings, prompt, max_new_tokens=20, undo_mode="ban")
    ids = torch.tensor([encode_prompt(prompt, tokenizer).tolist()])
    wanted = model.generate(
        ids, max_new_tokens=20, do_sample=False, suppress_tokens=[tokenizer.undo_id],
        eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.eos_id,
    )[0, ids.shape[1] :]  # fmt: skip
    assert found.decoded.raw_ids.tolist() == wanted.tolist()


def test_encode_prompt_is_that_of_training(tokenizer: Tokenizer) -> None:
    for text in ["7. Reverse: sun\n", " sun", "<UNDO>", "sun<UNDO>sun"]:
        record = Record(path="x", line=1, turns=(TextTurn(prompt=text, reference="sun"),))
        (turn,) = encode_record(record, tokenizer).turns
        ids = encode_prompt(text, tokenizer)
        assert ids.tolist() == turn.prompt_ids.tolist()
        assert tokenizer.undo_id not in ids
    with pytest.raises(VocabularyError, match="lacks the characters"):
        encode_prompt("\N{SNOWMAN}", tokenizer)
    assert encode_prompt("", tokenizer).tolist() == [tokenizer.bos_id]
    without_bos = copy.copy(tokenizer)
    without_bos.add_bos = False
    with pytest.raises(ConfigError, match="prompt: empty"):
        encode_prompt("", without_bos)


def test_show_prints_raw_beside_reduced(
    export: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, model = read_settings(export), load_model(export)
    tries = (
        generate(
            model, tokenizer, settings, "7. Reverse: sun\n", max_new_tokens=30, temperature=2.0,
            undo_bias=3.0, seed=seed,
        )
        for seed in range(20)
    )  # fmt: skip
    found = next(found for found in tries if any(run.kind == "undone" for run in found.runs))
    assert "[-" not in found.reduced
    ids = encode_prompt("7. Reverse: sun\n", tokenizer)
    assert found.reduced == response_text(tokenizer, ids, found.decoded.reduced_ids)
    show(found, "raw")
    assert capsys.readouterr().out == as_plain(iter(found.runs), "<UNDO>") + "\n"
    show(found, "reduced")
    assert capsys.readouterr().out == found.reduced + "\n"
    show(found, "both")
    out = capsys.readouterr().out
    assert "--- raw\n" in out and f"--- reduced\n{found.reduced}\n" in out
    assert f"{found.decoded.num_undos} undos" in out


@pytest.mark.parametrize("semantics", ["span", "reset"])
def test_generate_undoes_as_the_export_says(
    semantics: str, export: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    ids = np.flatnonzero(~tokenizer.is_special)[::4].tolist() if semantics == "span" else []
    folder = examined.variant(
        export, tmp_path / semantics, semantics=semantics, boundary_ids=ids
    )  # fmt: skip
    settings, model = read_settings(folder), load_model(folder)
    machine = Machine(tokenizer.undo_id, semantics, frozenset(ids))
    assert settings.machine == machine
    num_telling = 0
    for seed in range(12):
        found = generate(
            model, tokenizer, settings, "7. Reverse: sun\n", max_new_tokens=40, temperature=2.0,
            undo_bias=2.0, seed=seed,
        )  # fmt: skip
        raw = found.decoded.raw_ids
        wanted = reduce(raw, machine).tolist()
        assert found.decoded.reduced_ids.tolist() == wanted
        assert sum(run.num_tokens for run in found.runs if run.kind == "kept") == len(wanted)
        num_telling += len(wanted) != len(reduce(raw, Machine(tokenizer.undo_id)))
    assert num_telling > 0


def test_a_response_is_streamed_as_text(tokenizer: Tokenizer) -> None:
    """Characters of several tokens come when they are whole, and go with their first byte."""
    prompt = tokenizer.encode("Reverse: sun\n", continuation=False)
    ids = spell(tokenizer, "sun", " lamp").tolist()
    machine = Machine(tokenizer.undo_id)
    stream = TextStream(tokenizer, prompt, machine, np.array(ids[:1], np.int32))
    stack = Stack(machine, ids[:1])
    shown = stream.text
    for token in [*ids[1:], *[tokenizer.undo_id] * (len(ids) + 1), *spell(tokenizer, "mat")]:
        change = stream.take(stack.write(token))
        assert change.is_undo == (token == tokenizer.undo_id)
        shown = shown[: len(shown) - change.num_retracted] + change.appended
        assert shown == stream.text
        assert stream.text == response_text(tokenizer, prompt, np.array(stack.ids, np.int32))
    assert shown == "mat"


def test_unfinished_characters_wait(tmp_path: Path) -> None:
    made = train_sentencepiece(["so the"] * 9, tmp_path, vocab_size=300, byte_fallback=True)
    pieces = made.encode("s\u65e5\u672co", continuation=True).tolist()
    stream = TextStream(made, np.array([5], np.int32), Machine(made.undo_id), np.empty(0, np.int32))
    stack = Stack(Machine(made.undo_id))
    texts = []
    for token in pieces:
        stream.take(stack.write(token))
        texts.append(stream.text)
    assert texts == ["s", "s", "s", *["s\u65e5"] * 3, "s\u65e5\u672c", "s\u65e5\u672co"]


@pytest.mark.parametrize(
    ("text", "num_cut"), [("s\u65e5", 1), ("s\u65e5", 0), ("s\ufffd", 0), ("so", 0), ("", 0)]
)
def test_the_lines_give_a_last_character_that_stays_unfinished(
    text: str, num_cut: int, tmp_path: Path
) -> None:
    """What waits for more bytes comes in the end as it is, and so does a real U+FFFD."""
    made = train_sentencepiece(["so the"] * 9, tmp_path, vocab_size=300, byte_fallback=True)
    ids = made.encode(text, continuation=True).tolist()
    ids = ids[: len(ids) - num_cut]
    stack, file = Stack(Machine(made.undo_id)), io.StringIO()
    prompt = made.encode("the", continuation=False)
    stream = TextStream(made, prompt, Machine(made.undo_id), np.empty(0, np.int32))
    with shown(stream, delay=0.0, file=file) as on_event:
        for token in ids:
            on_event(0, stack.write(token))
    changes = [json.loads(line) for line in file.getvalue().splitlines()]
    assert all(change["append"] for change in changes)
    written = "".join(change["append"] for change in changes)
    assert written == response_text(made, prompt, np.array(ids, np.int32)) == stream.text
    assert num_cut or written == text


def test_generate_goes_on_from_a_beginning_and_stops_at_a_text(
    export: Path, tokenizer: Tokenizer
) -> None:
    settings, model = read_settings(export), load_model(export)
    prompt = "7. Reverse: sun mat lamp\n"
    plain = generate(model, tokenizer, settings, prompt, max_new_tokens=30, undo_mode="ban")
    half = plain.reduced[: len(plain.reduced) // 2]
    found = generate(
        model, tokenizer, settings, prompt, begun=half, max_new_tokens=5, undo_mode="ban"
    )
    assert found.decoded.num_forced == len(tokenizer.encode(half, continuation=True))
    assert found.reduced.startswith(half) and found.runs[0].forced
    stop = plain.reduced[3:6]
    found = generate(
        model,
        tokenizer,
        settings,
        prompt,
        max_new_tokens=30,
        undo_mode="ban",
        stop_texts=["\n\n", stop],
    )
    assert stop in found.reduced and found.decoded.stop_reason == "stop"
    last = response_text(tokenizer, np.array([5]), found.decoded.reduced_ids[:-1])
    assert stop not in last, "not a token later"
    assert len(found.reduced) < len(plain.reduced)


@pytest.mark.parametrize("prompt", ["", "7. Reverse: sun\n"], ids=["empty", "some"])
def test_a_beginning_is_encoded_as_in_training(prompt: str, tmp_path: Path) -> None:
    """After an empty prompt a response starts the text, though BOS stands before it."""
    texts = [row[key] for row in examined.records(200) for key in ("prompt", "reference")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(tmp_path / "plain"), vocab_size=60,
        add_dummy_prefix=True, user_defined_symbols=["\n"], minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    made = add_undo(tmp_path / "plain.model", tmp_path / "undo.model")
    assert made.has_prefix_space and made.add_bos
    folder = examined.make_export(tmp_path / "export", made)
    record = Record(path="x", line=1, turns=(TextTurn(prompt=prompt, reference="sun mat"),))
    (turn,) = encode_record(record, made).turns
    found = generate(
        load_model(folder), made, read_settings(folder), prompt, begun="sun mat", max_new_tokens=1,
        undo_mode="ban",
    )  # fmt: skip
    forced = found.decoded.raw_ids[: found.decoded.num_forced]
    assert forced.tolist() == turn.reference_ids[:-1].tolist()
    assert found.reduced.startswith("sun mat")


def test_a_beginning_that_cannot_be_spelled_is_named(export: Path, tokenizer: Tokenizer) -> None:
    settings, model = read_settings(export), load_model(export)
    with pytest.raises(VocabularyError, match=r"^begun: .*lacks the characters"):
        generate(model, tokenizer, settings, "7.", begun="\N{SNOWMAN}", max_new_tokens=1)


@pytest.mark.parametrize("stop_texts", [(), ("nowhere to be found",)], ids=["plain", "stopped"])
def test_generate_never_writes_a_row_that_is_no_token(
    stop_texts: tuple[str, ...], export: Path, tokenizer: Tokenizer
) -> None:
    """Models have rows beyond their tokenizer: padding, which a random model likes as much."""
    settings, model = read_settings(export), load_model(export)
    model.resize_token_embeddings(tokenizer.size + 300, mean_resizing=False)
    for seed in range(3):
        found = generate(
            model, tokenizer, settings, "7. Reverse: sun\n", max_new_tokens=30, temperature=5.0,
            seed=seed, stop_texts=stop_texts, banned_ids=[tokenizer.eos_id],
        )  # fmt: skip
        ids = found.decoded.emitted_ids
        assert len(ids) == 30 and ids.max() < tokenizer.size and tokenizer.eos_id not in ids


@pytest.mark.parametrize("begun", ["", "sun mat"])
def test_launcher_streams_lines_that_add_up(
    begun: str, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(LAUNCHER))["main"]
    common = ["--model", str(export), "--prompt", "7. Reverse: sun\n", "--max-new-tokens", "40",
              "--temperature", "2", "--seed", "4", "--tabu", "--max-revisits", "5",
              "--begun", begun, "--undo-bias", "2"]  # fmt: skip
    assert main([*common, "--show", "reduced"]) == 0
    wanted = capsys.readouterr().out
    assert main([*common, "--stream"]) == 0
    text, num_retracts = "", 0
    for line in capsys.readouterr().out.splitlines():
        change = json.loads(line)
        text = text[: len(text) - change.get("retract", 0)] + change.get("append", "")
        num_retracts += "retract" in change
    assert text + "\n" == wanted and num_retracts > 0
    if begun:
        assert not text.startswith(begun), "the beginning was undone too"
    with pytest.raises(SystemExit):
        main([*common, "--delay", "1"])


def test_the_terminal_shows_what_is_taken_back(tokenizer: Tokenizer) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    file = Terminal()
    prompt = tokenizer.encode("Reverse: sun\n", continuation=False)
    lamp = tokenizer.encode(" lamp", continuation=True).tolist()
    machine = Machine(tokenizer.undo_id)
    stack = Stack(machine)
    stream = TextStream(tokenizer, prompt, machine, np.empty(0, np.int32))
    with shown(stream, delay=0.0, file=file) as on_event:
        for token in [*spell(tokenizer, "sun"), *lamp, *[tokenizer.undo_id] * len(lamp)]:
            on_event(0, stack.write(int(token)))
    written = file.getvalue()
    assert "\x1b[9;31m" in written or "\x1b[31;9m" in written, "red and struck through"
    last = written.split("\x1b[2K")[-1]
    assert "sun" in last and "lamp" not in last


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(LAUNCHER), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_launcher_generates(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"7. Reverse: sun mat\n")
    common = ["--model", str(export), "--max-new-tokens", "12", "--show", "reduced"]
    main = runpy.run_path(str(LAUNCHER))["main"]
    assert main([*common, "--prompt-file", str(file), "--undo", "ban"]) == 0
    from_file = capsys.readouterr().out
    assert main([*common, "--prompt", "7. Reverse: sun mat\n", "--undo", "ban"]) == 0
    assert capsys.readouterr().out == from_file and len(from_file) > 1
    assert main([*common, "--prompt", "7. Reverse: sun mat", "--undo", "ban"]) == 0
    assert capsys.readouterr().out != from_file, "the newline of the file is part of the prompt"


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({"context": "pruned"}, ["--prompt", "x"], "context: 'pruned'"),
        ({"tokenizer_fingerprint": "0"}, ["--prompt", "x"], "fingerprint"),
        ({}, ["--prompt-file", "/nowhere/p.txt"], "/nowhere/p.txt: No such file"),
    ],
)
def test_launcher_refuses_in_one_line_and_at_once(
    export: Path, tmp_path: Path, changes: dict[str, Any], arguments: list[str], words: str
) -> None:
    folder = examined.variant(export, tmp_path / "other", **changes)
    start = time.perf_counter()
    done = launch("--model", str(folder), *arguments)
    seconds = time.perf_counter() - start
    assert done.returncode == 2 and done.stdout == ""
    assert words in done.stderr and done.stderr.count("\n") == 1
    # Without torch: loading it alone takes longer than this on a quiet machine.
    assert seconds < 5
    loaded = json.loads(
        subprocess.run(
            [sys.executable, "-c",
             "import sys, json, runpy, contextlib\n"
             f"sys.argv = {[str(LAUNCHER), '--model', str(folder), *arguments]!r}\n"
             "with contextlib.suppress(SystemExit): "
             f"runpy.run_path({str(LAUNCHER)!r}, run_name='__main__')\n"
             "print(json.dumps([m in sys.modules for m in ('torch', 'transformers')]))"],
            capture_output=True, text=True, check=True,
        ).stdout
    )  # fmt: skip
    assert loaded == [False, False]
