"""Ranks come from the distributed tests' pool."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "distributed"), str(Path(__file__).parent)]
