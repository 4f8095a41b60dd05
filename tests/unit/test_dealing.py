"""Ranks of a step get rows that cost about the same; which rows a step has does not change."""

from __future__ import annotations

import numpy as np
import pytest

from nmar_ds.data.dealing import deal
from nmar_ds.data.loader import FILLER_ROW, RowLoader
from nmar_ds.data.packing import pack
from nmar_ds.traces.schema import NUM_ROLES, Role

CAPACITY, W = 2048, 8


class NoTokens:
    """Shares are settled from lengths alone."""

    def ids(self, index: int) -> np.ndarray:
        raise AssertionError

    roles = ids


def loader_of(lengths: np.ndarray, share: np.ndarray, *, rows_per_rank: int, rank: int = 0,
              world: int = W, seed: int = 0) -> RowLoader:  # fmt: skip
    counts = np.zeros((len(lengths), NUM_ROLES), dtype=np.int64)
    counts[:, Role.CORRECTION] = (lengths - 1) * share
    counts[:, Role.PROMPT] = lengths - 1 - counts[:, Role.CORRECTION]
    return RowLoader(
        NoTokens(), pack(lengths, CAPACITY), counts, seed=seed,
        global_batch_rows=W * rows_per_rank, micro_batch_rows=1, rank=rank, world_size=world,
        pad_id=0,
    )  # fmt: skip


def law(name: str, num: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    lengths = {
        "lognormal": np.clip(rng.lognormal(5.8, 0.8, num), 8, CAPACITY),
        "uniform": rng.uniform(0.2 * CAPACITY, 0.7 * CAPACITY, num),
        "bimodal": np.where(rng.random(num) < 0.7, rng.integers(50, 200, num),
                            rng.integers(900, 2000, num)),
    }[name].astype(np.int64)  # fmt: skip
    return lengths, np.clip(rng.normal(0.6, 0.15, num), 0.05, 0.95)


def unevenness(loader: RowLoader, shares: np.ndarray) -> np.ndarray:
    """Largest over mean rank, of attention and of trained targets."""
    flat = shares.reshape(-1, shares.shape[-1])
    per_rank = loader._row_costs[flat].sum(axis=0)
    return np.asarray(per_rank.max(axis=0) / per_rank.mean(axis=0))


@pytest.mark.parametrize("name", ["lognormal", "uniform", "bimodal"])
def test_sixteen_rows_a_rank_are_even_within_five_percent(name: str) -> None:
    loader = loader_of(*law(name), rows_per_rank=16)
    steps = range(min(40, loader.steps_per_epoch - 1))
    dealt = np.array([unevenness(loader, loader.shares_of_step(s)) for s in steps])
    as_they_come = np.array(
        [unevenness(loader, loader.rows_of_step(s).reshape(16, 1, W)) for s in steps]
    )
    assert (np.median(dealt, axis=0) <= 1.02).all(), np.median(dealt, axis=0)
    assert np.median(as_they_come, axis=0).max() > 1.05, "nothing to even out"


def test_rows_of_like_cost_meet_in_one_round() -> None:
    loader = loader_of(*law("lognormal"), rows_per_rank=16)
    costs = loader._row_costs[loader.shares_of_step(0)[:, 0]].sum(axis=-1)
    assert (costs.min(axis=1)[:-1] >= costs.max(axis=1)[1:]).all()


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_a_step_has_the_same_rows_for_any_number_of_ranks(world: int) -> None:
    lengths, share = law("bimodal", 900)
    loaders = [
        loader_of(lengths, share, rows_per_rank=2, rank=r, world=world) for r in range(world)
    ]
    for step in range(loaders[0].steps_per_epoch * 2):
        shares = loaders[0].shares_of_step(step)
        assert all(np.array_equal(other.shares_of_step(step), shares) for other in loaders)
        rows = np.sort(shares[shares != FILLER_ROW])
        expected = loaders[0].rows_of_step(step)
        assert np.array_equal(rows, np.sort(expected[expected != FILLER_ROW]))


def test_every_row_is_dealt_once_and_equal_costs_keep_their_order() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        world, rounds = int(rng.integers(1, 9)), int(rng.integers(1, 6))
        costs = rng.integers(0, 3, (world * rounds, 2)).astype(float)
        dealt = deal(costs, world)
        assert dealt.shape == (rounds, world)
        assert np.array_equal(np.sort(dealt.ravel()), np.arange(world * rounds))
        assert np.array_equal(deal(costs, world), dealt)
    assert np.array_equal(deal(np.ones((6, 2)), 3), np.arange(6).reshape(2, 3))
