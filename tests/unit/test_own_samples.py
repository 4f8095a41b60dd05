"""A model's own responses: drawn with a real model, continued after a death, learnt from as they are."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_stores import prepare_store
from tiny_tokenizers import sums
from transformers import LlamaConfig, LlamaForCausalLM

from nmar_ds.data.store import Store
from nmar_ds.errors import ConfigError, TraceError, VocabularyError
from nmar_ds.inference.own_samples import SamplingSettings, model_facts, sample_file
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.records import read_records
from nmar_ds.traces.turns import encode_record

ROOT = Path(__file__).resolve().parents[2]
Write = Callable[..., Path]
torch.set_num_threads(1)


def tiny_model(rows: int) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
            initializer_range=0.3,
        )
    ).eval()  # fmt: skip


SETTINGS = SamplingSettings(num_samples=3, max_new_tokens=12, seed=5, batch_size=6)
COMMON: dict[str, Any] = {"chat": None, "model": {"folder": "m"}, "num_positions": 128}


def draw(records: Path, output: Path, tokenizer: Tokenizer, lm: Any, **changes: Any) -> list[int]:
    asked = {"settings": SETTINGS, **COMMON, **changes}
    return list(sample_file(records, output, lambda: lm, tokenizer, **asked))


@pytest.fixture
def records(write_jsonl: Write) -> Path:
    return write_jsonl(sums(10, seed=3), "plain.jsonl")


def test_samples_are_the_models_and_ordinary(
    records: Path, tmp_path: Path, sp_tokenizer: Tokenizer
) -> None:
    # No row for <UNDO> (it is the last id), as in a model that was never taught to undo.
    assert sp_tokenizer.undo_id == sp_tokenizer.size - 1
    model = tiny_model(sp_tokenizer.size - 1)
    assert draw(records, tmp_path / "a.jsonl", sp_tokenizer, model) == [0, 2, 4, 6, 8, 10]
    assert not list(tmp_path.glob("*.part*"))
    written = list(read_records(tmp_path / "a.jsonl"))
    assert [r.turns for r in written] == [r.turns for r in read_records(records)]
    samples = [sample for record in written for sample in record.samples]
    assert len(samples) == 30 and len({tuple(s.ids.tolist()) for s in samples}) > 20
    assert all(0 < len(s.ids) <= 12 or s.stopped for s in samples)
    assert {s.stopped for s in samples} == {len(s.ids) < 12 for s in samples}
    assert not any(sp_tokenizer.is_special[s.ids].any() for s in samples)


def test_no_sample_depends_on_its_batch(
    records: Path, tmp_path: Path, sp_tokenizer: Tokenizer
) -> None:
    model = tiny_model(sp_tokenizer.size + 5)  # padded rows are no tokens
    draw(records, tmp_path / "a.jsonl", sp_tokenizer, model)
    for size in (1, 30):
        other = SamplingSettings(num_samples=3, max_new_tokens=12, seed=5, batch_size=size)
        draw(records, tmp_path / f"{size}.jsonl", sp_tokenizer, model, settings=other)
        assert (tmp_path / f"{size}.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()
    seeded = SamplingSettings(num_samples=3, max_new_tokens=12, seed=6)
    draw(records, tmp_path / "b.jsonl", sp_tokenizer, model, settings=seeded)
    assert (tmp_path / "b.jsonl").read_bytes() != (tmp_path / "a.jsonl").read_bytes()


@pytest.mark.parametrize("cut", [0, 7])
def test_a_call_that_died_is_continued(
    cut: int, records: Path, tmp_path: Path, sp_tokenizer: Tokenizer
) -> None:
    model = tiny_model(sp_tokenizer.size)
    draw(records, tmp_path / "whole.jsonl", sp_tokenizer, model)
    output = tmp_path / "again.jsonl"
    asked = {"settings": SETTINGS, **COMMON}
    for num_done in sample_file(records, output, lambda: model, sp_tokenizer, **asked):
        if num_done >= 4:
            break  # killed between two batches
    part = tmp_path / "again.jsonl.part"
    assert not output.exists() and part.exists()
    if cut:  # in the middle of a line
        part.write_bytes(part.read_bytes()[:-cut])
    assert draw(records, output, sp_tokenizer, model)[0] == (3 if cut else 4)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_part_of_other_settings_is_not_continued(
    records: Path, tmp_path: Path, sp_tokenizer: Tokenizer
) -> None:
    model, output = tiny_model(sp_tokenizer.size), tmp_path / "o.jsonl"
    asked = {"settings": SETTINGS, **COMMON}
    next(sample_file(records, output, lambda: model, sp_tokenizer, **asked))
    with pytest.raises(ConfigError, match=r"o\.jsonl\.part: was begun with other model, seed;"):
        draw(records, output, sp_tokenizer, model, model={"folder": "n"},
             settings=SamplingSettings(num_samples=3, max_new_tokens=12, seed=6))  # fmt: skip


def test_what_cannot_be_sampled(
    write_jsonl: Write,
    records: Path,
    tmp_path: Path,
    sp_tokenizer: Tokenizer,
    bpe_tokenizer: Tokenizer,
) -> None:
    model, output = tiny_model(sp_tokenizer.size), tmp_path / "o.jsonl"
    empty = write_jsonl([{"prompt": "", "reference": "1"}], "empty.jsonl")
    with pytest.raises(TraceError, match=":1: prompt: empty, and the tokenizer sets no BOS"):
        draw(empty, output, bpe_tokenizer, model)
    for bad, message in (
        ([], "holds no record"),
        ([{"prompt": "1", "chosen": "1", "rejected": "2"}], ":1: record: not a plain prompt"),
        ([*sums(2), "{"], ":3: record: not JSON"),
    ):
        with pytest.raises(TraceError, match=message):
            draw(write_jsonl(bad, "bad.jsonl"), output, sp_tokenizer, model)
        assert not list(tmp_path.glob("o.jsonl*"))
    output.write_text("")
    with pytest.raises(ConfigError, match="exists already"):
        draw(records, output, sp_tokenizer, model)
    with pytest.raises(ConfigError, match="with temperature 0 would be equal"):
        SamplingSettings(num_samples=2, temperature=0.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_samples": 0}, "num_samples: 0, expected at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0, expected at least 1"),
        ({"batch_size": 0}, "batch_size: 0, expected at least 1"),
        ({"temperature": -1.0}, "temperature: -1.0, expected 0 (greedy) or 0.0001"),
        ({"temperature": float("inf")}, "temperature: inf, expected 0 (greedy) or 0.0001"),
        ({"top_p": 0.0}, "top_p: 0.0, expected in (0, 1]"),
    ],
)
def test_numbers_that_cannot_be_meant(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingSettings(**changes)
    assert words in str(caught.value)


def test_a_prompt_too_long_is_refused_before_anything_is_begun(
    write_jsonl: Write, tmp_path: Path, sp_tokenizer: Tokenizer
) -> None:
    """The last record of many batches: what came before it would be lost, and block the mending."""
    rows = sums(10, seed=3)
    rows[-1]["prompt"] = "+".join(["1"] * 60) + "?"
    long, output = write_jsonl(rows, "long.jsonl"), tmp_path / "o.jsonl"
    model = tiny_model(sp_tokenizer.size)
    *_, last = read_records(long)
    num = len(encode_record(last, sp_tokenizer).turns[0].prompt_ids)
    assert 128 - 12 < num < 128
    with pytest.raises(TraceError, match=rf":10: prompt: {num} tokens, expected at most 116, the"):
        draw(long, output, sp_tokenizer, model)
    assert not list(tmp_path.glob("o.jsonl*"))
    fitting = SamplingSettings(max_new_tokens=128 - num)
    assert draw(long, output, sp_tokenizer, model, settings=fitting)[-1] == 10


def test_from_samples_to_a_store(records: Path, tmp_path: Path, sp_tokenizer: Tokenizer) -> None:
    draw(records, tmp_path / "a.jsonl", sp_tokenizer, tiny_model(sp_tokenizer.size))
    manifest = prepare_store(
        [tmp_path / "a.jsonl"], tmp_path / "store", sp_tokenizer, builder="on_policy",
        max_length=500, traces_per_record=3, max_deviations=8,
    )  # fmt: skip
    store = Store(tmp_path / "store")
    drawn = [
        sample.ids for record in read_records(tmp_path / "a.jsonl") for sample in record.samples
    ]
    assert manifest["counts"]["stored"] == len(drawn) == 30
    assert manifest["counts"]["deviations"] >= 30  # a random model is wrong everywhere
    for number, ids in enumerate(drawn):
        wrong = [segment.ids for segment in store.trace(number).segments() if segment.role == 2]
        joined = np.concatenate([np.empty(0, np.int32), *wrong]).tolist()
        # What is undone is the sample's own, in its order.
        rest = iter(ids.tolist())
        assert all(token in rest for token in joined)


def test_the_command_from_configuration_to_file(
    records: Path, tmp_path: Path, sp_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(sp_tokenizer.size).save_pretrained(tmp_path / "model")
    main = runpy.run_path(str(ROOT / "launcher/sample.py"))["main"]
    arguments = ["--config", str(ROOT / "configs/quickstart.yaml"), "--model", str(tmp_path / "model"),
                 "--records", str(records), "--output", str(tmp_path / "o.jsonl"),
                 "--num-samples", "2", "--max-new-tokens", "5", "tokenizer.train=null",
                 f"tokenizer.path={sp_tokenizer.path}"]  # fmt: skip
    assert main(arguments) == 0
    assert "10 records, 2 samples each" in capsys.readouterr().out
    assert len(list(read_records(tmp_path / "o.jsonl"))) == 10
    assert main(arguments) == 2
    assert "o.jsonl: exists already" in capsys.readouterr().err
    arguments = [*arguments, f"--output={tmp_path / 'p.jsonl'}", "--max-new-tokens=128"]
    assert main(arguments) == 2
    assert ":1: prompt: " in (error := capsys.readouterr().err) and "at most 0, the" in error
    assert not list(tmp_path.glob("p.jsonl*"))


def test_a_model_of_other_ids_is_refused(tmp_path: Path, sp_tokenizer: Tokenizer) -> None:
    tiny_model(sp_tokenizer.size - 50).save_pretrained(tmp_path / "model")
    with pytest.raises(VocabularyError, match="expected the model's own tokenizer"):
        model_facts(tmp_path / "model", sp_tokenizer)
