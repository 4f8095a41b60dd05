"""The configuration reader: every misspelling is named, no value is coerced, no trap of YAML bites."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nmar_ds.config import RunConfig, Section, deepspeed_config, load_config
from nmar_ds.errors import ConfigError
from nmar_ds.model.weighting import LossOptions

FULL: dict[str, Any] = {
    "name": "run-1",
    "output": "runs/run-1",
    "seed": 7,
    "context": "linear",
    "tokenizer": {
        "path": "tok.model",
        "train": {"vocab_size": 64, "model_type": "bpe", "phrases": ["x = "]},
    },
    "undo": {
        "token": "<UNDO>",
        "reserved_token": "<spare>",
        "semantics": "span",
        "boundaries": ["\n"],
    },
    "data": {
        "train": ["a.jsonl", "b.jsonl"],
        "heldout": ["c.jsonl"],
        "store": "store",
        "sequence_length": 128,
        "overlong": "drop",
        "refused": "drop",
        "chat": {"system": "Add."},
        "traces": {
            "builder": "on_policy",
            "per_record": 2,
            "clean_share": 0.25,
            "max_deviations": 3,
            "max_deviation_length": 4,
            "retry_rate": 0.5,
            "delay": [1, 3],
            "verify": True,
        },
    },
    "model": {
        "path": "model",
        "config": None,
        "dtype": "float32",
        "activation_checkpointing": True,
        "attention": "masked",
        "pad_vocab_to_multiple_of": 8,
        "undo_init": {
            "method": "copy",
            "token": " undo",
            "anchors": [],
            "noise": 0.5,
            "output_bias": -1.5,
        },
    },
    "objective": {
        "preset": "custom",
        "weights": {"prefix": 1.0, "deviation": -0.1, "undo": 2.0, "correction": 0.5},
        "denominator": "sum",
        "nll_clip": 4.0,
        "unlikelihood": 0.25,
    },
    "optimizer": {
        "name": "sgd",
        "learning_rate": 0.5,
        "betas": [0.9, 0.99],
        "eps": 1.0e-06,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "final_learning_rate_ratio": 0.0,
        "max_grad_norm": 0.0,
    },
    "training": {
        "epochs": None,
        "steps": 12,
        "global_batch_rows": 12,
        "micro_batch_rows": 2,
        "world_size": 2,
        "log_every": 1,
        "eval_every": 4,
        "eval_rows": 8,
        "eval_decodes": 3,
        "eval_decode_forwards": 5,
        "max_nonfinite_steps": 2,
        "timeout_seconds": 60,
        "slow_timeout_seconds": 600,
    },
    "checkpoint": {
        "every": 5,
        "keep": 3,
        "resume": "never",
        "asynchronous": True,
        "max_failed_saves": 2,
    },
    "zero": {
        "overlap_comm": False,
        "reduce_bucket_size": 1000,
        "prefetch_bucket_size": 2000,
        "param_persistence_threshold": 0,
        "max_live_parameters": 3000,
        "gather_whole_layers": False,
        "hpz_partition_size": 2,
        "sub_group_size": 4000,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
    },
}

NEGATIVE = "{prefix: 1, deviation: -0.5, undo: 1, correction: 1}"
SMALL = """name: a
output: o
tokenizer: {path: t}
data: {train: [a], heldout: [b], store: s, sequence_length: 8}
model: {path: m}
optimizer:
  learning_rate: 1e-3
training:
  steps: 3
  global_batch_rows: 4
"""


def write(folder: Path, content: str | bytes | dict[str, Any]) -> Path:
    path = folder / "run.yaml"
    if isinstance(content, dict):
        content = yaml.safe_dump(content, sort_keys=False)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return str(caught.value)


def sections(section: type[Section], at: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Every (place, section class) of the configuration, found from the classes themselves."""
    found: list[tuple[tuple[str, ...], Any]] = [(at, section)]
    for name, field in section.model_fields.items():
        for inner in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(inner, type) and issubclass(inner, Section):
                found += sections(inner, (*at, name))
    return found


# Entries of the two lists of sources have a test of their own: tests/unit/test_sources.py.
ALL_KEYS = [
    (*at, name)
    for at, section in sections(RunConfig)
    for name in section.model_fields
    if at[:2] not in (("data", "train"), ("data", "heldout"))
]


def inside(data: dict[str, Any], place: tuple[str, ...]) -> Any:
    for part in place:
        data = data[part]
    return data


def typos(name: str) -> list[str]:
    middle = len(name) // 2
    return [
        name[:middle] + name[middle + 1 :],
        name[:middle] + name[middle] + name[middle:],
        name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :],
    ]


def test_the_full_configuration_loads_and_leaves_nothing_out(tmp_path: Path) -> None:
    loaded = load_config(write(tmp_path, FULL)).model_dump()
    loaded["optimizer"]["betas"] = list(loaded["optimizer"]["betas"])
    loaded["data"]["traces"]["delay"] = list(loaded["data"]["traces"]["delay"])
    assert loaded == FULL
    assert len(ALL_KEYS) > 50 and ("tokenizer", "train", "vocab_size") in ALL_KEYS
    for place in ALL_KEYS:
        assert place[-1] in inside(FULL, place[:-1]), f"FULL lacks {place}: extend it"


@pytest.mark.parametrize("place", ALL_KEYS, ids=".".join)
def test_a_typo_in_any_key_is_named_with_its_line_and_the_right_key(
    place: tuple[str, ...], tmp_path: Path
) -> None:
    siblings = inside(FULL, place[:-1])
    for typo in typos(place[-1]):
        if typo in siblings or typo == place[-1]:
            continue
        data = copy.deepcopy(FULL)
        section = inside(data, place[:-1])
        # The key keeps its line: the mapping is rebuilt in the same order.
        items = [(typo if key == place[-1] else key, value) for key, value in section.items()]
        section.clear()
        section.update(items)
        path = write(tmp_path, data)
        line = next(
            number
            for number, text in enumerate(path.read_text().splitlines(), 1)
            if text.strip().startswith(f"{typo}:")
        )
        dotted = ".".join([*place[:-1], typo])
        expected = f"{path}:{line}: {dotted}: unknown key; did you mean {place[-1]!r}?"
        assert expected in refusal(path).splitlines()


@pytest.mark.parametrize("place", ALL_KEYS, ids=".".join)
def test_a_typo_in_an_override_is_named(place: tuple[str, ...], tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    typo = typos(place[-1])[0]
    dotted = ".".join([*place[:-1], typo])
    expected = f"override: {dotted}: unknown key; did you mean {place[-1]!r}?"
    assert expected in refusal(path, f"{dotted}=1").splitlines()


def test_a_key_unlike_any_other_lists_all_and_a_weight_names_the_nearest_role(
    tmp_path: Path,
) -> None:
    assert (
        "training" in refusal(write(tmp_path, SMALL + "qqq: 1\n")).partition("expected one of")[2]
    )
    data = copy.deepcopy(FULL)
    for role in ("prefix", "deviation", "undo", "correction"):
        weights = dict(FULL["objective"]["weights"])
        weights[typos(role)[0]] = weights.pop(role)
        data["objective"]["weights"] = weights
        text = refusal(write(tmp_path, data))
        assert f"objective.weights.{typos(role)[0]}: no such role, expected {role}" in text


WRONG: dict[type, list[Any]] = {
    bool: ["true", 1, None, []],
    int: ["7", 7.0, True, [7]],
    float: ["text", True, [0.5], float("nan"), float("inf")],
    str: [3, True, ["text"], {"a": "text"}],
    list: ["text", 3, {"a": 1}, [None]],
    dict: ["text", 3, [{}]],
    type(None): [True, ["text"]],
}


@pytest.mark.parametrize("place", ALL_KEYS, ids=".".join)
def test_values_of_the_wrong_type_are_refused_where_they_stand(
    place: tuple[str, ...], tmp_path: Path
) -> None:
    for wrong in WRONG[type(inside(FULL, place))]:
        data = copy.deepcopy(FULL)
        inside(data, place[:-1])[place[-1]] = wrong
        path = write(tmp_path, data)
        text = refusal(path)
        assert ".".join(place) in text, (wrong, text)
        assert text.startswith(f"{path}:") and text.split(":")[1].isdigit(), (wrong, text)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed=-1", "seed"),
        ("seed=9223372036854775808", "seed"),
        ("optimizer.learning_rate=0", "learning_rate"),
        ("optimizer.learning_rate=-1e-3", "learning_rate"),
        ("optimizer.learning_rate=.inf", "finite"),
        ("optimizer.betas=[0.9]", "betas"),
        ("optimizer.betas=[0.9, 0.9, 0.9]", "betas"),
        ("optimizer.betas=[0.9, 1.0]", "0 <= beta < 1"),
        ("optimizer.betas=[-0.1, 0.9]", "0 <= beta < 1"),
        ("optimizer.eps=0", "eps"),
        ("optimizer.weight_decay=-1", "weight_decay"),
        ("optimizer.warmup_steps=-1", "warmup_steps"),
        ("optimizer.final_learning_rate_ratio=1.5", "final_learning_rate_ratio"),
        ("optimizer.max_grad_norm=-1", "max_grad_norm"),
        ("optimizer.name=adam", "optimizer.name"),
        ("data.train=[]", "data.train: is empty"),
        ("data.heldout=[]", "data.heldout: is empty"),
        ("data.sequence_length=0", "sequence_length"),
        ("data.traces.clean_share=1.01", "clean_share"),
        ("data.traces.max_deviations=0", "max_deviations"),
        ("data.overlong=truncate", "overlong"),
        ("model.dtype=float16", "dtype"),
        ("model.config={model_type: llama}", "exactly one of `path` and `config`"),
        ("model={}", "exactly one of `path` and `config`"),
        ("model={config: {hidden_size: 3}}", "model_type"),
        ("objective.preset=custom", "weights"),
        ("objective.weights={prefix: 1}", "weights"),
        ("objective={preset: custom, weights: {prefix: -1}}", "prefix"),
        ("objective={preset: custom, weights: {prefix: .nan}}", "finite"),
        ("objective.denominator=mean", "denominator"),
        ("objective.nll_clip=3.0", "objective.nll_clip: 3.0, but no weight is negative"),
        ("objective.nll_clip=0", "nll_clip"),
        ("objective.unlikelihood=0", "unlikelihood"),
        ("objective.unlikelihood=-1", "unlikelihood"),
        (f"objective={{preset: custom, weights: {NEGATIVE}}}", "set objective.nll_clip"),
        ("model.undo_init={method: copy}", "lacks `token`"),
        ("model.undo_init={method: semantic}", "lacks `anchors`"),
        ("model.undo_init={token: a}", "method mean does not use `token`"),
        ("model.undo_init={method: copy, token: a, anchors: [b]}", "does not use `anchors`"),
        ("model.undo_init={noise: -0.1}", "noise"),
        ("model.undo_init={method: random}", "method"),
        ("model={config: {model_type: llama}, undo_init: {}}", "nothing to initialise from"),
        ("training.epochs=1", "exactly one of `epochs` and `steps`"),
        ("training.steps=null", "exactly one of `epochs` and `steps`"),
        ("training={epochs: .inf, global_batch_rows: 1}", "finite"),
        ("training={epochs: 0, global_batch_rows: 1}", "epochs"),
        ("checkpoint.keep=1", "keep: leaves nothing to fall back on"),
        ("checkpoint.resume=yes", "resume"),
        ("zero.param_persistence_threshold=-1", "param_persistence_threshold"),
        ("zero.hpz_partition_size=0", "hpz_partition_size"),
        ("zero.sub_group_size=0", "sub_group_size"),
        ("zero.offload_optimizer={device: nvme}", "offload_optimizer.device"),
    ],
)
def test_values_out_of_range_are_refused(override: str, named: str, tmp_path: Path) -> None:
    text = refusal(write(tmp_path, SMALL), override)
    assert named in text
    # A rule that ties two keys together is reported at its section, wherever that stands.
    tied = any(f" {section}: " in text for section in ("model", "objective", "training"))
    assert tied or text.startswith("override: ")


@pytest.mark.parametrize(
    ("override", "mend"),
    [
        ("context=pruned", "use linear"),
    ],
)
def test_what_is_not_built_yet_is_refused_with_the_mend(
    override: str, mend: str, tmp_path: Path
) -> None:
    text = refusal(write(tmp_path, SMALL), override)
    assert override.partition("=")[0] in text and mend in text


@pytest.mark.parametrize(
    ("undo", "mend"),
    [
        ({"semantics": "span"}, 'needs `boundaries`: texts that end a span, such as "\\n"'),
        ({"semantics": "span", "boundaries": []}, "needs `boundaries`"),
        ({"semantics": "span", "boundaries": [".", ""]}, "undo.boundaries: holds an empty text"),
        ({"semantics": "reset", "boundaries": ["."]}, "belong to `span`, `semantics` is `reset`"),
        ({"boundaries": ["."]}, "belong to `span`, `semantics` is `token`"),
    ],
)
def test_boundaries_go_with_span(undo: dict[str, Any], mend: str, tmp_path: Path) -> None:
    text = refusal(write(tmp_path, SMALL + yaml.safe_dump({"undo": undo})))
    assert ": undo" in text and mend in text


def test_every_semantics_is_accepted(tmp_path: Path) -> None:
    for undo in ({"semantics": "reset"}, {"semantics": "span", "boundaries": [".", "\n"]}, {}):
        section = load_config(write(tmp_path, SMALL + yaml.safe_dump({"undo": undo}))).undo
        assert section.semantics == undo.get("semantics", "token")
        assert section.boundaries == undo.get("boundaries", [])


def test_a_negative_weight_and_unlikelihood_with_what_they_need(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    negative = f"objective={{preset: custom, weights: {NEGATIVE}, nll_clip: 3}}"
    assert load_config(path, [negative]).objective.options == LossOptions(nll_clip=3.0)
    both = load_config(path, [negative, "objective.unlikelihood=0.5"]).objective.options
    assert both == LossOptions(nll_clip=3.0, unlikelihood=0.5)
    only = load_config(path, ["objective.unlikelihood=2"]).objective.options
    assert only == LossOptions(unlikelihood=2.0)
    assert load_config(path).objective.options == LossOptions()


def test_overrides_replace_and_create(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    config = load_config(
        path,
        [
            "optimizer.learning_rate=3e-4",
            "zero.overlap_comm=no",
            "data.train=[x, y]",
            "training.steps=null",
            "training.epochs=2",
            "checkpoint={every: 3}",
            "checkpoint.keep=4",
            "name=first",
            "name=last",
        ],
    )
    assert config.optimizer.learning_rate == 3e-4
    assert config.zero.overlap_comm is False
    assert [source.path for source in config.data.train] == ["x", "y"]
    assert (config.training.steps, config.training.epochs) == (None, 2)
    assert (config.checkpoint.every, config.checkpoint.keep) == (3, 4)
    assert config.name == "last"
    assert load_config(path, ["output=a=b"]).output == "a=b"
    assert path.read_text() == SMALL


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "expected key.subkey=value"),
        ("=3", "expected key.subkey=value"),
        ("optimizer.=3", "expected key.subkey=value"),
        ("optimizer..eps=3", "expected key.subkey=value"),
        ("name.x=3", "name is a value, not a section"),
        ("optimizer.learning_rate.x=3", "optimizer.learning_rate is a value, not a section"),
        ("data.train.0=3", "data.train is a value, not a section"),
        ("seed=[1", "the value is not YAML"),
        ("seed=*x", "the value is not YAML"),
        ("name=2024-13-45", "the value is not YAML"),
        ("seed=\x07", "the value is not YAML"),
        ("seed=" + "9" * 5000, "the value is not YAML"),
        ("seed=" + "[" * 3000, "the value is not YAML"),
        ("zero={[a]: 1}", "a list cannot be a key"),
        ("zero={overlap_comm: yes, overlap_comm: no}", "given twice"),
        ("seed=!!python/object/apply:os.getpid []", "the value is not YAML"),
        ("optimizer={learning_rat: 1}", "override: optimizer.learning_rat: unknown key"),
        ("optimizer={eps: 1e-8}", "override: optimizer.learning_rate: is missing"),
    ],
)
def test_bad_overrides(override: str, said: str, tmp_path: Path) -> None:
    assert said in refusal(write(tmp_path, SMALL), override)


def test_numbers_and_words_mean_what_they_seem_to(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    for text, value in [("1e-3", 1e-3), ("1E5", 1e5), ("+2.5e+1", 25.0), (".5", 0.5), ("1.", 1.0),
                        ("3", 3.0), ("1_000.5", 1000.5), ("6.02e23", 6.02e23)]:  # fmt: skip
        assert (
            load_config(path, [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == value
        )
    for text, number in [("0", 0), ("12", 12), ("+12", 12), ("1_000", 1000), ("0x10", 16)]:
        seed = load_config(path, [f"seed={text}"]).seed
        assert seed == number and type(seed) is int
    # YAML 1.1 would read these as 8, 90, 5400 and 3.
    for text in ["010", "1:30", "1:30:00", "0b11", "1e3", "12.0", "'3'"]:
        assert "seed" in refusal(path, f"seed={text}")
    assert "learning_rate" in refusal(path, "optimizer.learning_rate=1:30.5")  # 90.5 there
    for text, flag in [("yes", True), ("on", True), ("true", True), ("no", False), ("off", False)]:
        assert load_config(path, [f"zero.overlap_comm={text}"]).zero.overlap_comm is flag
    # A bare yes or no is no name, nor are a date or a number; in quotes they are.
    for text in ["yes", "no", "null", "2024-01-01", "12", "1e3", "~"]:
        assert "name" in refusal(path, f"name={text}")
        if text != "~":
            assert load_config(path, [f"name='{text}'"]).name == text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (SMALL.replace("output: o", "name: b"), "run.yaml:2: name: given twice"),
        (SMALL + "  steps: 4\n", "run.yaml:11: steps: given twice"),
        (SMALL.replace("{path: t}", "{path: t, path: u}"), "run.yaml:3: path: given twice"),
        (SMALL.encode() + b"# caf\xe9\n", "is not UTF-8"),
        (SMALL.encode("utf-16"), "is not UTF-8"),
        ("", "name: is missing"),
        ("# nothing\n", "name: is missing"),
        ("- a\n- b\n", "run.yaml:1: is a list, expected a mapping"),
        ("text\n", "is a str, expected a mapping"),
        ("3\n", "is a int, expected a mapping"),
        ("name: a\n\toutput: o\n", "run.yaml:2: not YAML"),
        ("\tname: a\n", "run.yaml:1: not YAML"),
        ("name: [a\n", "not YAML"),
        ("name: a\n---\nname: b\n", "run.yaml:2: not YAML"),
        (SMALL + "seed: *x\n", "run.yaml:11: not YAML"),
        (SMALL + "seed: !!python/object/apply:os.getpid []\n", "run.yaml:11: not YAML"),
        (SMALL + "[a]: 1\n", "run.yaml:11: a list cannot be a key"),
        (SMALL + "{a: b}: 1\n", "run.yaml:11: a dict cannot be a key"),
        (SMALL + "<<: {seed: 3}\n", "run.yaml:11: not YAML"),
        (SMALL + "1: 2\n", "Keys should be strings"),
        (SMALL + "zero: {yes: 2}\n", "run.yaml:11: zero"),
        (SMALL + "seed: \x07\n", "not YAML"),
        (SMALL + "seed: " + "9" * 5000 + "\n", "not YAML"),
        (SMALL + "seed: 2024-13-45\n", "not YAML"),
        (SMALL + "zero: " + "[" * 3000 + "\n", "not YAML"),
        (SMALL + "zero: &z {a: *z}\n", "not YAML"),
        (SMALL.replace("name: a\n", ""), "run.yaml: name: is missing"),
        (SMALL.replace("  learning_rate: 1e-3\n", "  eps: 1e-8\n"),
         "run.yaml:6: optimizer.learning_rate: is missing"),
    ],
)  # fmt: skip
def test_broken_files_are_one_clear_line(content: str | bytes, said: str, tmp_path: Path) -> None:
    text = refusal(write(tmp_path, content))
    assert said in text
    assert all(line.startswith(str(tmp_path)) for line in text.splitlines())


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "no such configuration file" in refusal(tmp_path / "none.yaml")
    assert "is a folder" in refusal(tmp_path)


def test_every_fault_is_reported_at_once(tmp_path: Path) -> None:
    content = SMALL.replace("steps: 3", "stesp: 3") + "sed: 1\n"
    lines = refusal(write(tmp_path, content), "zero.overlap_com=yes").splitlines()
    assert any("run.yaml:9: training.stesp" in line for line in lines)
    assert any("run.yaml:11: sed" in line for line in lines)
    assert any("override: zero.overlap_com" in line for line in lines)


HOSTILE = [
    "", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "..\\x", ".hidden", "-rf", "--help", "_a",
    "a b", " a", "a ", "a\n", "\na", "a\x00b", "a;b", "$(id)", "`id`", "a|b", "a&b", "a'b", 'a"b',
    "a*", "~", "~root", "%2e%2e", "a\u2215b", "\u202ea", "caf\u00e9", "\uff0e\uff0e", "a:b", "x" * 65,
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_hostile_run_names_are_refused(name: str) -> None:
    assert len(HOSTILE) >= 30
    values = {**copy.deepcopy(FULL), "name": name}
    with pytest.raises(ValueError, match="is no run name"):
        RunConfig.model_validate(values)


def test_good_run_names_and_immutability(tmp_path: Path) -> None:
    for name in ["a", "7", "A.b_c-1", "x" * 64]:
        assert RunConfig.model_validate({**copy.deepcopy(FULL), "name": name}).name == name
    config = load_config(write(tmp_path, SMALL))
    with pytest.raises(ValueError, match="frozen"):
        config.training.steps = 4


def test_accumulation_steps(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, FULL))
    # 12 rows, 2 per micro-batch; 4 and 5 ranks run empty rows too.
    steps = [config.accumulation_steps(size) for size in (1, 2, 3, 4, 5, 6)]
    assert steps == [6, 3, 2, 2, 2, 1]
    for size in (7, 12):
        with pytest.raises(ConfigError, match=rf"global_batch_rows: 12 .* {size} ranks.* most 6 r"):
            config.accumulation_steps(size)


@pytest.mark.parametrize("norm", [0.0, 1.0, 0.5])
def test_deepspeed_dictionary(norm: float, tmp_path: Path) -> None:
    config = load_config(write(tmp_path, FULL), [f"optimizer.max_grad_norm={norm}"])
    made = deepspeed_config(config, world_size=3, device="cpu")
    assert made["gradient_clipping"] == norm  # absent, DeepSpeed clips at 1.0
    assert made["train_micro_batch_size_per_gpu"] == 2
    assert made["gradient_accumulation_steps"] == 2
    assert made["bf16"] == {"enabled": False}
    assert made["zero_allow_untested_optimizer"] is True
    assert made["communication_data_type"] == made["data_types"]["grad_accum_dtype"] == "fp32"
    zero = made["zero_optimization"]
    assert zero["stage"] == 3 and zero["overlap_comm"] is False
    assert zero["reduce_bucket_size"] == 1000
    assert zero["stage3_prefetch_bucket_size"] == 2000
    assert zero["stage3_param_persistence_threshold"] == 0
    assert zero["stage3_max_live_parameters"] == zero["stage3_max_reuse_distance"] == 3000
    assert zero["sub_group_size"] == 4000 and zero["zero_hpz_partition_size"] == 2
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert made["zero_force_ds_cpu_optimizer"] is False
    adamw = load_config(write(tmp_path, FULL), ["optimizer.name=adamw", "model.dtype=bfloat16"])
    made = deepspeed_config(adamw, world_size=1, device="cpu")
    plain = deepspeed_config(load_config(write(tmp_path, SMALL)), world_size=1, device="cpu")
    assert "offload_optimizer" not in plain["zero_optimization"]
    assert "zero_force_ds_cpu_optimizer" not in plain
    assert made["zero_allow_untested_optimizer"] is False and made["bf16"] == {"enabled": True}


def test_gradients_are_reduced_in_buckets_that_suit_the_device(tmp_path: Path) -> None:
    for device, size in (("cuda", 500_000_000), ("cpu", 1_000_000)):
        made = deepspeed_config(load_config(write(tmp_path, SMALL)), world_size=1, device=device)
        assert made["zero_optimization"]["reduce_bucket_size"] == size
        made = deepspeed_config(load_config(write(tmp_path, FULL)), world_size=2, device=device)
        assert made["zero_optimization"]["reduce_bucket_size"] == 1000  # as it is written there


def test_deepspeed_knows_every_key_of_its_dictionary(tmp_path: Path) -> None:
    """DeepSpeed ignores top-level keys it does not know, so they are held against its own names."""
    from deepspeed.runtime import constants
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    made = deepspeed_config(load_config(write(tmp_path, FULL)), world_size=2, device="cpu")
    names = {value for value in vars(constants).values() if isinstance(value, str)}
    names |= {"zero_optimization", "bf16"}  # kept elsewhere, as is the next line's
    assert set(made) <= names
    assert set(made["bf16"]) <= names and set(made["data_types"]) <= names
    zero = DeepSpeedZeroConfig(**made["zero_optimization"])  # forbids unknown keys
    known = set(DeepSpeedZeroConfig.model_fields)
    known |= {field.alias for field in DeepSpeedZeroConfig.model_fields.values() if field.alias}
    assert set(made["zero_optimization"]) <= known
    assert int(zero.stage) == 3


@pytest.mark.parametrize(
    ("size", "world_size", "ranks_per_node", "fits"),
    [
        (1, 3, 2, True),
        (2, 4, 2, True),
        (2, 2, 2, True),
        (2, 3, 2, False),  # one node has fewer
        (2, 4, 4, False),  # a copy on half a node
        (4, 8, 2, False),  # a copy over two nodes
        (8, 4, 4, False),
    ],
)
def test_a_second_copy_of_the_weights_is_a_nodes(
    size: int, world_size: int, ranks_per_node: int, fits: bool, tmp_path: Path
) -> None:
    config = load_config(write(tmp_path, SMALL), [f"zero.hpz_partition_size={size}"])
    if fits:
        config.check_hpz(world_size=world_size, ranks_per_node=ranks_per_node)
        return
    with pytest.raises(
        ConfigError, match=f"^zero.hpz_partition_size: {size}, but {ranks_per_node} of"
    ):
        config.check_hpz(world_size=world_size, ranks_per_node=ranks_per_node)


def test_nothing_left_of_the_loader_imports_torch() -> None:
    modules = [
        "nmar_ds.config",
        "nmar_ds.data.packing",
        "nmar_ds.data.loader",
        "nmar_ds.training.ranks",
        "nmar_ds.training.checkpoints",
        "nmar_ds.training.planning",
        "nmar_ds.training.estimate",
    ]
    script = (
        f"import importlib, sys\nfor name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    loaded = {'torch', 'transformers', 'deepspeed'} & set(sys.modules)\n"
        "    assert not loaded, (name, loaded)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
