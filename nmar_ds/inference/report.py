"""The outcome of an examination: table, samples, and the JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nmar_ds.data.view import visible
from nmar_ds.errors import ConfigError
from nmar_ds.inference.bars import AnyMeasure, number
from nmar_ds.inference.evaluation import FamilyResult, Sample
from nmar_ds.inference.exported import ExportSettings
from nmar_ds.inference.rendering import as_plain, as_rich, response_text, runs
from nmar_ds.traces.encoding import Tokenizer

FORMAT_VERSION = 2
COLUMNS = {
    "raw": "raw",
    "reduced": "reduced",
    "banned": "undo-banned",
    "false_undo": "false undo",
    "undone": "undone",
    "exact_k": "exact-k",
    "corrected": "corrected",
}


def print_table(results: Mapping[str, FamilyResult], console: Console) -> None:
    """Print one line per family: accuracies of free decoding, then of the forced deviations."""
    header = ["family", *COLUMNS.values(), "n"]
    rows = [
        [name, *(_share(result.measures[key]) for key in COLUMNS), f"{result.measures['n']}"]
        for name, result in results.items()
    ]
    if console.is_terminal:
        table = Table(title="accuracy (raw, reduced, undo-banned) and forced deviations")
        for index, title in enumerate(header):
            table.add_column(title, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]))


def print_traces(measures: Mapping[str, Mapping[str, float | None]]) -> None:
    """Print what was measured on held-out traces, a line each, with its interval."""
    width = max(map(len, measures))
    for tag, found in measures.items():
        ends = "" if found["low"] is None else f"  [{found['low']:.3f}, {found['high']:.3f}]"
        print(f"{tag.ljust(width)}  {found['value']:8.3f}{ends}")


def _share(measure: AnyMeasure) -> str:
    value = number(measure)
    return "-" if value is None else f"{value:.3f}"


def pick_samples(result: FamilyResult, num: int) -> list[tuple[str, Sample]]:
    """Free decodes, those with an undo first, and as many with a forced deviation."""
    free = sorted(result.free, key=lambda sample: sample.decoded.num_undos == 0)
    return [
        *(("free", sample) for sample in free[:num]),
        *(("forced deviation", sample) for sample in result.forced[:num]),
    ]


def print_samples(
    results: Mapping[str, FamilyResult],
    *,
    num: int,
    tokenizer: Tokenizer,
    settings: ExportSettings,
    console: Console,
) -> None:
    """Print decodes raw beside reduced; what was undone stays visible."""
    for name, result in results.items():
        for kind, sample in pick_samples(result, num):
            verdict = "right" if sample.right else "WRONG"
            lines = [
                Text(f"\n[{name}, {kind}: {verdict}]", style="bold"),
                Text(f"prompt : {visible(sample.problem.prompt)}"),
            ]
            if sample.decoded.num_forced:
                lines.append(Text(f"given  : {_given(sample, tokenizer)}"))
            lines += _raw_and_reduced(sample, tokenizer, settings, console)
            for line in lines:
                print_line(line, console)


def print_line(line: Text, console: Console) -> None:
    """Print with colours on a terminal, as plain characters elsewhere; never wrapped or cut."""
    if console.is_terminal:
        console.print(line, soft_wrap=True)
    else:
        print(line.plain)


def _given(sample: Sample, tokenizer: Tokenizer) -> str:
    ids = sample.decoded.raw_ids[: sample.decoded.num_forced]
    return visible(response_text(tokenizer, sample.problem.prompt_ids, ids))


def _raw_and_reduced(
    sample: Sample, tokenizer: Tokenizer, settings: ExportSettings, console: Console
) -> Iterator[Text]:
    plain = Text(visible(_plain(sample, tokenizer, settings)))
    raw = as_rich(_runs(sample, tokenizer, settings), settings.undo_token)
    yield Text("raw    : ").append_text(raw if console.is_terminal else plain)
    yield Text(f"reduced: {visible(_reduced(sample, tokenizer))}")


def _runs(sample: Sample, tokenizer: Tokenizer, settings: ExportSettings) -> Any:
    decoded = sample.decoded
    return runs(
        tokenizer,
        sample.problem.prompt_ids,
        decoded.raw_ids,
        settings.machine,
        num_forced=decoded.num_forced,
    )


def _plain(sample: Sample, tokenizer: Tokenizer, settings: ExportSettings) -> str:
    return as_plain(_runs(sample, tokenizer, settings), settings.undo_token)


def _reduced(sample: Sample, tokenizer: Tokenizer) -> str:
    return response_text(tokenizer, sample.problem.prompt_ids, sample.decoded.reduced_ids)


def as_json(
    results: Mapping[str, FamilyResult],
    *,
    about: Mapping[str, Any],
    overlap: Mapping[str, int],
    missed: Sequence[str],
    num_samples: int,
    tokenizer: Tokenizer,
    settings: ExportSettings,
) -> dict[str, Any]:
    """The report as a JSON object: every measure with its 95 % interval (docs/evaluation.md)."""
    families = {}
    for name, result in results.items():
        measures = {
            key: value if isinstance(value, int) else value.as_dict()
            for key, value in result.measures.items()
        }
        samples = [
            {
                "kind": kind,
                "line": sample.problem.line,
                "prompt": sample.problem.prompt,
                "reference": sample.problem.reference,
                "raw": _plain(sample, tokenizer, settings),
                "reduced": _reduced(sample, tokenizer),
                "raw_ids": sample.decoded.raw_ids.tolist(),
                "num_forced": sample.decoded.num_forced,
                "stop_reason": sample.decoded.stop_reason,
                "right": sample.right,
            }
            for kind, sample in pick_samples(result, num_samples)
        ]
        families[name] = {
            "measures": measures,
            "prompts_also_in_training": overlap.get(name),
            "samples": samples,
        }
    return {
        "format_version": FORMAT_VERSION, **about, "missed": list(missed), "families": families,
    }  # fmt: skip


def write_json(report: Mapping[str, Any], path: Path) -> None:
    """Write the report; a reader finds the old file or the whole new one."""
    aside = path.with_name(path.name + ".partial")
    try:
        aside.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}, expected a writable place") from None
