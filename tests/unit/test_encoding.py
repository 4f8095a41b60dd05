"""Tokenizers: exact text, no specials from content, no mark on continuations, exact export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from tiny_tokenizers import corpus, write_bpe

from nmar_ds.errors import VocabularyError
from nmar_ds.traces.encoding import (
    Tokenizer,
    add_undo,
    assert_parity,
    load_tokenizer,
    train_sentencepiece,
)

LOOKALIKES = (
    "<UNDO>", "a<UNDO>b <UNDO>", "\uff1c\uff35\uff2e\uff24\uff2f\uff1e", "<UN" + "DO>", "< UNDO >",
    "<s>", "</s>", "<pad>", "<unk>", "<|im_start|>user", "<0x41>", "[UNDO]", "\u00abUNDO\u00bb",
)  # fmt: skip
TEXTS = ("", "so the answer", " lead", "trail ", "two  spaces", "line\n\nline", "12 + 34 = 46",
         "h\u00e9llo \u65e5\u672c", "\u65e5")  # fmt: skip


def dummy_prefix_model(path: Path, source: Tokenizer) -> Path:
    model = model_pb2.ModelProto.FromString(source.path.read_bytes())
    model.normalizer_spec.add_dummy_prefix = True
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("continuation", [False, True])
def test_text_comes_back_exactly(any_tokenizer: Tokenizer, continuation: bool) -> None:
    for text in (*TEXTS, *corpus()[:30]):
        if any_tokenizer.has_prefix_space and text.startswith(" ") and not continuation:
            continue  # ambiguous at the start; refused by encode_record
        if any_tokenizer.size < 200 and not set(text) <= set("".join(corpus()).strip("\n")):
            continue  # characters the small vocabulary lacks
        ids = any_tokenizer.encode(text, continuation=continuation)
        assert ids.dtype == np.int32
        assert any_tokenizer.decode(ids, continuation=continuation) == text


@pytest.mark.parametrize("name", ["sp_tokenizer", "bpe_tokenizer", "bpe_prefix_tokenizer"])
def test_content_never_becomes_special(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    for text in LOOKALIKES:
        for continuation in (False, True):
            ids = tokenizer.encode(text, continuation=continuation)
            assert not tokenizer.is_special[ids].any()
            assert tokenizer.undo_id not in ids
            assert tokenizer.decode(ids, continuation=continuation) == text


def test_specials_contribute_no_text(any_tokenizer: Tokenizer) -> None:
    ids = any_tokenizer.encode("so the", continuation=True)
    marked = [any_tokenizer.undo_id, *ids.tolist(), any_tokenizer.eos_id, any_tokenizer.undo_id]
    assert any_tokenizer.decode(marked, continuation=True) == "so the"


def with_starts(
    tokenizer: Tokenizer, text: str, continuation: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Ids, and where they start, as `turns` gets both."""
    ids = tokenizer.encode_exactly(text, continuation=continuation)
    return ids, tokenizer.starts_of(ids, text, continuation=continuation)


def test_offsets_are_places_where_the_text_can_be_cut(any_tokenizer: Tokenizer) -> None:
    for text in ("so the answer is 12", "h\u00e9llo: 1 + 2 = 3", "\u65e5\u672c: 1", "\u672c\u65e5"):
        for continuation in (False, True):
            ids, starts = with_starts(any_tokenizer, text, continuation)
            assert len(starts) == len(ids) and starts[0] == 0
            for token, start in enumerate(starts.tolist()):
                if start >= 0:
                    before = any_tokenizer.decode(ids[:token], continuation=continuation)
                    assert before == text[:start]


def test_offsets_inside_a_character_are_marked(bpe_tokenizer: Tokenizer) -> None:
    ids, starts = with_starts(bpe_tokenizer, "\U0001f600a", True)
    assert starts.tolist() == [0] + [-1] * (len(ids) - 2) + [1]
    assert bpe_tokenizer.starts_character(ids).tolist() == (starts >= 0).tolist()


def test_offsets_need_text_that_comes_back(small_tokenizer: Tokenizer) -> None:
    with pytest.raises(VocabularyError):
        with_starts(small_tokenizer, "Z", True)


@pytest.mark.parametrize("kind", ["model", "json"])
def test_continuation_carries_no_word_mark(
    kind: str, sp_tokenizer: Tokenizer, bpe_prefix_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer = bpe_prefix_tokenizer
    if kind == "model":
        tokenizer = load_tokenizer(dummy_prefix_model(tmp_path / "d.model", sp_tokenizer))
    assert tokenizer.has_prefix_space
    at_start = tokenizer.encode("12", continuation=False)
    following = tokenizer.encode("12", continuation=True)
    assert tokenizer.decode_bytes(at_start) == b" 12"
    assert tokenizer.decode_bytes(following) == b"12"
    assert tokenizer.decode(at_start) == "12" == tokenizer.decode(following, continuation=True)
    assert tokenizer.piece_class(int(following[0])) == "digit"
    # A prefix space that is a token of its own: the text can be cut before it, not after.
    ids, starts = with_starts(tokenizer, "\n2", False)
    assert tokenizer.decode_bytes(ids[:1]) == b" " and starts.tolist() == [0, -1, 1]


def test_piece_classes(sp_tokenizer: Tokenizer, bpe_tokenizer: Tokenizer) -> None:
    for tokenizer in (sp_tokenizer, bpe_tokenizer):
        for text, expected in (
            ("1", "digit"), ("s", "letter"), (".", "punct"), (" ", "space"), ("\n", "space"),
        ):  # fmt: skip
            (token,) = tokenizer.encode(text, continuation=True).tolist()
            assert tokenizer.piece_class(token) == expected
        assert tokenizer.piece_class(tokenizer.undo_id) == "special"
        assert tokenizer.undo_id not in tokenizer.ordinary_ids()
        assert tokenizer.eos_id not in tokenizer.ordinary_ids()
    classes = {
        bpe_tokenizer.piece_class(int(token)): bpe_tokenizer.piece(int(token))
        for token in bpe_tokenizer.ordinary_ids()
    }
    assert classes["word-digit"].startswith("\u0120")
    (byte, *_) = bpe_tokenizer.encode("\U0001f600", continuation=True).tolist()
    assert bpe_tokenizer.piece_class(byte) == "byte"
    assert byte not in bpe_tokenizer.ordinary_ids()


def test_undo_is_the_next_free_id_and_nothing_moves(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    plain = write_bpe(tmp_path / "plain", add_prefix_space=False)
    before = json.loads((plain / "tokenizer.json").read_text())
    undo = add_undo(plain, tmp_path / "undo")
    after = json.loads((tmp_path / "undo" / "tokenizer.json").read_text())
    assert before["model"] == after["model"]
    assert undo.undo_id == len(before["model"]["vocab"]) == undo.size - 1
    assert undo.pad_id == 2 and undo.eos_id == 1 and undo.bos_id is None and not undo.add_bos
    added = after["added_tokens"][-1]
    assert (added["content"], added["special"], added["normalized"]) == ("<UNDO>", True, False)

    model = model_pb2.ModelProto.FromString(small_tokenizer.path.read_bytes())
    assert model.pieces[-1].piece == "<UNDO>"
    del model.pieces[-1]
    (tmp_path / "bare.model").write_bytes(model.SerializeToString())
    again = add_undo(tmp_path / "bare.model", tmp_path / "again.model")
    assert again.undo_id == len(model.pieces) and again.fingerprint == small_tokenizer.fingerprint
    with pytest.raises(VocabularyError, match="already"):
        add_undo(tmp_path / "again.model", tmp_path / "twice.model")
    with pytest.raises(VocabularyError, match="already"):
        add_undo(tmp_path / "undo", tmp_path / "twice")


def test_missing_undo_names_the_mend(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    plain = write_bpe(tmp_path / "plain", add_prefix_space=False)
    with pytest.raises(VocabularyError, match="add_undo"):
        load_tokenizer(plain)
    with pytest.raises(VocabularyError, match="add_undo"):
        load_tokenizer(small_tokenizer.path, undo_token="<BACK>")


@pytest.mark.parametrize("kind", ["added", "normalized", "piece", "symbol", "normal"])
def test_undo_that_text_can_produce_is_refused(kind: str, tmp_path: Path) -> None:
    if kind in ("symbol", "normal"):
        buffer = tmp_path / "user.model"
        with buffer.open("wb") as writer:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(corpus()), model_writer=writer, vocab_size=60,
                user_defined_symbols=["<UNDO>"], hard_vocab_limit=False, minloglevel=2,
            )  # fmt: skip
        if kind == "normal":
            model = model_pb2.ModelProto.FromString(buffer.read_bytes())
            next(piece for piece in model.pieces if piece.piece == "<UNDO>").type = 1
            buffer.write_bytes(model.SerializeToString())
        with pytest.raises(VocabularyError, match="expected a control symbol"):
            load_tokenizer(buffer)
        return
    folder = write_bpe(tmp_path / "plain", add_prefix_space=False)
    if kind != "piece":
        add_undo(folder, folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    if kind == "added":
        spec["added_tokens"][-1]["special"] = False
    elif kind == "normalized":
        spec["added_tokens"][-1]["normalized"] = True
    else:
        spec["model"]["vocab"]["<UNDO>"] = len(spec["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(VocabularyError, match=r"text can produce|after normalising"):
        load_tokenizer(folder)


def test_stored_truncation_and_padding_are_ignored(
    bpe_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = bpe_tokenizer.save(tmp_path / "t").parent
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["truncation"] = {
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    spec["padding"] = {
        "strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 2, "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    text = "so the answer is 12 + 34 and no more"
    ids = load_tokenizer(folder).encode(text, continuation=False)
    assert ids.tolist() == bpe_tokenizer.encode(text, continuation=False).tolist()


def test_a_stop_token_is_required(tmp_path: Path, bpe_tokenizer: Tokenizer) -> None:
    folder = bpe_tokenizer.save(tmp_path / "t").parent
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(VocabularyError, match="eos_token"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "so"}')
    with pytest.raises(VocabularyError, match="not a special token"):
        load_tokenizer(folder)


def test_other_decoders_are_refused(tmp_path: Path, bpe_tokenizer: Tokenizer) -> None:
    folder = bpe_tokenizer.save(tmp_path / "t").parent
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(VocabularyError, match="WordPiece"):
        load_tokenizer(folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b"\xff\xfe", b"[1]", b'{"model": 3}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "x.model"])
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VocabularyError):
        load_tokenizer(tmp_path / name)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no.model", tmp_path / "no"):
        with pytest.raises(VocabularyError, match="expected"):
            load_tokenizer(path)


def test_saved_copy_is_the_same_tokenizer(any_tokenizer: Tokenizer, tmp_path: Path) -> None:
    any_tokenizer.save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert copy.fingerprint == any_tokenizer.fingerprint
    assert len(any_tokenizer.fingerprint) == 64


def test_fingerprint_sees_every_setting(sp_tokenizer: Tokenizer, tmp_path: Path) -> None:
    seen = {sp_tokenizer.fingerprint}

    def changed(change: object) -> None:
        model = model_pb2.ModelProto.FromString(sp_tokenizer.path.read_bytes())
        change(model)  # type: ignore[operator]
        (tmp_path / "changed.model").write_bytes(model.SerializeToString())
        seen.add(load_tokenizer(tmp_path / "changed.model").fingerprint)

    changed(lambda model: setattr(model.pieces[270], "piece", "zz"))
    changed(lambda model: setattr(model.pieces[270], "score", -3.5))
    changed(lambda model: setattr(model.normalizer_spec, "add_dummy_prefix", True))
    changed(lambda model: setattr(model.normalizer_spec, "remove_extra_whitespaces", True))
    assert len(seen) == 5


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_training_is_repeatable(tmp_path: Path, model_type: str) -> None:
    made = [
        train_sentencepiece(corpus(), tmp_path / name, vocab_size=64, model_type=model_type, seed=3)
        for name in ("a", "b")
    ]
    assert made[0].path.read_bytes() == made[1].path.read_bytes()
    tokenizer = made[0]
    assert tokenizer.size <= 64
    assert {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.undo_id} == set(
        range(tokenizer.size - 4, tokenizer.size)
    )
    assert [tokenizer.piece(t) for t in tokenizer.encode("123", continuation=False)] == [
        "1",
        "2",
        "3",
    ]


def test_untrainable_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match="vocab_size"):
        train_sentencepiece([], tmp_path / "none", vocab_size=50)
    with pytest.raises(VocabularyError, match="model_type"):
        train_sentencepiece(corpus(), tmp_path / "none", vocab_size=50, model_type="word")


@pytest.mark.parametrize("kind", ["sp", "small", "bpe", "bpe_prefix", "dummy"])
def test_export_is_exact_in_plain_transformers(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    if kind == "dummy":
        source = request.getfixturevalue("sp_tokenizer")
        tokenizer = load_tokenizer(dummy_prefix_model(tmp_path / "d.model", source))
    else:
        tokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    tokenizer.save_transformers(tmp_path / "hf")
    texts = [text for text in corpus()[:80] if not text.startswith(" ")]
    literal = [] if kind == "small" else [*LOOKALIKES, *TEXTS]
    assert_parity(tokenizer, tmp_path / "hf", [*texts, *literal])
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in [*texts, *literal]:
        ids = exported(text, add_special_tokens=False).input_ids
        assert ids == tokenizer.encode(text, continuation=False).tolist(), text
        ours = tokenizer.encode(text, continuation=True).tolist()
        if not tokenizer.has_prefix_space:
            assert exported.decode(ours, clean_up_tokenization_spaces=False) == text
    assert exported.convert_tokens_to_ids("<UNDO>") == tokenizer.undo_id
    assert "<UNDO>" in exported.all_special_tokens
    assert exported.decode([tokenizer.undo_id, *ours], skip_special_tokens=True).lstrip(
        " "
    ) == exported.decode(ours).lstrip(" ")
    assert exported.eos_token_id == tokenizer.eos_id and exported.pad_token_id == tokenizer.pad_id
    first = exported("so the answer").input_ids[0]
    assert (first == tokenizer.bos_id) == tokenizer.add_bos
    # Parsed as a special when that is asked for, text by default.
    assert tokenizer.undo_id in exported("1<UNDO>2", split_special_tokens=False).input_ids


def test_chat_templates_keep_their_specials(bpe_tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = bpe_tokenizer.save(tmp_path / "chat").parent
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{m.content}}</s>{% endfor %}"
    )
    load_tokenizer(folder).save_transformers(tmp_path / "hf")
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = exported.apply_chat_template([{"role": "user", "content": "so"}])["input_ids"]
    assert ids[-1] == bpe_tokenizer.eos_id


def test_parity_names_the_first_text_that_differs(
    sp_tokenizer: Tokenizer, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    small_tokenizer.save_transformers(tmp_path / "hf")
    with pytest.raises(VocabularyError, match="'so the answer'"):
        assert_parity(sp_tokenizer, tmp_path / "hf", ["so the answer"])
    with pytest.raises(VocabularyError, match="undo_id"):
        assert_parity(sp_tokenizer, tmp_path / "hf", [])


def test_normalising_models_are_not_converted(tmp_path: Path) -> None:
    with (tmp_path / "n.model").open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus()), model_writer=writer, vocab_size=60,
            control_symbols=["<UNDO>"], hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    with pytest.raises(VocabularyError, match="normalises text"):
        load_tokenizer(tmp_path / "n.model").save_transformers(tmp_path / "hf")
