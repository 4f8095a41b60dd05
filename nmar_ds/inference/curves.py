"""The report of an examination as TensorBoard scalars.

What is measured on held-out traces has the tags it has during training (`heldout/...`), so that
both lie on one curve; the rest is `examined/FAMILY/MEASURE`. Ends of intervals hang below as
`/low` and `/high`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nmar_ds.errors import ConfigError


def scalars(report: Mapping[str, Any]) -> dict[str, float]:
    """Scalars by tag; what was not counted is left out."""
    found: dict[str, float] = {}
    for family, content in report["families"].items():
        for name, measure in content["measures"].items():
            found |= dict(_of(f"examined/{family}/{name}", measure))
    for family, vote in report.get("equal_compute", {"families": {}})["families"].items():
        found |= dict(_of(f"examined/{family}/vote_k", vote["k"]))
        found |= dict(_of(f"examined/{family}/vote_accuracy", vote["accuracy"]["baseline"]))
        found |= dict(_of(f"examined/{family}/vote_difference", vote["difference"]))
    traces = report.get("teacher_forced")
    if traces is not None:
        for tag, measure in traces["measures"].items():
            found |= dict(_of(tag, measure))
    return found


def _of(
    tag: str, measure: Mapping[str, float | None] | float | None
) -> Iterator[tuple[str, float]]:
    values = measure if isinstance(measure, Mapping) else {"value": measure}
    if values["value"] is None:  # an interval of nothing counted is no measurement
        return
    for key, suffix in (("value", ""), ("low", "/low"), ("high", "/high")):
        number = values.get(key)
        if number is not None:
            yield tag + suffix, float(number)


def write_scalars(report: Mapping[str, Any], folder: Path, *, step: int) -> None:
    """Write them as one point of each curve.

    Args:
        report: of `report.as_json`.
        folder: for TensorBoard events; a run's own `tensorboard` folder will do.
        step: where on the axis; the optimizer step of the checkpoint that was exported.

    Raises:
        ConfigError: the folder cannot be written.
    """
    from torch.utils.tensorboard import SummaryWriter

    try:
        with SummaryWriter(str(folder)) as writer:
            for tag, value in scalars(report).items():
                writer.add_scalar(tag, value, step)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}, expected a writable folder") from None
