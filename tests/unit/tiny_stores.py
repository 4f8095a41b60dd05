"""Preparing a store in one call, the builder's settings among the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nmar_ds.traces import prepare
from nmar_ds.traces.building import BuilderSettings
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.sources import SourceSettings, opened


def prepare_store(
    sources: Sequence[str | Path | SourceSettings],
    folder: str | Path,
    tokenizer: Tokenizer,
    *,
    builder: str,
    **settings: Any,
) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(BuilderSettings)}
    own = {name: settings.pop(name) for name in list(settings) if name in names}
    asked = BuilderSettings(name=builder, **own)  # type: ignore[arg-type]
    paths = [
        source if isinstance(source, SourceSettings)
        else SourceSettings(path=Path(source), asked=str(source))
        for source in sources
    ]  # fmt: skip
    with opened(paths, Path(folder).parent) as given:
        return prepare.prepare_store(given, folder, tokenizer, builder=asked, **settings)
