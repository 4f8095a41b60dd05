"""One seed of the study from its start to its figures; many of them, side by side, once each."""

from __future__ import annotations

import concurrent.futures
import copy
import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nmar_ds import __version__
from nmar_ds.data.loader import RowLoader
from nmar_ds.data.store import Store, manifest_checksum
from nmar_ds.data.work import write_aside
from nmar_ds.errors import WorkerLostError
from nmar_ds.model.loading import trainable_parameters
from nmar_ds.model.weighting import role_weights
from nmar_ds.theory.directions import directions
from nmar_ds.theory.exact_part import identity_gaps, one_step
from nmar_ds.theory.material import (
    is_clean,
    measured,
    new_model,
    rows_of,
    train,
    with_deviations,
)
from nmar_ds.theory.settings import OBJECTIVES, OPTIMIZERS, SafetyGapConfig
from nmar_ds.traces.schema import Role

# Of the held-out figures, those that the report draws; the first is that of SPEC 4.
CURVES = {
    "log_p_error": "log_p_deviation_per_token",
    "ce_undo": "loss_undo",
    "ce_correction": "loss_correction",
    "ce_prefix": "loss_prefix",
    "p_undo": "p_undo_at_first_place",
}
Say = Callable[[str], None]


def stores_of(config: SafetyGapConfig) -> tuple[Store, Store]:
    """Training and held-out traces."""
    folder = Path(config.output) / "store"
    return Store(folder / "train"), Store(folder / "heldout")


def fingerprint(config: SafetyGapConfig) -> str:
    """Of all that a seed's figures depend on: they are measured anew where it differs."""
    settings = config.model_dump(
        mode="json",
        exclude={"output", "num_seeds", "seed", "workers", "under_zero3", "timeout_seconds"},
    )
    facts = {
        "settings": settings,
        "stores": [manifest_checksum(store.manifest) for store in stores_of(config)],
        "version": __version__,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def clean_share(train_store: Store) -> dict[str, float]:
    """How much of the training traces has no deviation, and how many response targets are e."""
    clean, counts = is_clean(train_store), train_store.role_counts.astype(np.int64)
    targets = counts[:, 1:].sum()
    return {
        "traces": float(clean.mean()),
        "targets": float(counts[clean, 1:].sum() / targets),
        "error_targets": float(counts[:, Role.DEVIATION].sum() / targets),
    }


class _Curve:
    """Held-out figures along a training, from its start on."""

    def __init__(self, lm: Any, heldout: RowLoader, config: SafetyGapConfig) -> None:
        self.lm, self.heldout, self.settings = lm, heldout, config.curves
        self.points: dict[str, list[float]] = {"step": [], **{name: [] for name in CURVES}}

    def __call__(self, done: int) -> None:
        if done % self.settings.eval_every and done != self.settings.steps:
            return
        found = measured(self.lm, self.heldout, self.settings.eval_rows)
        self.points["step"].append(done)
        for name, key in CURVES.items():
            self.points[name].append(found[key])


def run_seed(config: SafetyGapConfig, seed: int, say: Say = print) -> dict[str, Any]:
    """All figures of one seed. The same on every machine of a kind: one thread, no clock."""
    torch.set_num_threads(1)
    train_store, heldout_store = stores_of(config)
    size = {"length": config.records.sequence_length, "batch_rows": config.batch_rows}
    every = np.arange(len(train_store), dtype=np.int64)
    batches = rows_of(train_store, every, seed=seed, **size)
    heldout_all = np.arange(len(heldout_store), dtype=np.int64)
    heldout = rows_of(heldout_store, heldout_all, seed=seed, **size)
    sample, probe = (
        rows_of(heldout_store, with_deviations(heldout_store, num, seed), seed=seed, **size)
        for num in (config.measure.identity_traces, config.measure.probe_traces)
    )
    start = _common_start(config, seed, train_store, size)
    before = measured(start, heldout, config.curves.eval_rows)
    say(f"seed {seed}: start ready, loss of prefixes {before['loss_prefix']:.3f}")
    result: dict[str, Any] = {
        "seed": seed,
        "weights": trainable_parameters(start.parameters()),
        "identities": identity_gaps(start, sample),
        "one_step": one_step(start, batches, probe, config.measure.etas),
        "directions": {"start": directions(start, probe)},
        "curves": {},
    }
    say(f"seed {seed}: identities and one step done")
    for name in OPTIMIZERS:
        result["curves"][name] = {}
        for objective in OBJECTIVES:
            lm = copy.deepcopy(start)
            curve = _Curve(lm, heldout, config)
            train(
                lm, batches, role_weights(objective), optimizer=_optimizer(name, lm, config),
                num_steps=config.curves.steps, each=curve,
            )  # fmt: skip
            result["curves"][name][objective] = curve.points
            result["directions"][f"{name} {objective}"] = directions(lm, probe)
            say(
                f"seed {seed}: {name} {objective}: log p(e|p) per token "
                f"{curve.points['log_p_error'][0]:.3f} -> {curve.points['log_p_error'][-1]:.3f}"
            )
    return result


def _common_start(
    config: SafetyGapConfig, seed: int, train_store: Store, size: dict[str, int]
) -> Any:
    """A model that has learnt from clean traces alone: it knows the task, and no undo."""
    clean = np.flatnonzero(is_clean(train_store)).astype(np.int64)
    lm = new_model(config.model, train_store, seed)
    optimizer = torch.optim.AdamW(
        lm.parameters(), lr=config.start.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    loader = rows_of(train_store, clean, seed=seed, **size)
    train(
        lm, loader, role_weights("sft"), optimizer=optimizer, num_steps=config.start.steps
    )  # fmt: skip
    return lm


def _optimizer(name: str, lm: Any, config: SafetyGapConfig) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(lm.parameters(), lr=config.curves.sgd_learning_rate)
    return torch.optim.AdamW(
        lm.parameters(), lr=config.curves.adamw_learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )


def _say(line: str) -> None:
    print(line, flush=True)


def _save_seed(config: SafetyGapConfig, seed: int, file: Path, mark: str) -> None:
    """Measure one seed and keep it; in a process of its own where there are workers."""
    started = time.monotonic()
    result = {"fingerprint": mark, **run_seed(config, seed, _say)}
    write_aside(file, json.dumps(result, indent=1).encode())
    _say(f"seed {seed}: done in {time.monotonic() - started:.0f} s")


def kept(file: Path, mark: str) -> dict[str, Any] | None:
    """What an earlier start left in a file, if it is of the same study and whole."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found if found.get("fingerprint") == mark else None
    except (OSError, ValueError, AttributeError):
        return None


def run_seeds(config: SafetyGapConfig) -> list[dict[str, Any]]:
    """Every seed's figures; those that an earlier start left are taken as they are.

    Raises:
        WorkerLostError: a process was killed; what was finished is kept.
    """
    folder, mark = Path(config.output) / "seeds", fingerprint(config)
    folder.mkdir(parents=True, exist_ok=True)
    files = {seed: folder / f"seed-{seed}.json" for seed in config.seeds()}
    todo = []
    for seed, file in files.items():
        if kept(file, mark) is not None:
            _say(f"seed {seed}: kept from before")
            continue
        if file.exists():
            _say(f"seed {seed}: {file} is of other settings or damaged; measured anew")
        todo.append(seed)
    if min(config.workers, len(todo)) < 2:
        for seed in todo:
            _save_seed(config, seed, files[seed], mark)
    else:
        _side_by_side(config, {seed: files[seed] for seed in todo}, mark)
    results = [kept(file, mark) for file in files.values()]
    assert all(results)
    return [result for result in results if result is not None]


def _side_by_side(config: SafetyGapConfig, files: dict[int, Path], mark: str) -> None:
    context = multiprocessing.get_context("spawn")
    num = min(config.workers, len(files))
    with concurrent.futures.ProcessPoolExecutor(num, mp_context=context) as pool:
        waiting = [
            pool.submit(_save_seed, config, seed, file, mark) for seed, file in files.items()
        ]
        try:
            for each in concurrent.futures.as_completed(waiting):
                each.result()
        except BrokenProcessPool:
            raise WorkerLostError(
                "a process that measured a seed was killed; start again, finished seeds are kept"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
