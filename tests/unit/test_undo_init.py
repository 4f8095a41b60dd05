"""How `<UNDO>` starts: texts to ids, ids to rows by hand, and the norms that are shown of them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, build

from nmar_ds.config import UndoInitSection
from nmar_ds.errors import ConfigError
from nmar_ds.model.row_norms import ROW_TAGS, as_scalars, describe, row_norms
from nmar_ds.model.training_model import UndoTrainingModel
from nmar_ds.model.undo_init import UndoInit, resolve_undo_init
from nmar_ds.model.vocabulary import add_undo_rows, known_rows

torch.set_num_threads(1)

# --- texts to ids -------------------------------------------------------------------------------


def _resolve(tokenizer, **section):
    return resolve_undo_init(UndoInitSection(**section), tokenizer, 9)


def _one_id(tokenizer):
    """A text that is one id in the middle of a text, and that id."""
    for number in tokenizer.ordinary_ids().tolist():
        text = tokenizer.decode([number], continuation=True)
        if text.startswith(" ") and tokenizer.encode(text, continuation=True).tolist() == [number]:
            return text, number
    raise AssertionError("no such text")


def test_no_section_is_the_mean_without_the_specials(any_tokenizer):
    init = resolve_undo_init(None, any_tokenizer, 9)
    special = np.flatnonzero(any_tokenizer.is_special).tolist()
    assert any_tokenizer.undo_id in special and any_tokenizer.eos_id in special
    assert init == UndoInit(seed=9, excluded_ids=tuple(special))
    assert str(init) == "mean of the known rows"


def test_copy_takes_a_piece_or_a_text_of_one_id(any_tokenizer):
    text, number = _one_id(any_tokenizer)
    piece = any_tokenizer.piece(number)
    for token in (piece, text):
        init = _resolve(any_tokenizer, method="copy", token=token, noise=0.5, output_bias=-1.0)
        assert (init.method, init.sources) == ("copy", ((number,),))
        assert (init.noise, init.output_bias, init.seed) == (0.5, -1.0, 9)
        assert str(init) == f"copy of {token!r} (id {number}), noise 0.5"


def test_anchors_keep_their_ids_apart(any_tokenizer):
    init = _resolve(any_tokenizer, method="semantic", anchors=[" carry", " 123456"])
    expected = [
        any_tokenizer.encode(text, continuation=True).tolist() for text in (" carry", " 123456")
    ]
    assert [list(ids) for ids in init.sources] == expected
    assert len(expected[1]) > 1, "an anchor of several ids"
    assert str(init).startswith("mean of ' carry' (id ")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (dict(method="copy", token=" 1234"), r"undo_init.token: ' 1234' is no piece .* to \d ids"),
        (dict(method="copy", token=""), "undo_init.token: '' is no piece .* encodes to 0 ids"),
        (dict(method="copy", token="<UNDO>"), "undo_init.token: '<UNDO>' is the undo token itself"),
        (dict(method="semantic", anchors=[" 1", ""]), r"anchors\[1\]: '' encodes to no id"),
    ],
)
def test_texts_that_give_no_row_are_one_line(any_tokenizer, section, message):
    with pytest.raises(ConfigError, match=message) as caught:
        _resolve(any_tokenizer, **section)
    assert "\n" not in str(caught.value)


def test_an_anchor_that_becomes_a_special_is_refused(small_tokenizer):
    """This vocabulary has no bytes for unknown characters, so they become `<unk>`."""
    for section in (
        dict(method="semantic", anchors=["\u2603"]),
        dict(method="copy", token="\u2603"),
    ):
        with pytest.raises(ConfigError, match=r"undo_init\.(anchors\[0\]|token): .*special token"):
            _resolve(small_tokenizer, **section)


# --- ids to rows --------------------------------------------------------------------------------

# Five known rows of two coordinates, then one for <UNDO>.
ROWS = [[1.0, 2.0], [3.0, 4.0], [100.0, 100.0], [5.0, 0.0], [7.0, 6.0], [-9.0, -9.0]]
BIAS = [1.0, 2.0, 100.0, 4.0, 5.0, -9.0]
SPECIAL = (2,)  # row 2 is a reserved token: out of every mean


class _Toy(torch.nn.Module):
    """As much of a language model as the rows need, with numbers that can be followed."""

    def __init__(self, *, tied, bias, dtype=torch.float64):
        super().__init__()
        self.embed = torch.nn.Embedding(6, 2, dtype=dtype)
        self.head = torch.nn.Linear(2, 6, bias=bias, dtype=dtype)
        with torch.no_grad():
            self.embed.weight.copy_(torch.tensor(ROWS))
            self.head.weight.copy_(torch.tensor(ROWS) * 10)
            if bias:
                self.head.bias.copy_(torch.tensor(BIAS))
        if tied:
            self.head.weight = self.embed.weight
        self.config = type("C", (), {"tie_word_embeddings": tied, "get_text_config": lambda c: c})()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head


def _rows(init, *, tied=False, bias=True, **more):
    model = _Toy(tied=tied, bias=bias, **more)
    add_undo_rows(model, undo_id=5, num_known_rows=6, init=init)
    kept = torch.tensor(ROWS)[:5].to(model.embed.weight)
    assert torch.equal(model.embed.weight[:5], kept)
    offset = model.head.bias[5].item() if bias else None
    return model.embed.weight[5].tolist(), model.head.weight[5].tolist(), offset


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_mean_by_hand(tied, bias):
    """(1 + 3 + 5 + 7) / 4 = 4 and (2 + 4 + 0 + 6) / 4 = 3; the bias (1 + 2 + 4 + 5) / 4 = 3."""
    row, out, offset = _rows(UndoInit(excluded_ids=SPECIAL), tied=tied, bias=bias)
    assert row == [4.0, 3.0]
    assert out == ([4.0, 3.0] if tied else [40.0, 30.0])
    assert offset == (3.0 if bias else None)


@pytest.mark.parametrize("tied", [True, False])
def test_copy_by_hand(tied):
    """The row itself in both matrices; the bias is the mean's, with the offset."""
    init = UndoInit(
        method="copy", sources=((3,),), labels=("x",), excluded_ids=SPECIAL, output_bias=-2.5
    )
    row, out, offset = _rows(init, tied=tied)
    assert row == [5.0, 0.0]
    assert out == ([5.0, 0.0] if tied else [50.0, 0.0])
    assert offset == 0.5


def test_semantic_by_hand():
    """Anchors (rows 0 and 4: mean (4, 4)) and (row 3: (5, 0)): mean (4.5, 2).

    A mean over the three ids would be (13/3, 8/3).
    """
    init = UndoInit(
        method="semantic", sources=((0, 4), (3,)), labels=("a", "b"), excluded_ids=SPECIAL
    )
    row, out, offset = _rows(init)
    assert row == [4.5, 2.0]
    assert out == [45.0, 20.0]
    assert offset == 3.0


def test_a_special_may_be_copied_though_it_enters_no_mean():
    init = UndoInit(method="copy", sources=((2,),), labels=("</s>",), excluded_ids=SPECIAL)
    assert _rows(init)[0] == [100.0, 100.0]


def test_noise_by_hand():
    """Deviations of the known rows (1, 3, 5, 7) and (2, 4, 0, 6): both have variance 5.

    Row = mean + noise * sqrt(5) * z; ten times that in the head, with a z of its own.
    """
    mean, out_mean, _ = _rows(UndoInit(excluded_ids=SPECIAL, seed=4))
    init = UndoInit(excluded_ids=SPECIAL, seed=4, noise=0.1)
    row, out, offset = _rows(init)
    z = (np.array(row) - mean) / (0.1 * math.sqrt(5))
    z_out = (np.array(out) - out_mean) / (0.1 * 10 * math.sqrt(5))
    assert offset == 3.0, "no noise on the bias"
    assert 0.01 < np.abs(z).min() and np.abs(z).max() < 4
    assert not np.allclose(z, z_out, atol=1e-3)
    half, *_ = _rows(dataclasses.replace(init, noise=0.05))
    np.testing.assert_allclose((np.array(half) - mean) * 2, np.array(row) - mean, rtol=1e-12)
    assert _rows(init)[:2] == (row, out), "the same seed, the same row"
    torch.manual_seed(77)
    assert _rows(init)[:2] == (row, out), "and no other generator has a say"
    assert _rows(dataclasses.replace(init, seed=5))[0] != row


def test_the_scale_of_the_noise():
    """Over many coordinates, each as wide as it is among the known rows."""
    model = build(hidden_size=512, num_attention_heads=4, tied=False)
    scale = torch.linspace(0.5, 2.0, 512)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)
        known = model.get_input_embeddings().weight[:60].clone()
    add_undo_rows(model, undo_id=60, num_known_rows=61, init=UndoInit(noise=0.3, seed=1))
    row = model.get_input_embeddings().weight[60].detach()
    z = (row - known.mean(0)) / (0.3 * known.std(0, correction=0))
    assert abs(float(z.mean())) < 0.15
    assert float(z.std()) == pytest.approx(1.0, abs=0.1)
    assert float(z[:256].std()) == pytest.approx(float(z[256:].std()), abs=0.2)


@pytest.mark.parametrize("tied", [True, False])
def test_of_a_grown_matrix_only_the_undo_row_is_special(tied):
    """Padding rows get the plain mean: a copy of a token would be a second class of its own."""
    model = build(tied=tied)
    old = [m.weight.detach().clone() for m in (model.model.embed_tokens, model.lm_head)]
    init = UndoInit(method="copy", sources=((7,),), labels=("x",), noise=0.2, excluded_ids=(0,))
    report = add_undo_rows(
        model, undo_id=VOCAB, num_known_rows=VOCAB, init=init, pad_to_multiple_of=32
    )
    assert report.rows_after == 64
    for module, before in zip((model.model.embed_tokens, model.lm_head), old, strict=True):
        assert torch.equal(module.weight[:VOCAB], before)
        mean = before[1:].double().mean(0).float()
        torch.testing.assert_close(module.weight[VOCAB + 1 :], mean.expand(64 - VOCAB - 1, -1))
        assert (module.weight[VOCAB] - before[7]).abs().max().item() > 0.01
    assert str(report).startswith("copy of 'x' (id 7), noise 0.2; resized from 61 to 64 rows")


def test_phi_has_a_bias_and_gets_its_offset():
    model = build("phi")
    before = model.lm_head.bias.detach().clone()
    add_undo_rows(model, undo_id=VOCAB, num_known_rows=VOCAB, init=UndoInit(output_bias=-2.0))
    assert model.lm_head.bias[VOCAB].item() == pytest.approx(float(before.mean()) - 2.0, abs=1e-6)
    assert torch.equal(model.lm_head.bias[:VOCAB], before)


# --- norms --------------------------------------------------------------------------------------


def test_norms_by_hand():
    """Known rows (3, 4), (0, 1) and (0, 0): norms 5, 1, 0, mean 2; the special row is left out."""
    embedding = torch.tensor([[3.0, 4.0], [90.0, 90.0], [0.0, 1.0], [0.0, 0.0], [6.0, 8.0]])
    known = known_rows(5, 4, (1,))
    assert known.tolist() == [True, False, True, True, False]
    norms = row_norms(embedding, embedding, None, known_K=known, undo_id=4)
    assert norms.dtype == torch.float64 and norms.tolist() == [10.0, 10.0, 2.0, 2.0]
    norms = row_norms(embedding, embedding * 2, torch.arange(5.0), known_K=known, undo_id=4)
    assert norms.tolist() == [10.0, 20.0, 2.0, 4.0, 4.0]
    scalars = as_scalars(norms)
    assert scalars == dict(zip(ROW_TAGS, [10.0, 20.0, 2.0, 4.0, 4.0], strict=True))
    assert describe(scalars) == ("norm 10 in (mean of known rows 2), 20 out (4), output bias 4")
    del scalars["undo_row/output_bias"]
    assert describe(scalars) == "norm 10 in (mean of known rows 2), 20 out (4)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_more_rows_than_a_chunk(dtype):
    matrix = (torch.randn(10_000, 8) + 1).to(dtype)
    known = known_rows(9_999, 9_998, range(100, 200))
    assert known.sum() == 9_999 - 101
    norms = row_norms(matrix, matrix, None, known_K=known, undo_id=9_998)
    expected = matrix.double().norm(dim=1)
    assert norms[2].item() == pytest.approx(expected[:9_999][known].mean().item(), rel=1e-12)
    assert norms[0].item() == pytest.approx(expected[9_998].item(), rel=1e-12)


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("phi", False)])
def test_the_training_module_gives_the_norms(family, tied):
    lm = build(family, tied=tied)
    known = known_rows(VOCAB, 60, (0, 3))
    norms = UndoTrainingModel(lm)(mode="row_norms", known_K=known, undo_id=60)
    rows = lm.get_input_embeddings().weight.double(), lm.lm_head.weight.double()
    expected = [float(m[60].norm()) for m in rows]
    expected += [float(m[known.nonzero()[:, 0]].norm(dim=1).mean()) for m in rows]
    if family == "phi":
        expected.append(float(lm.lm_head.bias[60]))
    assert norms.tolist() == pytest.approx(expected, rel=1e-9)
    assert not norms.requires_grad
