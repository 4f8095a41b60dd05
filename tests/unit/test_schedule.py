"""The learning rate of each step, against numbers worked out by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest

from nmar_ds.config import OptimizerSection
from nmar_ds.training.loop import learning_rate


def section(peak: float = 1.0, warmup: int = 0, floor: float = 0.0) -> OptimizerSection:
    return OptimizerSection(
        learning_rate=peak, warmup_steps=warmup, final_learning_rate_ratio=floor
    )


def rates(total: int, settings: OptimizerSection) -> list[float]:
    return [learning_rate(step, total, settings) for step in range(total)]


def test_warm_up_is_linear_and_moves_at_once() -> None:
    assert rates(8, section(2.0, warmup=4))[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


def test_cosine_without_warm_up() -> None:
    half = 0.5**0.5
    expected = [1.0, (1 + half) / 2, 0.5, (1 - half) / 2]
    assert rates(4, section()) == pytest.approx(expected)
    assert rates(4, section(3e-4, floor=0.1)) == pytest.approx(
        [3e-4 * (0.1 + 0.9 * share) for share in expected]
    )


def test_cosine_starts_after_the_warm_up() -> None:
    values = rates(6, section(1.0, warmup=2, floor=0.5))
    assert values == pytest.approx([0.5, 1.0, 1.0, 0.5 + 0.5 * 0.8535533906, 0.75, 0.5732233047])


def test_never_above_peak_nor_below_floor_and_only_falls_after_the_warm_up() -> None:
    for total in (1, 2, 7, 100):
        for warmup in (0, 1, total // 2, total):
            values = rates(total, section(0.3, warmup=warmup, floor=0.2))
            assert max(values) == pytest.approx(0.3)
            assert all(value <= 0.3 + 1e-12 for value in values)
            assert all(value >= 0.06 - 1e-12 for value in values[warmup:])
            assert all(a < b for a, b in pairwise(values[:warmup]))
            assert all(a > b for a, b in pairwise(values[warmup:]))


def test_constant_when_the_floor_is_the_peak_and_the_end_is_the_floor() -> None:
    assert rates(5, section(0.3, floor=1.0)) == pytest.approx([0.3] * 5)
    assert learning_rate(5, 5, section(0.3, floor=0.25)) == pytest.approx(0.075)
    assert learning_rate(1, 1, section(0.3, floor=0.25)) == pytest.approx(0.075)
    assert learning_rate(1, 1, section(0.3, warmup=1)) == pytest.approx(0.3)
    assert rates(1, section(0.3, warmup=1)) == pytest.approx([0.3])
