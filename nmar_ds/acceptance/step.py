"""One optimizer step of the real loop under ZeRO-3 on a tiny model, with its gradients kept."""

# W ranks, D denominator

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nmar_ds.acceptance.tiny import (
    LENGTH,
    NUM_TRACES,
    UNDO,
    VOCAB,
    ListSource,
    make_traces,
    model_keys,
)
from nmar_ds.config import ModelSection, RunConfig, deepspeed_config
from nmar_ds.data.loader import RowLoader, count_targets
from nmar_ds.data.packing import pack
from nmar_ds.model.loading import load_model
from nmar_ds.model.training_model import UndoTrainingModel
from nmar_ds.model.vocabulary import known_rows
from nmar_ds.model.weighting import PLAIN, LossOptions
from nmar_ds.training.engine import Engine, ProcessPeers, all_reduce, device_kind, make_optimizer
from nmar_ds.training.loop import TrainingLoop


class Quiet:
    """A monitor that remembers what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.values: dict[str, float] = {}

    def say(self, text: str) -> None:
        """A line."""
        self.lines.append(text)

    def measured(self, step: int, values: dict[str, float]) -> None:
        """Held-out figures."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Figures for TensorBoard."""
        self.values |= values

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Figures for the log."""

    def advance(self) -> None:
        """One step more."""


class Unsaved:
    """A saver that remembers which steps it was to save."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.pending = False

    def save(self, step: int) -> None:
        """A checkpoint is due."""
        self.steps.append(step)

    def settle(self) -> None:
        """Nothing is pending."""

    def finish(self) -> None:
        """Nothing is pending."""


def settings(
    world_size: int,
    *,
    global_rows: int,
    persistence: int,
    learning_rate: float,
    micro_rows: int = 1,
    dtype: str = "float32",
) -> tuple[RunConfig, dict[str, Any]]:
    """Configuration of plain SGD without clipping, and DeepSpeed's dictionary for it."""
    config = RunConfig.model_validate(
        {
            "name": "tiny",
            "output": "unused",
            "tokenizer": {"path": "unused"},
            "data": {"train": ["x"], "heldout": ["x"], "store": "x", "sequence_length": LENGTH},
            "model": {"config": model_keys(True), "dtype": dtype},
            "optimizer": {
                "name": "sgd",
                "learning_rate": learning_rate,
                "max_grad_norm": 0.0,
                "final_learning_rate_ratio": 1.0,
            },
            "training": {
                "steps": 4,
                "global_batch_rows": global_rows,
                "micro_batch_rows": micro_rows,
            },
            "zero": {"param_persistence_threshold": persistence},
        }
    )
    return config, deepspeed_config(config, world_size=world_size, device=device_kind())


class Recording(Engine):
    """The engine, which keeps the full gradients it is about to apply."""

    kept: dict[str, torch.Tensor]

    def step(self) -> None:
        """As the engine's."""
        if self._engine.is_gradient_accumulation_boundary():
            self.kept = self.full_gradients()
        super().step()


@dataclass(frozen=True)
class TinyRun:
    """Engine and rows of a tiny run.

    Attributes:
        config: of the run.
        engine: the model under ZeRO-3.
        loader: this rank's rows.
    """

    config: RunConfig
    engine: Recording
    loader: RowLoader


def tiny_run(
    *,
    tied: bool = True,
    dtype: str = "float32",
    options: LossOptions = PLAIN,
    global_rows: int = 4,
    micro_rows: int = 1,
    num_traces: int = NUM_TRACES,
    persistence: int = 0,
    learning_rate: float = 0.05,
    gradient_checkpointing: bool = False,
    whole_layers: bool = True,
    folder: str | None = None,
) -> TinyRun:
    """Put a tiny run together, as `run_training` does. Collective.

    With `folder` the model is loaded from there, else it is random. Parameters of fewer elements
    than `persistence` stay whole on every rank.
    """
    world_size = dist.get_world_size()
    config, ds_settings = settings(
        world_size, global_rows=global_rows, persistence=persistence,
        learning_rate=learning_rate, micro_rows=micro_rows, dtype=dtype,
    )  # fmt: skip
    section = ModelSection(
        **({"config": model_keys(tied)} if folder is None else {"path": folder}),
        dtype=config.model.dtype,
        activation_checkpointing=gradient_checkpointing,
    )
    loaded = load_model(
        section, ds_settings, tokenizer_size=VOCAB, undo_id=UNDO, seed=3, peers=ProcessPeers(),
        ids={"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    )  # fmt: skip
    model = UndoTrainingModel(loaded.model, options=options)
    engine = Recording(
        model, ds_settings, make_optimizer(model, config.optimizer),
        whole_modules=["LlamaDecoderLayer"] if whole_layers else [],
    )  # fmt: skip
    traces = make_traces(num=num_traces)
    source = ListSource(traces)
    plan = pack([len(ids) for ids, _ in traces], LENGTH)
    assert plan.num_rows >= global_rows, "too few traces for a whole step"
    loader = RowLoader(
        source, plan, count_targets(len(traces), source.roles), seed=1,
        global_batch_rows=global_rows, micro_batch_rows=micro_rows,
        rank=dist.get_rank(), world_size=world_size, pad_id=0,
    )  # fmt: skip
    return TinyRun(config, engine, loader)


def train_step(
    *, weights: list[float], denominator: str = "common", options: dict[str, float] | None = None,
    **run: Any,
) -> dict[str, Any]:  # fmt: skip
    """One optimizer step of the real loop over a global batch. Collective.

    Args:
        weights: by role.
        denominator: `objective.denominator`.
        options: of the loss.
        run: see `tiny_run`.

    Returns:
        Unclipped full gradients, weights before and after, the loss over all ranks, and what the
        step consisted of.
    """
    loss_options = LossOptions(**(options or {}))
    tiny = tiny_run(options=loss_options, **run)
    engine, loader, monitor = tiny.engine, tiny.loader, Quiet()
    loop = TrainingLoop(
        engine,
        loader,
        weights=np.array(weights),
        denominator_kind=denominator,
        options=loss_options,
        optimizer=tiny.config.optimizer,
        training=tiny.config.training,
        total_steps=4,
        monitor=monitor,  # type: ignore[arg-type]
        saver=Unsaved(),
        save_every=None,
        measure_heldout=dict,
        stop_requested=lambda: False,
    )
    before = engine.full_weights()
    engine.train()
    # Between steps, as evaluations do: it must not disturb what ZeRO-3 gathers and when.
    norms = [undo_row_norms(engine)]
    sums = loop.forward_backward(0, also_untrained=engine.rank == 0)
    norms.append(undo_row_norms(engine))
    loop._pace = np.ones(4)
    loop._log(1, sums)
    after = engine.full_weights()
    loss = all_reduce(torch.tensor([sums.loss], dtype=torch.float64, device=engine.device))
    rows = loader.rows_of_step(0)
    return {
        "gradients": _named(engine.kept),
        "before": _named(before),
        "after": _named(after),
        "loss": float(loss),
        "norms": norms,
        "logged": monitor.values,
        "norm": engine.gradient_norm(),
        "traces": [int(t) for row in rows if row >= 0 for t in loader.plan.row(int(row))],
        "micro_batches": loader.accumulation_steps,
    }


def _named(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: value.float().cpu().numpy() for name, value in tensors.items()}


def undo_row_norms(
    engine: Engine, num_rows: int = VOCAB, excluded: tuple[int, ...] = ()
) -> list[float]:
    """Norms of the undo row as the run takes them."""
    with torch.no_grad():
        known_K = known_rows(num_rows, num_rows - 1, excluded).to(engine.device)
        norms: list[float] = engine(
            mode="row_norms", known_K=known_K, undo_id=num_rows - 1
        ).tolist()
    return norms
