"""The row of `<UNDO>`: spare or new, tied or not, never at the price of another row."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
import transformers
from tiny_models import FAMILIES, VOCAB, build

from nmar_ds.errors import ConfigError, VocabularyError
from nmar_ds.model.undo_init import UndoInit
from nmar_ds.model.vocabulary import add_undo_rows

torch.set_num_threads(1)


def _parts(model):
    head = model.get_output_embeddings()
    return [model.get_input_embeddings().weight, head.weight, getattr(head, "bias", None)]


def _copy(model):
    return [None if part is None else part.detach().clone() for part in _parts(model)]


def _check(model, before, *, undo_id, num_known_rows, rows):
    """All parts have `rows` rows, the undo row is the mean, and every old row is untouched."""
    for part, old in zip(_parts(model), before, strict=True):
        if old is None:
            assert part is None
            continue
        assert part.shape == (rows, *old.shape[1:])
        known = [i for i in range(num_known_rows) if i != undo_id]
        mean = old[known].float().mean(0).to(old.dtype)
        torch.testing.assert_close(part.detach()[undo_id], mean, rtol=1e-6, atol=1e-7)
        kept = [i for i in range(len(old)) if i != undo_id]
        assert torch.equal(part.detach()[kept], old[kept])
    assert model.config.vocab_size == rows
    head = model.get_output_embeddings()
    assert head.out_features == rows
    assert (head.weight is model.get_input_embeddings().weight) == model.config.tie_word_embeddings


def _run(model, undo_id):
    """The model must still run, and give the undo id a logit."""
    logits = model(input_ids=torch.tensor([[1, 2, undo_id]]), use_cache=False).logits
    assert logits.shape[-1] > undo_id
    assert torch.isfinite(logits).all()


CASES = [
    (family, tied) for family in FAMILIES for tied in (True, False) if family != "phi" or not tied
]


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_one_row_is_added(family, tied):
    model = build(family, tied=tied)
    before = _copy(model)
    report = add_undo_rows(model, undo_id=VOCAB, num_known_rows=VOCAB)
    _check(model, before, undo_id=VOCAB, num_known_rows=VOCAB, rows=VOCAB + 1)
    assert (report.rows_before, report.rows_after) == (VOCAB, VOCAB + 1)
    assert (report.reused_spare_row, report.tied) == (False, tied)
    assert f"mean of the known rows; resized from {VOCAB} to {VOCAB + 1} rows" in str(report)
    _run(model, VOCAB)


@pytest.mark.parametrize(("family", "tied"), CASES)
@pytest.mark.parametrize("undo_id", [50, 55, VOCAB - 1])
def test_a_spare_row_is_reused_and_nothing_shrinks(family, tied, undo_id, monkeypatch):
    """A model padded from 50 tokens to 61 rows, as Qwen and Gemma are."""
    model = build(family, tied=tied)
    with torch.no_grad():  # padding rows are often zero or wild; they must not enter the mean
        for part in _parts(model):
            if part is not None:
                part[50:] = 100.0
    before = _copy(model)
    monkeypatch.setattr(type(model), "resize_token_embeddings", None)  # must not be called
    report = add_undo_rows(model, undo_id=undo_id, num_known_rows=50)
    assert report.reused_spare_row
    assert f"; spare row reused, {VOCAB} rows" in str(report)
    _check(model, before, undo_id=undo_id, num_known_rows=50, rows=VOCAB)
    _run(model, undo_id)


def test_a_reserved_row_among_the_known_ones_is_left_out_of_the_mean():
    """SmolLM2's spare tokens lie at ids 3 to 16."""
    model = build()
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = 1000.0
    before = _copy(model)
    add_undo_rows(model, undo_id=5, num_known_rows=VOCAB)
    _check(model, before, undo_id=5, num_known_rows=VOCAB, rows=VOCAB)


@pytest.mark.parametrize("tied", [True, False])
def test_every_new_row_is_set_whatever_the_random_state(tied):
    """New rows are random and differ between ranks until they are overwritten."""
    results = []
    for seed in (0, 1):
        model = build(tied=tied)
        torch.manual_seed(seed)
        report = add_undo_rows(
            model, undo_id=VOCAB + 4, num_known_rows=VOCAB, pad_to_multiple_of=32
        )
        assert report.rows_after == 96 == model.config.vocab_size
        results.append(_copy(model))
        assert torch.equal(results[-1][0][VOCAB:], results[-1][0][-1:].expand(96 - VOCAB, -1))
    assert all(torch.equal(a, b) for a, b in zip(*(r[:2] for r in results), strict=True))


def test_a_multiple_does_not_grow_a_model_that_has_a_row():
    model = build()
    add_undo_rows(model, undo_id=VOCAB - 1, num_known_rows=50, pad_to_multiple_of=64)
    assert model.config.vocab_size == VOCAB


def test_ties_are_read_from_the_configuration():
    """Two matrices that happen to share memory are still two, and the other way round."""
    model = build(tied=False)
    model.lm_head.weight.data = model.get_input_embeddings().weight.data
    assert not add_undo_rows(model, undo_id=VOCAB, num_known_rows=VOCAB).tied
    assert model.lm_head.weight.shape == (VOCAB + 1, 32)
    torch.testing.assert_close(model.lm_head.weight[VOCAB], model.lm_head.weight[:VOCAB].mean(0))


def test_the_mean_is_taken_in_float32():
    """Rounded once, at the end; a bfloat16 sum of 4000 rows would be far off."""
    model = build(dtype=torch.bfloat16, vocab_size=4000)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1.0)
    before = _copy(model)
    add_undo_rows(model, undo_id=4000, num_known_rows=4000)
    assert model.dtype == torch.bfloat16
    expected = before[0].double().mean(0)
    error = (model.get_input_embeddings().weight[4000].double() - expected).abs().max()
    assert error <= float(expected.abs().max()) * 2**-8


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("phi", False)])
def test_the_row_survives_saving(tmp_path, family, tied):
    model = build(family, tied=tied)
    add_undo_rows(model, undo_id=VOCAB, num_known_rows=VOCAB)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    for ours, theirs in zip(_parts(model), _parts(loaded), strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert loaded.config.vocab_size == VOCAB + 1


def test_a_head_with_a_bias_patched_in():
    model = build("llama")
    model.lm_head = torch.nn.Linear(32, VOCAB, bias=True)
    before = _copy(model)
    add_undo_rows(model, undo_id=VOCAB, num_known_rows=VOCAB)
    _check(model, before, undo_id=VOCAB, num_known_rows=VOCAB, rows=VOCAB + 1)
    assert model.lm_head.bias[VOCAB].item() == pytest.approx(before[2].mean().item(), abs=1e-6)


def test_training_reaches_the_new_row():
    model = build(tied=False)
    add_undo_rows(model, undo_id=VOCAB, num_known_rows=VOCAB)
    model(input_ids=torch.tensor([[1, VOCAB, 2]]), use_cache=False).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad[VOCAB].any()
    assert model.lm_head.weight.grad[VOCAB].any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(undo_id=5, num_known_rows=62), VocabularyError, "61 embedding rows, .* 62 tokens"),
        (dict(undo_id=5, num_known_rows=0), VocabularyError, "61 embedding rows"),
        (dict(undo_id=-1, num_known_rows=61), VocabularyError, "undo id -1"),
        (dict(undo_id=0, num_known_rows=1), VocabularyError, "none of the 1 tokens"),
        (
            dict(undo_id=61, num_known_rows=2, init=UndoInit(excluded_ids=(0, 1))),
            VocabularyError,
            "none of the 2 tokens is an ordinary one beside undo id 61",
        ),
        *(
            (
                dict(
                    undo_id=5, num_known_rows=40, init=UndoInit(sources=((3, bad),), labels=("a",))
                ),
                VocabularyError,
                f"id {bad} has no known row, expected one of the 40 tokens",
            )
            for bad in (-1, 5, 40)
        ),
        (
            dict(undo_id=5, num_known_rows=61, init=UndoInit(output_bias=-2.0)),
            ConfigError,
            "output_bias: -2, but the head of LlamaForCausalLM has no bias; drop it",
        ),
    ],
)
def test_impossible_requests_are_refused(arguments, error, message):
    model = build()
    before = _copy(model)
    with pytest.raises(error, match=message):
        add_undo_rows(model, **arguments)
    assert all(a is b or torch.equal(a, b) for a, b in zip(_copy(model), before, strict=True))


def test_a_head_of_another_size_is_refused():
    model = build()
    model.lm_head = torch.nn.Linear(32, VOCAB + 3, bias=False)
    with pytest.raises(VocabularyError, match="head has 64 rows, expected the embedding's 61"):
        add_undo_rows(model, undo_id=VOCAB, num_known_rows=VOCAB)


def test_deepspeed_is_not_needed_without_partitions(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # importing it would now fail
    monkeypatch.delitem(sys.modules, "nmar_ds.model.vocabulary")
    add_undo_rows = importlib.import_module("nmar_ds.model.vocabulary").add_undo_rows
    add_undo_rows(build(tied=False), undo_id=VOCAB, num_known_rows=VOCAB)
    partitioned = build(tied=False)
    partitioned.lm_head.weight.ds_id = 7
    with pytest.raises(ImportError):
        add_undo_rows(partitioned, undo_id=VOCAB - 1, num_known_rows=VOCAB)
