"""The report of an examination as a PNG: bars with their 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nmar_ds.pictures import new_figure, save_figure

SHARES = {
    "right answers": ("raw", "reduced", "banned", "wrong_to_right", "right_to_wrong"),
    "forced deviations": ("undone", "exact_k", "over_undo", "corrected", "correction_success",
                          "parrot"),
    "undos": ("undo_precision", "undo_recall", "forced_undo_precision", "forced_undo_recall",
              "false_undo", "undo_auroc"),
}  # fmt: skip
AMOUNTS = {"tokens and undos": ("overhead", "mean_undos", "free_latency", "mean_delay")}
PROBABILITIES = ("p_undo_at_first_place", "p_undo_where_due", "p_undo_elsewhere",
                 "undo_count_accuracy", "enters_error_greedy", "enters_error_sampled")  # fmt: skip
NATS = ("loss_prefix", "loss_deviation", "loss_undo", "loss_correction",
        "log_p_deviation_per_token")  # fmt: skip
Figures = Mapping[str, Mapping[str, float | None]]


def picture(report: Mapping[str, Any], file: Path) -> None:
    """Draw four panels of bars by family, and two more where traces of a store were scored.

    Args:
        report: of `report.as_json`.
        file: PNG to write.

    Raises:
        ConfigError: matplotlib is missing, or the place cannot be written.
    """
    families = {name: family["measures"] for name, family in report["families"].items()}
    panels = [(title, names, families) for title, names in {**SHARES, **AMOUNTS}.items()]
    traces = report.get("teacher_forced")
    if traces is not None:
        values = {"held-out traces": {
            tag.removeprefix("heldout/"): value for tag, value in traces["measures"].items()
        }}  # fmt: skip
        panels += [("held-out traces", PROBABILITIES, values)]
        panels += [("nats per token of held-out traces", NATS, values)]
    num_columns = len(panels) // 2
    figure = new_figure(file, (6.5 * num_columns, 9))
    # By hand: finding a layout takes longer than drawing.
    figure.subplots_adjust(0.05, 0.12, 0.98, 0.9, wspace=0.15, hspace=0.5)
    figure.suptitle(f"{report['model']} (bars: 95 % intervals)")
    for place, (title, names, values) in enumerate(panels):
        panel = figure.add_subplot(2, num_columns, place + 1)
        _bars(panel, names, values)
        panel.set_title(title)
        if title in SHARES:
            panel.set_ylim(0, 1.05)
        panel.legend(fontsize=7)
    save_figure(figure, file)


def _bars(panel: Any, names: Sequence[str], groups: Mapping[str, Figures]) -> None:
    """One group of bars a measure, one bar in it a family; what was not counted stays empty."""
    width = 0.8 / max(1, len(groups))
    for number, (label, measures) in enumerate(groups.items()):
        places, heights, below, above = [], [], [], []
        for place, name in enumerate(names):
            found = measures.get(name, {"value": None})
            value = found["value"]
            if value is None:
                continue
            low, high = found.get("low"), found.get("high")
            places.append(place + number * width)
            heights.append(value)
            # A percentile interval need not hold its own point; a bar has no negative length.
            below.append(0.0 if low is None else max(0.0, value - low))
            above.append(0.0 if high is None else max(0.0, high - value))
        panel.bar(
            places, heights, width, yerr=[below, above], label=label, capsize=2, color=f"C{number}"
        )  # an empty group would not move on by itself
    at = [place + 0.4 - width / 2 for place in range(len(names))]
    panel.set_xticks(at, names, rotation=25, ha="right", fontsize=7)
    panel.set_xlim(-width, len(names) - 0.2)
    panel.axhline(0, color="black", linewidth=0.5)
