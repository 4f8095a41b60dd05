"""Third-party SentencePiece models: ids as the sentencepiece library's, here and in transformers."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from test_planning import config
from tiny_tokenizers import corpus

from nmar_ds.data.prepare import prepare_run
from nmar_ds.data.store import Store
from nmar_ds.errors import TraceError, VocabularyError
from nmar_ds.model.folder import check_model_folder
from nmar_ds.traces.encoding import Tokenizer, add_undo, load_tokenizer
from nmar_ds.traces.merges import InexpressibleError, derive_merges
from nmar_ds.traces.parity import CheckedTokenizer, check_records, checked
from nmar_ds.traces.records import read_records
from nmar_ds.traces.schema import Role
from nmar_ds.traces.sentencepiece_vocabulary import add_control_piece

REAL = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
NORMAL, UNKNOWN, CONTROL, SYMBOL, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
TEXTS = (
    "", "a", " ", "  ", " lead", "trail  ", "two  spaces   three    four", "1234567890 - 3.14159",
    "\ttab\t\ttabs", "line\n\n\n    indented\r\n", "h\u00e9llo na\u00efve \u65e5\u672c\u8a9e\u306e\u6587",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u0645\u0631\u062d\u0628\u0627 \u041f\u0440\u0438\u0432\u0435\u0442 e\u0301 \ufb01", "<UNDO>a<UNDO>",
    "[INST] <s>x</s> [/INST] <unk><0x41>", "[control_8][IMG]", "def f(x):\n                 return x",
    "-" * 70 + "=" * 33, "x\x00y\ufeff\u200b\u3000", "\u2581mark\u2581", *corpus()[:20],
    *("." * number + " " * number + "z" for number in range(1, 70)),
)  # fmt: skip
SYMBOL_TEXTS = ("a[REFERENCE_DOC_3] b", "[REFERENCE_DOC_19]x", " [REFERENCE_DOC_1]")


def real_model(name: str) -> Path:
    found = importlib.util.find_spec("mistral_common")
    assert found is not None and found.origin, "pip install -e '.[dev]' brings mistral-common"
    return Path(found.origin).parent / "data" / REAL[name]


def llama_folder(folder: Path, model: Path, **tokenizer_config: Any) -> Path:
    """A model folder with random weights and the .model alone as its tokenizer."""
    import transformers

    size = len(model_pb2.ModelProto.FromString(model.read_bytes()).pieces)
    lm = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=size, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, max_position_embeddings=64,
        )
    )  # fmt: skip
    lm.save_pretrained(folder)
    shutil.copyfile(model, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", **tokenizer_config})
    )
    return folder


def write_model(path: Path, pieces: list[tuple[str, float, int]], **spec: Any) -> Path:
    """A model of given pieces, after unknown, bos and eos at 0 to 2."""
    model = model_pb2.ModelProto()
    named = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), *pieces]
    for piece, score, kind in dict((entry[0], entry) for entry in reversed(named)).values():
        model.pieces.add(piece=piece, score=score, type=kind)
    kept = sorted(model.pieces, key=lambda piece: [name for name, *_ in named].index(piece.piece))
    del model.pieces[:]
    model.pieces.extend(kept)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = 1 if spec.get("unigram") else 2
    trainer.byte_fallback = spec.get("byte_fallback", False)
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    trainer.vocab_size = len(model.pieces)
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = spec.get("add_dummy_prefix", False)
    normalizer.remove_extra_whitespaces = spec.get("remove_extra_whitespaces", False)
    path.write_bytes(model.SerializeToString())
    return path


def alphabet(letters: str) -> list[tuple[str, float, int]]:
    return [(letter, -20.0 - number, NORMAL) for number, letter in enumerate(letters)]


def converted(tokenizer: Tokenizer, folder: Path) -> CheckedTokenizer:
    tokenizer.save_transformers(folder)
    return CheckedTokenizer(tokenizer, folder)


@pytest.mark.parametrize("name", REAL)
def test_real_models_equal_sentencepiece_and_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from nmar_ds.training.export import _write_tokenizer

    model = real_model(name)
    folder = llama_folder(tmp_path / "llama", model)
    tokenizer = add_undo(folder, tmp_path / "undo")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert tokenizer.undo_id == reference.get_piece_size() == tokenizer.size - 1
    check_model_folder(folder, tokenizer_size=tokenizer.size, tokenizer_fingerprint="")
    exported = tmp_path / "exported"
    shutil.copytree(folder, exported)
    (exported / "tokenizer.model").unlink()
    facts = {"undo_token": "<UNDO>", "semantics": "token", "context": "linear"}
    _write_tokenizer(tokenizer, tmp_path / "undo", facts, exported)
    plain = AutoTokenizer.from_pretrained(exported)
    plain.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    compared = CheckedTokenizer(tokenizer, exported)
    for text in [*TEXTS, *SYMBOL_TEXTS]:
        ids = compared.encode(text, continuation=False).tolist()
        assert ids == reference.encode(text), text
        assert not tokenizer.is_special[ids].any()
        for loaded in (plain, again):
            assert loaded(text, add_special_tokens=False).input_ids == ids, text
            assert loaded(text).input_ids == [1, *ids]
            # SentencePiece spells a literal mark as the space that it stands for.
            assert loaded.decode(ids) == text.replace("\u2581", " ")
            assert loaded.convert_tokens_to_ids("<UNDO>") == tokenizer.undo_id
            assert loaded("<UNDO>", split_special_tokens=False).input_ids[-1] == tokenizer.undo_id
        following = compared.encode(text, continuation=True)
        assert tokenizer.decode(following, continuation=True) == text.replace("\u2581", " ")
    if name != "v1":
        (inst,) = plain.convert_tokens_to_ids(["[INST]"])
        assert tokenizer.is_special[inst] and tokenizer.piece(inst) == "[INST]"


def test_transformers_alone_cuts_a_bare_model_differently(tmp_path: Path) -> None:
    """Why the model is converted here: transformers' own reading of the folder has other ids."""
    from transformers import AutoTokenizer

    folder = llama_folder(tmp_path / "llama", real_model("v3"))
    theirs = AutoTokenizer.from_pretrained(folder)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert any(
        theirs(text, add_special_tokens=False).input_ids != reference.encode(text)
        for text in [*TEXTS, *SYMBOL_TEXTS]
    )


@pytest.fixture(scope="module")
def real_checked(tmp_path_factory: pytest.TempPathFactory) -> CheckedTokenizer:
    folder = tmp_path_factory.mktemp("v7")
    shutil.copyfile(real_model("v7"), folder / "tokenizer.model")
    return converted(add_undo(folder, folder / "undo"), folder / "hf")


FRAGMENTS = st.one_of(
    st.text(max_size=12), st.text("ab 1.\u2581\n-", max_size=20),
    st.sampled_from(["<UNDO>", "[INST]", "</s>", "[REFERENCE_DOC_12]", "<0x0A>", " the", "    "]),
)  # fmt: skip


@given(st.lists(FRAGMENTS, max_size=8).map("".join), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_text_is_equal_or_refused(
    real_checked: CheckedTokenizer, text: str, continuation: bool
) -> None:
    if text.startswith("[REFERENCE_DOC_12]") and len(text) == 18 and not continuation:
        with pytest.raises(VocabularyError, match="REFERENCE_DOC_12"):
            real_checked.encode(text, continuation=False)
        return
    ids = real_checked.encode(text, continuation=continuation)  # compares with tokenizer.json
    assert not real_checked.is_special[ids].any()
    said = real_checked.decode(ids, continuation=continuation)
    assert said == text.replace("\u2581", " ")


def random_pieces(rng: random.Random) -> list[tuple[str, float, int]]:
    letters = "\u2581abc"
    pieces = [(letter, -30.0, NORMAL) for letter in letters]
    for _ in range(rng.randint(0, 16)):
        text = "".join(rng.choice(letters) for _ in range(rng.randint(2, 6)))
        score = -float(rng.randint(1, 8)) if rng.random() < 0.5 else -rng.random()
        pieces.append((text, score, rng.choice((NORMAL,) * 9 + (UNUSED,))))
    if rng.random() < 0.4:
        pieces += [("\u2581" * n, -9.0, NORMAL) for n in rng.sample(range(2, 10), 5)]
    if rng.random() < 0.4:
        pieces += [("ab", 0.0, SYMBOL), ("\u2581\u2581b", 0.0, SYMBOL)]
    controls = [("<cab>", 0.0, CONTROL), ("cab", 0.0, CONTROL)]
    return controls + pieces if rng.random() < 0.5 else pieces + controls


def test_random_bpe_models_are_exact_or_refused(tmp_path: Path) -> None:
    """Scores in any order, many equal, runs of spaces, symbols, controls first or last."""
    rng = random.Random(7)
    num_exact = num_refused = 0
    for number in range(120):
        path = write_model(
            tmp_path / f"{number}.model", random_pieces(rng), add_dummy_prefix=number % 2 == 0
        )
        reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
        tokenizer = add_undo(path, tmp_path / f"{number}u.model")
        try:
            compared = converted(tokenizer, tmp_path / "hf")
        except VocabularyError as error:
            assert "expected a model that tokenizer.json can express exactly" in str(error)
            num_refused += 1
            continue
        num_exact += 1
        for _ in range(60):
            text = "".join(rng.choice("  abc") for _ in range(rng.randint(1, 40)))
            if text not in ("ab", "  b"):  # nothing but a symbol
                ids = compared.encode(text, continuation=False)
                assert ids.tolist() == reference.encode(text)
                compared.encode(text, continuation=True)
    assert num_exact >= 50 and num_refused >= 10, (num_exact, num_refused)


def test_what_cannot_be_expressed_is_refused_by_name() -> None:
    nothing: Callable[[str], bool] = lambda piece: False  # noqa: E731
    with pytest.raises(InexpressibleError, match=r"'ab', '.*share the score -1"):
        derive_merges({"a": -9.0, "b": -9.0, "ab": -1.0, "aba": -1.0}, nothing)
    with pytest.raises(InexpressibleError, match="arises from 'b'"):
        derive_merges({"a": -9.0, "ab": -1.0}, nothing)
    with pytest.raises(InexpressibleError, match="may overlap"):
        derive_merges({"a": -9.0, "b": -9.0, "ab": -1.0, "ba": -1.0}, nothing)
    # A piece that never comes out whole has no merge: "bc" is joined first.
    scores = {"a": -9.0, "b": -9.0, "c": -9.0, "bc": -1.0, "ab": -2.0, "abc": -3.0}
    assert derive_merges(scores, nothing) == [("b", "c"), ("a", "b"), ("a", "bc")]
    scores |= {"abcc": -2.5}  # "abc" arises too late for it
    assert derive_merges(scores, nothing)[-1] == ("a", "bc")


@pytest.mark.parametrize(
    ("pieces", "spec", "named"),
    [
        ([("ab", -1.0, UNUSED)], {}, "unused piece 'ab'"),
        ([("x", 0.0, CONTROL)], {}, "'x'"),
        ([("a b", 0.0, SYMBOL)], {}, "symbol 'a b'"),
        ([], {"remove_extra_whitespaces": True}, "removes extra white space"),
        ([("[c]", 0.0, CONTROL)], {"unigram": True, "byte_fallback": True}, r"'\[c\]'"),
    ],
)
def test_models_out_of_reach_are_refused_by_name(
    pieces: list[tuple[str, float, int]], spec: dict[str, Any], named: str, tmp_path: Path
) -> None:
    entries = [*alphabet("\u2581ab</s>unk0x"), *pieces]
    if spec.get("byte_fallback"):
        entries += alphabet("123456789ABCDEF")
        entries += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    path = write_model(tmp_path / "a.model", [*pieces, *entries], **spec)
    tokenizer = add_undo(path, tmp_path / "b.model")
    with pytest.raises(VocabularyError, match=named):
        tokenizer.save_transformers(tmp_path / "hf")


@pytest.mark.parametrize("byte_fallback", [False, True])
@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_trained_models_with_specials_in_front(
    model_type: str, byte_fallback: bool, tmp_path: Path
) -> None:
    """Controls at 1 to 4, user-defined symbols, dummy prefix, with and without bytes."""
    with (tmp_path / "a.model").open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text + " <[ i sep ad o ]0x123456789ABCDEFunk/>" for text in corpus()]),
            model_writer=writer, vocab_size=420 if byte_fallback else 150, model_type=model_type,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            control_symbols=["[sep]", "<so>"], user_defined_symbols=["is", "[add]"],
            byte_fallback=byte_fallback, hard_vocab_limit=False, minloglevel=2,
            character_coverage=1.0,
        )  # fmt: skip
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "a.model"))
    tokenizer = add_undo(tmp_path / "a.model", tmp_path / "b.model")
    compared = converted(tokenizer, tmp_path / "hf")
    literal = ["a [sep] is<so>", "x[add] this is", "<unk><s>"] if byte_fallback else []
    for text in [*corpus(), " 12  is", *literal]:
        line = text.rstrip("\n")
        assert compared.encode(line, continuation=False).tolist() == reference.encode(line)
        compared.encode(line, continuation=True)
    assert compared.num_texts > 600


def test_a_reserved_piece_becomes_the_undo_token(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copyfile(real_model("v7"), folder / "tokenizer.model")
    written = add_control_piece(
        folder / "tokenizer.model", tmp_path / "u", "<UNDO>", reserved="[control_20]"
    )
    tokenizer, before = load_tokenizer(written), add_undo(folder, tmp_path / "added")
    assert (tokenizer.undo_id, tokenizer.size) == (22, 32768)
    assert [tokenizer.piece(n) for n in range(22)] == [before.piece(n) for n in range(22)]
    text = "[control_20] <UNDO> as ever 12"
    ids = converted(tokenizer, tmp_path / "hf").encode(text, continuation=False)
    assert ids.tolist() == before.encode(text, continuation=False).tolist()
    for name in ("</s>", "the", "[REFERENCE_DOC_0]", "<0x41>", "<unk>", "nothing"):
        with pytest.raises(VocabularyError, match=r"\[control_19\], \[control_20\]") as caught:
            add_control_piece(folder / "tokenizer.model", tmp_path / "v", "<UNDO>", reserved=name)
        assert repr(name) in str(caught.value) and str(caught.value).count("[control_") == 5
    (folder / "tokenizer_config.json").write_text('{"pad_token": "[control_20]"}')
    with pytest.raises(VocabularyError, match="no spare piece"):
        add_control_piece(folder / "tokenizer.model", tmp_path / "v", "<UNDO>", "[control_20]")


def test_the_folder_names_the_specials(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copyfile(real_model("v7"), folder / "tokenizer.model")
    beside = folder / "tokenizer_config.json"
    template = "{% for m in messages %}[INST]{{ m.content }}{% endfor %}"
    named = {"eos_token": "[control_30]", "pad_token": {"content": "<unk>"}, "add_bos_token": False}
    beside.write_text(json.dumps({**named, "chat_template": template}))
    tokenizer = add_undo(folder, tmp_path / "undo")
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (32, 0, 1)
    assert not tokenizer.add_bos
    copy = load_tokenizer(tokenizer.save(tmp_path / "copy").parent)
    assert copy.fingerprint == tokenizer.fingerprint and copy.eos_id == 32
    tokenizer.save_transformers(tmp_path / "hf")
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = plain.apply_chat_template([{"role": "user", "content": "so"}])["input_ids"]
    assert ids[0] == 3 and plain.eos_token_id == 32 and plain("so").input_ids[0] != 1
    beside.write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(VocabularyError, match=r"eos_token: '<\|im_end\|>'"):
        load_tokenizer(add_control_piece(folder / "tokenizer.model", tmp_path / "x", "<UNDO>"))
    beside.write_text('{"added_tokens_decoder": {"32768": {"content": "<|im_end|>"}}}')
    with pytest.raises(VocabularyError, match=r"'<\|im_end\|>' \(id 32768\)"):
        add_undo(folder, tmp_path / "y")
    beside.unlink()
    (folder / "added_tokens.json").write_text('{"<|im_end|>": 32768}')
    with pytest.raises(VocabularyError, match=r"tokenizer\.json"):
        add_undo(folder, tmp_path / "y")


def records(folder: Path, **changed: Any) -> dict[str, list[str]]:
    texts = [text for text in TEXTS if text.strip() and "\u2581" not in text]
    rows = [{"prompt": text, "reference": f"{text} = 12"} for text in texts]
    rows.append({"prompt": "1+1?", "reference": "is 2", "deviations": [{"at": 3, "text": "34"}]})
    paths = {}
    for part in ("train", "heldout"):
        own = [*rows, changed] if changed and part == "heldout" else rows
        path = folder / f"{part}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in own))
        paths[f"data__{part}"] = [str(path)]
    return {**paths, "num_rows": [str(len(rows))]}


def run_config(tmp_path: Path, model: Path, **changed: Any) -> tuple[Any, int]:
    paths = records(tmp_path, **changed)
    num_rows = int(paths.pop("num_rows")[0])
    traces = {"builder": "given"}
    run = config(
        tmp_path, tokenizer__path=str(model), data__sequence_length=512, data__traces=traces,
        **paths,
    )  # fmt: skip
    return run, num_rows


def test_prepared_stores_hold_the_ids_of_sentencepiece(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copyfile(real_model("v7"), folder / "tokenizer.model")
    run, num_rows = run_config(tmp_path, folder)
    lines = list(prepare_run(run))
    assert "<UNDO> added as id 32768" in lines[0]
    # Two texts a record and part, the one with a deviation three.
    assert lines[-1] == f"parity    {2 * (2 * num_rows + 1):,} texts equal in tokenizer.json"
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for part in ("train", "heldout"):
        store = Store(tmp_path / "store" / part)
        rows = [json.loads(line) for line in (tmp_path / f"{part}.jsonl").open()]
        for index, row in enumerate(rows):
            trace = store.trace(index)
            prompt = trace.ids[trace.roles == Role.PROMPT]
            assert prompt.tolist() == [1, *reference.encode(row["prompt"])]


def test_a_record_that_differs_is_refused_by_line_and_field(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copyfile(real_model("v7"), folder / "tokenizer.model")
    run, num_rows = run_config(tmp_path, folder, prompt="[REFERENCE_DOC_0]", reference=" x")
    with pytest.raises(TraceError, match=r"tokenizer\.json") as caught:
        list(prepare_run(run))
    error = caught.value
    assert (error.path, error.line) == (str(tmp_path / "heldout.jsonl"), num_rows + 1)
    assert error.field == "prompt" and "'\u2581', '[REFERENCE_DOC_0]'" in str(error)
    assert not (tmp_path / "store" / "heldout").exists()
    # The export's own check says as much.
    with checked(load_tokenizer(tmp_path / "store" / "tokenizer")) as compared:
        check_records(compared, read_records(tmp_path / "train.jsonl"))
        with pytest.raises(TraceError, match=rf"heldout.jsonl:{num_rows + 1}: prompt: near"):
            check_records(compared, read_records(tmp_path / "heldout.jsonl"))


@pytest.mark.parametrize("damage", ["merges", "decoder", "space"])
def test_every_kind_of_difference_is_seen(
    damage: str, real_checked: CheckedTokenizer, tmp_path: Path
) -> None:
    inner = real_checked.unchecked
    inner.save_transformers(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    if damage == "merges":
        spec["model"]["merges"] = [
            pair for pair in spec["model"]["merges"] if "".join(pair) != "\u2581answer"
        ]
    elif damage == "decoder":
        spec["decoder"]["decoders"].pop()
    else:
        spec["normalizer"]["normalizers"].pop(0)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(VocabularyError, match=r"tokenizer\.json"):
        CheckedTokenizer(inner, tmp_path).encode("the answer is", continuation=False)
    assert np.array_equal(
        real_checked.encode("the answer is", continuation=False),
        inner.encode("the answer is", continuation=False),
    )


def test_a_symbol_of_a_unigram_model_wins_as_in_sentencepiece(tmp_path: Path) -> None:
    pieces = [("a", -5.0, NORMAL), ("b", -6.0, NORMAL), ("\u2581", -7.0, NORMAL)]
    pieces += [("abb", -9.0, NORMAL), ("bb", 0.0, SYMBOL)]
    path = write_model(tmp_path / "a.model", pieces, unigram=True)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    compared = converted(add_undo(path, tmp_path / "b.model"), tmp_path / "hf")
    ids = compared.encode("abb a", continuation=False).tolist()
    assert ids == reference.encode("abb a") and compared.piece(ids[1]) == "bb"
