"""Each undo semantics from records to examination: models that learn three traces by heart.

All training runs share the start of one process. What is learnt includes the deviations (SFT), so
the exported model has to write the stored traces, and the decoder has to carry their undos out.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pool import free_port

ROOT = Path(__file__).resolve().parents[2]
RECORDS: list[dict[str, Any]] = [
    # A boundary inside the deviation, which starts in the middle of a span.
    {"prompt": "0:", "reference": "abc.dba.cab.", "deviations": [{"at": 6, "text": "c.d"}]},
    # One that ends in a boundary and starts rightly; later another one.
    {"prompt": "1:", "reference": "cad.bac.dcb.",
     "deviations": [{"at": 1, "text": "aa."}, {"at": 9, "text": "a"}]},
    # The error made twice, right after a boundary.
    {"prompt": "2:", "reference": "bda.cdb.abd.",
     "deviations": [{"at": 4, "text": "ad"}, {"at": 4, "text": "b"}]},
]  # fmt: skip
# What the model has to write, by hand; < is an undo.
WRITTEN = {
    "token": ["abc.dbc.d<<<a.cab.", "caa.<<<ad.bac.da<cb.", "bda.ad<<b<cdb.abd."],
    "span": ["abc.dbc.d<<dba.cab.", "caa.<cad.bac.da<dcb.", "bda.ad<b<cdb.abd."],
    "reset": ["abc.dbc.d<abc.dba.cab.", "caa.<cad.bac.da<cad.bac.dcb.",
              "bda.ad<bda.b<bda.cdb.abd."],
}  # fmt: skip
# At `1:` a right a opens the first deviation: 3 undos under `token` take it back, too.
UNDOS = {"token": [3, 4, 3], "span": [2, 2, 2], "reset": [1, 2, 2]}
SEMANTICS = list(WRITTEN)


def configuration(folder: Path, semantics: str) -> dict[str, Any]:
    records = str(folder / "records.jsonl")
    undo: dict[str, Any] = {"semantics": semantics}
    if semantics == "span":
        undo["boundaries"] = ["."]
    return {
        "name": semantics,
        "output": str(folder / semantics / "run"),
        "tokenizer": {"path": str(folder / semantics / "t.model"), "train": {"vocab_size": 14}},
        "undo": undo,
        "data": {
            "train": [records], "heldout": [records], "store": str(folder / semantics / "store"),
            "sequence_length": 128,
        },
        "model": {
            "dtype": "float32",
            "config": {
                "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
                "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
                "max_position_embeddings": 128, "tie_word_embeddings": True,
            },
        },
        "objective": {"preset": "sft"},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 10},
        "training": {
            "steps": 120, "global_batch_rows": 1, "log_every": 60, "eval_rows": 1,
        },
    }  # fmt: skip


def train(folder: Path, semantics: str) -> None:
    """Prepare and train; once per process, since DeepSpeed keeps the groups of its first run."""
    from nmar_ds.config import RunConfig
    from nmar_ds.data.prepare import prepare_run
    from nmar_ds.training.planning import plan_run
    from nmar_ds.training.ranks import discover_ranks
    from nmar_ds.training.run import run_training
    from nmar_ds.training.stopping import Launcher

    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )  # fmt: skip
    config = RunConfig.model_validate(configuration(folder, semantics))
    print(*prepare_run(config), sep="\n")
    assert run_training(config, plan_run(config), discover_ranks(os.environ), Launcher())


def train_all(folder: Path) -> int:
    """Import once, then fork for each semantics; the sum of the exit codes."""
    import nmar_ds.training.run  # noqa: F401

    context = multiprocessing.get_context("fork")
    codes = []
    for semantics in SEMANTICS:
        process = context.Process(target=train, args=(folder, semantics))
        process.start()
        process.join()
        codes.append(process.exitcode or 0)
    return sum(map(abs, codes))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("semantics")
    lines = [json.dumps(record) + "\n" for record in RECORDS]
    (folder / "records.jsonl").write_text("".join(lines), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_records_to_examination(semantics: str, runs: Path) -> None:
    from nmar_ds.data.store import Store
    from nmar_ds.inference.bars import number
    from nmar_ds.inference.decoding import decode
    from nmar_ds.inference.evaluation import Examination, evaluate
    from nmar_ds.inference.exported import load_exported_tokenizer, load_model, read_settings
    from nmar_ds.inference.probes import load_problems
    from nmar_ds.training.export import export_checkpoint

    exported = runs / semantics / "export"
    export_checkpoint(runs / semantics / "run", exported)
    settings = read_settings(exported)
    tokenizer = load_exported_tokenizer(exported, settings)
    (dot,) = tokenizer.encode(".", continuation=True).tolist()
    assert settings.semantics == semantics
    assert settings.boundary_ids == ((dot,) if semantics == "span" else ())
    assert settings.machine == Store(runs / semantics / "store" / "train").machine

    model = load_model(exported)
    families = load_problems([runs / "records.jsonl"], tokenizer)
    (problems,) = families.values()
    found = decode(
        model, [problem.prompt_ids for problem in problems], machine=settings.machine,
        eos_id=settings.eos_id, pad_id=settings.pad_id, max_new_tokens=90,
    )  # fmt: skip
    assert [
        "".join(
            "<" if token == settings.undo_id else tokenizer.decode([token], continuation=True)
            for token in decoded.raw_ids.tolist()
        )
        for decoded in found
    ] == WRITTEN[semantics]
    assert [decoded.num_undos for decoded in found] == UNDOS[semantics]
    for decoded, problem in zip(found, problems, strict=True):
        assert decoded.reduced_ids.tolist() == problem.reference_ids.tolist()
        assert (decoded.num_strays, decoded.stop_reason) == (0, "eos")

    (result,) = evaluate(
        model, tokenizer, settings, families, Examination(num_problems=3, max_length=3)
    ).values()
    measures = {name: number(measure) for name, measure in result.measures.items()}
    ones = ("reduced", "exact", "with_undo", "undo_recall")
    zeros = ("raw", "stray_undo", "undo_limited", "unfinished")
    assert {name: measures[name] for name in ones + zeros} == {
        **dict.fromkeys(ones, 1.0), **dict.fromkeys(zeros, 0.0)
    }  # fmt: skip
    # What the semantics takes along is no false undo, and writing it again no loop; only under
    # `token` was the right a at the head of a deviation popped without need.
    share = 1 / 3 if semantics == "token" else 0.0
    assert (measures["false_undo"], measures["loop"]) == (share, share)
    assert measures["undo_precision"] == (9 / 10 if semantics == "token" else 1.0)
    num_written = sum(len(decoded.raw_ids) for decoded in found)
    assert measures["overhead"] == num_written / sum(len(p.reference_ids) for p in problems)
    assert measures["num_probes"] == 3


if __name__ == "__main__":
    sys.exit(train_all(Path(sys.argv[1])))
