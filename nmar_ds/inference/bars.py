"""The bars a model has to clear: `reduced>=0.95`. Imports no torch, so typos are caught at once."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nmar_ds.errors import ConfigError
from nmar_ds.inference.intervals import Auroc, Mean
from nmar_ds.inference.metrics import Rate

AnyMeasure = Rate | Mean | Auroc | int

# Everything an examination measures (`evaluation.FamilyResult.measures`; a test compares the two).
MEASURES = (
    "n", "raw", "reduced", "banned", "exact", "wrong_to_right", "right_to_wrong", "with_undo",
    "mean_undos", "false_undo", "undo_precision", "undo_recall", "erred", "free_noticed",
    "free_latency", "repaired", "stray_undo", "undo_limited", "loop", "unfinished", "overhead",
    "num_probes", "undone", "exact_k", "over_undo", "corrected", "correction_success", "parrot",
    "forced_undo_precision", "forced_undo_recall", "noticed", "mean_latency", "mean_delay",
    "false_undo_prefix", "undo_auroc",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One requirement: `measure` at least (or, with `at_most`, at most) `limit`."""

    measure: str
    at_most: bool
    limit: float

    def __str__(self) -> str:
        return f"{self.measure}{'<=' if self.at_most else '>='}{self.limit:g}"

    def cleared(self, value: float | None) -> bool:
        """Whether a value meets it; a measure that counted nothing does not."""
        if value is None:
            return False
        return value <= self.limit if self.at_most else value >= self.limit


def parse_bar(text: str) -> Bar:
    """Read `MEASURE>=NUMBER` or `MEASURE<=NUMBER`; `exact-k` and `exact_k` are the same.

    Raises:
        ConfigError: another form, or an unknown measure.
    """
    match = re.fullmatch(r"\s*([a-zA-Z_-]+)\s*(>=|<=)\s*(\S+)\s*", text)
    if match is None:
        raise ConfigError(f"--require: {text!r}, expected MEASURE>=NUMBER or MEASURE<=NUMBER")
    name, operator, number = match.group(1).replace("-", "_").lower(), match[2], match[3]
    if name not in MEASURES:
        near = difflib.get_close_matches(name, MEASURES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(
            f"--require: unknown measure {match[1]!r}{hint}, expected one of {', '.join(MEASURES)}"
        )
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise ConfigError(f"--require: {text!r}: {number!r} is not a number, expected one")
    return Bar(measure=name, at_most=operator == "<=", limit=limit)


def number(measure: AnyMeasure) -> float | None:
    """The value of a measure, None where nothing was counted."""
    return measure if isinstance(measure, int) else measure.value


def missed(families: Mapping[str, Mapping[str, AnyMeasure]], bars: Iterable[Bar]) -> list[str]:
    """One line for every bar that a family does not clear."""
    lines = []
    for bar in bars:
        for name, measures in families.items():
            measure = measures[bar.measure]
            value = number(measure)
            if not bar.cleared(value):
                counts = f" ({measure.num} of {measure.of})" if isinstance(measure, Rate) else ""
                shown = "nothing counted" if value is None else f"{value:.3f}{counts}"
                lines.append(f"{name}: {bar.measure} {shown}, required {bar}")
    return lines
