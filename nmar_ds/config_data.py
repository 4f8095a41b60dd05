"""The `data` section: where records are, how they become traces, how they are packed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from nmar_ds.config_base import Fraction, PathText, PositiveInt, Section


class TraceSection(Section):
    """How records become traces."""

    builder: Literal["given", "random", "hard", "pairs", "retry", "weak_retry", "on_policy"] = (
        "given"
    )
    """`given`: as the records say; `random`: uniform vocabulary; `hard`: plausible wrong values;
    `pairs`: the rejected response; `retry`: a step that cannot be taken yet; `weak_retry`: any
    later step; `on_policy`: a model's own samples (docs/records.md)."""
    per_record: PositiveInt = 1
    """Traces made of each record, each with deviations of its own."""
    clean_share: Fraction = 0.2
    """Share of the traces that get no deviation (all builders but `given`)."""
    max_deviations: PositiveInt = 2
    """A trace that is not clean has 1 to this many deviations, uniformly (`random`, `hard`), or at
    most this many of its sample's (`on_policy`)."""
    max_deviation_length: PositiveInt = 6
    """Wrong tokens, drawn uniformly from 1 to this (`random`, `hard`); right ones that `span` or
    `reset` moves into the deviation come on top."""
    retry_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Probability of a retry before each step, and again after one (`retry`, `weak_retry`)."""
    delay: tuple[int, int] | None = None
    """`[from, to]`: tokens that a deviation goes on for after its first wrong one, uniformly;
    null leaves it whole (`pairs`, `retry`, `weak_retry`, `on_policy`)."""
    verify: bool = False
    """Whether a sample counts as wrong only if the record's `answer` proves it (`on_policy`)."""

    @model_validator(mode="after")
    def _given_once(self) -> TraceSection:
        if self.builder == "given" and self.per_record != 1:
            raise ValueError("`given` makes one trace of a record, so `per_record` must be 1")
        return self

    @field_validator("delay", mode="before")
    @classmethod
    def _list_of_two(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value  # YAML has no tuples

    @model_validator(mode="after")
    def _where_they_mean_something(self) -> TraceSection:
        if self.delay is not None and self.builder in ("given", "random", "hard"):
            raise ValueError(
                f"`delay` means nothing to `{self.builder}`, expected pairs, retry, weak_retry or "
                "on_policy; what random and hard draw is bounded by `max_deviation_length`"
            )
        if self.delay is not None and not 0 <= self.delay[0] <= self.delay[1]:
            raise ValueError(f"`delay` is {list(self.delay)}, expected [from, to], 0 <= from <= to")
        if self.verify and self.builder != "on_policy":
            raise ValueError(f"`verify` means nothing to `{self.builder}`, expected on_policy")
        return self


class ChatSection(Section):
    """Prompts as a chat model expects them; `chat: {}` takes the template as it is."""

    system: str | None = None
    """System message; null leaves it to the template, which may write a default of its own."""


class GeneratorSection(Section):
    """Records that are made, not read: the same from the same settings."""

    name: Literal["dependency_arithmetic", "reasoning_gym"]
    """Our own problems in steps, or a family of reasoning-gym."""
    num: PositiveInt
    """Records."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the problems; training and held-out ones need different seeds."""
    operations: tuple[int, int] = (2, 8)
    """`[least, most]` operations of a problem (`dependency_arithmetic`)."""
    distractors: tuple[int, int] = (0, 2)
    """`[least, most]` quantities that the answer does not need (`dependency_arithmetic`)."""
    operators: Annotated[list[Literal["+", "-", "*"]], Field(min_length=1)] = ["+", "-", "*"]
    """Which operators are drawn, equally likely (`dependency_arithmetic`)."""
    family: str | None = None
    """Such as `chain_sum` (`reasoning_gym`)."""
    settings: dict[str, Any] = {}
    """The family's own settings (`reasoning_gym`)."""

    @field_validator("operations", "distractors", mode="before")
    @classmethod
    def _list_of_two(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value  # YAML has no tuples

    @model_validator(mode="after")
    def _family_where_it_belongs(self) -> GeneratorSection:
        if (self.family is None) == (self.name == "reasoning_gym"):
            raise ValueError("`family` goes with `reasoning_gym`, and only with it")
        return self


class SourceSection(Section):
    """Where records come from; a text alone is a path."""

    path: PathText | None = None
    """`.jsonl` (also `.jsonl.gz`, `.jsonl.zst`), `.parquet`, or a folder saved by `datasets`."""
    columns: dict[str, str] = {}
    """Field of a record: its column. Where given, all other columns are left out."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each record is taken: 2 is twice, with deviations of its own each time; 0.25 is one
    in four, drawn by the seed."""
    max_records: PositiveInt | None = None
    """The first so many lines or rows alone."""
    generator: GeneratorSection | None = None
    """In the place of a path."""

    @model_validator(mode="before")
    @classmethod
    def _text_is_a_path(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_of_both(self) -> SourceSection:
        if (self.path is None) == (self.generator is None):
            raise ValueError("has `path` and `generator`, or neither, expected one of them")
        return self

    @model_serializer(mode="wrap")
    def _path_alone_is_a_text(self, handler: Any) -> Any:
        alone = self.path is not None and self == SourceSection(path=self.path)
        return self.path if alone else handler(self)

    def __str__(self) -> str:
        """The path, for scripts."""
        return self.path or f"generator {self.generator}"


class DataSection(Section):
    """Where the records are, and how they are packed."""

    train: list[SourceSection]
    """Training records: paths, or mappings (below) for columns, weights and generators."""
    heldout: list[SourceSection]
    """Held-out records, likewise; their traces give the held-out losses."""
    store: PathText
    """Folder for the prepared stores: `train/` and `heldout/` are written under it."""
    sequence_length: PositiveInt
    """Tokens per packed row."""
    overlong: Literal["error", "drop"] = "error"
    """A trace longer than a row stops the preparation, or is dropped and counted."""
    refused: Literal["error", "drop"] = "error"
    """A bad record stops the preparation, or is left out, counted and listed with its reason in
    the store's `refused.jsonl`."""
    chat: ChatSection | None = None
    """Where given, the tokenizer's chat template is put around the prompts of text records."""
    traces: TraceSection = TraceSection()
    """How records become traces."""

    @field_validator("train", "heldout")
    @classmethod
    def _not_empty(cls, value: list[SourceSection]) -> list[SourceSection]:
        if not value:
            raise ValueError("is empty, expected at least one source")
        return value

    @model_validator(mode="after")
    def _disjoint(self) -> DataSection:
        for source in self.train:
            made = source.generator
            for other in self.heldout:
                same = other.generator
                if made and same and (made.name, made.family, made.seed) == (
                    same.name, same.family, same.seed
                ):  # fmt: skip
                    raise ValueError(
                        f"`train` and `heldout` both generate {made.family or made.name} with seed "
                        f"{made.seed}, expected another seed: they would be the same problems"
                    )
        return self
