"""Lengths that every benchmark of data draws from: four laws, fixed here and nowhere else.

    python benchmarks/data.py

prints their quantiles. A law gives tokens per trace; the trained share of a trace is drawn beside
it. Nothing here can be overridden from a command line, so that two reported figures never differ by
a length law.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

SEED = 20261125
SHORTEST = 8  # tokens; and at most the row's capacity
TRAINED_MEAN, TRAINED_SIGMA = 0.60, 0.15  # of a trace's targets, normal, clipped to 0.05 .. 0.95
LAWS = ("trace", "chat", "long", "bimodal")
MEAN_SIGMA = {"trace": (435.0, 0.8), "chat": (752.0, 0.9)}  # lognormal: mean, sigma of the log
LONG = (0.2, 0.7)  # of the capacity, uniform
SHORT_SHARE, SHORT, TALL = 0.7, (50, 200), (0.45, 0.95)  # bimodal: tokens; shares of the capacity


class Lengths(NamedTuple):
    """Traces by length.

    Attributes:
        tokens: int64[N], each 1 to the capacity.
        trained: int64[N], of its targets.
    """

    tokens: npt.NDArray[np.int64]
    trained: npt.NDArray[np.int64]


def draw(law: str, num: int, capacity: int, seed: int = SEED) -> Lengths:
    """Traces of a law.

    Args:
        law: of `LAWS`.
        num: N.
        capacity: tokens of a row; lengths are clipped to it.
        seed: another one for another sample.
    """
    rng = np.random.default_rng([seed, LAWS.index(law), num, capacity])
    if law in MEAN_SIGMA:
        mean, sigma = MEAN_SIGMA[law]
        tokens = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, num)
    elif law == "long":
        tokens = rng.uniform(LONG[0] * capacity, LONG[1] * capacity, num)
    else:
        tall = rng.uniform(TALL[0] * capacity, TALL[1] * capacity, num)
        tokens = np.where(rng.random(num) < SHORT_SHARE, rng.uniform(*SHORT, num), tall)
    clipped = np.clip(tokens, SHORTEST, capacity).astype(np.int64)
    share = np.clip(rng.normal(TRAINED_MEAN, TRAINED_SIGMA, num), 0.05, 0.95)
    return Lengths(clipped, ((clipped - 1) * share).astype(np.int64))


def lower_bound(tokens: npt.NDArray[np.int64], capacity: int) -> int:
    """Rows that no packing can do without: the larger of L1 and L2.

    L1 is the tokens over the capacity. L2 (Martello and Toth, 1990): for every k up to half the
    capacity, traces longer than capacity - k stand alone, those over half stand apart, and what the
    rest of at least k needs beyond the room these leave needs further rows.
    """
    counts = np.bincount(tokens, minlength=capacity + 1)
    sizes = counts * np.arange(capacity + 1)
    num, total = np.cumsum(counts), np.cumsum(sizes)
    half = capacity // 2
    k = np.arange(1, half + 1)
    alone = num[-1] - num[capacity - k]
    apart = num[capacity - k] - num[half]
    apart_size = total[capacity - k] - total[half]
    rest_size = total[half] - total[k - 1]
    over = np.maximum(0, -(-(rest_size - (apart * capacity - apart_size)) // capacity))
    return int(max(-(-int(tokens.sum()) // capacity), (alone + apart + over).max()))


if __name__ == "__main__":
    print("law       capacity    mean  median     90%  trained")
    for name in LAWS:
        for size in (2048, 8192):
            drawn = draw(name, 100_000, size)
            low, high = np.quantile(drawn.tokens, [0.5, 0.9])
            print(f"{name:9} {size:8,} {drawn.tokens.mean():7.0f} {low:7.0f} {high:7.0f} "
                  f"{drawn.trained.sum() / drawn.tokens.sum():8.3f}")  # fmt: skip
