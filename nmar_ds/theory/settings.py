"""The configuration of a Safety Gap study: strict, as a run's is. No torch here."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from nmar_ds.config import (
    ModelSection,
    RunConfig,
    SentencePieceTraining,
    load_section,
)
from nmar_ds.config_base import PathText, PositiveInt, Section
from nmar_ds.config_data import SourceSection, TraceSection

Rate = Annotated[float, Field(gt=0)]
OPTIMIZERS = ("sgd", "adamw")
OBJECTIVES = ("sft", "msft")


class RecordsSection(Section):
    """Records, and how they become packed traces."""

    train: list[SourceSection]
    """Training records; the clean ones among their traces make the common start."""
    heldout: list[SourceSection]
    """Held-out records: all curves, probes and directions are of their traces."""
    sequence_length: PositiveInt
    """Tokens per packed row."""
    traces: TraceSection
    """How records become traces."""
    tokenizer: SentencePieceTraining
    """The tokenizer, trained on the records."""


class StartSection(Section):
    """Training on clean traces that comes first, so that the study is not about noise (AdamW)."""

    steps: PositiveInt
    """Optimizer steps."""
    learning_rate: Rate
    """Constant."""


class CurvesSection(Section):
    """SFT and mSFT from the common start, on the same batches."""

    steps: PositiveInt
    """T, optimizer steps."""
    eval_every: PositiveInt
    """Steps between two points of a curve."""
    eval_rows: PositiveInt
    """Packed rows of held-out traces per point."""
    sgd_learning_rate: Rate
    """Constant, without momentum."""
    adamw_learning_rate: Rate
    """Constant."""


class MeasureSection(Section):
    """The exact part and the directions, all in float64."""

    identity_traces: PositiveInt
    """Held-out traces with deviations for the identities (a) and (b)."""
    probe_traces: PositiveInt
    """Held-out traces with deviations for the one step (c) and the directions (e)."""
    etas: list[Rate]
    """Learning rates of the one SGD step, falling."""

    @field_validator("etas")
    @classmethod
    def _falling(cls, value: list[float]) -> list[float]:
        if len(value) < 2 or any(a <= b for a, b in itertools.pairwise(value)):
            raise ValueError(
                f"are {value}, expected at least two, each smaller than the one before"
            )
        return value


class SafetyGapConfig(Section):
    """Everything one study needs."""

    output: PathText
    """Folder of report, picture, figures, and of what a restart goes on from."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of deviations and tokenizer; the study's seeds are this one and those that follow."""
    num_seeds: PositiveInt = 4
    """Independent repetitions: initial weights and row order. Below 3 nothing is said of curves."""
    workers: PositiveInt = 2
    """Seeds that run side by side, one core each."""
    records: RecordsSection
    """The data."""
    model: ModelSection
    """A small model, made from `config`."""
    batch_rows: PositiveInt
    """Packed rows per optimizer step."""
    start: StartSection
    """The common start."""
    curves: CurvesSection
    """T steps."""
    measure: MeasureSection
    """Identities, one step, directions."""
    under_zero3: bool = True
    """Whether the identities are taken on two ranks under ZeRO-3 as well."""
    timeout_seconds: PositiveInt = 300
    """Longest time for those two ranks."""

    @model_validator(mode="after")
    def _small_and_exact(self) -> SafetyGapConfig:
        if self.model.path is not None or self.model.dtype != "float32":
            raise ValueError("`model` needs `config`, and `dtype` float32")
        if self.records.traces.builder == "given":
            raise ValueError(
                "`records.traces.builder` is given, expected one that draws deviations"
            )
        return self

    def seeds(self) -> list[int]:
        """The seeds of the repetitions."""
        return [self.seed + number for number in range(self.num_seeds)]

    def run_config(self) -> RunConfig:
        """The preparation's configuration; store and tokenizer stand in the output folder."""
        output, records = Path(self.output), self.records.model_dump()
        return RunConfig.model_validate(
            {
                "name": "safety_gap",
                "output": self.output,
                "seed": self.seed,
                "tokenizer": {
                    "path": str(output / "tokenizer.model"),
                    "train": records["tokenizer"],
                },
                "data": {
                    "train": records["train"],
                    "heldout": records["heldout"],
                    "store": str(output / "store"),
                    "sequence_length": self.records.sequence_length,
                    "traces": records["traces"],
                },
                "model": self.model.model_dump(),
                "optimizer": {"learning_rate": self.start.learning_rate},
                "training": {"steps": self.start.steps, "global_batch_rows": self.batch_rows},
            }
        )


def load_settings(path: str | Path, overrides: list[str] | None = None) -> SafetyGapConfig:
    """Read and check a study's configuration.

    Raises:
        ConfigError: one line per fault: file, line, key, value, nearest valid key.
    """
    return load_section(SafetyGapConfig, path, overrides)
