"""What the environment says about ranks, good and bad."""

from __future__ import annotations

import re

import pytest

from nmar_ds.errors import LaunchError
from nmar_ds.training.ranks import (
    VARIABLES,
    Ranks,
    complete_environment,
    discover_ranks,
    own_cpus,
    threads_per_rank,
)


def launched(
    rank: object = 0, local: object = 0, world: object = 1, **more: object
) -> dict[str, str]:
    values = {
        "RANK": rank,
        "LOCAL_RANK": local,
        "WORLD_SIZE": world,
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": 29500,
        **more,
    }
    return {name: str(value) for name, value in values.items()}


def ranks(rank: int, local: int, world: int, local_world: int) -> Ranks:
    return Ranks(rank=rank, local_rank=local, world_size=world, local_world_size=local_world)


ALONE = ranks(0, 0, 1, 1)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ALONE),
        ({"HOME": "/root"}, ALONE),
        ({"MASTER_ADDR": "x", "MASTER_PORT": "1"}, ALONE),
        ({name: "" for name in VARIABLES}, ALONE),
        (launched(), ALONE),
        (launched(1, 1, 2), ranks(1, 1, 2, 2)),
        (launched(3, 1, 4, LOCAL_SIZE=2), ranks(3, 1, 4, 2)),
        (launched(3, 1, 4, LOCAL_WORLD_SIZE=2), ranks(3, 1, 4, 2)),
        (launched(3, 1, 4, LOCAL_WORLD_SIZE=2, LOCAL_SIZE=4), ranks(3, 1, 4, 2)),
        (launched(3, 1, 4, LOCAL_WORLD_SIZE="", LOCAL_SIZE=2), ranks(3, 1, 4, 2)),
        (launched(2, 0, 3, LOCAL_SIZE=1), ranks(2, 0, 3, 1)),
        # deepspeed on the second of two nodes with 1 and 2 slots; torchrun on the last of three.
        (launched(1, 1, 3, LOCAL_SIZE=2, CROSS_RANK=1, CROSS_SIZE=2), ranks(1, 1, 3, 2)),
        (launched(2, 0, 3, LOCAL_SIZE=2, CROSS_RANK=1, CROSS_SIZE=2), ranks(2, 0, 3, 2)),
        (launched(5, 1, 6, LOCAL_WORLD_SIZE=2, GROUP_RANK=2), ranks(5, 1, 6, 2)),
    ],
)
def test_good_environments(environ: dict[str, str], expected: Ranks) -> None:
    assert discover_ranks(environ) == expected


@pytest.mark.parametrize("missing", VARIABLES)
@pytest.mark.parametrize("empty", [False, True])
def test_each_missing_variable_is_named(missing: str, empty: bool) -> None:
    environ = launched(1, 1, 2)
    if empty:
        environ[missing] = ""
    else:
        del environ[missing]
    with pytest.raises(LaunchError, match=f"environment: {missing}: not set although"):
        discover_ranks(environ)


@pytest.mark.parametrize("only", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_one_variable_alone_names_all_the_others(only: str) -> None:
    others = ", ".join(name for name in VARIABLES if name != only)
    with pytest.raises(LaunchError, match=f"{others}: not set although {only} is"):
        discover_ranks({only: "0"})


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        (launched("one"), "RANK: is 'one', expected a whole number"),
        (launched("-1"), "RANK: is '-1', expected a whole number"),
        (launched(" 0"), "RANK: is ' 0', expected a whole number"),
        (launched("0.0"), "RANK: is '0.0', expected a whole number"),
        (launched(local="x"), "LOCAL_RANK: is 'x', expected a whole number"),
        (launched(world="2 "), "WORLD_SIZE: is '2 ', expected a whole number"),
        (launched(LOCAL_SIZE="two"), "LOCAL_SIZE: is 'two', expected a whole number"),
        (launched(LOCAL_WORLD_SIZE="2x"), "LOCAL_WORLD_SIZE: is '2x', expected a whole number"),
        (launched(0, 0, 0), "RANK: is 0, expected less than WORLD_SIZE 0"),
        (launched(2, 0, 2), "RANK: is 2, expected less than WORLD_SIZE 2"),
        (launched(9, 0, 2), "RANK: is 9, expected less than WORLD_SIZE 2"),
        (launched(1, 2, 2), "LOCAL_RANK: is 2 of 2 local ranks in a world of 2"),
        (launched(3, 2, 4, LOCAL_SIZE=2), "LOCAL_RANK: is 2 of 2 local ranks in a world of 4"),
        (launched(0, 0, 2, LOCAL_SIZE=4), "LOCAL_RANK: is 0 of 4 local ranks in a world of 2"),
        (launched(0, 0, 2, LOCAL_WORLD_SIZE=0), "expected LOCAL_RANK < LOCAL_WORLD_SIZE"),
        (launched(MASTER_PORT="http"), "MASTER_PORT: is 'http', expected a whole number"),
        (launched(MASTER_PORT="0"), "MASTER_PORT: is 0, expected 1 to 65535"),
        (launched(MASTER_PORT="65536"), "MASTER_PORT: is 65536, expected 1 to 65535"),
    ],
)
def test_bad_environments_name_the_variable(environ: dict[str, str], said: str) -> None:
    with pytest.raises(LaunchError, match=re.escape(said)) as caught:
        discover_ranks(environ)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("environment: ")


def test_a_process_alone_gets_all_that_deepspeed_insists_on() -> None:
    for environ in ({}, {"MASTER_ADDR": "far.away"}):
        complete_environment(environ, ALONE)
        assert environ["MASTER_ADDR"] == "127.0.0.1"
        assert 0 < int(environ["MASTER_PORT"]) < 65536
        assert [environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE")] == [
            "0",
            "0",
            "1",
            "1",
        ]
        assert discover_ranks(environ) == ALONE  # what was completed is complete
    # A port alone is kept, and the address is not left to MPI.
    environ = {"MASTER_PORT": "12345"}
    complete_environment(environ, ALONE)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("127.0.0.1", "12345")


def test_a_launched_process_keeps_its_meeting_place() -> None:
    environ = launched(3, 1, 4, LOCAL_WORLD_SIZE=2)
    complete_environment(environ, discover_ranks(environ))
    expected = launched(3, 1, 4, LOCAL_WORLD_SIZE=2, LOCAL_SIZE=2)
    assert environ == expected | {"THP_MEM_ALLOC_ENABLE": "1"}
    environ["THP_MEM_ALLOC_ENABLE"] = "0"  # whoever does not want it says so
    complete_environment(environ, discover_ranks(environ))
    assert environ["THP_MEM_ALLOC_ENABLE"] == "0"


def cpus(*ranges: tuple[int, int]) -> list[frozenset[int]]:
    return [frozenset(range(first, end)) for first, end in ranges]


def test_threads_are_shared_out_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)), raising=False)
    for chosen, sizes in [
        ("", (12, 6, 4, 1)),
        ("0", (12, 6, 4, 1)),
        ("x", (12, 6, 4, 1)),
        ("3", (3,) * 4),
    ]:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
        got = tuple(
            threads_per_rank(own_cpus(), [own_cpus()] * (local - 1)) for local in (1, 2, 3, 64)
        )
        assert got == sizes


@pytest.mark.parametrize(
    ("masks", "threads"),
    [
        (cpus((0, 32)) * 4, [8, 8, 8, 8]),  # deepspeed, torchrun, srun --cpu-bind=none
        (cpus((0, 8), (8, 16), (16, 24), (24, 32)), [8, 8, 8, 8]),  # srun --cpus-per-task=8
        (cpus((0, 1), (1, 2)), [1, 1]),  # mpirun's two ranks, each on a core
        (cpus((0, 16), (0, 16), (16, 32), (16, 32)), [8, 8, 8, 8]),  # mpirun, by socket
        (cpus((0, 16), (0, 16), (16, 32)), [8, 8, 16]),
        (cpus((0, 8), (4, 12)), [6, 6]),
        (cpus((0, 1)) * 3, [1, 1, 1]),
    ],
)
def test_a_cpu_is_shared_by_the_ranks_that_may_run_on_it(
    masks: list[frozenset[int]], threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    got = [
        threads_per_rank(own, masks[:rank] + masks[rank + 1 :]) for rank, own in enumerate(masks)
    ]
    assert got == threads
