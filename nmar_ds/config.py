"""The run configuration: one strict YAML file per run, plus `a.b=c` overrides.

Nothing here imports torch, so a misspelt key is reported before the slow imports begin. Each
section belongs to one component, which is handed its section (or single values) and never the
whole. DeepSpeed's own dictionary is generated from it (`deepspeed_config`): DeepSpeed accepts
misspelt top-level keys silently, so users never write one.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import re
import sys
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from nmar_ds.config_base import Fraction, PathText, PositiveInt, Section
from nmar_ds.config_data import DataSection
from nmar_ds.errors import ConfigError, NmarError
from nmar_ds.yaml_input import apply_override, closest, nearest, read_yaml

if TYPE_CHECKING:
    from nmar_ds.model.weighting import LossOptions


NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


class SentencePieceTraining(Section):
    """Train a SentencePiece tokenizer on the sources' text before preparing them."""

    vocab_size: PositiveInt
    """Number of ids, `<UNDO>` and the other control symbols among them."""
    model_type: Literal["unigram", "bpe"] = "unigram"
    """SentencePiece model type."""
    phrases: list[str] = []
    """Fixed wording that becomes one piece wherever it occurs (unigram only)."""


class TokenizerSection(Section):
    """The tokenizer of model and data; `<UNDO>` is added where it has none."""

    path: PathText
    """A SentencePiece `.model`, a `tokenizer.json`, or a folder that holds one of them."""
    train: SentencePieceTraining | None = None
    """Where given, `launcher/prepare.py` trains the tokenizer and writes it to `path`."""


class UndoSection(Section):
    """What the undo token is and what one of it undoes (SPEC section 2)."""

    token: str = "<UNDO>"
    """Its text form; a text can never produce the token itself."""
    reserved_token: str | None = None
    """A special token nothing uses, whose id and row it takes; null adds a new id."""
    semantics: Literal["token", "span", "reset"] = "token"
    """What one of it undoes: `token` one token; `span` the last one and on back to a
    boundary, which stays; `reset` the whole response."""
    boundaries: list[str] = []
    """For `span`: a token whose text ends with one of these texts is a boundary, such as "\\n"."""

    @field_validator("boundaries")
    @classmethod
    def _texts(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError("holds an empty text, with which every token ends")
        return value

    @model_validator(mode="after")
    def _boundaries_fit(self) -> UndoSection:
        if self.semantics == "span" and not self.boundaries:
            raise ValueError('`span` needs `boundaries`: texts that end a span, such as "\\n"')
        if self.semantics != "span" and self.boundaries:
            raise ValueError(f"`boundaries` belong to `span`, `semantics` is `{self.semantics}`")
        return self


class UndoInitSection(Section):
    """How `<UNDO>` starts in a pretrained model that does not know it."""

    method: Literal["mean", "copy", "semantic"] = "mean"
    """`mean` of the known rows; `copy` of a token's; `semantic`: the mean of anchors."""
    token: str | None = None
    """For `copy`: a piece of the tokenizer, or a text that encodes to exactly one id."""
    anchors: list[str] = []
    """For `semantic`: texts such as " undo"; ids are averaged in each, then the anchors."""
    noise: Annotated[float, Field(ge=0)] = 0.0
    """Gaussian noise on the row, in standard deviations of the known rows, per coordinate."""
    output_bias: float = 0.0
    """Added to the mean bias in a head that has one; below 0 makes `<UNDO>` start rare."""

    @model_validator(mode="after")
    def _sources_fit(self) -> UndoInitSection:
        if self.method == "copy" and self.token is None:
            raise ValueError("method copy lacks `token`, the token whose row is copied")
        if self.method != "copy" and self.token is not None:
            raise ValueError(f"method {self.method} does not use `token`; drop it, or use copy")
        if self.method == "semantic" and not self.anchors:
            raise ValueError('method semantic lacks `anchors`, for example [" delete", " undo"]')
        if self.method != "semantic" and self.anchors:
            raise ValueError(
                f"method {self.method} does not use `anchors`; drop them, or use semantic"
            )
        return self


class ModelSection(Section):
    """The model: a local Hugging Face folder, or a configuration to initialise at random."""

    path: PathText | None = None
    """Local folder with config.json and safetensors weights."""
    config: dict[str, Any] | None = None
    """Keys of a transformers configuration, `model_type` among them; vocab_size is filled in."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of weights and activations; the optimizer always keeps fp32 master weights."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward: less memory, a third more work."""
    attention: Literal["auto", "segments", "fa_varlen", "torch_varlen", "flex", "masked"] = "auto"
    """Kernel behind attention; `auto` takes the best that this machine has (docs/attention.md)."""
    pad_vocab_to_multiple_of: PositiveInt = 1
    """Embedding rows are rounded up to this when rows have to be added."""
    undo_init: UndoInitSection | None = None
    """How `<UNDO>` starts in the model of `path`; null is the mean of the known rows."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSection:
        if (self.path is None) == (self.config is None):
            raise ValueError("needs exactly one of `path` and `config`")
        if self.config is not None and "model_type" not in self.config:
            like = closest("model_type", self.config)
            meant = f"; {like!r} is no key of it, did you mean 'model_type'?" if like else ""
            raise ValueError(f"`config` lacks `model_type`, for example llama{meant}")
        if self.config is not None and self.undo_init is not None:
            raise ValueError(
                "has `undo_init`, but a model made from `config` is random throughout and has "
                "nothing to initialise from; drop `undo_init`, or give `path`"
            )
        return self


class ObjectiveSection(Section):
    """The loss: a weight per role and an explicit denominator (SPEC section 3)."""

    preset: Literal["msft", "sft", "custom"] = "msft"
    """`msft` does not train the deviations, `sft` does, `custom` takes `weights`."""
    weights: dict[str, float] | None = None
    """Weights by role name, for `custom` only; `prompt` may be left out and weighs 0 then. Under
    `model.dtype: bfloat16` the gradients take each rounded to bfloat16 (0.3 as 0.30078), the loss
    and its denominator as it is; sums of few powers of two, such as 0.25 and 0.75, are exact."""
    denominator: Literal["common", "trained", "traces", "sum"] = "common"
    """What the sum of losses is divided by, over the whole global batch (SPEC section 3)."""
    nll_clip: Annotated[float, Field(gt=0)] | None = None
    """Nats; targets of negatively weighted roles count, and push, up to this loss only."""
    unlikelihood: Annotated[float, Field(gt=0)] | None = None
    """Weight of -log(1 - p) on deviation targets, beside what `weights` say of them."""

    @property
    def options(self) -> LossOptions:
        """What the loss has beside weights."""
        from nmar_ds.model.weighting import LossOptions

        return LossOptions(nll_clip=self.nll_clip, unlikelihood=self.unlikelihood or 0.0)

    @model_validator(mode="after")
    def _weights_fit(self) -> ObjectiveSection:
        if self.preset != "custom" and self.weights is None and self.nll_clip is None:
            return self  # and numpy need not be loaded for it
        from nmar_ds.model.weighting import role_weights

        try:
            role_weights(self.preset, self.weights, self.options)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self


class OptimizerSection(Section):
    """AdamW (or plain SGD) with linear warm-up and cosine decay."""

    name: Literal["adamw", "sgd"] = "adamw"
    """The optimizer."""
    learning_rate: Annotated[float, Field(gt=0)]
    """At the end of the warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW only."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW only."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """On matrices only; norms and biases are exempt."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear rise at the start."""
    final_learning_rate_ratio: Fraction = 0.1
    """Cosine decay ends at this share of the peak."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are clipped to this norm; 0 switches clipping off."""

    @field_validator("betas", mode="before")
    @classmethod
    def _pair(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("betas")
    @classmethod
    def _below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"are {list(value)}, expected 0 <= beta < 1")
        return value


class TrainingSection(Section):
    """How long, and in which portions."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the packed rows; give this or `steps`."""
    steps: PositiveInt | None = None
    """Optimizer steps; give this or `epochs`."""
    global_batch_rows: PositiveInt
    """Packed rows per optimizer step over all ranks, however many; empty rows fill up the rest."""
    micro_batch_rows: PositiveInt = 1
    """Rows per rank and forward; accumulation follows from it and the number of ranks."""
    world_size: PositiveInt | None = None
    """Refuse to start with another number of ranks."""
    log_every: PositiveInt = 10
    """Steps between figures in the log and in TensorBoard."""
    eval_every: PositiveInt | None = 500
    """Steps between held-out figures; they are always taken at the start and at the end, and with
    null only then."""
    eval_rows: PositiveInt = 16
    """Packed rows of held-out traces per evaluation."""
    eval_decodes: Annotated[int, Field(ge=0)] = 2
    """Held-out prompts that each evaluation answers for TensorBoard's table; 0: none."""
    eval_decode_forwards: PositiveInt = 16
    """Forwards that those answers may take; what is not done by then is shown cut off."""
    max_nonfinite_steps: PositiveInt = 3
    """This many non-finite steps in a row stop the run."""
    timeout_seconds: PositiveInt = 300
    """Longest wait for the ranks to meet, and longest forward, backward or optimizer step: what
    takes longer is a hang, and ends the run."""
    slow_timeout_seconds: PositiveInt = 1800
    """The same for what may take longer: loading and verifying, the first step, an evaluation, a
    save."""

    @model_validator(mode="after")
    def _slow_is_slower(self) -> TrainingSection:
        if self.slow_timeout_seconds < self.timeout_seconds:
            raise ValueError(
                f"slow_timeout_seconds is {self.slow_timeout_seconds}, expected at least "
                f"timeout_seconds ({self.timeout_seconds})"
            )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSection:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("needs exactly one of `epochs` and `steps`")
        return self


class CheckpointSection(Section):
    """When checkpoints are published and how many are kept."""

    every: PositiveInt | None = None
    """Steps between checkpoints; one is always published at the end and on a stop signal."""
    keep: PositiveInt = 2
    """At least 2. Older ones are deleted once this many newer ones are whole, and two of them were
    read byte by byte by this run: read back after being written, or resumed from."""
    resume: Literal["auto", "never"] = "auto"
    """`auto`: continue from the newest valid checkpoint of the run folder, or start."""

    asynchronous: bool = False
    """Training goes on while a copy of its state is written: needs host memory for the copy, and a
    failed save does not stop the run at once. Off, training waits until a save is announced."""
    max_failed_saves: PositiveInt = 3
    """So many failed asynchronous saves in a row stop the run; the last one must succeed."""

    @field_validator("keep")
    @classmethod
    def _one_is_none(cls, value: int) -> int:
        if value < 2:
            raise ValueError("leaves nothing to fall back on when the only one is damaged; use 2")
        return value


class OffloadSection(Section):
    """The optimizer's state, its gradients and its step in host memory."""

    device: Literal["cpu"] = "cpu"
    """Where they go."""
    pin_memory: bool = True
    """Page-locked host memory: faster copies, and it cannot be swapped out."""


REDUCE_BUCKET = {"cuda": 500_000_000, "cpu": 1_000_000}


class ZeroSection(Section):
    """ZeRO-3 knobs; DeepSpeed's defaults, but for `gather_whole_layers` and a CPU's bucket."""

    overlap_comm: bool = True
    """Overlap gradient reduction with the backward (GPUs)."""
    reduce_bucket_size: PositiveInt | None = None
    """Elements reduced at once. By default 500 million on GPUs and one million on CPUs, where
    copying gradients together costs more than sending them one by one."""
    prefetch_bucket_size: PositiveInt = 50_000_000
    """Elements gathered ahead of their use."""
    param_persistence_threshold: Annotated[int, Field(ge=0)] = 100_000
    """Parameters smaller than this stay whole on every rank."""
    max_live_parameters: PositiveInt = 1_000_000_000
    """Elements that may be gathered at a time."""
    gather_whole_layers: bool = True
    """Gather a decoder layer's parameters at once: fewer hooks and larger messages."""
    hpz_partition_size: PositiveInt = 1
    """Ranks of a node, to keep a second copy of the weights spread over each node (hpZ): the
    backward then gathers them without leaving it. 1: no second copy."""
    sub_group_size: PositiveInt = 1_000_000_000
    """Elements of a rank that one optimizer call updates; bounds what it needs beside its state."""
    offload_optimizer: OffloadSection | None = None
    """Where given, the optimizer lives in host memory; `offload_optimizer: {}` is enough."""

    def reduced_at_once(self, device: str) -> int:
        """Elements of a bucket of gradients on `cuda` or `cpu`."""
        return self.reduce_bucket_size or REDUCE_BUCKET[device]


class RunConfig(Section):
    """Everything one run needs."""

    name: str
    """Letters, digits, `.`, `_`, `-`; kept in checkpoints."""
    output: PathText
    """Run folder: checkpoints, TensorBoard events, the resolved configuration."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of deviations, tokenizer training, initial weights and row order."""
    context: Literal["linear", "pruned"] = "linear"
    """What a token may see; only `linear` is built end to end."""
    tokenizer: TokenizerSection
    """The tokenizer."""
    undo: UndoSection = UndoSection()
    """The undo token."""
    data: DataSection
    """Records, stores and rows."""
    model: ModelSection
    """The model."""
    objective: ObjectiveSection = ObjectiveSection()
    """The loss."""
    optimizer: OptimizerSection
    """The optimizer and its schedule."""
    training: TrainingSection
    """Length and portions."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Saving and resuming."""
    zero: ZeroSection = ZeroSection()
    """ZeRO-3 knobs."""

    @field_validator("name")
    @classmethod
    def _name_is_safe(cls, value: str) -> str:
        if re.fullmatch(NAME_PATTERN, value) is None:
            raise ValueError(f"{value!r} is no run name, expected {NAME_PATTERN}")
        return value

    @field_validator("context")
    @classmethod
    def _only_linear(cls, value: str) -> str:
        if value != "linear":
            raise ValueError("is not built end to end yet; use linear")
        return value

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches per rank and optimizer step, filled up with empty rows where need be.

        Raises:
            ConfigError: some ranks would never be given a row.
        """
        rows, each = self.training.global_batch_rows, self.training.micro_batch_rows
        most = -(-rows // each)
        if world_size > most:
            raise ConfigError(
                f"training.global_batch_rows: {rows} rows do not reach {world_size} ranks x {each} "
                f"micro_batch_rows, expected at most {most} ranks"
            )
        return -(-rows // (each * world_size))

    def check_hpz(self, *, world_size: int, ranks_per_node: int) -> None:
        """See that each second copy of the weights lies on one node, whole.

        Raises:
            ConfigError: `zero.hpz_partition_size` does not fit the ranks.
        """
        size = self.zero.hpz_partition_size
        if size > 1 and (size != ranks_per_node or world_size % size != 0):
            raise ConfigError(
                f"zero.hpz_partition_size: {size}, but {ranks_per_node} of {world_size} ranks run "
                f"on this node, expected as many on every node and that number, or 1"
            )


def deepspeed_config(config: RunConfig, *, world_size: int, device: str) -> dict[str, Any]:
    """The dictionary handed to DeepSpeed on `cuda` or `cpu`, with every default that matters.

    Clipping is explicit because DeepSpeed clips at 1.0 when the key is absent (its PR #8068).
    Gradients are reduced and accumulated in fp32 whatever the model's dtype.
    """
    bf16 = config.model.dtype == "bfloat16"
    offload = config.zero.offload_optimizer
    return {
        "train_micro_batch_size_per_gpu": config.training.micro_batch_rows,
        "gradient_accumulation_steps": config.accumulation_steps(world_size),
        "gradient_clipping": config.optimizer.max_grad_norm,
        "bf16": {"enabled": bf16},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": config.optimizer.name == "sgd",
        # DeepSpeed's own CPU Adam is compiled at the first start; torch's fused one is at hand.
        **({} if offload is None else {"zero_force_ds_cpu_optimizer": False}),
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": config.zero.overlap_comm,
            "contiguous_gradients": True,
            "reduce_bucket_size": config.zero.reduced_at_once(device),
            "stage3_prefetch_bucket_size": config.zero.prefetch_bucket_size,
            "stage3_param_persistence_threshold": config.zero.param_persistence_threshold,
            "stage3_max_live_parameters": config.zero.max_live_parameters,
            # What is used again within this many elements stays gathered whatever the limit above
            # says, so a smaller limit alone would change nothing.
            "stage3_max_reuse_distance": config.zero.max_live_parameters,
            "stage3_gather_16bit_weights_on_model_save": True,
            "sub_group_size": config.zero.sub_group_size,
            "zero_hpz_partition_size": config.zero.hpz_partition_size,
            **({} if offload is None else {"offload_optimizer": offload.model_dump()}),
        },
    }


def _known_keys(kind: type[Section], place: tuple[Any, ...]) -> list[str]:
    """Field names of the section that holds `place`."""
    section: Any = kind
    for part in place[:-1]:
        if part.isdigit():  # an entry of a list of sections
            continue
        field = section.model_fields.get(part) if hasattr(section, "model_fields") else None
        if field is None:
            return []
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((c for c in candidates if hasattr(c, "model_fields")), None)
    return list(section.model_fields) if section is not None else []


def _describe(
    kind: type[Section],
    error: Any,
    source: str,
    *,
    lines: dict[tuple[str, ...], int],
    overridden: set[str],
) -> str:
    place = tuple(str(part) for part in error["loc"])
    dotted = ".".join(str(part) for part in error["loc"])
    where = source
    if any(".".join(place[:depth]) in overridden for depth in range(1, len(place) + 1)):
        where = "override"
    else:
        for depth in range(len(place), 0, -1):
            if place[:depth] in lines:
                where = f"{source}:{lines[place[:depth]]}"
                break
    if error["type"] == "extra_forbidden":
        return f"{where}: {dotted}: unknown key{nearest(place[-1], _known_keys(kind, place))}"
    if error["type"] == "missing":
        return f"{where}: {dotted}: is missing"
    message = error["msg"].removeprefix("Value error, ")
    value = error["input"]
    shown = f" (is {value!r})" if not isinstance(value, dict | list) else ""
    return f"{where}: {dotted}: {message}{shown}" if dotted else f"{where}: {message}"


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read and check a run configuration.

    Args:
        path: YAML file.
        overrides: `a.b=c` texts; values are YAML and replace what the file says.

    Raises:
        ConfigError: one line per fault: file, line, key, value, nearest valid key.
    """
    return load_section(RunConfig, path, overrides)


SectionType = TypeVar("SectionType", bound=Section)


def load_section(
    kind: type[SectionType], path: str | Path, overrides: list[str] | None = None
) -> SectionType:
    """As `load_config`, for a file that holds another kind of configuration."""
    path = Path(path)
    data, lines = read_yaml(path)
    overridden = {".".join(apply_override(data, text)) for text in overrides or []}
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        faults = [
            _describe(kind, e, str(path), lines=lines, overridden=overridden)
            for e in error.errors()
        ]
        raise ConfigError("\n".join(faults)) from None


def reference_page() -> str:
    """The configuration reference in Markdown: every key, its type, default and meaning."""
    parts = [
        "# Configuration: every key\n",
        "One strict YAML file per run; `a.b=c` on the command line replaces a value. Written by\n"
        "`python -m nmar_ds.config`.\n",
    ]

    def add(section: type[BaseModel], prefix: str) -> None:
        title = f"`{prefix}`" if prefix else "Top level"
        about = "" if not prefix else (section.__doc__ or "").strip() + "\n\n"
        rows = []
        meanings = _attribute_docstrings(section)
        inner: list[tuple[type[BaseModel], str]] = []
        for name, field in section.model_fields.items():
            candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
            child = next((c for c in candidates if hasattr(c, "model_fields")), None)
            dotted = f"{prefix}.{name}" if prefix else name
            if child is not None:
                inner.append((child, dotted))
            kind = "section" if child is not None else _type_name(field.annotation)
            default = "required" if field.is_required() else f"`{_shown(field.default)}`"
            if child is not None and not field.is_required():
                default = "optional" if field.default is None else "its defaults"
            meaning = meanings.get(name, "").replace("\n", " ").replace("|", "\\|")
            rows.append(f"| `{name}` | {kind} | {default} | {meaning} |")
        table = "| key | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows)
        parts.append(f"## {title}\n\n{about}{table}\n")
        for child, dotted in inner:
            add(child, dotted)

    add(RunConfig, "")
    return "\n".join(parts)


def _attribute_docstrings(section: type[BaseModel]) -> dict[str, str]:
    """The text under each key. pydantic can read it too, but at every start of every launcher."""
    (body,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(body, ast.ClassDef)
    return {
        key.target.id: inspect.cleandoc(text.value.value)
        for key, text in itertools.pairwise(body.body)
        if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(text.value.value, str)
    }


def _type_name(annotation: Any) -> str:
    """`int or null` for `Annotated[int, ...] | None`, and the values of a Literal."""
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_type_name(part) for part in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if annotation is type(None):
        return "`null`"
    name = annotation.__name__ if get_origin(annotation) is None else str(annotation)
    return "`" + name.replace("typing.", "") + "`"


def _shown(value: Any) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _main(argv: list[str] | None = None) -> int:
    """Print the reference page, or values of a configuration for shell scripts."""
    parser = argparse.ArgumentParser(prog="python -m nmar_ds.config", description=_main.__doc__)
    parser.add_argument("--get", metavar="KEY", help="print this key's value (of `--config`)")
    parser.add_argument("--null", action="store_true", help="end each value with a zero byte")
    parser.add_argument("--config", metavar="FILE", help="run configuration (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.get is None:
        print(reference_page(), end="")
        return 0
    if arguments.config is None:
        parser.error("--get needs --config")
    try:
        value: Any = load_config(arguments.config, arguments.overrides)
        for part in arguments.get.split("."):
            if not isinstance(value, BaseModel) or part not in type(value).model_fields:
                raise ConfigError(f"--get {arguments.get}: no such key")
            value = getattr(value, part)
    except (NmarError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for item in value if isinstance(value, list) else [value]:
        print(item, end="\0" if arguments.null else "\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
