"""The command users type: `deepspeed launcher/train.py`, stopped by a signal, resumed, exported.

One module of real launches; everything else shares a persistent pool of ranks.
"""

from __future__ import annotations

import html
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pool import free_port

from nmar_ds.training.monitor import SCREEN

ROOT = Path(__file__).resolve().parents[2]
DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
STEPS = 8

pytestmark = pytest.mark.launch


def write_records(path: Path, *, num: int, seed: int) -> None:
    generator = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num):
            word = "".join(generator.choice("abcdefgh") for _ in range(generator.randint(3, 7)))
            record = {"group": "back", "prompt": f"turn {word}: ", "reference": word[::-1]}
            file.write(json.dumps(record) + "\n")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with records, a configuration and prepared stores."""
    folder = tmp_path_factory.mktemp("launch")
    write_records(folder / "train.jsonl", num=120, seed=1)
    write_records(folder / "heldout.jsonl", num=20, seed=2)
    config: dict[str, Any] = {
        "name": "launch",
        "output": str(folder / "run"),
        "tokenizer": {"path": str(folder / "tokenizer.model"), "train": {"vocab_size": 40}},
        "data": {
            "train": [str(folder / "train.jsonl")],
            "heldout": [str(folder / "heldout.jsonl")],
            "store": str(folder / "store"),
            "sequence_length": 64,
            "traces": {"builder": "hard", "clean_share": 0.3},
        },
        "model": {
            "dtype": "float32",
            "config": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
                "tie_word_embeddings": True,
            },
        },
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2, "weight_decay": 0.1},
        "training": {"steps": STEPS, "global_batch_rows": 4, "log_every": 1, "eval_rows": 4},
        "checkpoint": {"every": 3},
        # Every parameter partitioned: with persistent ones an unrelated collective hides races.
        "zero": {"param_persistence_threshold": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    run_python("launcher/prepare.py", "--config", str(folder / "config.yaml"))
    return folder


def environment() -> dict[str, str]:
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def run_python(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert result.returncode == code, result.stdout + result.stderr
    return result


COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc", "hipcc", "ninja")


def with_traps(folder: Path) -> dict[str, str]:
    """The environment, with compilers that only say that they were called."""
    traps = folder / "traps"
    traps.mkdir()
    for name in COMPILERS:
        (traps / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {folder}/compiled\nexit 1\n')
        (traps / name).chmod(0o755)
    return {**environment(), "PATH": f"{traps}{os.pathsep}{os.environ['PATH']}"}


def launch(
    folder: Path, *overrides: str, num_ranks: int = 2, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    command = [
        DEEPSPEED, "--num_gpus", str(num_ranks), "--master_port", str(free_port()),
        "launcher/train.py", "--config", str(folder / "config.yaml"), *overrides,
    ]  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, env=env or environment(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], timeout: float = 240) -> str:
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return output


def weights_of(run: Path) -> dict[str, np.ndarray]:
    from nmar_ds.training.checkpoints import find_newest
    from nmar_ds.training.export import full_state

    found = find_newest(run / "checkpoints", report=pytest.fail)
    assert found is not None and found.step == STEPS
    return {name: value.numpy() for name, value in full_state(found).items()}


def losses(output: str) -> dict[int, str]:
    """Figures of each step's line, without the times."""
    lines = re.findall(rf"step +(\d+)/{STEPS}  (total .*?)  [\d,]+ tok/s", output)
    return {int(step): figures for step, figures in lines}


@pytest.fixture(scope="module")
def whole(prepared: Path) -> tuple[Path, str]:
    """An uninterrupted run."""
    process = launch(
        prepared, f"output={prepared / 'whole'}", "training.world_size=2", env=with_traps(prepared)
    )
    output = finish(process)
    assert process.returncode == 0, output
    assert re.search(r"canary    \d\d checks passed", output), output
    return prepared / "whole", output


def test_no_compiler_runs(whole: tuple[Path, str], prepared: Path) -> None:
    """DeepSpeed probes and builds its extensions by compilers, at each start, if it is let."""
    called = prepared / "compiled"
    assert not called.exists(), called.read_text()
    assert subprocess.run([prepared / "traps" / "cc"], check=False).returncode == 1
    assert called.read_text().startswith("cc"), "the trap itself"


def rank_pids(parent: int) -> list[int]:
    """Processes below `parent` that run launcher/train.py themselves."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], [parent]
    while todo:
        pid = todo.pop()
        todo += children.get(pid, [])
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"launcher/train.py" in words and b"--local_rank=0" in b" ".join(words):
            found.append(pid)
        elif b"launcher/train.py" in words and b"--local_rank=1" in b" ".join(words):
            found.append(pid)
    return found


def test_a_run_stopped_by_a_signal_resumes_bit_exactly(
    prepared: Path, whole: tuple[Path, str]
) -> None:
    reference, reference_output = whole
    output_folder = prepared / "stopped"
    process = launch(prepared, f"output={output_folder}")
    said = ""
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        if re.search(r"step +4/", line):
            ranks = rank_pids(process.pid)
            assert len(ranks) == 2
            os.kill(ranks[0], signal.SIGTERM)  # one rank alone: the others must agree
            break
    said += finish(process)
    assert process.returncode == 0, said
    stopped_at = int(re.search(r"stopped after step (\d+)", said).group(1))  # type: ignore[union-attr]
    assert 4 <= stopped_at < STEPS
    again = launch(prepared, f"output={output_folder}")
    output = finish(again)
    assert again.returncode == 0, output
    assert f"after step {stopped_at}" in output
    resumed = losses(output)
    assert min(resumed) == stopped_at + 1
    whole_losses = losses(reference_output)
    assert {**losses(said), **resumed} == whole_losses and len(whole_losses) == STEPS
    a, b = weights_of(reference), weights_of(output_folder)
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name], err_msg=name)


def test_a_damaged_checkpoint_is_refused_and_the_older_one_used(
    prepared: Path, whole: tuple[Path, str]
) -> None:
    import shutil

    reference, _ = whole
    output_folder = prepared / "damaged"
    shutil.copytree(reference, output_folder)
    newest = output_folder / "checkpoints" / f"step-{STEPS:08d}"
    victim = newest / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    process = launch(prepared, f"output={output_folder}")
    output = finish(process)
    assert process.returncode == 0, output
    assert f"refused {newest.name}" in output and victim.name in output
    assert "after step 6" in output
    for name, value in weights_of(reference).items():
        np.testing.assert_array_equal(value, weights_of(output_folder)[name])


def test_another_run_or_world_size_is_refused(prepared: Path, whole: tuple[Path, str]) -> None:
    reference, _ = whole
    before = sorted(path.name for path in (reference / "checkpoints").iterdir())
    cases = [
        ("objective.preset=sft", 2, "objective.preset was 'msft', is 'sft'"),
        ("training.world_size=2", 1, "2 ranks are asked for, 1 started"),
        ("checkpoint.resume=never", 2, "already holds checkpoints"),
    ]
    for override, num_ranks, message in cases:
        process = launch(prepared, f"output={reference}", override, num_ranks=num_ranks)
        output = finish(process)
        assert process.returncode != 0
        assert message in output, output
        assert output.count("error: ") == 1, "one line, by one rank"
    assert sorted(path.name for path in (reference / "checkpoints").iterdir()) == before


def test_the_export_loads_in_plain_transformers(prepared: Path, whole: tuple[Path, str]) -> None:
    reference, _ = whole
    exported = prepared / "export"
    run_python("launcher/export.py", "--run", str(reference), "--output", str(exported))
    again = run_python(
        "launcher/export.py", "--run", str(reference), "--output", str(exported), code=2
    )
    assert "--overwrite" in again.stderr
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nmar_ds.data.store import Store

    trained = weights_of(reference)
    stored = load_file(str(exported / "model.safetensors"))
    assert "lm_head.weight" not in stored, "tied"
    for name, value in stored.items():
        np.testing.assert_array_equal(value, trained[name])
    model = AutoModelForCausalLM.from_pretrained(exported, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(exported, local_files_only=True)
    own = Store(prepared / "store" / "train").tokenizer()
    text = "turn abcd: dcba"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == own.encode(text, continuation=False).tolist()
    assert tokenizer.convert_tokens_to_ids("<UNDO>") == own.undo_id
    assert model.config.vocab_size == own.size
    assert model.get_input_embeddings().weight.shape[0] == own.size


def test_tensorboard_holds_the_promised_curves(whole: tuple[Path, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole[0] / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {
        "loss/total", "loss/prefix", "loss/deviation", "loss/undo", "loss/correction",
        "heldout/log_p_deviation_per_token", "heldout/p_undo_at_first_place",
        "optimizer/learning_rate", "optimizer/gradient_norm",
        "throughput/tokens_per_second", "throughput/trained_tokens_per_second",
        "throughput/step_seconds", "packing/use",
        "undo_row/input_norm", "undo_row/output_norm",
        "undo_row/mean_known_input_norm", "undo_row/mean_known_output_norm",
        "time/heldout_seconds", "time/heldout_share",
    }  # fmt: skip
    shown = [tag for charts in SCREEN.values() for _, names in charts.values() for tag in names]
    assert len(shown) >= 5 and set(shown) <= tags
    (share,) = events.Scalars("time/heldout_share")
    spent = [event.value for event in events.Scalars("time/heldout_seconds")]
    assert share.step == STEPS and len(spent) == 2 and 0 < share.value < 1
    stepped = sum(event.value for event in events.Scalars("throughput/step_seconds"))
    assert share.value <= sum(spent) / (sum(spent) + stepped) + 1e-6
    assert "of the time so far)" in whole[1]
    assert [event.step for event in events.Scalars("loss/total")] == list(range(1, STEPS + 1))
    assert [event.step for event in events.Scalars("heldout/p_undo_at_first_place")] == [0, STEPS]
    norms = events.Scalars("undo_row/input_norm")
    assert [event.step for event in norms] == [0, STEPS]
    assert norms[0].value != norms[1].value
    assert "undo_row/output_bias" not in tags
    line = next(line for line in whole[1].splitlines() if line.startswith("undo row  row "))
    assert f"norm {norms[0].value:.4g} in (mean of known rows " in line


def test_tensorboard_holds_a_table_of_decodes(whole: tuple[Path, str], prepared: Path) -> None:
    """Two prompts, each by itself and after its own error, under the first and the last weights."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from nmar_ds.data.store import Store
    from nmar_ds.training.decodes import choose

    store = Store(prepared / "store" / "heldout")
    tokenizer = store.tokenizer()
    chosen = choose(store, 2, store.machine)
    assert [len(each.forced_ids) > 0 for each in chosen] == [False, True] * 2
    events = EventAccumulator(str(whole[0] / "tensorboard"))
    events.Reload()
    tables = events.Tensors("heldout/decodes/text_summary")
    assert [event.step for event in tables] == [0, STEPS]
    texts = [html.unescape(event.tensor_proto.string_val[0].decode()) for event in tables]
    assert texts[0] != texts[1]
    for text in texts:
        rows = text.splitlines()[2:]
        assert len(rows) == len(chosen)
        for row, exercise in zip(rows, chosen, strict=True):
            assert row.startswith(f"| {tokenizer.decode(exercise.prompt_ids)} | ")
            assert re.search(r" \| (right|(wrong|cut off), expected \w.*) \|$", row), row


def test_a_pretrained_folder_with_a_start_and_an_objective_of_its_own(prepared: Path) -> None:
    """One step: the run hands start, clip and unlikelihood to model, canary, loop and log."""
    import torch
    import transformers
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from nmar_ds.data.store import Store

    tokenizer = Store(prepared / "store" / "train").tokenizer()
    keys = yaml.safe_load((prepared / "config.yaml").read_text())["model"]["config"]
    keys.pop("model_type")
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**keys, vocab_size=tokenizer.size)
    )
    model.save_pretrained(prepared / "pretrained")
    source = int(tokenizer.ordinary_ids()[-1])
    start = f"{{method: copy, token: '{tokenizer.piece(source)}'}}"
    weights = "{prefix: 1, deviation: -0.5, undo: 1, correction: 1}"
    process = launch(
        prepared,
        f"output={prepared / 'started'}",
        f"model={{path: '{prepared / 'pretrained'}', dtype: float32, undo_init: {start}}}",
        f"objective={{preset: custom, weights: {weights}, denominator: trained}}",
        "objective.nll_clip=0.25", "objective.unlikelihood=0.75",
        "training.steps=1", "optimizer.warmup_steps=0",
        num_ranks=1,
    )  # fmt: skip
    output = finish(process)
    assert process.returncode == 0, output
    row = f"undo row  copy of {tokenizer.piece(source)!r} (id {source}); spare row reused, "
    assert row in output, output
    assert "deviation -0.5, undo 1, correction 1, nll_clip 0.25, unlikelihood 0.75" in output
    events = EventAccumulator(str(prepared / "started" / "tensorboard"))
    events.Reload()
    norm = float(model.model.embed_tokens.weight[source].detach().norm())
    assert events.Scalars("undo_row/input_norm")[0].value == pytest.approx(norm, rel=1e-6)

    def logged(tag: str) -> float:
        return events.Scalars(tag)[0].value

    plain = ("prefix", "undo", "correction")
    num_wrong = logged("targets/deviation")
    total = sum(logged(f"sums/{role}") for role in plain)
    # Every loss of a fresh model is about ln(40), far beyond the clip.
    total += num_wrong * (0.75 * logged("loss/unlikelihood") - 0.5 * 0.25)
    divisor = sum(logged(f"targets/{role}") for role in plain) + num_wrong * (0.75 + 0.5)
    assert num_wrong > 0 and logged("loss/total") == pytest.approx(total / divisor, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
        (["--config", "{config}", "optimizer.learning_rat=1"], "did you mean 'learning_rate'?"),
        (["--config", "{config}", "training.world_size=2"], "2 ranks are asked for, 1 started"),
        (["--config", "{config}", "data.store=nowhere"], "nowhere/train"),
        (["--config", "{config}", "data.traces.per_record=3"], "data.traces.per_record"),
        (["--config", "{config}", "model={path: nowhere}"], "model.path: nowhere: no such folder"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_within_two_seconds(
    prepared: Path, arguments: list[str], message: str
) -> None:
    words = [word.replace("{config}", str(prepared / "config.yaml")) for word in arguments]
    started = time.monotonic()
    result = run_python("launcher/train.py", *words, code=2)
    seconds = time.monotonic() - started
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert message in lines[0]
    imports = run_python("-X", "importtime", "launcher/train.py", *words, code=2).stderr
    assert not re.search(r"\| +(torch|transformers|deepspeed)$", imports, re.MULTILINE)
    assert seconds < 10, (
        "two seconds on an idle machine; this bound only catches a lost import guard"
    )
