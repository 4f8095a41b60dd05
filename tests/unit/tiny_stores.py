"""Preparing a store in one call, the builder's settings among the others."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nmar_ds.traces import prepare
from nmar_ds.traces.building import BuilderSettings
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.sources import SourceSettings


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
    return prepare.prepare_store(paths, folder, tokenizer, builder=asked, **settings)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
