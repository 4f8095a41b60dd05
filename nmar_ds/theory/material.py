"""What a seed is measured on: packed traces, probes, a small model and plain training of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nmar_ds.acceptance.exact import remove_upcasts
from nmar_ds.acceptance.packed import inputs, run_ours
from nmar_ds.acceptance.reference import gradients
from nmar_ds.config import ModelSection
from nmar_ds.data.loader import Batch, RowLoader
from nmar_ds.data.packing import pack
from nmar_ds.data.store import Store
from nmar_ds.errors import ConfigError
from nmar_ds.model.loading import load_model
from nmar_ds.model.training_model import UndoTrainingModel
from nmar_ds.model.weighting import FloatArray, denominator
from nmar_ds.traces.schema import Role
from nmar_ds.training.heldout import measure, wrong_targets

CPU = torch.device("cpu")
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Subset:
    """Some traces of a store, numbered anew."""

    store: Store
    chosen: Indices

    def ids(self, index: int) -> Any:
        """Of one trace."""
        return np.array(self.store.ids(int(self.chosen[index])))  # a copy: torch wants to write

    def roles(self, index: int) -> Any:
        """Of one trace."""
        return np.array(self.store.roles(int(self.chosen[index])))

    def onsets(self, index: int) -> Any:
        """Of one trace's deviations."""
        return self.store.onsets(int(self.chosen[index]))


def pad_id(store: Store) -> int:
    """What padding holds; nobody sees it."""
    facts = store.manifest["tokenizer"]
    return int(facts["eos_id"] if facts["pad_id"] is None else facts["pad_id"])


def rows_of(store: Store, chosen: Indices, *, length: int, batch_rows: int, seed: int) -> RowLoader:
    """Packed rows of some traces in the order of a seed, for one process.

    Raises:
        ConfigError: there are none.
    """
    if not len(chosen):
        raise ConfigError(f"{store.folder}: holds no trace of the kind that is needed here")
    return RowLoader(
        Subset(store, chosen), pack(store.lengths[chosen], length), store.role_counts[chosen],
        seed=seed, global_batch_rows=batch_rows, micro_batch_rows=batch_rows, rank=0,
        world_size=1, pad_id=pad_id(store),
    )  # fmt: skip


def is_clean(store: Store) -> npt.NDArray[np.bool_]:
    """Which traces have no deviation."""
    found: npt.NDArray[np.bool_] = store.role_counts[:, Role.DEVIATION] == 0
    return found


def with_deviations(store: Store, num: int, seed: int) -> Indices:
    """As many traces with deviations, drawn by a seed.

    Raises:
        ConfigError: the store has fewer.
    """
    there = np.flatnonzero(~is_clean(store))
    if len(there) < num:
        raise ConfigError(
            f"measure: asks for {num} traces with deviations, expected at most {len(there)}, "
            f"which {store.folder} has"
        )
    drawn = np.random.default_rng([seed, num]).permutation(there)[:num]
    return np.sort(drawn).astype(np.int64)


def whole_batch(loader: RowLoader) -> Batch:
    """All rows of a plan as one batch."""
    return loader.batch(np.arange(loader.plan.num_rows))


def new_model(section: ModelSection, store: Store, seed: int) -> Any:
    """A random model for the store's tokenizer."""
    facts = store.manifest["tokenizer"]
    ids = {f"{name}_token_id": facts[f"{name}_id"] for name in ("bos", "eos", "pad")}
    return load_model(
        section, {}, tokenizer_size=facts["size"], undo_id=facts["undo_id"], ids=ids, seed=seed,
        partition=False,
    ).model  # fmt: skip


def in_float64(lm: Any, attention: str | None = None) -> Any:
    """A copy that computes in float64 throughout; with `attention`, a stock model."""
    exact = copy.deepcopy(lm).double()
    if attention is not None:
        exact.set_attn_implementation(attention)
    remove_upcasts(exact)
    return exact


def train(
    lm: Any,
    loader: RowLoader,
    weights: FloatArray,
    *,
    optimizer: torch.optim.Optimizer,
    num_steps: int,
    each: Callable[[int], None] = lambda done: None,
) -> None:
    """Plain training steps with the common denominator; `each` is called before and after them."""
    model = UndoTrainingModel(lm)
    model.train()
    each(0)
    for step in range(num_steps):
        counts, num_traces = loader.counts_of_step(step)
        divisor = denominator("common", counts, weights, num_traces)
        optimizer.zero_grad()
        for batch in loader.batches_of_step(step):
            loss: Any = run_ours(model, batch, weights).loss_sum / divisor
            loss.backward()
        optimizer.step()
        each(step + 1)


class _OneProcess:
    """A model as `heldout.measure` wants its engine."""

    device = CPU

    def __init__(self, lm: Any) -> None:
        self.model = UndoTrainingModel(lm)
        self.train = self.model.train

    def __call__(self, batch: Batch, **asked: Any) -> Any:
        targets_N = torch.from_numpy(batch.targets)
        roles_N = torch.from_numpy(batch.target_roles)
        return self.model(*inputs(batch, CPU), targets_N, roles_N=roles_N, **asked)


def measured(lm: Any, loader: RowLoader, num_rows: int) -> dict[str, float]:
    """Held-out figures of `training.heldout`, without their prefix."""
    source: Any = loader.source
    found = measure(
        _OneProcess(lm), loader, num_rows=num_rows, onsets=source.onsets,
        undo_id=source.store.manifest["tokenizer"]["undo_id"],
        arguments=lambda batch: {"batch": batch}, reduce=lambda tensor: tensor,
    )  # fmt: skip
    return {name.removeprefix("heldout/"): value for name, value in found.items()}


def packed_gradient(
    lm: Any, batch: Batch, weights: FloatArray, divisor: float
) -> tuple[list[Tensor], npt.NDArray[np.float64]]:
    """Gradient of the objective by the training path, and the loss sums S_k it reports."""
    out = run_ours(UndoTrainingModel(lm), batch, weights)
    return gradients(lm, out.loss_sum / divisor), out.role_sums.numpy()


def log_p_errors(lm: Any, batch: Batch, onsets: Callable[[int], Any]) -> Tensor:
    """Sum of log p over the wrong tokens, from each deviation's onset on; differentiable."""
    model = UndoTrainingModel(lm)
    wrong_N = torch.from_numpy(wrong_targets(batch, onsets))
    out: Any = model(
        *inputs(batch, CPU), torch.from_numpy(batch.targets), wrong_N.double(),
        torch.from_numpy(batch.target_roles),
    )  # fmt: skip
    log_p: Tensor = -out.loss_sum
    return log_p


def stepped(lm: Any, gradient: Sequence[Tensor], eta: float) -> Any:
    """A copy after one SGD step."""
    after = copy.deepcopy(lm)
    with torch.no_grad():
        for (_, weight), g in zip(sorted(after.named_parameters()), gradient, strict=True):
            weight.sub_(eta * g)
    return after
