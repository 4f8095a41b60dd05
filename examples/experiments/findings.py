"""From results of runs to a page: intervals over seeds, what they show, and what they do not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cells import UNKNOWN, finished, short
from studies import Arm, Study

from nmar_ds.data.work import write_aside
from nmar_ds.theory.formulas import excludes_zero, interval

LOWEST, HIGHEST = 0.2, 0.9  # of the base's accuracy: outside, a task tells nothing
FEWEST_SEEDS = 3
Results = dict[Arm, dict[int, dict[str, Any]]]  # arm -> seed -> result
Found = dict[str, float | None]

# Place in a result, its name on the page.
COLUMNS: dict[tuple[str, str], str] = {
    ("greedy", "raw"): "greedy raw",
    ("greedy", "reduced"): "greedy reduced",
    ("greedy", "banned"): "greedy undo-banned",
    ("sampled", "raw"): "sampled raw",
    ("sampled", "reduced"): "sampled reduced",
    ("greedy", "undo_gain"): "greedy, gain by undo",
    ("sampled", "undo_gain"): "sampled, gain by undo",
    ("greedy", "with_undo"): "greedy with undo",
    ("sampled", "with_undo"): "sampled with undo",
    ("greedy", "false_undo"): "false undo",
    ("greedy", "undone"): "undone",
    ("greedy", "exact_k"): "exact-k",
    ("greedy", "corrected"): "corrected",
    ("start", "log_p_deviation_per_token"): "log p(e\\|p) before",
    ("end", "log_p_deviation_per_token"): "log p(e\\|p)",
    ("end", "p_undo_at_first_place"): "P(undo) first",
    ("end", "undo_count_accuracy"): "count right",
    ("store", "error_targets"): "errors of targets",
}
COMPARED = (("greedy", "reduced"), ("greedy", "banned"), ("sampled", "reduced"),
            ("greedy", "false_undo"), ("end", "log_p_deviation_per_token"),
            ("end", "p_undo_at_first_place"))  # fmt: skip
GAP = ("greedy", "reduced")
# Banned: whether a model errs; reduced: also how well it takes that back.
GAPS = (GAP, ("greedy", "banned"))
UNDO_GAIN = "undo_gain"  # reduced minus undo-banned: what being allowed to take back is worth


def collect(study: Study, output: Path) -> Results:
    """Results of the finished runs; a run of other settings than today's does not count."""
    found: Results = {}
    for cell in study.cells:
        result = finished(cell, output)
        if result is not None and cell.condition in study.untrained:
            result = {**result, "end": result["start"]}
        if result is not None:
            result = {**result, "name": cell.name}
            found.setdefault((cell.condition, cell.objective), {})[cell.seed] = result
    return found


def made_by(results: Results) -> dict[str, list[str]]:
    """Runs by the code that made them (hex digest); an old result does not say."""
    found: dict[str, list[str]] = {}
    for runs in results.values():
        for result in runs.values():
            found.setdefault(result.get("code_sha256", UNKNOWN), []).append(result["name"])
    return found


def value(result: Mapping[str, Any], place: tuple[str, str]) -> float | None:
    """One figure of a result, None where the run has none of it."""
    if place[1] == UNDO_GAIN:
        reduced, banned = (value(result, (place[0], name)) for name in ("reduced", "banned"))
        return None if reduced is None or banned is None else reduced - banned
    number: float | None = result.get(place[0], {}).get(place[1])
    return number


def over_seeds(runs: Mapping[int, Mapping[str, Any]], place: tuple[str, str]) -> Found | None:
    """Mean, 95 % t interval and the values of the seeds that have the figure; None without one."""
    values = {seed: number for seed in sorted(runs)
              if (number := value(runs[seed], place)) is not None}  # fmt: skip
    if not values:
        return None
    return {**interval([*values.values()]), "by_seed": {str(k): v for k, v in values.items()}}


def difference(a: Mapping[int, Any], b: Mapping[int, Any], place: tuple[str, str]) -> Found | None:
    """Mean and interval of a - b over the seeds that both have, seed by seed."""
    pairs = [(value(a[seed], place), value(b[seed], place)) for seed in sorted(set(a) & set(b))]
    values = [x - y for x, y in pairs if x is not None and y is not None]
    return {**interval(values), "seeds": len(values)} if values else None


def gap_of_gaps(
    results: Results, first: str, other: str, place: tuple[str, str] = GAP
) -> Found | None:
    """(mSFT - SFT under `first`) - (the same under `other`), seed by seed."""
    arms = [results.get((name, objective), {}) for name in (first, other)
            for objective in ("msft", "sft")]  # fmt: skip
    seeds = set.intersection(*(set(arm) for arm in arms))
    values = []
    for seed in sorted(seeds):
        a, b, c, d = (value(arm[seed], place) for arm in arms)
        if a is not None and b is not None and c is not None and d is not None:
            values.append((a - b) - (c - d))
    return {**interval(values), "seeds": len(values)} if values else None


def summarize(study: Study, output: Path) -> dict[str, Any]:
    """Everything the page says, for programs.

    `status` is `missing` (no base yet), `uninformative` (the base's mean greedy accuracy lies not
    between 0.2 and 0.9: nothing is concluded), `incomplete` or `complete`.

    Raises:
        ValueError: SFT and mSFT of a pair did not see the same traces.
    """
    results = collect(study, output)
    check_same_traces(results)
    base = over_seeds(results.get(study.base, {}), GAP)
    num_done = sum(len(runs) for runs in results.values())
    found: dict[str, Any] = {
        "experiment": study.name, "question": study.question, "design": study.design,
        "runs": {"finished": num_done, "of": len(study.cells)},
        "code": made_by(results), "base_accuracy": base,
        "status": status(base, num_done, len(study.cells)),
        "arms": [_arm(arm, runs) for arm, runs in sorted(results.items(), key=_order(study))],
        "differences": _differences(study, results), "gaps": _gaps(study, results),
    }  # fmt: skip
    found["shown"], found["not_shown"] = conclusions(found)
    return found


def status(base: Found | None, num_done: int, num_runs: int) -> str:
    """See `summarize`."""
    if base is None or base["mean"] is None:
        return "missing"
    if not LOWEST <= base["mean"] <= HIGHEST:
        return "uninformative"
    return "complete" if num_done == num_runs else "incomplete"


def check_same_traces(results: Results) -> None:
    """SFT and mSFT of a condition and seed are to differ in nothing but the weights of roles."""
    for (condition, objective), runs in results.items():
        for seed, run in runs.items():
            other = results.get((condition, "msft"), {}).get(seed)
            if objective == "sft" and other is not None:
                if run["store"]["checksum"] != other["store"]["checksum"]:
                    raise ValueError(f"{condition}, seed {seed}: SFT and mSFT saw other traces")


def _order(study: Study) -> Any:
    arms = [(cell.condition, cell.objective) for cell in study.cells]
    return lambda item: arms.index(item[0])


def _arm(arm: Arm, runs: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    measures = {".".join(place): over_seeds(runs, place) for place in COLUMNS}
    measures["store.clean_traces"] = over_seeds(runs, ("store", "clean_traces"))
    return {"condition": arm[0], "objective": arm[1], "seeds": sorted(runs), "measures": measures}


def _differences(study: Study, results: Results) -> list[dict[str, Any]]:
    return [
        {"a": list(a), "b": list(b), "measure": ".".join(place), **found}
        for a, b in study.differences
        for place in COMPARED
        if (found := difference(results.get(a, {}), results.get(b, {}), place)) is not None
    ]


def _gaps(study: Study, results: Results) -> list[dict[str, Any]]:
    return [
        {"a": study.gaps[0], "b": other, "measure": ".".join(place), **found}
        for other in study.gaps[1:]
        for place in GAPS
        if (found := gap_of_gaps(results, study.gaps[0], other, place)) is not None
    ]


def conclusions(found: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Sentences that intervals over enough seeds bear out, and what they leave open."""
    if found["status"] == "missing":
        return [], ["Anything: the base models have not been trained yet."]
    if found["status"] == "uninformative":
        return [], [
            f"Anything: the base is right on {_text(found['base_accuracy'])} of the problems, and "
            f"only between {LOWEST} and {HIGHEST} would a difference mean something."
        ]
    shown, left = [], []
    names = {".".join(place): name for place, name in COLUMNS.items()}
    for arm in found["arms"]:
        for kind in ("greedy", "sampled"):
            gain = arm["measures"][f"{kind}.{UNDO_GAIN}"]
            if gain is not None and arm["objective"] in ("sft", "msft"):
                one = {**gain, "seeds": len(arm["seeds"])}
                text = (
                    f"{kind}: accuracy of {arm['objective']} on {arm['condition']} with the undo "
                    f"minus that with it banned: {_text(one)}"
                )
                (shown if _holds(one) else left).append(_with_seeds(text, one))
    for one in found["differences"]:
        a, b = ("{1} on {0}".format(*one[side]) for side in ("a", "b"))
        text = f"{names[one['measure']]}: {a} minus {b}: {_text(one)}"
        (shown if _holds(one) else left).append(_with_seeds(text, one))
    for one in found["gaps"]:
        text = (
            f"{names[one['measure']]}: the gain by masking (mSFT - SFT) on {one['a']} minus that "
            f"on {one['b']}: {_text(one)}"
        )
        (shown if _holds(one) else left).append(_with_seeds(text, one))
    if len(found["code"]) > 1:
        left.append("That a difference is not one of code: the runs were made by different code.")
    return shown, [*left, "Anything about other models, tasks, sizes or longer training."]


def _holds(one: Mapping[str, Any]) -> bool:
    return one["seeds"] >= FEWEST_SEEDS and excludes_zero(one)


def _with_seeds(text: str, one: Mapping[str, Any]) -> str:
    few = one["seeds"] < FEWEST_SEEDS
    return f"{text} ({one['seeds']} of {FEWEST_SEEDS} seeds)" if few else text


def _text(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    if found["low"] is None:
        return f"{found['mean']:.3f}"
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _short(found: Mapping[str, Any] | None) -> str:
    """Mean and half of the interval: a table of intervals is too wide to read."""
    if found is None:
        return "-"
    low = found["low"]
    return f"{found['mean']:.3f}" + ("" if low is None else f" ± {found['mean'] - low:.3f}")


def page(found: Mapping[str, Any]) -> str:
    """The summary in Markdown."""
    runs = found["runs"]
    lines = [
        f"# {found['question']}", "",
        f"Experiment `{found['experiment']}`, {runs['finished']} of {runs['of']} runs: "
        f"**{found['status']}**. Written by the command; do not edit.", "",
        *_made_by(found["code"]), "```bash",
        f"python examples/experiments/run.py --experiment {found['experiment']} "
        "--output runs/experiments", "```", "", found["design"], "",
        f"Accuracy of the base, greedy: {_text(found['base_accuracy'])}. [low, high] and ±: "
        "95 % t intervals over seeds; those of differences, over paired differences. A figure "
        "without one is the same for each seed that has it.", "",
    ]  # fmt: skip
    if found["status"] in ("complete", "incomplete"):
        lines += [*_table(found["arms"]), ""]
    lines += ["## Shown", "", *_listed(found["shown"]), "", "## Not shown", ""]
    return "\n".join([*lines, *_listed(found["not_shown"]), ""])


def _made_by(code: Mapping[str, Sequence[str]]) -> list[str]:
    """One line, and runs by name where they are not all of one code."""
    if not code:
        return []
    if len(code) == 1:
        return [f"Code (sha256 of its files): {short(next(iter(code)))}.", ""]
    runs = "; ".join(f"{short(key)}: {', '.join(names)}" for key, names in code.items())
    return [f"**The runs were made by different code** (sha256 of its files): {runs}.", ""]


def _listed(texts: Sequence[str]) -> list[str]:
    return [f"* {text}" for text in texts] or ["Nothing."]


def _table(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """Means, arms in rows; a column that nobody has is left out."""
    columns = {".".join(place): name for place, name in COLUMNS.items()}
    columns = {
        key: name for key, name in columns.items() if any(arm["measures"][key] for arm in arms)
    }
    lines = [
        f"| errors | trained | seeds | {' | '.join(columns.values())} |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for arm in arms:
        cells = [_short(arm["measures"][key]) for key in columns]
        lines.append(
            f"| {arm['condition']} | {arm['objective']} | {len(arm['seeds'])} | "
            f"{' | '.join(cells)} |"
        )
    return lines


def write_summary(study: Study, output: Path, folder: Path) -> list[Path]:
    """Write `<name>.md` and `<name>.json`; both from the results alone."""
    found = summarize(study, output)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{study.name}.md", folder / f"{study.name}.json"]
    write_aside(files[0], page(found).encode())
    write_aside(files[1], (json.dumps(found, indent=1) + "\n").encode())
    return files
