"""Weights counted from a configuration are those of the model itself, on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nmar_ds.config import load_config
from nmar_ds.errors import ConfigError
from nmar_ds.model.architecture import architecture_of, read_folder_config, rows_with_undo

ROOT = Path(__file__).resolve().parents[2]
# As their makers publish them.
EXACT = {
    "llama3_1b": 1_235_814_400,
    "llama3_8b": 8_030_261_248,
    "qwen3_32b": 32_762_123_264,
    "llama3_70b": 70_553_706_496,
}
SMALL = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2,
}  # fmt: skip
KINDS = [
    {"model_type": "llama"},
    {"model_type": "llama", "tie_word_embeddings": True, "head_dim": 16},
    {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    {"model_type": "mistral"},
    {"model_type": "mistral", "attention_bias": True, "mlp_bias": True},  # which it does not know
    {"model_type": "qwen2", "tie_word_embeddings": True},
    {"model_type": "qwen3", "attention_bias": True, "head_dim": 10},
    {"model_type": "qwen3"},
]


def on_meta(config: Any) -> list[int]:
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sorted(parameter.numel() for parameter in model.parameters())


def counted(keys: dict[str, Any], rows: int) -> list[int]:
    shape = architecture_of(keys, rows=rows, place="here")
    found = sorted(numel for numel, count in shape.parameters() for _ in range(count))
    assert sum(found) == shape.num_weights
    return found


@pytest.mark.parametrize("name", EXACT)
def test_a_preset_has_exactly_the_published_weights(name: str) -> None:
    from nmar_ds.model.loading import config_of_folder

    folder = ROOT / "configs/architectures" / name
    keys = read_folder_config(folder)
    found = counted(keys, keys["vocab_size"])
    assert sum(found) == EXACT[name]
    assert found == on_meta(config_of_folder(folder))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: " ".join(map(str, kind.values())))
def test_every_parameter_of_every_kind_is_counted(kind: dict[str, Any]) -> None:
    import transformers

    keys = {**SMALL, **kind}
    config = transformers.CONFIG_MAPPING[kind["model_type"]](
        **{key: value for key, value in keys.items() if key != "model_type"}, vocab_size=101
    )
    assert counted(keys, 101) == on_meta(config)


def test_what_a_configuration_leaves_out_is_what_transformers_takes() -> None:
    import transformers

    from nmar_ds.model.architecture import _DEFAULTS

    for model_type, defaults in _DEFAULTS.items():
        config = transformers.CONFIG_MAPPING[model_type](**{
            **SMALL, "num_attention_heads": 32, "hidden_size": 64 * 32
        } | {"num_key_value_heads": defaults["num_key_value_heads"]})  # fmt: skip
        keys = {**SMALL, "num_attention_heads": 32, "hidden_size": 64 * 32}
        keys.pop("num_key_value_heads")
        found = counted({"model_type": model_type, **keys}, config.vocab_size)
        assert found == on_meta(config), model_type


@pytest.mark.parametrize(
    ("name", "tokenizer_size", "multiple", "rows", "more"),
    [
        ("llama3_1b", 128_257, 1, 128_257, 2_048),  # tied: one row
        ("llama3_8b", 128_257, 1, 128_257, 2 * 4_096),
        ("llama3_8b", 128_257, 64, 128_320, 64 * 2 * 4_096),
        ("llama3_8b", 128_256, 64, 128_256, 0),  # a reserved token: nothing grows
        ("qwen3_32b", 151_670, 1, 151_936, 0),  # a spare row
    ],
)
def test_what_the_undo_row_adds(
    name: str, tokenizer_size: int, multiple: int, rows: int, more: int
) -> None:
    keys = read_folder_config(ROOT / "configs/architectures" / name)
    assert rows_with_undo(keys["vocab_size"], tokenizer_size, multiple) == rows
    assert sum(counted(keys, rows)) == EXACT[name] + more


def test_the_row_rule_is_that_of_the_model() -> None:
    from tiny_models import build

    from nmar_ds.model.vocabulary import add_undo_rows

    for undo_id, multiple in ((59, 8), (60, 8), (60, 1), (64, 8)):
        model = build(vocab_size=60)
        report = add_undo_rows(
            model, undo_id=undo_id, num_known_rows=60, pad_to_multiple_of=multiple
        )
        assert report.rows_after == rows_with_undo(60, undo_id + 1, multiple)


def test_an_unknown_kind_or_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="here: model_type: 'gpt2' has no estimate, expected one"):
        architecture_of({"model_type": "gpt2"}, rows=3, place="here")
    with pytest.raises(ConfigError, match="here: intermediate_size: is None, expected an integer"):
        architecture_of({"model_type": "llama", "hidden_size": 4}, rows=3, place="here")
    with pytest.raises(ConfigError, match=r"config\.json: No such file"):
        read_folder_config(tmp_path)
    for text, said in (("{", "is not JSON"), ("[]", "vocab_size"), ("{}", "vocab_size")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_folder_config(tmp_path)


@pytest.mark.parametrize("name", EXACT)
def test_the_presets_fit_their_ranks_and_their_architecture(name: str) -> None:
    config = load_config(ROOT / f"configs/{name}.yaml")
    world_size = config.training.world_size
    assert world_size is not None and config.accumulation_steps(world_size) >= 2
    config.check_hpz(world_size=world_size, ranks_per_node=8)
    keys = json.loads((ROOT / "configs/architectures" / name / "config.json").read_text())
    assert config.data.sequence_length <= keys["max_position_embeddings"]
    shape = architecture_of(keys, rows=keys["vocab_size"], place=name)
    assert config.zero.prefetch_bucket_size == pytest.approx(shape.num_layer_weights, rel=0.01)
    needed = 2 * shape.num_layer_weights + shape.rows * shape.hidden
    assert config.zero.max_live_parameters == pytest.approx(needed, rel=0.05)
