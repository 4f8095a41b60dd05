"""The loader: roles survive packing, order is everyone's, counts are exact, the cursor is the state."""

# B rows per micro-batch, T tokens per row, N = B * T, S segments

from __future__ import annotations

from collections import Counter
from itertools import pairwise, product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmar_ds.data.loader import (
    FILLER_ROW,
    Batch,
    RowLoader,
    count_targets,
    make_batch,
)
from nmar_ds.data.packing import Plan, pack
from nmar_ds.traces.schema import NO_ROLE, NUM_ROLES, Role

PAD = 7
checked = settings(max_examples=60, deadline=None, derandomize=True, database=None)


class Traces:
    """Random traces in which no id occurs twice, so that an id says where it came from."""

    def __init__(self, lengths: list[int], seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.lengths = lengths
        ends = np.cumsum([0, *lengths])
        names = rng.permutation(int(ends[-1])).astype(np.int32) + 100
        self._ids = [names[a:b] for a, b in pairwise(ends)]
        self._roles = [rng.integers(0, NUM_ROLES, size=n).astype(np.uint8) for n in lengths]

    def ids(self, index: int) -> npt.NDArray[np.int32]:
        return self._ids[index]

    def roles(self, index: int) -> npt.NDArray[np.uint8]:
        return self._roles[index]

    def counts(self) -> npt.NDArray[np.int64]:
        return count_targets(len(self.lengths), self.roles)


def check_batch(
    batch: Batch, traces: Traces, rows: list[npt.NDArray[np.int64]], length: int
) -> None:
    """Hold a batch against the unpacked traces, token by token."""
    num = len(rows) * length
    assert (
        batch.input_ids.shape
        == batch.position_ids.shape
        == batch.roles.shape
        == (len(rows), length)
    )
    assert batch.targets.shape == batch.target_roles.shape == (num,)
    assert batch.input_ids.dtype == batch.position_ids.dtype == batch.targets.dtype == np.int64
    assert batch.roles.dtype == batch.target_roles.dtype == np.uint8
    assert batch.cu_seqlens.dtype == np.int32
    ids, roles = batch.input_ids.reshape(-1), batch.roles.reshape(-1)
    positions = batch.position_ids.reshape(-1)
    expected_segments = []
    seen = np.zeros(num, dtype=bool)
    for row, members in enumerate(rows):
        at = row * length
        for trace in members.tolist():
            size = traces.lengths[trace]
            mine = slice(at, at + size)
            # What a trace is, it is after packing: ids, roles, positions from 0.
            assert np.array_equal(ids[mine], traces.ids(trace))
            assert np.array_equal(roles[mine], traces.roles(trace))
            assert positions[mine].tolist() == list(range(size))
            # The role of a loss term is that of its target; the last token has none.
            assert batch.targets[mine].tolist() == [*traces.ids(trace)[1:].tolist(), -1]
            assert batch.target_roles[mine].tolist() == [*traces.roles(trace)[1:].tolist(), NO_ROLE]
            expected_segments.append((at, at + size, trace))
            seen[mine] = True
            at += size
        if at < (row + 1) * length:
            expected_segments.append((at, (row + 1) * length, -1))
            assert positions[at : (row + 1) * length].tolist() == list(
                range((row + 1) * length - at)
            )
    assert (ids[~seen] == PAD).all() and (roles[~seen] == NO_ROLE).all()
    assert (batch.targets[~seen] == -1).all() and (batch.target_roles[~seen] == NO_ROLE).all()
    bounds = batch.cu_seqlens.tolist()
    segments = list(zip(bounds[:-1], bounds[1:], batch.trace_ids.tolist(), strict=True))
    assert segments == expected_segments
    assert batch.num_tokens == seen.sum()


@st.composite
def corpora(draw: st.DrawFn) -> tuple[Traces, int]:
    capacity = draw(st.integers(1, 24))
    sizes = st.integers(1, capacity) | st.just(capacity)
    lengths = draw(st.lists(sizes, min_size=1, max_size=25))
    return Traces(lengths, draw(st.integers(0, 1000))), capacity


@checked
@given(corpora(), st.integers(1, 4))
def test_roles_after_packing_are_those_before(corpus: tuple[Traces, int], per_batch: int) -> None:
    traces, capacity = corpus
    plan = pack(traces.lengths, capacity)
    rows = [plan.row(row) for row in range(plan.num_rows)]
    rows += [np.empty(0, np.int64)] * (-len(rows) % per_batch)
    role_of = {}
    for trace in range(len(traces.lengths)):
        role_of |= dict(zip(traces.ids(trace).tolist(), traces.roles(trace).tolist(), strict=True))
    firsts = {int(traces.ids(trace)[0]) for trace in range(len(traces.lengths))}
    targets: Counter[int] = Counter()
    for start in range(0, len(rows), per_batch):
        chosen = rows[start : start + per_batch]
        batch = make_batch(traces, chosen, length=capacity, pad_id=PAD)
        check_batch(batch, traces, chosen, capacity)
        for token, role in zip(batch.targets.tolist(), batch.target_roles.tolist(), strict=True):
            if token >= 0:
                assert role == role_of[token]
                targets[token] += 1
    # Every token but the first of each trace is a target, once over the whole plan.
    assert set(targets) == set(role_of) - firsts
    assert set(targets.values()) <= {1}


def test_full_rows_do_not_run_into_each_other() -> None:
    traces = Traces([4, 4, 1, 3, 2])
    rows = [np.array([0]), np.array([1]), np.array([2, 3]), np.array([], np.int64), np.array([4])]
    batch = make_batch(traces, rows, length=4, pad_id=PAD)
    check_batch(batch, traces, rows, 4)
    assert batch.cu_seqlens.tolist() == [0, 4, 8, 9, 12, 16, 18, 20]
    assert batch.trace_ids.tolist() == [0, 1, 2, 3, -1, 4, -1]
    assert (batch.targets >= 0).sum() == 3 + 3 + 0 + 2 + 0 + 1
    assert batch.targets[[3, 7, 8, 11]].tolist() == [-1] * 4


def test_pad_id_in_a_trace_is_an_ordinary_token() -> None:
    traces = Traces([3])
    traces._ids[0] = np.array([PAD, PAD, PAD], np.int32)
    batch = make_batch(traces, [np.array([0])], length=5, pad_id=PAD)
    assert batch.targets.tolist() == [PAD, PAD, -1, -1, -1]
    assert batch.num_tokens == 3


def test_a_batch_of_filler_rows_has_nothing_to_learn() -> None:
    empty = np.empty(0, np.int64)
    batch = make_batch(Traces([1]), [empty, empty], length=3, pad_id=PAD)
    assert batch.num_tokens == 0
    assert (batch.targets == -1).all() and (batch.target_roles == NO_ROLE).all()
    assert batch.cu_seqlens.tolist() == [0, 3, 6] and batch.trace_ids.tolist() == [-1, -1]


def test_an_overfull_row_is_a_programmers_error() -> None:
    with pytest.raises(AssertionError, match="overfills"):
        make_batch(Traces([3, 3]), [np.array([0, 1])], length=5, pad_id=PAD)


def test_counts_of_targets_by_hand() -> None:
    roles = [[0, 1, 1, 2, 3, 4], [1], [0, 0, 4, 4], [3, 2]]
    counts = count_targets(4, lambda index: np.array(roles[index], np.uint8))
    assert counts.tolist() == [[0, 2, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 2], [0, 0, 1, 0, 0]]
    assert counts.dtype == np.int64


# -- order -----------------------------------------------------------------------------------

CORPUS = Traces(np.random.default_rng(5).integers(1, 13, size=122).tolist(), seed=5)
PLAN = pack(CORPUS.lengths, 16)
COUNTS = CORPUS.counts()


def loader(
    *,
    rank: int = 0,
    world: int = 1,
    micro: int = 1,
    total: int = 8,
    seed: int = 3,
    traces: Traces = CORPUS,
    plan: Plan = PLAN,
) -> RowLoader:
    return RowLoader(
        traces,
        plan,
        COUNTS if traces is CORPUS else traces.counts(),
        seed=seed,
        global_batch_rows=total,
        micro_batch_rows=micro,
        rank=rank,
        world_size=world,
        pad_id=PAD,
    )


def members(batches: list[Batch]) -> list[int]:
    return [int(trace) for batch in batches for trace in batch.trace_ids if trace >= 0]


SHARES = [(1, 1), (1, 2), (1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)]
SHARES += [(3, 1), (3, 2), (5, 1), (7, 1), (2, 3), (1, 5), (1, 16)]  # filled up with empty rows


def test_the_rows_of_a_step_are_the_same_however_they_are_shared_out() -> None:
    assert PLAN.num_rows % 8 != 0  # so that there are filler rows
    alone = loader()
    for step in range(2 * alone.steps_per_epoch + 1):
        rows = alone.rows_of_step(step)
        assert rows.shape == (8,)
        expected = sorted(
            t for row in rows if row != FILLER_ROW for t in PLAN.row(int(row)).tolist()
        )
        for world, micro in SHARES:
            got: list[int] = []
            for rank in range(world):
                one = loader(rank=rank, world=world, micro=micro)
                assert np.array_equal(one.rows_of_step(step), rows)
                batches = one.batches_of_step(step)
                assert len(batches) == one.accumulation_steps == -(-8 // (world * micro))
                assert all(batch.input_ids.shape == (micro, 16) for batch in batches)
                got += members(batches)
            assert sorted(got) == expected  # each once, on one rank


def test_every_row_once_per_epoch_and_every_epoch_in_another_order() -> None:
    one = loader()
    epochs = []
    for epoch in range(4):
        rows = np.concatenate(
            [one.rows_of_step(epoch * one.steps_per_epoch + s) for s in range(one.steps_per_epoch)]
        )
        kept = rows[rows != FILLER_ROW]
        assert sorted(kept.tolist()) == list(range(PLAN.num_rows))
        # Filler only fills up the last step.
        assert (rows[: PLAN.num_rows] != FILLER_ROW).all()
        epochs.append(kept.tolist())
    orders = {tuple(order) for order in epochs}
    assert len(orders) == 4 and tuple(range(PLAN.num_rows)) not in orders


def test_the_seed_decides_the_order_and_nothing_else_does() -> None:
    first = [tuple(loader(seed=seed).rows_of_step(0).tolist()) for seed in range(20)]
    assert len(set(first)) == 20
    assert first == [tuple(loader(seed=seed).rows_of_step(0).tolist()) for seed in range(20)]
    # (seed 1, epoch 0) must not be (seed 0, epoch 1), nor (1, 11) be (11, 1).
    steps = loader().steps_per_epoch
    pairs = {
        tuple(loader(seed=seed).rows_of_step(epoch * steps).tolist())
        for seed in (0, 1, 11, 111)
        for epoch in (0, 1, 11, 111)
    }
    assert len(pairs) == 16
    other = [tuple(loader(seed=seed, total=4).rows_of_step(0).tolist()) for seed in range(20)]
    assert other == [rows[:4] for rows in first]


def test_counts_of_a_step_are_those_of_all_its_batches() -> None:
    for world, micro in SHARES:
        ranks = [loader(rank=rank, world=world, micro=micro) for rank in range(world)]
        total = np.zeros(NUM_ROLES, np.int64)
        for step in range(ranks[0].steps_per_epoch):
            batches = [batch for one in ranks for batch in one.batches_of_step(step)]
            actual = np.zeros(NUM_ROLES, np.int64)
            for batch in batches:
                has_target = batch.targets >= 0
                assert np.array_equal(has_target, batch.target_roles != NO_ROLE)
                actual += np.bincount(batch.target_roles[has_target], minlength=NUM_ROLES)
            for one in ranks:
                counts, num_traces = one.counts_of_step(step)
                assert counts.tolist() == actual.tolist() and counts.dtype == np.int64
                assert num_traces == len(members(batches))
            total += actual
        assert total.tolist() == COUNTS.sum(axis=0).tolist()
        assert total.sum() == sum(CORPUS.lengths) - len(CORPUS.lengths)


def same(first: list[Batch], second: list[Batch]) -> bool:
    names = Batch.__dataclass_fields__
    return len(first) == len(second) and all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for a, b in zip(first, second, strict=True)
        for name in names
    )


def test_a_fresh_loader_stands_where_one_that_walked_there_stands() -> None:
    walked = loader(rank=1, world=2, micro=2)
    steps = 2 * walked.steps_per_epoch + 2
    history = [walked.batches_of_step(step) for step in range(steps)]
    for step in range(steps):
        assert same(loader(rank=1, world=2, micro=2).batches_of_step(step), history[step])
    for step in (0, steps - 1, 3, walked.steps_per_epoch, 1):  # back and forth, too
        assert same(walked.batches_of_step(step), history[step])
        counts, num_traces = walked.counts_of_step(step)
        fresh = loader(rank=0, world=2, micro=2).counts_of_step(step)
        assert counts.tolist() == fresh[0].tolist() and num_traces == fresh[1]
    assert not same(history[0], history[1])


@pytest.mark.parametrize("num_rows", range(1, 18))
def test_no_rank_ever_runs_out_before_another(num_rows: int) -> None:
    traces = Traces([3] * num_rows, seed=num_rows)  # one trace fills one row
    plan = pack(traces.lengths, 3)
    for world, micro, accumulation in product((1, 2, 3, 4), (1, 2), (1, 2)):
        total = world * micro * accumulation
        ranks = [
            loader(rank=r, world=world, micro=micro, total=total, traces=traces, plan=plan)
            for r in range(world)
        ]
        steps = -(-num_rows // total)
        assert {one.steps_per_epoch for one in ranks} == {steps}
        seen: list[int] = []
        for step in range(steps):
            shares = [one.batches_of_step(step) for one in ranks]
            assert {len(share) for share in shares} == {accumulation}
            assert {b.input_ids.shape for share in shares for b in share} == {(micro, 3)}
            seen += [trace for share in shares for trace in members(share)]
        assert sorted(seen) == list(range(num_rows))


def test_a_rank_that_never_has_a_row_is_a_programmers_error() -> None:
    for world, micro in ((9, 1), (5, 2), (2, 8)):
        with pytest.raises(AssertionError, match="RunConfig"):
            loader(world=world, micro=micro, total=8)


def test_rows_that_do_not_divide_are_filled_up_at_the_end() -> None:
    shares = [[b.num_tokens > 0 for b in loader(rank=r, world=3).batches_of_step(0)]
              for r in range(3)]  # fmt: skip
    assert [sum(rank) for rank in shares] in ([3, 3, 2], [3, 2, 3], [2, 3, 3])
    assert all(rank[:2] == [True, True] for rank in shares), "the empty row is in the last round"


def test_the_first_token_of_a_trace_never_counts_whatever_its_role() -> None:
    traces = Traces([1] * 9)
    assert traces.counts().sum() == 0
    one = loader(traces=traces, plan=pack(traces.lengths, 4), total=4)
    counts, num_traces = one.counts_of_step(0)
    assert counts.sum() == 0 and num_traces == 9
    assert (one.batches_of_step(0)[0].targets == -1).all()
    assert Role.PROMPT == 0
