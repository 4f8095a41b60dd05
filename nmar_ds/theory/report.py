"""The page a study ends with: what was measured, what that shows, and what it does not."""

# p prefix, e deviation, b undo, c correction

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nmar_ds.acceptance.verdict import Line, within
from nmar_ds.theory.formulas import excludes_zero, interval
from nmar_ds.theory.settings import OPTIMIZERS, SafetyGapConfig

FLOAT64, FLOAT32 = 1e-10, 1e-5  # of the largest gradient
APART = 0.01
NEAR_ONE = 0.01  # |measured / predicted - 1| of one step at the smallest eta
FEWEST_SEEDS = 3
SHOWN_CURVES = {"log_p_error": "log p(e|p)", "ce_undo": "CE_b", "ce_correction": "CE_c"}


def summarize(
    config: SafetyGapConfig, seeds: Sequence[dict[str, Any]], *, clean: dict[str, float],
    zero3: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """Everything the report says, for programs.

    Args:
        config: of the study.
        seeds: results of `run_seed`.
        clean: `clean_share` of the training traces.
        zero3: of `on_ranks`, or None where it was left out.
    """
    checks = [*_exact(seeds), *_under_zero3(zero3), *_step_checks(seeds)]
    curves = {name: _ends(seeds, name) for name in OPTIMIZERS}
    found = {
        "seeds": [one["seed"] for one in seeds],
        "weights": seeds[0]["weights"],
        "steps": config.curves.steps,
        "clean_share": clean,
        "good": all(line.passed for line in checks),
        "checks": [
            {"check": line.check, "passed": line.passed, "seen": line.seen,
             "expected": line.expected}
            for line in checks
        ],
        "zero3": zero3,
        "one_step": _steps_by_eta(seeds),
        "curves": curves,
        "directions": _directions(seeds),
        "by_seed": list(seeds),
    }  # fmt: skip
    found["shown"] = _shown(found)
    found["not_shown"] = _not_shown(found)
    return found


def _exact(seeds: Sequence[dict[str, Any]]) -> list[Line]:
    """The worst seed of each residual in float64."""
    names = [name for name in seeds[0]["identities"] if name != "apart"]
    where = "float64, one process"
    lines = [
        within(f"{where}: {n}", max(_numbers(one["identities"][n] for one in seeds)), FLOAT64)
        for n in names
    ]
    return [*lines, _apart(where, min(one["identities"]["apart"] for one in seeds))]


def _numbers(values: Any) -> list[float]:
    """NaN counts as endlessly large: `max` may pass it over."""
    return [math.inf if math.isnan(value) else value for value in values]


def _apart(where: str, seen: float) -> Line:
    return Line(
        check=f"{where}: (b) under `trained` differs from G_e / D", passed=seen > APART,
        seen=f"by {seen:.2e}", expected=f"by more than {APART:.0e}",
    )  # fmt: skip


def _under_zero3(zero3: dict[str, Any] | None) -> list[Line]:
    if zero3 is None:
        return []
    where = f"ZeRO-3, {zero3['ranks']} ranks x {zero3['micro_batches']} micro-batches"
    lines = [within(f"{where}: {n}", seen, FLOAT32) for n, seen in zero3["gaps"].items()]
    return [*lines, _apart(where, zero3["apart"])]


def _step_checks(seeds: Sequence[dict[str, Any]]) -> list[Line]:
    """(c): the ratio goes to 1."""
    first = max(abs(one["one_step"][0]["ratio"] - 1) for one in seeds)
    last = max(_numbers(abs(one["one_step"][-1]["ratio"] - 1) for one in seeds))
    eta = seeds[0]["one_step"][-1]["eta"]
    return [
        within(f"(c) |measured / predicted - 1| at eta {eta:g}", last, NEAR_ONE),
        Line(
            check="(c) it has fallen since the largest eta", passed=last < first,
            seen=f"{first:.2e} -> {last:.2e}", expected="a fall",
        ),
    ]  # fmt: skip


def _steps_by_eta(seeds: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    return [
        {
            "eta": rows[0]["eta"],
            "lowest": min(row["ratio"] for row in rows),
            "highest": max(row["ratio"] for row in rows),
        }
        for rows in zip(*(one["one_step"] for one in seeds), strict=True)
    ]


def _ends(seeds: Sequence[dict[str, Any]], optimizer: str) -> dict[str, Any]:
    """Start, ends and what lies between them, with intervals over seeds; differences are paired."""
    found = {}
    for name in seeds[0]["curves"][optimizer]["sft"]:
        if name == "step":
            continue
        sft, msft = (
            [one["curves"][optimizer][objective][name] for one in seeds]
            for objective in ("sft", "msft")
        )
        found[name] = {
            "start": interval([curve[0] for curve in sft]),
            "sft": interval([curve[-1] for curve in sft]),
            "msft": interval([curve[-1] for curve in msft]),
            "sft_minus_msft": interval([a[-1] - b[-1] for a, b in zip(sft, msft, strict=True)]),
            "msft_minus_start": interval([curve[-1] - curve[0] for curve in msft]),
        }
    return found


def _directions(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Intervals over seeds of every figure of (e); one that is missing in a seed is left out."""
    found: dict[str, Any] = {}
    for place in seeds[0]["directions"]:
        found[place] = {}
        for kind in ("alpha", "cosine", "norm", "rms_norm"):
            found[place][kind] = {}
            for name in seeds[0]["directions"][place][kind]:
                values = [one["directions"][place][kind][name] for one in seeds]
                there = [value for value in values if value is not None]
                if there:
                    found[place][kind][name] = interval(there)
    return found


def _shown(found: dict[str, Any]) -> list[str]:
    """Sentences that the figures bear out."""
    lines = []
    passed = {check["check"]: check["passed"] for check in found["checks"]}
    if all(good for name, good in passed.items() if "(a)" in name):
        lines.append("The loss terms of undo and correction, and their gradients, are the same "
                     "under SFT and mSFT at the same parameters (a).")  # fmt: skip
    if all(good for name, good in passed.items() if "(b)" in name):
        lines.append("Under `common` the objectives' gradients differ by G_e / D and nothing else; "
                     "under `trained` they do not, by the amount predicted (b).")  # fmt: skip
    if all(good for name, good in passed.items() if name.startswith("(c)")):
        lines.append("After one SGD step log p(e|p) differs by eta <G_e/D, g_e>, "
                     "up to what vanishes with eta (c).")  # fmt: skip
    if len(found["seeds"]) < FEWEST_SEEDS:
        return lines
    for name, ends in found["curves"].items():
        for key, label in SHOWN_CURVES.items():
            apart = ends[key]["sft_minus_msft"]
            if excludes_zero(apart):
                higher = "higher" if apart["mean"] > 0 else "lower"
                lines.append(
                    f"{name}: after {found['steps']} steps on this data {label} is {higher} under "
                    f"SFT: {_shown_interval(apart)}."
                )
    return lines


def _not_shown(found: dict[str, Any]) -> list[str]:
    """What the figures leave open, and what nobody may read into them."""
    lines = [
        "That SFT and mSFT agree on b and c after training: they share parameters, and their "
        "gradients differ from the first step on.",
        "That p(e|p) falls, or rises, under mSFT: masking removes the direct pull towards e; "
        "shared parameters and clean traces move it either way.",
    ]
    for name, ends in found["curves"].items():
        moved = ends["log_p_error"]["msft_minus_start"]
        lines.append(f"Here, {name}: log p(e|p) per token moved by "
                     f"{_shown_interval(moved)} under mSFT.")  # fmt: skip
    if len(found["seeds"]) < FEWEST_SEEDS:
        lines.append(f"Anything about curves: {len(found['seeds'])} seeds, of at least "
                     f"{FEWEST_SEEDS}.")  # fmt: skip
    else:
        for name, ends in found["curves"].items():
            for key, label in SHOWN_CURVES.items():
                apart = ends[key]["sft_minus_msft"]
                if not excludes_zero(apart):
                    why = ("all seeds have the same, which gives no interval"
                           if apart["low"] is None else "its interval holds 0")  # fmt: skip
                    lines.append(
                        f"{name}: a difference in {label} after {found['steps']} steps; {why}."
                    )
    lines.append("(c) under AdamW: the identity is of SGD.")
    lines.append("Anything about other models, data, shares of clean traces or longer training.")
    return lines


def _shown_interval(found: dict[str, float | None]) -> str:
    if found["low"] is None or found["high"] is None:
        return f"{found['mean']:+.3f}"
    return f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def page(found: dict[str, Any]) -> str:
    """The report as text, on one page."""
    clean = found["clean_share"]
    lines = [
        "The Safety Gap, measured (SPEC section 4)", "",
        f"model {found['weights']:,} weights; seeds {', '.join(map(str, found['seeds']))}; "
        f"[low, high]: 95 % t intervals over seeds",
        f"clean traces: {clean['traces']:.1%} of the training traces, {clean['targets']:.1%} of "
        f"their response targets; errors: {clean['error_targets']:.1%} of the targets",
        "", "Exact part (relative to the largest gradient; worst seed)",
    ]  # fmt: skip
    for check in found["checks"]:
        mark = "PASS" if check["passed"] else "FAIL"
        lines.append(f"  {mark}  {check['check']}: {check['seen']} (expected {check['expected']})")
    lines += ["", "(c) one SGD step: measured / predicted, lowest and highest seed"]
    lines += [
        f"  eta {row['eta']:<8g}{row['lowest']:.5f} .. {row['highest']:.5f}"
        for row in found["one_step"]
    ]
    lines += [
        "",
        f"(d) held-out figures per token: start, after {found['steps']} steps, difference",
    ]
    for name, ends in found["curves"].items():
        for key, label in SHOWN_CURVES.items():
            end = ends[key]
            lines.append(
                f"  {name:<6}{label:<11}start {end['start']['mean']:7.3f}  SFT "
                f"{end['sft']['mean']:7.3f}  mSFT {end['msft']['mean']:7.3f}  SFT - mSFT "
                f"{_shown_interval(end['sft_minus_msft'])}"
            )
    lines += ["", "(e) directions, single held-out traces: alpha-hat for g_bk of b, c, both; "
                  "cosines with g_e; norms of the means"]  # fmt: skip
    lines.append(f"  {'':<12}{'alpha b':>8}{'c':>8}{'b+c':>8}  {'cos b':>7}{'c':>7}{'p':>7}"
                 f"  {'|g_e|':>7}{'|g_b|':>7}{'|g_c|':>7}{'|g_p|':>7}")  # fmt: skip
    for place, each in found["directions"].items():
        alpha = "".join(f"{_mean(each['alpha'], n):>8}" for n in ("b", "c", "bc"))
        cosines = "".join(f"{_mean(each['cosine'], n):>7}" for n in ("b", "c", "p"))
        norms = "".join(f"{_mean(each['norm'], n, '.1f'):>7}" for n in ("e", "b", "c", "p"))
        lines.append(f"  {place:<12}{alpha}  {cosines}  {norms}")
    lines += ["", "Shown", *(f"  - {text}" for text in found["shown"])]
    lines += ["", "Not shown", *(f"  - {text}" for text in found["not_shown"])]
    verdict = "PASS" if found["good"] else "FAIL"
    num = sum(check["passed"] for check in found["checks"])
    return "\n".join(
        [*lines, "", f"EXACT PART: {verdict} ({num} of {len(found['checks'])} checks)"]
    )


def _mean(values: dict[str, dict[str, float]], name: str, form: str = ".3f") -> str:
    return format(values[name]["mean"], form) if name in values else "none"
