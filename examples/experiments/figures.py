"""The figures of one finished run, read from what the product's launchers left in its folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from nmar_ds.data.store import Store
from nmar_ds.errors import ConfigError
from nmar_ds.traces.schema import Role

DECODED = ("raw", "reduced", "banned", "with_undo", "false_undo", "wrong_to_right",
           "right_to_wrong", "undo_recall", "undone", "exact_k", "corrected", "parrot")  # fmt: skip


def read_figures(folder: Path) -> dict[str, Any]:
    """Shares of right answers and undos, held-out figures, and what was trained on.

    Args:
        folder: of a cell whose commands are done.

    Returns:
        `greedy` and `sampled` (each measure by name, all families pooled), `start` and `end` (the
        held-out figures before the first and after the last step), `store` (a checksum of
        its traces, the share of response targets that are errors, and of traces without any).
    """
    found: dict[str, Any] = {}
    for kind in ("greedy", "sampled"):
        file = folder / f"{kind}.json"
        if file.exists():
            found[kind] = pooled(json.loads(file.read_text(encoding="utf-8")))
    found["start"], found["end"] = heldout(folder / "run" / "tensorboard")
    store = Store(folder / "store" / "train")
    counts = store.role_counts.sum(axis=0, dtype="int64")
    found["store"] = {
        "checksum": traces_checksum(store.manifest),
        "error_targets": float(counts[Role.DEVIATION] / counts[Role.PREFIX :].sum()),
        "clean_traces": float((store.role_counts[:, Role.DEVIATION] == 0).mean()),
    }
    return found


def traces_checksum(manifest: dict[str, Any]) -> str:
    """Of the traces alone: two stores made of files of different names may hold the same ones."""
    shards = {name: facts for name, facts in manifest["files"].items() if "shard-" in name}
    return hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()


def pooled(report: dict[str, Any]) -> dict[str, float | None]:
    """Measures of an examination over the problems of all its families.

    Returns:
        Shares; None where nothing could have happened.
    """
    shares = {}
    for name in DECODED:
        rates = [family["measures"][name] for family in report["families"].values()]
        of = sum(rate["of"] for rate in rates)
        shares[name] = sum(rate["num"] for rate in rates) / of if of else None
    return shares


def heldout(folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """First and last held-out figures of a run, without their prefix.

    Raises:
        ConfigError: the folder holds none.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("heldout/")]
    if not tags:
        raise ConfigError(f"{folder}: holds no held-out figures, expected those of a run")
    first, last = {}, {}
    for tag in tags:
        points = sorted(events.Scalars(tag), key=lambda point: point.step)
        name = tag.removeprefix("heldout/")
        first[name], last[name] = points[0].value, points[-1].value
    return first, last
