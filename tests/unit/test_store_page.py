"""The byte-by-byte table of docs/records.md is read back: its words alone are enough to read a store."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tiny_stores import prepare_store
from tiny_tokenizers import sums

from nmar_ds.data.shards import ARRAYS
from nmar_ds.data.store import Store
from nmar_ds.traces.encoding import Tokenizer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "records.md"


def table() -> dict[str, tuple[str, str]]:
    """Array -> (type, entries), as the page says."""
    rows = re.findall(
        r"^\| `shard-00000\.(\w+)\.bin` \| `([^`]+)`[^|]*\| ([^|]+) \|",
        PAGE.read_text("utf-8"),
        re.M,
    )
    return {name: (kind, entries.strip()) for name, kind, entries in rows}


def test_a_store_can_be_read_by_the_page_alone(
    write_jsonl: Callable[..., Path], sp_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prepare_store([write_jsonl(sums(30))], tmp_path / "s", sp_tokenizer, builder="hard",
                  max_length=300, max_deviations=2)  # fmt: skip
    store = Store(tmp_path / "s")
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text("ascii"))
    (shard,) = manifest["shards"]
    assert set(table()) == set(ARRAYS)
    sizes = {"t": shard["num_tokens"], "n": shard["num_traces"], "n + 1": shard["num_traces"] + 1,
             "d": shard["num_onsets"], "5 n": 5 * shard["num_traces"]}  # fmt: skip
    arrays = {}
    for name, (kind, entries) in table().items():
        content = (tmp_path / "s" / f"shard-00000.{name}.bin").read_bytes()
        arrays[name] = np.frombuffer(content, dtype=kind)
        assert len(arrays[name]) == sizes[entries], name
    for index in range(len(store)):
        start, end = arrays["offsets"][index : index + 2]
        first, last = arrays["onset_offsets"][index : index + 2]
        trace = store.trace(index)
        assert arrays["ids"][start:end].tolist() == trace.ids.tolist()
        assert arrays["roles"][start:end].tolist() == trace.roles.tolist()
        assert tuple(arrays["onsets"][first:last]) == trace.onsets
        assert (arrays["lines"][index], arrays["sources"][index]) == (trace.line, trace.source)
        counted = np.bincount(trace.roles[1:], minlength=5)
        assert arrays["role_counts"][5 * index : 5 * index + 5].tolist() == counted.tolist()
    for key in re.findall(r"`(\w+)`", PAGE.read_text("utf-8").split("has `format_version` 1")[1]):
        assert key in manifest or key == "format_version", key
