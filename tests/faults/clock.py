"""A wrong clock for a process: CLOCK_SHIFT seconds off, and as fast as CLOCK_PACE says.

It replaces the functions of Python's `time` and of `datetime`; the C++ of torch keeps the machine's.
"""

from __future__ import annotations

import datetime
import os
import time


def shift_as_told() -> None:
    """Before anything else is imported that might keep the true functions."""
    shift = float(os.environ.get("CLOCK_SHIFT", "0"))
    pace = float(os.environ.get("CLOCK_PACE", "1"))
    if shift == 0 and pace == 1:
        return
    true_time, true_monotonic, true_counter = time.time, time.monotonic, time.perf_counter
    began = true_time()
    time.time = lambda: began + shift + pace * (true_time() - began)
    time.time_ns = lambda: int(time.time() * 1e9)
    time.monotonic = lambda: shift + pace * true_monotonic()
    time.monotonic_ns = lambda: int(time.monotonic() * 1e9)
    time.perf_counter = lambda: shift + pace * true_counter()
    local, strftime = time.localtime, time.strftime
    time.localtime = lambda at=None: local(time.time() if at is None else at)  # type: ignore[assignment]
    time.strftime = lambda form, at=None: strftime(form, at or time.localtime())  # type: ignore[assignment]

    class Shifted(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
            return datetime.datetime.fromtimestamp(time.time(), tz)

    datetime.datetime = Shifted  # type: ignore[misc]
