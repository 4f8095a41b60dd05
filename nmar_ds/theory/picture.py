"""The curves of a study as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nmar_ds.pictures import new_figure, save_figure
from nmar_ds.theory.formulas import interval
from nmar_ds.theory.settings import OBJECTIVES, OPTIMIZERS

PANELS = {
    "log_p_error": "log p(e|p) per wrong token",
    "ce_undo": "CE_b per undo",
    "ce_correction": "CE_c per correction token",
}
LABELS = {"sft": "SFT", "msft": "mSFT"}


def picture(found: dict[str, Any], file: Path) -> None:
    """Draw nine panels: curves under SGD and AdamW; one step, cosines and norms.

    Raises:
        ConfigError: matplotlib is missing.
    """
    figure = new_figure(file, (14, 11))
    figure.subplots_adjust(0.06, 0.06, 0.98, 0.92, wspace=0.22, hspace=0.32)
    figure.suptitle(
        f"Safety Gap: {found['weights']:,} weights, {len(found['seeds'])} seeds, "
        f"{found['clean_share']['traces']:.0%} clean traces (bands: 95 % intervals over seeds)"
    )
    panels = figure.subplots(3, 3)
    for row, optimizer in enumerate(OPTIMIZERS):
        for column, (key, title) in enumerate(PANELS.items()):
            panel = panels[row][column]
            _curves(panel, found, optimizer, key)
            panel.set_title(f"{title}, {optimizer}")
            panel.set_xlabel("step")
    panels[0][0].legend()
    _one_step(panels[2][0], found)
    _bars(panels[2][1], found, "cosine", ("b", "c", "p"), "cosines with g_e")
    _bars(panels[2][2], found, "norm", ("e", "b", "c", "p"), "norms of the mean gradients")
    save_figure(figure, file)


def _curves(panel: Any, found: dict[str, Any], optimizer: str, key: str) -> None:
    for objective in OBJECTIVES:
        curves = [one["curves"][optimizer][objective] for one in found["by_seed"]]
        steps = curves[0]["step"]
        points = [interval(values) for values in zip(*(one[key] for one in curves), strict=True)]
        (line,) = panel.plot(steps, [point["mean"] for point in points], label=LABELS[objective])
        # None, which becomes NaN, at one seed and where all agree: no band there.
        low, high = (np.array([point[side] for point in points], float) for side in ("low", "high"))
        panel.fill_between(steps, low, high, alpha=0.2, color=line.get_color())
    start, end = panel.get_ylim()
    if key != "log_p_error":  # the first points of an unknown token would flatten the rest
        panel.set_ylim(0, min(end, 4))
    else:
        panel.set_ylim(start, min(end, 0))


def _one_step(panel: Any, found: dict[str, Any]) -> None:
    for one in found["by_seed"]:
        rows = one["one_step"]
        panel.loglog(
            [row["eta"] for row in rows], [abs(row["ratio"] - 1) for row in rows], marker="o"
        )
    panel.set_title("one SGD step: |measured / predicted - 1|")
    panel.set_xlabel("eta")


def _bars(panel: Any, found: dict[str, Any], kind: str, names: tuple[str, ...], title: str) -> None:
    places = list(found["directions"])
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        means = [found["directions"][p][kind].get(name, {"mean": 0.0})["mean"] for p in places]
        panel.bar([at + number * width for at in range(len(places))], means, width, label=name)
    panel.set_xticks([at + 0.4 - width / 2 for at in range(len(places))], places, fontsize=7)
    panel.axhline(0, color="black", linewidth=0.5)
    panel.set_title(title)
    panel.legend()
