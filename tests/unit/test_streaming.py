"""A folder read tensor by tensor must give what transformers gives, bit for bit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, VOCAB, build

from nmar_ds.config import ModelSection
from nmar_ds.errors import ConfigError
from nmar_ds.model.attention import ATTENTION_NAME
from nmar_ds.model.loading import load_model
from nmar_ds.model.streaming import Alone, ShardReader, load_streaming, plan_filling
from nmar_ds.model.weight_files import INDEX_FILE, SINGLE_FILE, StoredTensor, read_stored_tensors

torch.set_num_threads(1)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GEMMA3 = (
    transformers.Gemma3TextConfig,
    dict(num_key_value_heads=1, head_dim=16, sliding_window=128, query_pre_attn_scalar=16),
)
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
    "short_factor": [1.001, 1.037, 1.111, 1.337], "long_factor": [1.7, 2.3, 3.1, 5.9],
}  # fmt: skip


@pytest.fixture(autouse=True)
def gemma3(monkeypatch):
    monkeypatch.setitem(FAMILIES, "gemma3_text", GEMMA3)


def save(folder, family="llama", *, shards=False, dtype=torch.float32, **more):
    model = build(family, dtype=dtype, **more)
    model.save_pretrained(folder, max_shard_size="6KB" if shards else "5GB")
    assert (folder / INDEX_FILE).is_file() == shards
    return folder


def stream(folder, dtype=torch.float32):
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    plan = plan_filling(config, folder, dtype=dtype, peers=Alone())
    return load_streaming(
        config,
        plan,
        dtype=dtype,
        attention=ATTENTION_NAME,
        deepspeed_settings=None,
        peers=Alone(),
    )


def reference(folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True
    )


def assert_same(ours, theirs):
    """Parameters and buffers: names, dtypes and every bit."""
    for kind in ("named_parameters", "named_buffers"):
        mine = dict(getattr(ours, kind)(remove_duplicate=False))
        others = dict(getattr(theirs, kind)(remove_duplicate=False))
        assert mine.keys() == others.keys()
        for name, value in mine.items():
            assert value.dtype == others[name].dtype, name
            assert torch.equal(value, others[name]), name
    assert not ours.training
    assert all(parameter.requires_grad for parameter in ours.parameters())


CASES = [
    (f, tied)
    for f in [*FAMILIES, "gemma3_text"]
    for tied in (True, False)
    if f != "phi" or not tied
]


@pytest.mark.parametrize(("family", "tied"), CASES)
@pytest.mark.parametrize("shards", [False, True], ids=["one-file", "shards"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_from_pretrained(tmp_path, family, tied, shards, dtype):
    save(tmp_path, family, tied=tied, shards=shards)
    if shards:
        assert len(list(tmp_path.glob("*.safetensors"))) >= 4
    ours = stream(tmp_path, DTYPES[dtype])
    assert_same(ours, reference(tmp_path, DTYPES[dtype]))
    head, embedding = ours.get_output_embeddings().weight, ours.get_input_embeddings().weight
    assert (head is embedding) == tied


@pytest.mark.parametrize("stored", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_files_of_other_dtypes_are_converted(tmp_path, stored, dtype):
    save(tmp_path, shards=True, dtype=stored)
    assert_same(stream(tmp_path, DTYPES[dtype]), reference(tmp_path, DTYPES[dtype]))


@pytest.mark.parametrize("rope", [LLAMA3_ROPE, LONGROPE], ids=lambda rope: rope["rope_type"])
def test_rotary_frequencies_stay_float32(tmp_path, rope):
    save(tmp_path, rope_parameters=rope)
    ours = stream(tmp_path, torch.bfloat16)
    assert_same(ours, reference(tmp_path, torch.bfloat16))
    assert ours.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_vocabulary_padded_past_the_tokenizer_keeps_its_rows(tmp_path):
    save(tmp_path, tied=True)
    loaded = load_model(
        ModelSection(path=str(tmp_path), dtype="float32"),
        {},
        tokenizer_size=51,
        undo_id=50,
        ids={},
        seed=1,
        partition=False,
    )
    stored = reference(tmp_path).get_input_embeddings().weight
    ours = loaded.model.get_input_embeddings().weight
    kept = [row for row in range(VOCAB) if row != 50]
    assert ours.shape == stored.shape
    assert torch.equal(ours[kept], stored[kept])
    assert not torch.equal(ours[50], stored[50])
    assert not loaded.model.config.use_cache


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 16, 25])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_chunks_meet_without_gap_or_overlap(tmp_path, numel, stored):
    """Chunks of 8 elements (32 bytes of float32) and a tensor that ends anywhere."""
    values = torch.randn(numel).to(stored)
    save_file({"before": torch.ones(3), "x": values, "zafter": torch.ones(5)}, tmp_path / "f")
    from nmar_ds.model.weight_files import read_header

    tensor = next(t for t in read_header(tmp_path / "f") if t.name == "x")
    target = torch.full((numel,), float("nan"), dtype=torch.float32)
    with ShardReader(chunk_bytes=8 * stored.itemsize) as reader:
        reader.read_into(target, tensor)
        reader.raise_problem()
    assert torch.equal(target, values.float())


def test_one_shard_is_open_at_a_time(tmp_path):
    folder = save(tmp_path, shards=True)
    with ShardReader() as reader:
        streams = []
        for tensor in read_stored_tensors(folder).values():
            reader.read_into(torch.empty(tensor.shape), tensor)
            if reader._stream not in streams:
                streams.append(reader._stream)
            assert [stream.closed for stream in streams] == [True] * (len(streams) - 1) + [False]
    assert len(streams) >= 4
    assert streams[-1].closed


def test_after_a_fault_nothing_more_is_read(tmp_path):
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "f")
    lost = StoredTensor(
        name="a", file=tmp_path / "gone", dtype="F32", shape=(4,), start=0, num_bytes=16
    )
    target = torch.zeros(4)
    with ShardReader() as reader:
        reader.read_into(target, lost)
        reader.read_into(target, StoredTensor(
            name="b", file=tmp_path / "f", dtype="F32", shape=(4,), start=0, num_bytes=16
        ))  # fmt: skip
        with pytest.raises(ConfigError, match="gone: No such file"):
            reader.raise_problem()
    assert not target.any()


def test_a_file_cut_after_the_check_is_named(tmp_path):
    folder = save(tmp_path)
    config = transformers.AutoConfig.from_pretrained(folder)
    plan = plan_filling(config, folder, dtype=torch.float32, peers=Alone())
    file = folder / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ConfigError, match=r"model\.safetensors: ends inside .*\.weight"):
        load_streaming(
            config, plan, dtype=torch.float32, attention="eager", deepspeed_settings=None,
            peers=Alone(),
        )  # fmt: skip


def test_buffers_in_files_are_filled(tmp_path, monkeypatch):
    """No supported family stores buffers, so one is given to a model."""
    model_class = transformers.LlamaForCausalLM
    plain = model_class.__init__

    def with_buffer(self, config):
        plain(self, config)
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("absent", torch.zeros(2))

    save(tmp_path)
    tensors = load_file(tmp_path / SINGLE_FILE)
    save_file({**tensors, "steps": torch.tensor([1, 2, 2**40])}, tmp_path / SINGLE_FILE)
    monkeypatch.setattr(model_class, "__init__", with_buffer)
    ours = stream(tmp_path)
    assert ours.steps.tolist() == [1, 2, 2**40]
    assert ours.absent.tolist() == [0, 0]


def rewrite(folder, change):
    """Apply `change` to the tensors of a single-file folder."""
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})


def test_tied_weights_may_be_stored_twice_if_equal(tmp_path):
    save(tmp_path, tied=True)
    expected = reference(tmp_path)
    rewrite(
        tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    assert_same(stream(tmp_path), expected)
    rewrite(tmp_path, lambda t: t.pop("model.embed_tokens.weight"))  # the head alone will do
    assert_same(stream(tmp_path), expected)


def test_a_tied_head_that_differs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("nmar_ds.model.streaming.CHUNK_BYTES", 1000)
    save(tmp_path, tied=True)

    def differ(tensors):
        head = tensors["model.embed_tokens.weight"].clone()
        head[-1, -1] += 1e-6
        tensors["lm_head.weight"] = head

    rewrite(tmp_path, differ)
    with pytest.raises(ConfigError, match=r"model\.safetensors: \S+ differs from .*ties them"):
        stream(tmp_path)


def test_an_untied_model_needs_its_head(tmp_path):
    save(tmp_path, tied=False)
    rewrite(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ConfigError, match=r"lack lm_head\.weight, .*tie_word_embeddings is false"):
        stream(tmp_path)


def test_known_extras_of_old_files_are_skipped(tmp_path):
    save(tmp_path)
    expected = reference(tmp_path)
    rewrite(
        tmp_path,
        lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    )
    assert_same(stream(tmp_path), expected)


def _shape(tensors):
    tensors["model.norm.weight"] = torch.ones(33)


def _kind(tensors):
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int64)


def _prefix(tensors):
    for name in list(tensors):
        tensors[f"transformer.{name.removeprefix('model.')}"] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"lack model\.layers\.1\.mlp\.up_p"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}),
            r"hold model\.layers\.2\.mlp\.up_proj\.weight \(model\.safetensors\) that it does not",
        ),
        (_shape, r"model\.safetensors: model\.norm\.weight has shape \[33\], .*asks for \[32\]"),
        (_kind, r"model\.norm\.weight has dtype I64, expected F32, F16 or BF16"),
        (_prefix, r"lack model\.\S+, \S+, \S+ and \d+ more and hold transformer\.\S+, .*Llama"),
    ],
    ids=["missing", "unexpected", "shape", "kind", "prefix"],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    save(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ConfigError, match=message) as caught:
        stream(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_an_architecture_without_a_head_for_language_is_refused(tmp_path):
    save(tmp_path)
    config = transformers.ViTConfig()
    with pytest.raises(ConfigError, match="model_type 'vit': transformers cannot build a causal"):
        plan_filling(config, tmp_path, dtype=torch.float32, peers=Alone())


def test_an_unknown_model_type_is_one_line(tmp_path):
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "nosuch"}))
    section = ModelSection(path=str(tmp_path), dtype="float32")
    with pytest.raises(ConfigError, match=r"config\.json: .*nosuch") as caught:
        load_model(section, {}, tokenizer_size=61, undo_id=60, ids={}, seed=1, partition=False)
    assert "\n" not in str(caught.value)


class Pair(Alone):
    """Two ranks of which this one is rank 0; the other says what it is told to."""

    def __init__(self, other):
        self.other = other

    def gather(self, value):
        return [value, self.other]


def test_ranks_that_see_other_files_are_refused(tmp_path):
    folder = save(tmp_path)
    config = transformers.AutoConfig.from_pretrained(folder)
    plan = plan_filling(config, folder, dtype=torch.float32, peers=Alone())
    with pytest.raises(ConfigError, match="rank 1 sees other weights there than rank 0"):
        load_streaming(
            config, plan, dtype=torch.float32, attention="eager", deepspeed_settings=None,
            peers=Pair("another digest"),
        )  # fmt: skip


def test_the_digest_tells_folders_apart(tmp_path):
    from nmar_ds.model.weight_files import digest

    one = save(tmp_path / "one", shards=True)
    shutil.copytree(one, tmp_path / "copy")
    save(tmp_path / "other")
    digests = [
        digest(read_stored_tensors(tmp_path / name).values()) for name in ("one", "copy", "other")
    ]
    assert digests[0] == digests[1] != digests[2]
