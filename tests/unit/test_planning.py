"""What a run will do, on tiny stores whose rows and steps can be counted by hand."""

# N traces

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import build

from nmar_ds.config import RunConfig
from nmar_ds.data.prepare import prepare_run
from nmar_ds.data.store import manifest_checksum, read_manifest, write_store
from nmar_ds.errors import CheckpointError, ConfigError, StoreError, VocabularyError
from nmar_ds.model.undo_init import MEAN
from nmar_ds.traces.boundaries import machine_of
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.reduction import Machine
from nmar_ds.traces.schema import NUM_ROLES, Trace
from nmar_ds.training.checkpoints import check_same_run
from nmar_ds.training.estimate import estimate_lines, shape_of, work_of
from nmar_ds.training.planning import (
    RunPlan,
    asked_settings,
    made_settings,
    open_store,
    plan_run,
    store_folder,
)

X, P, E, B, C = range(5)
BUILDER = {
    "name": "given",
    "traces_per_record": 1,
    "clean_share": 0.2,
    "max_deviations": 2,
    "max_deviation_length": 6,
    "max_length": 10,
    "overlong": "error",
}
# Lengths 6, 4, 5, 10, 5, 3 in rows of 10: [10] [6 4] [5 5] [3].
TRAIN = [
    [X, P, E, B, C, C],
    [X, X, P, P],
    [P, P, E, B, C],
    [X, X, X, X, P, P, P, P, P, P],
    [X, E, B, C, C],
    [X, E, E],  # has no target that mSFT trains
]
HELDOUT = [[X, P, P], [X, P, P, P]]
NEGATIVE = {"prefix": 1.0, "deviation": -0.5, "undo": 1.0, "correction": 1.0}
NEW_FACTS = ("objective.nll_clip", "objective.unlikelihood", "model.undo_init")


def trace(roles: list[int], seed: int) -> Trace:
    ids = np.random.default_rng(seed).integers(10, 60, size=len(roles)).astype(np.int32)
    return Trace(ids=ids, roles=np.array(roles, np.uint8), line=seed + 1)


def write(
    folder: Path,
    part: str,
    tokenizer: Tokenizer,
    roles: list[list[int]] | None = None,
    *,
    first_seed: int = 0,
    **changes: Any,
) -> None:
    traces = (TRAIN if part == "train" else HELDOUT) if roles is None else roles
    settings: dict[str, Any] = {
        "tokenizer": tokenizer,
        "sources": [{"path": f"{part}.jsonl", "sha256": "0" * 64}],
        "builder": {**BUILDER, **changes.pop("builder", {})},
        "seed": 5,
        **changes,
    }
    seeded = [trace(each, first_seed + index) for index, each in enumerate(traces)]
    write_store(folder / "store" / part, seeded, **settings)


def config(folder: Path, **changes: Any) -> RunConfig:
    """A configuration for `write`'s stores; changes are given as section__key=value."""
    values: dict[str, Any] = {
        "name": "run",
        "output": str(folder / "run"),
        "seed": 5,
        "tokenizer": {"path": "unused"},
        "data": {
            "train": ["train.jsonl"],
            "heldout": ["heldout.jsonl"],
            "store": str(folder / "store"),
            "sequence_length": 10,
            "traces": {},
        },
        "undo": {},
        "model": {"config": {"model_type": "llama"}},
        "objective": {},
        "optimizer": {"learning_rate": 0.1},
        "training": {"epochs": 3, "global_batch_rows": 3},
    }
    for key, value in changes.items():
        at = values
        *sections, name = key.split("__")
        for section in sections:
            at = at[section]
        at[name] = value
    return RunConfig.model_validate(values)


@pytest.fixture
def stores(tmp_path: Path, small_tokenizer: Tokenizer) -> Path:
    for part in ("train", "heldout"):
        write(tmp_path, part, small_tokenizer)
    return tmp_path


def test_rows_and_steps_by_hand(stores: Path, small_tokenizer: Tokenizer) -> None:
    plan = plan_run(config(stores))
    assert plan.store.num_traces == 6 and plan.heldout.num_traces == 2
    assert plan.num_tokens == 33
    assert plan.plan.num_rows == 4 and plan.heldout_plan.num_rows == 1
    rows = {tuple(plan.plan.row(row).tolist()) for row in range(4)}
    assert rows == {(3,), (0, 1), (2, 4), (5,)}
    assert plan.packing_use == pytest.approx(33 / 40)
    assert (plan.steps_per_epoch, plan.total_steps) == (2, 6)
    assert plan.weights.tolist() == [0, 1, 0, 1, 1]
    assert plan.untrained == [5]
    assert plan.store.role_counts.shape == (6, NUM_ROLES)
    assert plan.store.role_counts.sum(axis=0).tolist() == [4, 10, 5, 3, 5]
    assert plan.facts["tokenizer"] == small_tokenizer.fingerprint
    assert plan.facts["plan"] == plan.plan.fingerprint()
    assert plan.facts["total_steps"] == 6
    assert plan.facts["optimizer.learning_rate"] == 0.1
    assert plan.facts["objective.preset"] == "msft"


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"training__epochs": 1}, 2),
        ({"training__epochs": 0.5}, 1),
        ({"training__epochs": 0.01}, 1),
        ({"training__epochs": 1.01}, 3),
        ({"training__epochs": 2.5}, 5),
        ({"training__epochs": 1, "training__global_batch_rows": 4}, 1),
        ({"training__epochs": 1, "training__global_batch_rows": 5}, 1),
        ({"training__epochs": 1, "training__global_batch_rows": 1}, 4),
        ({"training__epochs": None, "training__steps": 17}, 17),
        ({"training__epochs": 1.1, "training__global_batch_rows": 1}, 5),
    ],
)
def test_how_many_steps(changes: dict[str, Any], steps: int, stores: Path) -> None:
    assert plan_run(config(stores, **changes)).total_steps == steps


def test_epochs_are_not_rounded_up_by_a_floating_point_error(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    write(tmp_path, "train", small_tokenizer, [[P] * 10] * 25)
    write(tmp_path, "heldout", small_tokenizer)
    plan = plan_run(config(tmp_path, training__epochs=2.2, training__global_batch_rows=1))
    assert (plan.steps_per_epoch, plan.total_steps) == (25, 55)


def test_warm_up_has_to_fit(stores: Path) -> None:
    assert plan_run(config(stores, optimizer__warmup_steps=6)).total_steps == 6
    with pytest.raises(
        ConfigError, match=r"optimizer.warmup_steps: 7, expected at most the 6 steps"
    ):
        plan_run(config(stores, optimizer__warmup_steps=7))


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"seed": 6}, "seed"),
        ({"undo__token": "<BACK>"}, "undo.token"),
        ({"data__sequence_length": 11}, "data.sequence_length"),
        ({"data__overlong": "drop"}, "data.overlong"),
        ({"data__train": ["other.jsonl"]}, "data.train"),
        ({"data__train": ["train.jsonl", "train.jsonl"]}, "data.train"),
        ({"data__heldout": ["other.jsonl"]}, "data.heldout"),
        ({"data__traces__builder": "hard"}, "data.traces.builder"),
        ({"data__traces": {"builder": "random", "per_record": 2}}, "data.traces.builder"),
        ({"data__traces__clean_share": 0.3}, "data.traces.clean_share"),
        ({"data__traces__max_deviations": 3}, "data.traces.max_deviations"),
        ({"data__traces__max_deviation_length": 5}, "data.traces.max_deviation_length"),
        ({"data__traces__retry_rate": 0.5}, "data.traces.retry_rate"),
        ({"data__traces": {"builder": "pairs", "delay": [0, 1]}}, "data.traces.builder"),
    ],
)
def test_a_store_of_other_settings_is_refused_and_the_setting_named(
    changes: dict[str, Any], setting: str, stores: Path
) -> None:
    part = "heldout" if setting == "data.heldout" else "train"
    with pytest.raises(StoreError) as caught:
        plan_run(config(stores, **changes))
    text = str(caught.value)
    assert f"was prepared with {setting} = " in text and "launcher/prepare.py" in text
    assert text.startswith(str(stores / "store" / part))


def test_every_setting_of_the_traces_is_compared(stores: Path) -> None:
    """A key added to the section has to be compared, too: the list above is the section's."""
    named = {"builder", "per_record", "clean_share", "max_deviations", "max_deviation_length",
             "retry_rate", "delay", "verify"}  # fmt: skip
    assert set(type(config(stores).data.traces).model_fields) == named
    # Those that only some builders have: asked for as a store's manifest keeps them.
    sampled = {"builder": "on_policy", "delay": [1, 2], "verify": True}
    asked = asked_settings(config(stores, data__traces=sampled), "train")
    assert asked["data.traces.delay"] == [1, 2] and asked["data.traces.verify"] is True
    made = made_settings(
        {
            **read_manifest(stores / "store" / "train"),
            "builder": {
                **read_manifest(stores / "store" / "train")["builder"],
                "delay": [1, 2],
                "verify": True,
            },
        }
    )
    assert made["data.traces.delay"] == [1, 2] and made["data.traces.verify"] is True


def test_a_store_of_another_meaning_is_refused(stores: Path, small_tokenizer: Tokenizer) -> None:
    digits = machine_of(small_tokenizer, "span", ["1", "2"])
    points = machine_of(small_tokenizer, "span", ["."])
    reset = machine_of(small_tokenizer, "reset")
    for changes, asked, words in [
        ({"machine": reset}, {}, "undo.semantics = 'reset'"),
        ({"machine": points, "boundaries": ["."]}, {}, "undo.semantics = 'span'"),
        (
            {"machine": digits, "boundaries": ["1", "2"]},
            {"undo": {"semantics": "span", "boundaries": ["."]}},
            r"undo.boundaries = \['1', '2'\], but the configuration says \['.'\]",
        ),
        ({"context": "pruned"}, {}, "context = 'pruned'"),
    ]:
        write(stores, "train", small_tokenizer, **changes)
        with pytest.raises(StoreError, match=words):
            plan_run(config(stores, **asked))


def test_boundary_ids_are_a_fact_of_the_run_and_older_stores_have_none(
    stores: Path, small_tokenizer: Tokenizer
) -> None:
    plain = facts(stores)
    for part in ("train", "heldout"):
        file = store_folder(config(stores), part) / "manifest.json"
        manifest = json.loads(file.read_text())
        del manifest["boundaries"], manifest["boundary_ids"]
        manifest["checksum"] = manifest_checksum(manifest)
        file.write_text(json.dumps(manifest))
    assert facts(stores) == plain and "undo.boundary_ids" not in plain
    assert open_store(config(stores), "train").machine == Machine(small_tokenizer.undo_id)
    found = {}
    for text in ("1", "2"):
        machine = machine_of(small_tokenizer, "span", [text])
        for part in ("train", "heldout"):
            write(stores, part, small_tokenizer, machine=machine, boundaries=[text])
        undo = {"semantics": "span", "boundaries": [text]}
        found[text] = facts(stores, undo=undo)
        assert open_store(config(stores, undo=undo), "train").machine == machine
        assert found[text]["undo.boundary_ids"] == sorted(machine.boundary_ids)
    with pytest.raises(CheckpointError, match=r"undo.boundary_ids was \[\d+"):
        check_same_run(found["1"], found["2"], stores)


def test_missing_empty_and_damaged_stores(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    with pytest.raises(StoreError, match=r"train.*missing"):
        plan_run(config(tmp_path))
    write(tmp_path, "train", small_tokenizer)
    with pytest.raises(StoreError, match=r"heldout.*missing"):
        plan_run(config(tmp_path))
    write(tmp_path, "heldout", small_tokenizer, [])
    with pytest.raises(StoreError, match=r"heldout: holds no traces"):
        plan_run(config(tmp_path))
    write(tmp_path, "heldout", small_tokenizer)
    write(tmp_path, "train", small_tokenizer, [])
    with pytest.raises(StoreError, match=r"train: holds no traces"):
        plan_run(config(tmp_path))
    write(tmp_path, "train", small_tokenizer)
    plan_run(config(tmp_path))
    manifest = store_folder(config(tmp_path), "train") / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 5', '"seed": 6'))
    with pytest.raises(StoreError, match="checksum"):
        plan_run(config(tmp_path))


def test_two_tokenizers_are_refused(
    stores: Path, small_tokenizer: Tokenizer, sp_tokenizer: Tokenizer
) -> None:
    write(stores, "heldout", sp_tokenizer)
    with pytest.raises(StoreError, match="its tokenizer is not that of"):
        plan_run(config(stores))


def test_untrained_traces_follow_the_weights_and_are_listed(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    # Number 3 has its only prefix token first, where it is nobody's target.
    write(tmp_path, "train", small_tokenizer, [[X, P], [X, E], [X, E, B], [P, X], [P], [X, C]])
    write(tmp_path, "heldout", small_tokenizer)
    weights = {"prefix": 0.0, "deviation": 0.0, "undo": 0.0, "correction": 2.0}
    for changes, expected in [
        ({}, [1, 3, 4]),
        ({"objective__preset": "sft"}, [3, 4]),
        ({"objective__preset": "custom", "objective__weights": weights}, [0, 1, 2, 3, 4]),
    ]:
        run = config(tmp_path, **changes)
        plan = plan_run(run)
        assert plan.untrained == expected
        line = plan.summary(run)[-1]
        listed = ", ".join(str(index) for index in expected)
        assert line == f"untrained {len(expected)} traces have no trained target: {listed}"


def test_many_untrained_traces_are_counted_in_full_and_listed_in_part(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    write(tmp_path, "train", small_tokenizer, [[X, E]] * 12 + [[X, P]])
    write(tmp_path, "heldout", small_tokenizer)
    run = config(tmp_path)
    line = plan_run(run).summary(run)[-1]
    assert line.startswith("untrained 12 traces") and line.endswith(
        "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ..."
    )


def test_the_summary_has_the_numbers(stores: Path) -> None:
    run = config(stores)
    text = "\n".join(plan_run(run).summary(run))
    # 10 prefix, 3 undo and 5 correction targets of 33 tokens.
    for part in ("6 training, 2 held-out", "33 per epoch, 54.5% of them trained",
                 "prompt 4, prefix 10, deviation 5, undo 3, correction 5", "4 of 10 tokens, 17.50%",
                 "6 of 3 rows, 2 per epoch (3.00 epochs)", "msft, denominator common",
                 "untrained 1 traces have no trained target: 5"):  # fmt: skip
        assert part in text
    run = config(stores, objective__preset="sft")
    assert "untrained" not in "\n".join(plan_run(run).summary(run))


def test_work_is_that_of_the_traces_not_of_the_rows(stores: Path) -> None:
    keys = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
    run = config(stores, model__config=keys)
    plan = plan_run(run)
    shape = shape_of(run, plan.store.manifest["tokenizer"]["size"])
    squares = (6**2 + 4**2 + 5**2 + 10**2 + 5**2 + 3**2) / 2  # two steps an epoch
    flops = work_of(shape, tokens=33 / 2, squares=squares).flops
    seconds = flops / (4 * 2e12 * 0.5)
    text = "\n".join(estimate_lines(run, plan, world_size=4, mfu=0.5, peak_tflops=2.0))
    assert f"a step is 16 tokens and {flops / 1e15:.4g} PFLOP (on average): {seconds:.3g} s" in text
    assert f"hours     {6 * seconds / 3600:.3g} for 6 steps, 99 tokens" in text
    assert f"{shape.num_weights:,} weights" in text


@pytest.mark.parametrize(
    ("objective", "untrained", "share", "said"),
    [
        ({}, [5], "54.5%", ""),  # 10 + 3 + 5 of 33 tokens
        ({"unlikelihood": 0.5}, [], "69.7%", ", unlikelihood 0.5"),  # and 5 more
        (
            {"preset": "custom", "weights": NEGATIVE, "nll_clip": 3.0},
            [],
            "69.7%",
            "deviation -0.5, undo 1, correction 1, nll_clip 3",
        ),
    ],
)
def test_pushing_a_deviation_away_is_training_it(
    stores: Path, objective: dict[str, Any], untrained: list[int], share: str, said: str
) -> None:
    run = config(stores, objective=objective)
    plan = plan_run(run)
    assert plan.untrained == untrained
    summary = "\n".join(plan.summary(run))
    assert f"{share} of them trained" in summary
    assert f"{said}\n" in summary + "\n"
    assert ("untrained 1 traces" in summary) == bool(untrained)


def facts(folder: Path, **changes: Any) -> dict[str, Any]:
    return plan_run(config(folder, **changes)).facts


def test_facts_are_plain_repeatable_and_name_what_changed(stores: Path) -> None:
    first = facts(stores)
    assert first == facts(stores)
    assert json.loads(json.dumps(first)) == first  # or a resumed run would differ from itself
    check_same_run(first, facts(stores), stores)
    for changes, changed in [
        ({"training__epochs": 4}, {"total_steps"}),
        ({"training__global_batch_rows": 2}, {"training.global_batch_rows"}),
        ({"optimizer__betas": [0.9, 0.999]}, {"optimizer.betas"}),
        ({"optimizer__warmup_steps": 1}, {"optimizer.warmup_steps"}),
        ({"objective__preset": "sft"}, {"objective.preset"}),
        ({"objective__denominator": "trained"}, {"objective.denominator"}),
        ({"objective__unlikelihood": 0.5}, {"objective.unlikelihood"}),
        ({"model__dtype": "float32"}, {"model.dtype"}),
        ({"model__config": {"model_type": "llama", "hidden_size": 8}}, {"model.config"}),
    ]:
        second = facts(stores, **changes)
        assert {key for key in first | second if first.get(key) != second.get(key)} == changed
    negative = {"preset": "custom", "weights": NEGATIVE, "nll_clip": 3.0}
    first = facts(stores, objective=negative)
    second = facts(stores, objective={**negative, "nll_clip": 4.0})
    assert {key for key in first if first[key] != second[key]} == {"objective.nll_clip"}
    with pytest.raises(CheckpointError, match=r"objective.nll_clip was 3.0, is 4.0"):
        check_same_run(first, second, stores)
    first = facts(stores)
    with pytest.raises(CheckpointError, match=r"objective.unlikelihood was None, is 0.5"):
        check_same_run(first, facts(stores, objective__unlikelihood=0.5), stores)
    # A checkpoint of a version that had no such options is one without them.
    old = {key: value for key, value in first.items() if key not in NEW_FACTS}
    assert len(old) == len(first) - 3
    check_same_run(old, first, stores)
    # These may change from one start to the next.
    for changes in ({"output": "elsewhere"}, {"training__log_every": 3},
                    {"training__micro_batch_rows": 3}, {"name": "other"}):  # fmt: skip
        assert facts(stores, **changes) == first


def test_facts_tell_data_apart_that_differs_in_one_token_or_role_only(
    stores: Path, small_tokenizer: Tokenizer
) -> None:
    first = facts(stores)
    write(stores, "train", small_tokenizer)
    assert facts(stores) == first  # written again, the same

    def changed() -> set[str]:
        second = facts(stores)
        return {key for key in first if first[key] != second[key]}

    write(stores, "train", small_tokenizer, first_seed=1)  # other ids, the same lengths
    assert changed() == {"data"}
    write(stores, "train", small_tokenizer, [[X, P, E, B, P, C], *TRAIN[1:]])
    assert changed() == {"data"}
    write(stores, "train", small_tokenizer, [TRAIN[1], TRAIN[0], *TRAIN[2:]])
    assert changed() == {"data"}  # these two share a row
    write(stores, "train", small_tokenizer, [TRAIN[3], *TRAIN[1:3], TRAIN[0], *TRAIN[4:]])
    assert changed() == {"data", "plan"}


def test_what_prepare_writes_is_what_a_run_asks_for(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    """Records to plan, through the real preparation: the two lists of settings agree."""
    small_tokenizer.save(tmp_path / "tokenizer")
    for part, number in (("train", 12), ("heldout", 3)):
        records = [
            {"prompt": f"{a}+{a + 1}?", "reference": f" {a} + {a + 1} = {2 * a + 1}", "group": "g"}
            for a in range(number)
        ]
        (tmp_path / f"{part}.jsonl").write_text(
            "".join(json.dumps(each) + "\n" for each in records)
        )
    run = config(
        tmp_path,
        tokenizer__path=str(tmp_path / "tokenizer"),
        data__train=[str(tmp_path / "train.jsonl")],
        data__heldout=[str(tmp_path / "heldout.jsonl")],
        data__sequence_length=128,
        data__traces={"builder": "random", "per_record": 2, "clean_share": 0.5},
    )
    lines = list(prepare_run(run))
    assert [line.split()[0] for line in lines] == ["tokenizer", "train", "heldout", "parity"]
    plan = plan_run(run)
    assert isinstance(plan, RunPlan) and plan.store.num_traces == 24 and plan.untrained == []
    assert open_store(run, "heldout").num_traces == 6
    assert all("up to date" in line for line in list(prepare_run(run))[1:])
    again = plan_run(run)
    assert again.facts == plan.facts


def test_the_start_of_the_undo_row_is_resolved_for_a_folder(
    stores: Path, tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    folder = tmp_path / "model"
    build(vocab_size=small_tokenizer.size).save_pretrained(folder)
    number = int(small_tokenizer.ordinary_ids()[7])
    section = {"method": "copy", "token": small_tokenizer.piece(number)}
    plan = plan_run(config(stores, model={"path": str(folder), "undo_init": section}))
    assert (plan.undo_init.sources, plan.undo_init.seed) == (((number,),), 5)
    assert plan.facts["model.undo_init"] == {
        **section, "anchors": [], "noise": 0.0, "output_bias": 0.0
    }  # fmt: skip
    assert json.loads(json.dumps(plan.facts)) == plan.facts
    plain = plan_run(config(stores, model={"path": str(folder)}))
    assert plain.undo_init.method == "mean" and plain.facts["model.undo_init"] is None
    assert small_tokenizer.eos_id in plain.undo_init.excluded_ids
    with pytest.raises(CheckpointError, match=r"model.undo_init was {.*}, is None"):
        check_same_run(plan.facts, plain.facts, stores)
    assert plan_run(config(stores)).undo_init == MEAN


def test_a_trained_undo_row_is_not_started_again(
    stores: Path, tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    folder = tmp_path / "exported"
    build(vocab_size=small_tokenizer.size).save_pretrained(folder)
    facts = {"tokenizer_fingerprint": small_tokenizer.fingerprint}
    (folder / "nmar.json").write_text(json.dumps(facts), encoding="utf-8")
    assert plan_run(config(stores, model={"path": str(folder)})).total_steps == 6
    with pytest.raises(ConfigError, match=r"^model.undo_init: .*exported: <UNDO> is trained alre"):
        plan_run(config(stores, model={"path": str(folder), "undo_init": {}}))


def test_a_model_with_another_tokenizer_of_the_same_size_is_refused(
    stores: Path, small_tokenizer: Tokenizer
) -> None:
    """Before torch: a run on ids that mean other pieces to the model would only seem to learn."""
    from safetensors.numpy import save_file

    from nmar_ds.traces.sentencepiece_vocabulary import read_model

    folder = stores / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file(
        {"model.embed_tokens.weight": np.ones((small_tokenizer.size, 2), np.float32)},
        folder / "model.safetensors",
    )
    small_tokenizer.save(folder)
    run = config(stores, model={"path": str(folder)})
    plan_run(run)
    model = read_model(folder / "tokenizer.model")
    model.pieces[20].piece, model.pieces[21].piece = model.pieces[21].piece, model.pieces[20].piece
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(
        VocabularyError, match=r"model/tokenizer\.model: id 20 is .*data's tokenizer"
    ):
        plan_run(run)
    facts = {"tokenizer_fingerprint": small_tokenizer.fingerprint}
    (folder / "nmar.json").write_text(json.dumps(facts))  # an export proves it by fingerprint
    plan_run(run)
