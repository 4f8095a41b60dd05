"""What a run will do, settled before torch is imported: stores, rows, steps, and its identity."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nmar_ds.config import RunConfig
from nmar_ds.data.packing import Plan, pack
from nmar_ds.data.store import Store, boundary_ids_of
from nmar_ds.errors import ConfigError, StoreError
from nmar_ds.model.folder import check_model_folder
from nmar_ds.model.own_tokenizer import check_own_tokenizer
from nmar_ds.model.undo_init import MEAN, UndoInit, resolve_undo_init
from nmar_ds.model.weighting import role_weights, trained_roles
from nmar_ds.traces.schema import Role


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run, laid out.

    Attributes:
        store, heldout: the prepared traces.
        plan, heldout_plan: their rows.
        weights: float64[NUM_ROLES].
        undo_init: how `<UNDO>` starts in a pretrained model, by ids.
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps of one pass over the plan.
        untrained: indices of training traces without a trained target (SPEC section 2).
        facts: what decides the run's result, by dotted name; kept in every checkpoint.
    """

    store: Store
    heldout: Store
    plan: Plan
    heldout_plan: Plan
    weights: npt.NDArray[np.float64]
    undo_init: UndoInit
    total_steps: int
    steps_per_epoch: int
    untrained: list[int]
    facts: dict[str, Any]

    @property
    def num_tokens(self) -> int:
        """Tokens of all training traces."""
        return int(self.store.lengths.sum(dtype=np.int64))

    @property
    def packing_use(self) -> float:
        """Share of the rows' places that hold a token."""
        return self.num_tokens / (self.plan.num_rows * self.plan.capacity)

    def summary(self, config: RunConfig) -> list[str]:
        """Lines for `--dry-run` and the start of a run."""
        counts = self.store.role_counts.sum(axis=0)
        options = config.objective.options
        trained = int(counts[trained_roles(self.weights, options)].sum())
        shares = ", ".join(f"{role.label} {int(counts[role]):,}" for role in Role)
        lines = [
            f"traces    {self.store.num_traces:,} training, {self.heldout.num_traces:,} held-out",
            f"tokens    {self.num_tokens:,} per epoch, {trained / max(1, self.num_tokens):.1%} of "
            f"them trained; targets: {shares}",
            f"rows      {self.plan.num_rows:,} of {self.plan.capacity} tokens, "
            f"{1 - self.packing_use:.2%} padding",
            f"steps     {self.total_steps:,} of {config.training.global_batch_rows} rows, "
            f"{self.steps_per_epoch:,} per epoch ({self.total_steps / self.steps_per_epoch:.2f} "
            "epochs)",
            f"objective {config.objective.preset}, denominator {config.objective.denominator}, "
            + ", ".join(f"{role.label} {self.weights[role]:g}" for role in Role)
            + ("" if options.nll_clip is None else f", nll_clip {options.nll_clip:g}")
            + (f", unlikelihood {options.unlikelihood:g}" if options.unlikelihood else ""),
        ]
        if self.untrained:
            shown = ", ".join(str(index) for index in self.untrained[:10])
            lines.append(
                f"untrained {len(self.untrained):,} traces have no trained target: {shown}"
                + (", ..." if len(self.untrained) > 10 else "")
            )
        return lines


def store_folder(config: RunConfig, part: str) -> Path:
    """Folder of the prepared `train` or `heldout` traces."""
    return Path(config.data.store) / part


def open_store(config: RunConfig, part: str) -> Store:
    """Open a prepared store and check that it is what the configuration asks for.

    Raises:
        StoreError: missing, damaged, or prepared with other settings.
    """
    folder = store_folder(config, part)
    store = Store(folder)
    asked, made = asked_settings(config, part), made_settings(store.manifest)
    for name, value in asked.items():
        if made[name] != value:
            raise StoreError(
                f"{folder}: was prepared with {name} = {made[name]!r}, but the configuration "
                f"says {value!r}; run launcher/prepare.py again"
            )
    return store


def asked_settings(config: RunConfig, part: str) -> dict[str, Any]:
    """The settings that decide what a prepared store holds, by their configuration keys."""
    traces = config.data.traces
    return {
        "undo.token": config.undo.token,
        "undo.semantics": config.undo.semantics,
        "undo.boundaries": config.undo.boundaries,
        "context": config.context,
        "seed": config.seed,
        "data.sequence_length": config.data.sequence_length,
        "data.overlong": config.data.overlong,
        "data.refused": config.data.refused,
        f"data.{part}": [source.model_dump(mode="json") for source in getattr(config.data, part)],
        "data.chat": None if config.data.chat is None else config.data.chat.model_dump(),
        **{f"data.traces.{name}": value for name, value in traces.model_dump(mode="json").items()},
    }


def made_settings(manifest: dict[str, Any]) -> dict[str, Any]:
    """The same settings as a store's manifest keeps them; both parts' source keys are filled."""
    builder = manifest["builder"]
    sources = [source.get("asked", source["path"]) for source in manifest["sources"]]
    return {
        "undo.token": manifest["tokenizer"]["undo_token"],
        "undo.semantics": manifest["semantics"],
        "undo.boundaries": manifest.get("boundaries", []),
        "context": manifest["context"],
        "seed": manifest["seed"],
        "data.sequence_length": builder["max_length"],
        "data.overlong": builder["overlong"],
        "data.refused": builder.get("refused", "error"),
        "data.train": sources,
        "data.heldout": sources,
        # The template's own checksum goes with the data; what is asked for is the system message.
        "data.chat": builder.get("chat") and {"system": builder["chat"]["system"]},
        "data.traces.builder": builder["name"],
        "data.traces.per_record": builder["traces_per_record"],
        "data.traces.clean_share": builder["clean_share"],
        "data.traces.max_deviations": builder["max_deviations"],
        "data.traces.max_deviation_length": builder["max_deviation_length"],
        # Stores of before these keys were built as their defaults say.
        "data.traces.retry_rate": builder.get("retry_rate", 0.1),
        "data.traces.delay": builder.get("delay"),
        "data.traces.verify": builder.get("verify", False),
    }


def plan_run(config: RunConfig) -> RunPlan:
    """Open the stores, pack the rows and count the steps.

    Raises:
        StoreError, ConfigError: the stores do not fit each other or the configuration.
    """
    store, heldout = open_store(config, "train"), open_store(config, "heldout")
    fingerprint = store.manifest["tokenizer"]["fingerprint"]
    if heldout.manifest["tokenizer"]["fingerprint"] != fingerprint:
        raise StoreError(
            f"{store_folder(config, 'heldout')}: its tokenizer is not that of "
            f"{store_folder(config, 'train')}; run launcher/prepare.py again"
        )
    for part, opened in (("train", store), ("heldout", heldout)):
        if opened.num_traces == 0:
            raise StoreError(f"{store_folder(config, part)}: holds no traces")
    undo_init = MEAN
    if config.model.path is not None:
        if _check_model(Path(config.model.path), store) and config.model.undo_init is not None:
            raise ConfigError(
                f"model.undo_init: {config.model.path}: {config.undo.token} is trained already and "
                "keeps its row, expected no model.undo_init"
            )
        undo_init = resolve_undo_init(config.model.undo_init, store.tokenizer(), config.seed)
    if Path(config.output).exists() and not Path(config.output).is_dir():
        raise ConfigError(f"output: {config.output}: is a file, expected a folder")
    plan = pack(store.lengths, config.data.sequence_length)
    heldout_plan = pack(heldout.lengths, config.data.sequence_length)
    steps_per_epoch = -(-plan.num_rows // config.training.global_batch_rows)
    total_steps = config.training.steps
    if total_steps is None:
        assert config.training.epochs is not None
        # Rounded first: 2.2 epochs of 25 steps is 55.00000000000001 in floating point.
        total_steps = max(1, math.ceil(round(config.training.epochs * steps_per_epoch, 6)))
    if config.optimizer.warmup_steps > total_steps:
        raise ConfigError(
            f"optimizer.warmup_steps: {config.optimizer.warmup_steps}, expected at most the "
            f"{total_steps} steps of the run"
        )
    options = config.objective.options
    weights = role_weights(config.objective.preset, config.objective.weights, options)
    num_trained = store.role_counts[:, trained_roles(weights, options)].sum(axis=1)
    return RunPlan(
        store=store,
        heldout=heldout,
        plan=plan,
        heldout_plan=heldout_plan,
        weights=weights,
        undo_init=undo_init,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        untrained=np.flatnonzero(num_trained == 0).tolist(),
        facts=_facts(config, plan, store.manifest, total_steps),
    )


def _check_model(folder: Path, store: Store) -> bool:
    """Check a model folder and that its ids mean what the store's do.

    Returns:
        Whether its `<UNDO>` row is trained already.
    """
    described = store.manifest["tokenizer"]
    trained_before = check_model_folder(
        folder,
        tokenizer_size=described["size"],
        tokenizer_fingerprint=described["fingerprint"],
    )
    if not trained_before:  # an export of ours has proved it by the fingerprint
        check_own_tokenizer(folder, store.tokenizer_folder(), undo_id=described["undo_id"])
    return trained_before


def _content(manifest: dict[str, Any]) -> str:
    """sha256 over a store's ids and roles: the plan knows lengths only."""
    digest = hashlib.sha256()
    for name, entry in sorted(manifest["files"].items()):
        if name.endswith((".ids.bin", ".roles.bin")):
            digest.update(f"{name} {entry['sha256']}\n".encode())
    return digest.hexdigest()


def _facts(
    config: RunConfig, plan: Plan, manifest: dict[str, Any], total_steps: int
) -> dict[str, Any]:
    """Everything that decides the result, flat, so that a difference can be named."""
    flat: dict[str, Any] = {
        "seed": config.seed,
        "context": config.context,
        "undo.semantics": config.undo.semantics,
        # Only where there are some: runs from before there were any go on.
        **({"undo.boundary_ids": ids} if (ids := boundary_ids_of(manifest)) else {}),
        "data.sequence_length": config.data.sequence_length,
        "training.global_batch_rows": config.training.global_batch_rows,
        "total_steps": total_steps,
        "plan": plan.fingerprint(),
        "data": _content(manifest),
        "tokenizer": manifest["tokenizer"]["fingerprint"],
    }
    for section in ("model", "objective", "optimizer"):
        for name, value in getattr(config, section).model_dump(mode="json").items():
            flat[f"{section}.{name}"] = value
    return flat
