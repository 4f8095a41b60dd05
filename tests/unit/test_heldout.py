"""Held-out measures: sums by hand, and the same totals for every number of ranks."""

# N flattened tokens of a batch

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from nmar_ds.data.loader import Batch, RowLoader, count_targets, make_batch
from nmar_ds.data.packing import pack
from nmar_ds.traces.schema import NUM_ROLES, Role
from nmar_ds.training.heldout import as_scalars, batch_sums, measure
from nmar_ds.training.monitor import SCREEN, Monitor

torch.set_num_threads(1)
X, P, E, B, C = Role


class Fixed:
    """Traces given as lists of (role, id)."""

    def __init__(self, *traces: list[tuple[int, int]]) -> None:
        self.traces = traces

    def ids(self, index: int) -> npt.NDArray[np.int32]:
        return np.array([token for _, token in self.traces[index]], np.int32)

    def roles(self, index: int) -> npt.NDArray[np.uint8]:
        return np.array([role for role, _ in self.traces[index]], np.uint8)

    def onsets(self, index: int) -> npt.NDArray[np.int32]:
        """The first token of every deviation but the first, whose second one it is (if any)."""
        roles = [role for role, _ in self.traces[index]]
        found = [n for n, r in enumerate(roles) if r == E and (n == 0 or roles[n - 1] != E)]
        if found and roles[found[0] : found[0] + 2] == [E, E]:
            found[0] += 1
        return np.array(found, np.int32)


TWO = Fixed(
    [(X, 10), (P, 11), (E, 12), (E, 13), (B, 9), (B, 9), (E, 14), (B, 9), (C, 15)],
    [(X, 20), (X, 21), (E, 22), (B, 9), (C, 23)],
)


def test_batch_sums_by_hand() -> None:
    batch = make_batch(TWO, [np.array([0]), np.array([1])], length=10, pad_id=0)
    nll = np.full(20, np.nan)  # what no target is at must not be looked at
    #          P    E    E    B    B    E    B    C
    nll[:8] = [1.0, 2.0, 3.0, 0.5, 4.0, 5.0, 0.25, 6.0]
    #            X    E    B    C
    nll[10:14] = [7.0, 8.0, 2.0, 9.0]
    nan = np.nan
    undo = np.full(20, nan)
    #           P    E    E    B     B    E    B     C
    undo[:8] = [3.0, nan, nan, 0.5, 0.6, 0.7, 0.25, 0.9]
    #              X    E    B    C
    undo[10:14] = [nan, nan, 0.1, 2.0]
    sums = batch_sums(batch, nll, undo, TWO.onsets)
    assert sums.shape == (2 * NUM_ROLES + 8,)
    assert sums[-8] == pytest.approx(sum(np.exp([-0.5, -0.6, -0.25, -0.1])))
    assert sums[-7:-5].tolist() == pytest.approx([sum(np.exp([-3.0, -0.9, -2.0])), 3])
    # The first has an undo too few in it? No: .61 and .55 of two, but .50 of a third (its E): not
    # above half. The second: .78, then .41 on its correction. The third: .90, then .14.
    assert sums[-5] == 3
    for place, value in ((4, 0.7), (5, 0.6), (7, 0.6), (13, 0.6)):
        other = undo.copy()
        other[place] = value  # too unsure of an undo, or too sure of one too many
        assert batch_sums(batch, nll, other, TWO.onsets)[-5] == 2, place
    assert sums[:NUM_ROLES].tolist() == [7.0, 1.0, 18.0, 6.75, 15.0]
    assert sums[NUM_ROLES : 2 * NUM_ROLES].tolist() == [1, 1, 4, 4, 2]
    # Of the first deviation only the second token is wrong: 3.0, then 5.0 and 8.0.
    assert sums[-4:-2].tolist() == [16.0, 3]
    # Only the first undo after each deviation; the second of the first pair (4.0) is no notice.
    assert sums[-2] == pytest.approx(np.exp(-0.5) + np.exp(-0.25) + np.exp(-2.0))
    assert sums[-1] == 3


def test_scalars_by_hand_and_absent_roles_are_left_out() -> None:
    totals = np.array([7.0, 1.0, 18.0, 6.75, 15.0, 1, 1, 4, 4, 2, 3.0, 0.5, 2, 1, 16.0, 3, 1.5, 3])
    assert as_scalars(totals) == {
        "heldout/loss_prefix": 1.0,
        "heldout/loss_deviation": 4.5,
        "heldout/loss_undo": 1.6875,
        "heldout/loss_correction": 7.5,
        "heldout/log_p_deviation_per_token": -16 / 3,
        "heldout/p_undo_at_first_place": 0.5,
        "heldout/p_undo_where_due": 0.75,
        "heldout/undo_count_accuracy": 1 / 3,
        "heldout/p_undo_elsewhere": 0.25,
    }
    clean = np.array([7.0, 1.0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    assert as_scalars(clean) == {"heldout/loss_prefix": 0.5}
    assert as_scalars(np.zeros(18)) == {}


def test_an_empty_batch_adds_nothing() -> None:
    batch = make_batch(TWO, [np.empty(0, np.int64)], length=4, pad_id=0)
    nothing = np.full(4, np.nan)
    assert batch_sums(batch, nothing, nothing, TWO.onsets).tolist() == [0.0] * 18


# -- measure ---------------------------------------------------------------------------------

rng = np.random.default_rng(8)
CORPUS = Fixed(
    *[
        [(int(rng.integers(0, 5)), int(rng.integers(1, 50))) for _ in range(size)]
        for size in rng.integers(1, 13, size=90)
    ]
)
PLAN = pack([len(trace) for trace in CORPUS.traces], 16)
COUNTS = count_targets(len(CORPUS.traces), CORPUS.roles)


def nll_of(batch: Batch) -> npt.NDArray[np.float64]:
    """Some -log p that depends on a token, its target and its place in its trace."""
    place = batch.position_ids.reshape(-1)
    return ((batch.input_ids.reshape(-1) * 7 + batch.targets * 3 + place) % 13) / 4.0


class FakeEngine:
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.modes: list[Any] = []

    def train(self, mode: bool = True) -> None:
        self.modes.append(mode)

    def __call__(self, *, batch: Batch, mode: str, undo_id: int) -> torch.Tensor:
        assert (
            mode == "nll" and undo_id == 9 and not torch.is_grad_enabled() and self.modes == [False]
        )
        self.batches.append(batch)
        nll = nll_of(batch)
        return torch.from_numpy(np.stack([nll, nll / 2])).float()


def measured(world: int, micro: int, num_rows: int) -> tuple[dict[str, float], list[FakeEngine]]:
    """Each rank in turn; what they hand to the reduction is added up and given to the last."""
    engines, parts = [], []

    def reduce(part: torch.Tensor) -> torch.Tensor:
        parts.append(part.clone())
        return torch.stack(parts).sum(0)

    values: dict[str, float] = {}
    for rank in range(world):
        engine = FakeEngine()
        values = measure(
            engine,
            RowLoader(
                CORPUS, PLAN, COUNTS, seed=0, global_batch_rows=micro * world,
                micro_batch_rows=micro, rank=rank, world_size=world, pad_id=0,
            ),
            num_rows=num_rows,
            undo_id=9,
            onsets=CORPUS.onsets,
            arguments=lambda batch: {"batch": batch},
            reduce=reduce,
        )  # fmt: skip
        assert engine.modes == [False, True]
        engines.append(engine)
    assert len(parts) == world
    return values, engines


def looked_at(engines: list[FakeEngine]) -> list[int]:
    return sorted(
        int(trace)
        for engine in engines
        for batch in engine.batches
        for trace in batch.trace_ids
        if trace >= 0
    )


@pytest.mark.parametrize("num_rows", [1, 5, 8, PLAN.num_rows, PLAN.num_rows + 50])
def test_sums_do_not_depend_on_the_number_of_ranks(num_rows: int) -> None:
    alone, engines = measured(1, 1, num_rows)
    traces = looked_at(engines)
    assert len(engines[0].batches) == min(num_rows, PLAN.num_rows)
    assert "heldout/p_undo_at_first_place" in alone or num_rows == 1
    for world, micro in [(1, 3), (2, 1), (2, 2), (4, 1), (4, 3), (7, 2)]:
        values, engines = measured(world, micro, num_rows)
        assert values == pytest.approx(alone, rel=1e-12)
        assert looked_at(engines) == traces  # each chosen row once, on one rank
        assert len({len(engine.batches) for engine in engines}) == 1


def test_all_rows_give_the_plain_means_over_unpacked_traces() -> None:
    values, engines = measured(2, 2, 10_000)
    assert looked_at(engines) == list(range(len(CORPUS.traces)))
    sums: dict[int, list[float]] = {role: [] for role in Role}
    notices, wrong = [], []
    due, elsewhere = [], []
    for index, trace in enumerate(CORPUS.traces):
        onsets = iter(CORPUS.onsets(index).tolist())
        onset = next(onsets) if trace[0][0] == E else 0
        for place, ((role, token), (next_role, target)) in enumerate(pairwise(trace)):
            nll = ((token * 7 + target * 3 + place) % 13) / 4.0
            sums[next_role].append(nll)
            if next_role == E and role != E:
                onset = next(onsets)
            if next_role == E and place + 1 >= onset:
                wrong.append(nll)
            if next_role == B:
                due.append(np.exp(-nll / 2))
            elif next_role in (P, C):
                elsewhere.append(np.exp(-nll / 2))
            if role == E and next_role == B:
                notices.append(np.exp(-nll))
    for role in (P, E, B, C):
        assert values[f"heldout/loss_{role.label}"] == pytest.approx(np.mean(sums[role]))
    assert 0 < len(wrong) < len(sums[E])
    assert values["heldout/log_p_deviation_per_token"] == pytest.approx(-np.mean(wrong))
    assert values["heldout/p_undo_at_first_place"] == pytest.approx(np.mean(notices))
    assert values["heldout/p_undo_where_due"] == pytest.approx(np.mean(due))
    assert values["heldout/p_undo_elsewhere"] == pytest.approx(np.mean(elsewhere))
    assert 0 <= values["heldout/undo_count_accuracy"] <= 1


def test_one_screen_shows_tags_that_are_written(tmp_path: Path) -> None:
    """TensorBoard's layout names only scalars that a run writes."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Monitor(tmp_path, is_writer=True, total_steps=3):
        pass
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["tensors"] == ["custom_scalars__config__"]
    written = as_scalars(np.ones(18))
    named = [tag for charts in SCREEN.values() for _, tags in charts.values() for tag in tags]
    assert set(named) <= set(written) and len(named) == len(set(named))
    assert {"heldout/p_undo_elsewhere", "heldout/log_p_deviation_per_token"} < set(named)


def test_few_rows_are_spread_over_the_plan() -> None:
    _, engines = measured(1, 1, 4)
    where = {tuple(PLAN.row(row).tolist()): row for row in range(PLAN.num_rows)}
    rows = sorted(
        where[tuple(int(trace) for trace in batch.trace_ids if trace >= 0)]
        for batch in engines[0].batches
    )
    num = PLAN.num_rows
    assert rows == [0, num // 4, num // 2, 3 * num // 4]
