"""`launcher/prepare.py` as it is, with tiny units, each a little slow and written down.

Environment: EXECUTED, a file that gets a line for each unit begun; SLOW, seconds a unit takes more.
"""

from __future__ import annotations

import os
import runpy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nmar_ds.traces import prepare, sources

ROOT = Path(__file__).resolve().parents[2]
sources.CHUNK_BYTES = 1200
prepare.SHARD_TOKENS = 4000


def watched(name: str, make: Callable[..., Any]) -> Callable[..., Any]:
    def run(recipe: Any, opened: Any, unit: Any, *rest: Any) -> Any:
        with open(os.environ["EXECUTED"], "a") as log:
            number, chunk = unit.parts[0]
            log.write(f"{name} {opened[number].label} {chunk.first_line} {os.getpid()}\n")
        time.sleep(float(os.environ.get("SLOW", "0")))
        return make(recipe, opened, unit, *rest)

    return run


prepare.build = watched("unit", prepare.build)
prepare.references = watched("pool", prepare.references)
runpy.run_path(str(ROOT / "launcher/prepare.py"), run_name="__main__")
