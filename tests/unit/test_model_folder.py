"""What is wrong with a model folder is said in one line, before torch is imported."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from nmar_ds.errors import ConfigError, NmarError, VocabularyError
from nmar_ds.model.folder import check_model_folder
from nmar_ds.model.own_tokenizer import check_own_tokenizer
from nmar_ds.model.weight_files import INDEX_FILE, SINGLE_FILE, read_stored_tensors
from nmar_ds.traces.encoding import add_undo, train_sentencepiece

ROWS = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": ROWS}))
    tensors = {
        "model.embed_tokens.weight": np.ones((ROWS, 2), np.float32),
        "model.norm.weight": np.ones(2, np.float16),
    }
    save_file(tensors, made / SINGLE_FILE)
    return made


def check(folder: Path) -> bool:
    return check_model_folder(folder, tokenizer_size=ROWS, tokenizer_fingerprint="f")


def refused(folder: Path, message: str, kind: type[NmarError] = ConfigError) -> None:
    with pytest.raises(kind, match=message) as caught:
        check(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_good_folder_passes(folder: Path) -> None:
    assert check(folder) is False


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("auto_map", {"AutoModel": "x.Y"}, r"config\.json: wants code of its own run \(auto_map\)"),
        ("quantization_config", {"bits": 4}, r"quantization_config: the weights are quantised"),
        ("vision_config", {}, r"vision_config: not a plain language model \(model_type 'llama'\)"),
        ("text_config", {"hidden_size": 4}, "text_config: not a plain language model"),
        ("is_encoder_decoder", True, "is_encoder_decoder: True, expected a causal decoder"),
    ],
)
def test_configurations_that_cannot_be_trained(
    folder: Path, key: str, value: object, message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    refused(folder, message)


def test_code_of_the_tokenizer_is_refused_too(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["t.T", null]}}')
    refused(folder, r"tokenizer_config\.json: wants code of its own run")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "pytorch_model.bin",
            r"holds only pickled weights \(pytorch_model\.bin\).*save_pretrained",
        ),
        ("model.gguf", r"holds quantised weights \(model\.gguf\).*gguf_file"),
        ("other.safetensors", r"holds other\.safetensors without model\.safetensors\.index\.json"),
        ("notes.txt", r"holds no \.safetensors weights"),
    ],
)
def test_other_weights_are_named(folder: Path, name: str, message: str) -> None:
    (folder / SINGLE_FILE).rename(folder / name)
    refused(folder, message)


def test_rows_that_do_not_fit(folder: Path) -> None:
    with pytest.raises(VocabularyError, match=r"has rows for 12 ids, but .* has 14"):
        check_model_folder(folder, tokenizer_size=14, tokenizer_fingerprint="f")
    (folder / "config.json").write_text(json.dumps({"vocab_size": ROWS + 1}))
    refused(folder, r"embed_tokens\.weight has 12 rows, but config\.json says 13", VocabularyError)


def test_an_export_needs_the_same_tokenizer(folder: Path) -> None:
    (folder / "nmar.json").write_text('{"tokenizer_fingerprint": "f"}')
    assert check(folder) is True
    (folder / "nmar.json").write_text('{"tokenizer_fingerprint": "g"}')
    refused(folder, "trained with another tokenizer", VocabularyError)


def write_raw(file: Path, header: object, num_bytes: int) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(num_bytes))


def entry(begin: int, end: int, *, shape: object = (2,), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "num_bytes", "message"),
    [
        ({"a": entry(0, 8)}, 7, r"is truncated: \d+ bytes, but its header describes \d+"),
        ({"a": entry(0, 8)}, 9, "is too long"),
        ({"a": entry(0, 12)}, 12, r"a \[2\] of F32 has 8 bytes, but its offsets say 12"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "lies: b overlaps"),
        ({"a": entry(0, 8), "b": entry(9, 17)}, 17, "lies: b leaves a gap"),
        ({"a": entry(4, 12)}, 12, "lies: a leaves a gap"),
        ({"a": entry(10**15, 10**15 + 8)}, 8, "lies: a leaves a gap"),
        ({"a": entry(8, 0)}, 8, "offsets say -8"),
        ({"a": entry(-8, 0)}, 8, "lacks a dtype, a shape or offsets"),
        ({"a": entry(0, 8, shape=[-1, -2])}, 8, "lacks a dtype, a shape or offsets"),
        ({"a": entry(0, 8, shape=3)}, 8, "lacks a dtype, a shape or offsets"),
        ({"a": {"dtype": "F32"}}, 8, "lacks a dtype, a shape or offsets"),
        ({"a": entry(0, 2, dtype="F8_E4M3")}, 2, "a has dtype F8_E4M3, expected F32, F16 or BF16"),
        ([1], 0, "has a header that is a list"),
        (b'{"a": 1, "a": 2}', 0, "a name is given twice"),
        (b"\xff\xfe", 0, "has a header that is not JSON"),
    ],
)
def test_headers_that_cannot_be_true(
    folder: Path, header: object, num_bytes: int, message: str
) -> None:
    write_raw(folder / SINGLE_FILE, header, num_bytes)
    refused(folder, r"model\.safetensors: .*" + message)


@pytest.mark.parametrize("size", [0, 7, 8, 50])
def test_a_file_cut_in_its_header(folder: Path, size: int) -> None:
    file = folder / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:size])
    refused(folder, r"model\.safetensors: (has \d bytes, too few|says its header has \d+ bytes)")


def split(folder: Path) -> Path:
    """Two shards and their index."""
    (folder / SINGLE_FILE).unlink()
    embedding = {"model.embed_tokens.weight": np.ones((ROWS, 2), np.float32)}
    save_file(embedding, folder / "m-1.safetensors")
    save_file({"model.norm.weight": np.ones(2, np.float32)}, folder / "m-2.safetensors")
    places = {"model.embed_tokens.weight": "m-1.safetensors"}
    places["model.norm.weight"] = "m-2.safetensors"
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": places}))
    return folder / INDEX_FILE


def test_shards_and_files_beside_them(folder: Path) -> None:
    """Some folders also hold the original, merged weights under another name."""
    split(folder)
    save_file({"x": np.ones(2, np.float32)}, folder / "consolidated.safetensors")
    tensors = read_stored_tensors(folder)
    assert [(t.name, t.file.name) for t in tensors.values()] == [
        ("model.embed_tokens.weight", "m-1.safetensors"),
        ("model.norm.weight", "m-2.safetensors"),
    ]
    assert check(folder) is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "m-2.safetensors").unlink(), r"m-2\.safetensors: is named by .* not there"),
        (
            lambda f: save_file({"y": np.ones(2, np.float32)}, f / "m-2.safetensors"),
            r"m-2\.safetensors: holds y, which \S+ places in no file",
        ),
        (
            lambda f: write_raw(f / "m-2.safetensors", {}, 0),
            r"m-2\.safetensors: lacks model\.norm\.weight, which",
        ),
        (
            lambda f: (f / "m-1.safetensors").write_bytes(
                (f / "m-1.safetensors").read_bytes()[:-1]
            ),
            r"m-1\.safetensors: is truncated",
        ),
        (
            lambda f: save_file({"x": np.ones(2, np.float32)}, f / SINGLE_FILE),
            r"holds model\.safetensors and \S+, which names other files",
        ),
        (lambda f: (f / INDEX_FILE).write_text("{"), r"index\.json: is no index"),
        (
            lambda f: (f / INDEX_FILE).write_text('{"weight_map": {"a": "../m.safetensors"}}'),
            r"index\.json: is no index",
        ),
    ],
    ids=["missing", "other", "lacks", "truncated", "both", "no-json", "outside"],
)
def test_an_index_must_agree_with_its_files(folder: Path, change: object, message: str) -> None:
    split(folder)
    change(folder)  # type: ignore[operator]
    refused(folder, message)


PIECES = ["<unk>", "<eos>", "<spare>", "a", "b", "c"]


def make_json(folder: Path, pieces: list[str], *, undo: bool = False) -> Path:
    """A byte-level tokenizer.json with these pieces."""
    folder.mkdir(exist_ok=True)
    model = tokenizers.models.WordLevel({p: n for n, p in enumerate(pieces)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    specials = [p for p in pieces if p.startswith("<")] + (["<UNDO>"] if undo else [])
    made.add_special_tokens(
        [tokenizers.AddedToken(p, special=True, normalized=False) for p in specials]
    )
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("data", "undo_id"),
    [
        ([*PIECES], 6),  # appended
        (["<unk>", "<eos>", "<UNDO>", "a", "b", "c"], 2),  # a reserved token renamed
    ],
    ids=["appended", "renamed"],
)
def test_the_same_pieces_pass(tmp_path: Path, data: list[str], undo_id: int) -> None:
    own = make_json(tmp_path / "own", PIECES)
    made = make_json(tmp_path / "data", data, undo="<UNDO>" not in data)
    check_own_tokenizer(own, made, undo_id=undo_id)
    check_own_tokenizer(made, made, undo_id=undo_id)  # the very same


@pytest.mark.parametrize(
    ("data", "undo_id", "message"),
    [
        # the same number of ids, two of them exchanged
        (["<unk>", "<eos>", "<spare>", "a", "c", "b"], 6, "id 4 is 'b', but .* it is 'c'"),
        # two renamed, of which only the undo id may be
        (["<unk>", "<end>", "<UNDO>", "a", "b", "c"], 2, "id 1 is '<eos>', but .* it is '<end>'"),
        ([*PIECES, "d"], 7, "id 6 does not exist, but .* it is 'd'"),
        (PIECES[:4], 4, "id 5 is 'c', but .* it does not exist"),
    ],
)
def test_the_first_piece_that_differs_is_named(
    tmp_path: Path, data: list[str], undo_id: int, message: str
) -> None:
    own = make_json(tmp_path / "own", PIECES)
    made = make_json(tmp_path / "data", data, undo="<UNDO>" not in data)
    with pytest.raises(VocabularyError, match=message) as caught:
        check_own_tokenizer(own, made, undo_id=undo_id)
    assert "\n" not in str(caught.value)


def test_sentencepiece_folders_are_compared_too(tmp_path: Path) -> None:
    data = train_sentencepiece(
        ["one two three four five"] * 20, tmp_path / "plain.model", vocab_size=40, undo_token="<U>"
    )
    own = tmp_path / "own"
    own.mkdir()
    (own / "tokenizer.model").write_bytes(data.path.read_bytes())
    with_undo = add_undo(own, tmp_path / "data")
    check_own_tokenizer(own, tmp_path / "data", undo_id=with_undo.undo_id)
    other = train_sentencepiece(
        ["six seven eight nine ten"] * 20, tmp_path / "other.model", vocab_size=40, undo_token="<U>"
    )
    (own / "tokenizer.model").write_bytes(other.path.read_bytes())
    with pytest.raises(VocabularyError, match=r"own/tokenizer\.model: id \d+ (is|does not exist)"):
        check_own_tokenizer(own, tmp_path / "data", undo_id=with_undo.undo_id)
    (own / "second.model").write_bytes(b"")
    with pytest.raises(
        VocabularyError, match=r"holds second\.model, tokenizer\.model, expected on"
    ):
        check_own_tokenizer(own, tmp_path / "data", undo_id=with_undo.undo_id)


def test_older_byte_level_folders_are_compared_too(tmp_path: Path) -> None:
    data = make_json(tmp_path / "data", PIECES, undo=True)
    own = tmp_path / "own"
    own.mkdir()
    (own / "vocab.json").write_text(json.dumps({p: n for n, p in enumerate(PIECES[:4])}))
    (own / "added_tokens.json").write_text(json.dumps({"b": 4}))
    decoder = {"added_tokens_decoder": {"5": {"content": "c"}}}
    (own / "tokenizer_config.json").write_text(json.dumps(decoder))
    check_own_tokenizer(own, data, undo_id=6)
    (own / "added_tokens.json").write_text(json.dumps({"x": 4}))
    with pytest.raises(VocabularyError, match=r"vocab\.json: id 4 is 'x', but .* it is 'b'"):
        check_own_tokenizer(own, data, undo_id=6)


def test_a_folder_without_a_tokenizer_passes_and_a_broken_one_does_not(tmp_path: Path) -> None:
    data = make_json(tmp_path / "data", PIECES, undo=True)
    own = tmp_path / "own"
    own.mkdir()
    check_own_tokenizer(own, data, undo_id=6)
    for text in ("{", "[]", '{"model": {}}', '{"model": {"vocab": 3}}'):
        (own / "tokenizer.json").write_text(text)
        with pytest.raises(VocabularyError, match=r"own/tokenizer\.json: is no"):
            check_own_tokenizer(own, data, undo_id=6)


def test_a_large_vocabulary_is_compared_without_torch_and_quickly(tmp_path: Path) -> None:
    pieces = ["<unk>", *(f"piece-{number}" for number in range(150_000))]
    own, data = make_json(tmp_path / "own", pieces), make_json(tmp_path / "data", pieces, undo=True)
    started = time.process_time()
    check_own_tokenizer(own, data, undo_id=150_001)
    assert time.process_time() - started < 1.0
    code = (
        "import sys; from pathlib import Path; import nmar_ds.model.folder;"
        "from nmar_ds.model.own_tokenizer import check_own_tokenizer as check;"
        f"check(Path({str(own)!r}), Path({str(data)!r}), undo_id=150_001);"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_errors_are_one_line_with_a_remedy(folder: Path) -> None:
    (folder / SINGLE_FILE).write_bytes(b"")
    with pytest.raises(ConfigError) as caught:
        check(folder)
    assert re.search(r"expected a whole safetensors file; fetch or save", str(caught.value))
