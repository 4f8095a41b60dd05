"""launcher/train.py with a fault put in from outside: the environment's FAULT says which, as JSON.

WATCH, where it is set, is [folder, attempt]: what the ranks consume is written down there.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import history  # noqa: E402
import injected  # noqa: E402

from launcher import train  # noqa: E402

if __name__ == "__main__":
    injected.install(json.loads(os.environ.get("FAULT", "null")), int(os.environ["RANK"]))
    if "WATCH" in os.environ:
        folder, attempt = json.loads(os.environ["WATCH"])
        history.watch(folder, attempt, int(os.environ["RANK"]))
    code = train.main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
