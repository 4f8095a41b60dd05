"""The soak's judge: a true recovery passes, and each of five false ones is found out."""

from __future__ import annotations

from pathlib import Path

import broken
import pytest
from fork_server import ForkServer
from soak import Ledger, Soak
from soak_faults import OTHERS

KILL = {
    "do": "run", "fault": {"where": "forward", "step": 6, "rank": 1, "how": "kill"}
}  # fmt: skip
# What gives each away; None for resumes that are as they should be.
GIVEN_AWAY = {
    None: None,
    "forgets moments": "other weights",
    "forgets random state": "another state of optimizer or random numbers",
    "skips a step": "traces lost",
    "repeats a step": "duplicated",
    "reads other rows": "traces lost",
}


@pytest.fixture(scope="module")
def soak(config_file: Path, server: ForkServer) -> Soak:
    return Soak(config_file.parent, server)


@pytest.mark.parametrize("name", GIVEN_AWAY)
def test_a_resume_that_goes_wrong_is_found_out(name: str | None, soak: Soak) -> None:
    soak.broken = name
    try:
        result = soak.suffer([KILL])
    finally:
        soak.broken = None
    sign = GIVEN_AWAY[name]
    assert result["recovered"] == (sign is None), result
    assert sign is None or any(sign in problem for problem in result["problems"]), result
    assert (result["lost"] > 0) == (name in ("skips a step", "reads other rows")), result
    assert (result["duplicated"] > 0) == (name in ("repeats a step", "reads other rows")), result
    assert result["attempts"] == 2


def test_every_way_to_go_wrong_is_tried() -> None:
    assert set(GIVEN_AWAY) == {None, *broken.BREAKS}


def test_a_misfortune_that_does_not_happen_is_no_recovery(soak: Soak) -> None:
    never = {**KILL, "fault": {**KILL["fault"], "step": 600}}
    result = soak.suffer([never])
    assert not result["recovered"] and "did not happen" in result["problems"][0], result


def test_a_strike_at_a_rank_that_is_gone_is_no_strike(soak: Soak) -> None:
    late = {"ranks": [5], "signal": "SIGKILL", "share": 0.1}  # there is no such rank
    result = soak.suffer([{"do": "run", "struck": late}])
    assert not result["recovered"] and "did not happen" in result["problems"][0], result


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_another_number_of_ranks_loses_nothing(num_ranks: int, soak: Soak) -> None:
    stop = {**KILL, "fault": {**KILL["fault"], "how": "SIGTERM"}}
    acts = [stop, {"do": "run", "num_ranks": num_ranks}]
    result = soak.suffer(acts, exact=False)
    assert result["recovered"] and (result["lost"], result["duplicated"]) == (0, 0), result
    assert "another number of ranks" in OTHERS


def test_the_ledger_outlives_a_torn_line_and_forgets_what_other_code_did(tmp_path: Path) -> None:
    file = tmp_path / "state.jsonl"
    Ledger(file).add("0", {"recovered": True})
    with file.open("a") as torn:
        torn.write('\n{"name": "1", "reco')
    again = Ledger(file)
    assert list(again.done) == ["0"]
    again.add("1", {"recovered": False})
    assert list(Ledger(file).done) == ["0", "1"]
    again.code = "other code"
    again.add("2", {"recovered": True})
    assert list(Ledger(file).done) == ["0", "1"]
