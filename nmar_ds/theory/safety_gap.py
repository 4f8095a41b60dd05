"""SPEC section 4, measured: prepare, measure every seed, the ranks, and write the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nmar_ds import __version__
from nmar_ds.data.crew import Crew
from nmar_ds.data.prepare import prepare_run
from nmar_ds.data.work import write_aside
from nmar_ds.errors import ConfigError
from nmar_ds.theory import on_ranks, report, seeds
from nmar_ds.theory.picture import picture
from nmar_ds.theory.settings import SafetyGapConfig


def run_study(config: SafetyGapConfig) -> bool:
    """Measure what is not measured yet and write report.txt, report.json and report.png.

    Returns:
        Whether the exact part holds: (a), (b) and (c). Curves and directions pass no judgement.
    """
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    _check_model(config)
    for line in prepare_run(config.run_config(), Crew()):
        print(line, flush=True)
    zero3 = _zero3(config, output) if config.under_zero3 else None
    results = seeds.run_seeds(config)
    train_store, _ = seeds.stores_of(config)
    found = report.summarize(config, results, clean=seeds.clean_share(train_store), zero3=zero3)
    text = report.page(found)
    try:
        picture(found, output / "report.png")
    except ConfigError:
        text += "\n(a picture as well: pip install '.[plots]')"
    write_aside(output / "report.json", json.dumps(found, indent=1).encode())
    write_aside(output / "report.txt", f"{text}\n".encode())
    print(f"\n{text}\n\n{output / 'report.txt'}, report.json, report.png", flush=True)
    return bool(found["good"])


def _check_model(config: SafetyGapConfig) -> None:
    """Misspelt keys of the model are found before anything is prepared."""
    from nmar_ds.model.loading import config_of_keys

    config_of_keys(config.model, vocab_size=config.records.tokenizer.vocab_size, ids={})


def _zero3(config: SafetyGapConfig, output: Path) -> dict[str, Any]:
    """The ranks' figures, kept over restarts."""
    file, mark = output / "zero3.json", f"zero3 {__version__}"
    found = seeds.kept(file, mark)
    if found is None:
        print("zero3: starting two ranks", flush=True)
        found = {
            "fingerprint": mark,
            **on_ranks.start(output, timeout_seconds=config.timeout_seconds),
        }
        write_aside(file, json.dumps(found, indent=1).encode())
    else:
        print("zero3: kept from before", flush=True)
    return found
