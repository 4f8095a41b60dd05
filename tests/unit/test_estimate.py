"""Estimates beside what autograd keeps, what a model multiplies, and what a person is told."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nmar_ds.config import RunConfig, load_config
from nmar_ds.errors import ConfigError
from nmar_ds.model.architecture import Architecture, architecture_of, read_folder_config
from nmar_ds.training import estimate
from nmar_ds.training.estimate import Memory, memory_of, shape_of, work_of
from nmar_ds.training.run_folder import checkpoint_bytes

ROOT = Path(__file__).resolve().parents[2]
PRESETS = ["llama3_1b", "llama3_8b", "qwen3_32b", "llama3_70b"]
SMALL: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}  # fmt: skip
VOCAB = 201


def preset(name: str, *overrides: str) -> tuple[RunConfig, Architecture]:
    config = load_config(
        ROOT / f"configs/{name}.yaml", [f"model.path=configs/architectures/{name}", *overrides]
    )
    keys = read_folder_config(ROOT / "configs/architectures" / name)
    return config, architecture_of(keys, rows=keys["vocab_size"], place=name)


@pytest.mark.parametrize(
    ("keys", "rows", "length"),
    [
        ({}, 2, 96),
        ({"num_hidden_layers": 6}, 1, 200),
        ({"model_type": "qwen3", "head_dim": 32}, 2, 96),
        ({"model_type": "qwen2", "intermediate_size": 700}, 1, 64),
        ({"num_key_value_heads": 8, "tie_word_embeddings": True}, 3, 64),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("recompute", [False, True])
def test_saved_activations_are_autograds(
    keys: dict[str, Any], rows: int, length: int, dtype: str, recompute: bool
) -> None:
    """Within a tenth; without recomputation, where it is known what is kept, a hundredth."""
    from nmar_ds.acceptance.measured import saved_bytes

    keys = {**SMALL, **keys}
    seen = saved_bytes(
        keys, vocab=VOCAB, rows=rows, length=length, dtype=dtype, recompute=recompute
    )
    shape = architecture_of(keys, rows=VOCAB, place="here")
    item, tokens = {"bfloat16": 2, "float32": 4}[dtype], rows * length
    reckoned = estimate.saved_bytes(shape, tokens, item, recompute=recompute)
    reckoned += estimate.loss_kept_bytes(shape, tokens, item)
    assert reckoned == pytest.approx(seen, rel=0.10 if recompute else 0.01)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_work_is_what_the_matrices_multiply(model_type: str) -> None:
    """torch's own count of a forward and a backward; attention it counts whole, not causal."""
    import torch
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    keys = {**SMALL, "model_type": model_type}
    kind = transformers.CONFIG_MAPPING[model_type]
    named = {name: value for name, value in keys.items() if name != "model_type"}
    model = transformers.AutoModelForCausalLM.from_config(
        kind(**named, vocab_size=VOCAB), attn_implementation="eager"
    )
    ids = torch.zeros(2, 48, dtype=torch.int64)
    # Without a gradient for the embeddings' output nothing is saved that training would not do.
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    shape = architecture_of(keys, rows=VOCAB, place="here")
    whole = work_of(shape, tokens=96, squares=2 * 2 * 48**2)  # twice the causal half
    assert counter.get_total_flops() == pytest.approx(whole.flops, rel=0.01)
    assert work_of(shape, tokens=96, squares=0).flops < whole.flops


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_its_gpus(name: str) -> None:
    """80 GB cards have 85 thousand million bytes; a tenth stays free."""
    config, shape = preset(name)
    world_size = config.training.world_size
    assert world_size is not None
    memory = memory_of(config, shape, world_size=world_size)
    assert 0.3 * 85e9 < memory.peak < 0.9 * 85e9
    assert (memory.second_copy > 0) == (world_size > 8)


def test_seventy_billion_on_four_nodes_fit_with_the_optimizer_in_host_memory() -> None:
    config, shape = preset("llama3_70b", "training.world_size=32")
    plain = memory_of(config, shape, world_size=32)
    assert plain.peak > 0.95 * 85e9 and plain.host == 0
    config, _ = preset("llama3_70b", "training.world_size=32", "zero.offload_optimizer={}")
    host = memory_of(config, shape, world_size=32)
    assert host.peak < 0.9 * 85e9 and host.gradients == host.optimizer == 0
    assert host.step == 4 * config.zero.reduced_at_once("cuda")  # the bucket of gradients alone
    assert 8 * host.host == pytest.approx(353e9, rel=0.01)  # as the preset says


@pytest.mark.parametrize(
    ("name", "rows", "kept"),
    [("llama3_8b", 4, 114e9), ("qwen3_32b", 2, 216e9), ("llama3_70b", 1, 142e9)],
)
def test_what_presets_say_of_activations_without_checkpointing(
    name: str, rows: int, kept: float
) -> None:
    config, shape = preset(name, "model.activation_checkpointing=no")
    assert config.training.micro_batch_rows == rows
    memory = memory_of(config, shape, world_size=config.training.world_size or 1)
    assert memory.saved == pytest.approx(kept, rel=0.01) and memory.recomputed == 0
    assert f"{kept / 1e9:.0f} GB of activations" in (ROOT / f"configs/{name}.yaml").read_text()


def test_the_peak_is_the_larger_of_backward_and_step() -> None:
    config, shape = preset("llama3_1b")
    memory = memory_of(config, shape, world_size=8)
    assert memory.peak == memory.state + memory.activations + memory.loss + memory.buffers
    late = dataclasses.replace(memory, step=10**12)
    assert late.peak == late.state + 10**12
    fields = {field.name for field in dataclasses.fields(Memory)}
    assert all(getattr(memory, name) >= 0 for name in fields)


def dry_run(*arguments: str, code: int = 0) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "launcher/train.py", "--dry-run", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize("name", PRESETS)
def test_a_dry_run_tells_what_it_can_before_the_data_are_there(name: str) -> None:
    """And still fails: the run could not start."""
    out, error = dry_run(
        "--config", f"configs/{name}.yaml", f"model.path=configs/architectures/{name}",
        "data.store=nowhere", code=2,
    )  # fmt: skip
    assert error.startswith("error: nowhere/train/manifest.json: missing")
    config, shape = preset(name)
    for part in ("weights", "gradients", "optimizer", "activations", "loss", "buffers"):
        assert part in out
    assert f"{shape.num_weights:,} weights" in out
    assert f"on each of {config.training.world_size} GPUs" in out
    assert "PFLOP (full rows, each one trace)" in out and "hours" in out and "checkpoint" in out


def test_a_dry_run_reckons_the_device_that_is_named() -> None:
    """Where the step is the most, it is listed in place of what is not there then."""
    arguments = ("--config", "configs/llama3_8b.yaml", "data.store=nowhere",
                 "model.path=configs/architectures/llama3_8b")  # fmt: skip
    config, shape = preset("llama3_8b")
    for device, many in (("cuda", "16 GPUs"), ("cpu", "16 ranks")):
        out, _ = dry_run(*arguments, "--device", device, code=2)
        line = next(line for line in out.splitlines() if line.startswith("memory"))
        memory = memory_of(config, shape, world_size=16, device=device)
        assert f"{memory.peak / 1e9:,.1f} GB on each of {many} at most" in line
        assert "activations" in line and "step" not in line
    late = ("training.world_size=1", "zero.hpz_partition_size=1", "data.sequence_length=16")
    out, _ = dry_run(*arguments, *late, code=2)
    config, shape = preset("llama3_8b", *late)
    step = memory_of(config, shape, world_size=1).step
    assert f"the optimizer's step {step / 1e9:,.1f} GB" in out and "activations" not in out


def test_hours_follow_the_stated_share_and_peak() -> None:
    arguments = ("--config", "configs/llama3_8b.yaml", "data.store=nowhere",
                 "model.path=configs/architectures/llama3_8b")  # fmt: skip

    def hours(*more: str) -> float:
        out, _ = dry_run(*arguments, *more, code=2)
        line = next(line for line in out.splitlines() if line.startswith("hours"))
        return float(line.split()[1])

    usual = hours()
    assert hours("--mfu", "0.2") == pytest.approx(2 * usual, rel=0.02)
    assert hours("--peak-tflops", "494.5") == pytest.approx(2 * usual, rel=0.02)
    assert hours("training.steps=500") == pytest.approx(usual / 2, rel=0.02)
    for bad in (("--mfu", "0"), ("--mfu", "1.5"), ("--peak-tflops", "0")):
        dry_run(*arguments, *bad, code=2)


def test_what_cannot_be_reckoned_is_said_in_one_line() -> None:
    out, error = dry_run("--config", "configs/llama3_8b.yaml", "model.path=nowhere", code=2)
    assert out.splitlines() == [
        "estimate  none: model.path: nowhere/config.json: No such file or directory"
    ]
    assert error.startswith("error: ")


def test_ranks_that_do_not_fit_are_refused_by_a_dry_run() -> None:
    _, error = dry_run("--config", "configs/llama3_8b.yaml", "training.world_size=12", code=2)
    assert "zero.hpz_partition_size: 8" in error
    _, error = dry_run("--config", "configs/llama3_8b.yaml", "training.world_size=64", code=2)
    assert "training.global_batch_rows: 128" in error


SCALE: list[tuple[str, tuple[str, ...]]] = [
    *((name, ()) for name in PRESETS),
    ("llama3_70b", ("training.world_size=32", "zero.offload_optimizer={}")),
]


def scale_row(name: str, *overrides: str) -> str:
    """A line of docs/scale.md: GB by part, then work, hours and checkpoint."""
    config, shape = preset(name, *overrides)
    world_size = config.training.world_size or 1
    memory = memory_of(config, shape, world_size=world_size)
    rows, length = config.training.global_batch_rows, config.data.sequence_length
    work = work_of(shape, tokens=rows * length, squares=rows * length**2)
    hours = 1000 * work.flops / (world_size * 989e12 * 0.4) / 3600
    parts = [memory.weights, memory.second_copy, memory.gradients, memory.optimizer,
             memory.activations, memory.loss, memory.buffers, memory.peak, memory.host]  # fmt: skip
    figures = " | ".join(f"{part / 1e9:.1f}" for part in parts)
    return (
        f"| `{name}` | {world_size // 8} x 8 | {figures} | {work.flops / 1e15:.1f} | {hours:.2f} | "
        f"{checkpoint_bytes(shape.num_weights, 'adamw') / 1e9:.1f} |"
    )


@pytest.mark.parametrize(("name", "overrides"), SCALE)
def test_the_page_on_scale_has_these_figures(name: str, overrides: tuple[str, ...]) -> None:
    page = (ROOT / "docs/scale.md").read_text("utf-8")
    assert scale_row(name, *overrides) in page
    _, shape = preset(name)
    assert f"{shape.num_weights:,}" in page


def test_rows_follow_the_tokenizer() -> None:
    config, shape = preset("llama3_8b")
    config = load_config(
        ROOT / "configs/llama3_8b.yaml",
        [f"model.path={ROOT}/configs/architectures/llama3_8b", "model.pad_vocab_to_multiple_of=64"],
    )
    assert shape_of(config, None).rows == shape_of(config, 128_256).rows == shape.rows
    assert shape_of(config, 128_257).rows == 128_320
    quick = load_config(ROOT / "configs/quickstart.yaml")
    assert shape_of(quick, 75).num_weights == 872_320
    with pytest.raises(ConfigError, match="not known before the data is prepared"):
        shape_of(quick, None)
