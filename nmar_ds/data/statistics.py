"""The page that says what a store holds: as text, and as a picture."""

from __future__ import annotations

import itertools
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nmar_ds.data.audit import MOST, Statistics
from nmar_ds.errors import ConfigError
from nmar_ds.pictures import new_figure, save_figure
from nmar_ds.traces.schema import Role

BAR = 40  # characters of the longest
LENGTH_BINS = 12
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)


def page(found: Statistics, title: str) -> str:
    """The statistics as text.

    Args:
        found: from `audit`.
        title: first line, such as the store's folder.
    """
    if not found.num_traces:
        return f"{title}\n\nno traces\n"
    counts = [
        f"{name} {value:,}" for name, value in sorted(found.counts.items()) if type(value) is int
    ]
    quantiles = np.quantile(found.lengths, QUANTILES)
    by_role = [
        (role.label, int(found.tokens[role]), f"{found.tokens[role] / found.num_tokens:6.1%}")
        for role in Role
    ]
    lines = [
        title, "",
        f"traces {found.num_traces:,}, tokens {found.num_tokens:,}, "
        f"{found.num_tokens / found.num_traces:.0f} a trace",
        f"rows of {found.capacity:,}: {found.num_rows:,}, {found.packing_use:.2%} of their places "
        "hold a token",
        f"without a target of masked SFT: {found.num_without_target:,} traces, "
        f"{found.num_rows_without_target:,} whole rows",
        *textwrap.wrap(f"counts: {', '.join(counts)}", 100, subsequent_indent="  "), "",
        "tokens by role", *_bars([(name, num, share) for name, num, share in by_role]), "",
        "tokens of a trace: " + ", ".join(
            f"{share:.0%} up to {value:,.0f}" for share, value in zip(QUANTILES, quantiles,
                                                                      strict=True)
        ), *_bars(_histogram(found.lengths)), "",
        "deviations of a trace", *_bars(_counted(found.deviations)), "",
    ]  # fmt: skip
    for name, values in (
        ("tokens of a deviation", found.deviation_lengths),
        ("undos after a deviation", found.undo_runs),
        ("tokens from the first wrong one to the first undo", found.delays),
    ):
        if values.any():
            lines += [name, *_bars(_counted(values)), ""]
    return "\n".join(lines)


def _bars(rows: Sequence[tuple[str, int, str]]) -> list[str]:
    """Label, bar, number, and what else is to be said of it."""
    most = max((number for _, number, _ in rows), default=0) or 1
    width = max((len(label) for label, _, _ in rows), default=0)
    drawn = []
    for label, number, more in rows:
        bar = "#" * round(BAR * number / most)
        drawn.append(f"  {label:>{width}}  {bar:<{BAR}}  {number:>13,} {more}".rstrip())
    return drawn


def _histogram(lengths: npt.NDArray[np.int32]) -> list[tuple[str, int, str]]:
    """Equal steps of the logarithm."""
    low, high = int(lengths.min()), int(lengths.max())
    if low == high:
        return [(f"{low:,}", len(lengths), "")]
    edges = np.unique(np.geomspace(low, high + 1, LENGTH_BINS + 1).round().astype(int))
    numbers, _ = np.histogram(lengths, bins=edges)
    return [
        (f"{start:,}-{end - 1:,}", int(number), "")
        for (start, end), number in zip(itertools.pairwise(edges.tolist()), numbers, strict=True)
    ]


def _counted(values: npt.NDArray[np.int64]) -> list[tuple[str, int, str]]:
    """A counter up to its last place that holds anything."""
    last = int(np.flatnonzero(values)[-1]) if values.any() else 0
    return [
        (f"{MOST - 1} or more" if number == MOST - 1 else str(number), int(values[number]), "")
        for number in range(last + 1)
        if values[number]
    ]


def picture(found: Statistics, title: str, file: Path) -> None:
    """The same as a PNG of six panels.

    Raises:
        ConfigError: matplotlib is missing.
    """
    figure = new_figure(file, (12, 7))
    # By hand: finding a layout takes longer than drawing.
    figure.subplots_adjust(0.06, 0.06, 0.98, 0.88, wspace=0.25, hspace=0.3)
    figure.suptitle(
        f"{title}: {found.num_traces:,} traces, {found.num_tokens:,} tokens, "
        f"{found.num_rows:,} rows of {found.capacity:,} ({found.packing_use:.1%} used)"
    )
    panels = figure.subplots(2, 3).ravel()
    panels[0].bar([role.label for role in Role], found.tokens)
    panels[0].set_title("tokens by role")
    panels[1].hist(found.lengths, bins=60)
    panels[1].set_title("tokens of a trace")
    for panel, values, name in (
        (panels[2], found.deviations, "deviations of a trace"),
        (panels[3], found.deviation_lengths, "tokens of a deviation"),
        (panels[4], found.undo_runs, "undos after a deviation"),
        (panels[5], found.delays, "tokens from the first wrong one to the first undo"),
    ):
        last = int(np.flatnonzero(values)[-1]) if values.any() else 0
        panel.bar(np.arange(last + 1), values[: last + 1])
        panel.set_title(name + (f" (last: {MOST - 1} or more)" if last == MOST - 1 else ""))
    save_figure(figure, file)


def write_pages(found: Statistics, store: Path) -> None:
    """Text, JSON and, where matplotlib is installed, the picture beside a store, named after it."""

    def beside(kind: str) -> Path:
        return store.with_name(f"{store.name}.statistics.{kind}")

    text = page(found, store.name)  # not its path: the same records give the same pages
    try:
        picture(found, store.name, beside("png"))
    except ConfigError:
        text += "\n(a picture as well: pip install '.[plots]')\n"
    beside("txt").write_text(text + "\n", encoding="utf-8")
    beside("json").write_text(as_json(found), encoding="utf-8")


def as_json(found: Statistics) -> str:
    """The statistics for programs."""
    some = found.lengths if found.num_traces else np.zeros(1)
    quantiles = np.quantile(some, QUANTILES)
    return json.dumps({
        "traces": found.num_traces, "tokens": found.num_tokens, "rows": found.num_rows,
        "capacity": found.capacity, "packing_use": found.packing_use,
        "without_target": found.num_without_target,
        "rows_without_target": found.num_rows_without_target,
        "tokens_by_role": {role.label: int(found.tokens[role]) for role in Role},
        "length_quantiles": dict(zip(map(str, QUANTILES), map(float, quantiles), strict=True)),
        "deviations": found.deviations.tolist(),
        "deviation_lengths": found.deviation_lengths.tolist(),
        "undo_runs": found.undo_runs.tolist(), "delays": found.delays.tolist(),
        "counts": found.counts,
    }, indent=1, sort_keys=True) + "\n"  # fmt: skip
