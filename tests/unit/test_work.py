"""The work folder: claims are exclusive, results whole or absent, the first error is the one told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nmar_ds.data import work as module
from nmar_ds.data.crew import Crew, HandedDown
from nmar_ds.data.work import AttemptOverError, Work
from nmar_ds.errors import ConfigError, NmarError, StoreError, TraceError, WorkerLostError


def nothing() -> None: ...


def put(work: Work, number: int, phase: str = "unit") -> None:
    work.put(phase, number, {"n": number}, {"ids": np.arange(number, dtype="<i4")})


def test_results_come_back_and_every_unit_is_claimed_once(tmp_path: Path) -> None:
    work = Work.begin(tmp_path / "w", {"a": 1})
    other = Work(tmp_path / "w", work.attempt)
    mine, theirs = work.take("unit", 6), other.take("unit", 6)
    taken = [next(mine), next(theirs), next(theirs), next(mine), next(mine), next(theirs)]
    assert taken == [0, 1, 2, 3, 4, 5] and list(mine) == list(theirs) == []
    put(work, 3)
    facts, arrays = other.result("unit", 3)
    assert facts == other.facts_of("unit", 3) == {"n": 3} and arrays["ids"].tolist() == [0, 1, 2]
    assert work.finished("unit") == {3} and work.finished("pool") == set()


def test_the_next_attempt_keeps_what_is_whole(tmp_path: Path) -> None:
    work = Work.begin(tmp_path / "w", {"a": 1})
    for number in (0, 1, 4):
        put(work, number)
    file = work.folder / "unit-000001.result"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match=r"unit-000001\.result: damaged"):
        work.result("unit", 1)
    (work.folder / "unit-000002.result.aside-x").write_bytes(b"half")
    again = Work.begin(tmp_path / "w", {"a": 1})
    assert list(again.take("unit", 6)) == [1, 2, 3, 5]
    assert not list(work.folder.glob("*aside*"))
    # Whoever is left of the attempt before finds nothing to claim, and harms nothing.
    with pytest.raises(AttemptOverError):
        next(work.take("unit", 6))
    with pytest.raises(AttemptOverError):
        work.heard("shards", Crew())


def test_other_facts_start_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = Work.begin(tmp_path / "w", {"a": 1})
    put(old, 0)
    new = Work.begin(tmp_path / "w", {"a": 2})
    # A process that the old attempt left in the middle of a unit, however late it looks.
    monkeypatch.setattr(old, "place", tmp_path)
    with pytest.raises(AttemptOverError):
        put(old, 1)
    assert list(new.take("unit", 2)) == [0, 1]
    assert list(tmp_path.iterdir()) == [tmp_path / "w"]
    assert list((tmp_path / "w").iterdir()) == [new.folder]


def test_a_newer_attempt_does_the_unit_itself(tmp_path: Path) -> None:
    old = Work.begin(tmp_path / "w", {"a": 1})
    new = Work.begin(tmp_path / "w", {"a": 1})
    with pytest.raises(AttemptOverError):
        put(old, 0)
    assert new.finished("unit") == set()


def test_a_result_of_a_folder_that_is_gone_goes_nowhere(tmp_path: Path) -> None:
    old = Work.begin(tmp_path / "w", {"a": 1})
    module.drop(tmp_path / "w")
    with pytest.raises(AttemptOverError):
        put(old, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [TraceError("f.jsonl", 7, "record", "bad", "good"), ConfigError("no library")]
)
def test_the_first_error_in_order_is_the_one_told(error: NmarError, tmp_path: Path) -> None:
    work = Work.begin(tmp_path / "w", {})
    mine, theirs = work.take("unit", 9), work.take("unit", 9)
    assert [next(mine), next(theirs)] == [0, 1]
    put(work, 0)
    work.fail("unit", next(mine), StoreError("later"))
    assert list(theirs) == [], "nobody takes another"
    work.fail("unit", 1, error)
    with pytest.raises(type(error)) as caught:
        work.wait("unit", 9, Crew(), nothing)
    assert str(caught.value) == str(error) and vars(caught.value) == vars(error)
    with pytest.raises(NmarError) as known:
        work.heard("shards", Crew())
    assert known.value.shared


def test_units_before_an_error_are_waited_for(tmp_path: Path) -> None:
    work = Work.begin(tmp_path / "w", {})
    mine = work.take("unit", 9)
    assert [next(mine), next(mine)] == [0, 1]
    work.fail("unit", 1, ConfigError("the later one"))
    with pytest.raises(ConfigError, match="the earlier one"):
        work.wait("unit", 9, Crew(), lambda: work.fail("unit", 0, ConfigError("the earlier one")))


def claim_as(work: Work, number: int, text: str) -> None:
    (work.place / f"unit-{number:06d}.claim").write_text(text)


def test_a_unit_of_the_dead_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work.begin(tmp_path / "w", {})
    assert next(work.take("unit", 2)) == 0
    put(work, 0)
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    claim_as(work, 1, json.dumps([module._machine(), int(gone.stdout), 1.0]))
    with pytest.raises(WorkerLostError, match=r"is gone in the middle of unit 1; .*run the same"):
        work.wait("unit", 2, Crew(), nothing)
    # An id that another process has by now.
    claim_as(work, 1, json.dumps([module._machine(), os.getpid(), 1.0]))
    with pytest.raises(WorkerLostError):
        work.wait("unit", 2, Crew(), nothing)
    # Killed between making its claim and signing it.
    claim_as(work, 1, "")
    monkeypatch.setattr(module, "EMPTY_CLAIM_SECONDS", 0.05)
    with pytest.raises(WorkerLostError):
        work.wait("unit", 2, Crew(), nothing)
    # Another machine's processes are not ours to judge; what they finish counts.
    claim_as(work, 1, json.dumps(["elsewhere", 1, 1.0]))
    work.wait("unit", 2, Crew(), lambda: put(work, 1))


def test_a_process_whose_parent_is_gone_ends() -> None:
    told = {"rank": 1, "size": 2, "parent": os.getppid(), "value": {"x": 1}}
    worker = HandedDown(told)
    worker.check()
    assert worker.share(None) == {"x": 1}
    with pytest.raises(WorkerLostError) as caught:
        HandedDown({**told, "parent": 1 << 22}).check()
    assert caught.value.shared
