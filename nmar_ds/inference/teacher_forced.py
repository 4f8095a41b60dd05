"""Teacher-forced measures of an exported model on a store of held-out traces (SPEC 4 and 7).

The sums are those of training (`training.heldout`), kept trace by trace, so that every figure gets
an interval over traces. Added is how often the model would enter an error itself: with the right
prefix given, whether greedy decoding writes the error's first wrong token, and with which chance
sampling at temperature 1 does. No draw is needed for that.
"""

# P traces, C totals of a trace, R resamples, T tokens of a trace

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nmar_ds.data.loader import make_batch
from nmar_ds.data.store import Store
from nmar_ds.errors import ConfigError
from nmar_ds.inference.intervals import bounds, resampled_sums
from nmar_ds.inference.metrics import Rate
from nmar_ds.inference.scoring import TargetScores, score_targets
from nmar_ds.training.heldout import NUM_TOTALS, as_scalars, batch_sums

NUM_OWN = 3  # totals beside those of `batch_sums`
# Shares of deviations, and the columns of both counts. A bootstrap of them would shrink to a point
# where all or none do, which is where a trained model is.
SHARES = {
    "heldout/undo_count_accuracy": (NUM_TOTALS - 5, NUM_TOTALS - 1),
    "heldout/enters_error_greedy": (NUM_TOTALS, NUM_TOTALS + 2),
}
Floats = npt.NDArray[np.float64]


def measure_store(
    model: Any, store: Store, *, undo_id: int, num_traces: int
) -> dict[str, dict[str, float | int | None]]:
    """Score traces, spread over the store, each by itself.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        store: opened by `fitting.open_store`.
        undo_id: of `<UNDO>`.
        num_traces: how many at most.

    Returns:
        By the tags of training: value, its interval over traces, and the number of traces that
        have a say in it. Shares of deviations have Wilson's, all else a bootstrap (None of one).

    Raises:
        ConfigError: a trace that is longer than the model's positions.
    """
    chosen = choose_traces(model, store, num_traces)
    scores = score_targets(
        model, [store.ids(index).astype(np.int32) for index in chosen], undo_id=undo_id
    )
    sums_PC = np.stack([_sums(store, *pair) for pair in zip(chosen, scores, strict=True)])
    values = _scalars(sums_PC.sum(axis=0))
    drawn = [_scalars(row_C) for row_C in resampled_sums(sums_PC)]
    each = [_scalars(row_C) for row_C in sums_PC]
    found: dict[str, dict[str, float | int | None]] = {}
    for tag, value in values.items():
        num_units = sum(tag in own for own in each)
        low, high = None, None
        if tag in SHARES:
            nums_P, sizes_P = sums_PC[:, SHARES[tag]].T
            low, high = Rate.spread(nums_P, sizes_P).bounds
        elif num_units > 1:
            low, high = bounds(np.array([row.get(tag, np.nan) for row in drawn]))
        found[tag] = {"value": value, "of": num_units, "low": low, "high": high}
    return found


def choose_traces(model: Any, store: Store, num_traces: int) -> list[int]:
    """Indices of the traces to score, at most so many and spread over the store.

    Raises:
        ConfigError: one of them is longer than the model's positions.
    """
    num = min(num_traces, store.num_traces)
    chosen: list[int] = (np.arange(num) * store.num_traces // num).tolist()
    longest = max(chosen, key=lambda index: len(store.ids(index)))
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and len(store.ids(longest)) > positions:
        raise ConfigError(
            f"{store.folder}: trace {longest} has {len(store.ids(longest))} tokens, expected at "
            f"most the model's {positions} positions"
        )
    return chosen


def _sums(store: Store, trace: int, scores: TargetScores) -> Floats:
    """float64[C] of one trace: `batch_sums`, then greedy and expected entries, and deviations."""
    length = len(store.ids(trace))
    batch = make_batch(store, [np.array([trace])], length=length, pad_id=0)
    # The last token is followed by nothing; no sum looks there.
    nll_T, undo_nll_T = (
        np.concatenate([values, [np.nan]]) for values in (scores.nll, scores.undo_nll)
    )
    places = store.onsets(trace).astype(np.int64) - 1
    places = places[places >= 0]  # a trace's first token is nobody's target
    own = scores.is_top[places].sum(), np.exp(-scores.nll[places]).sum(), len(places)
    return np.concatenate([batch_sums(batch, nll_T, undo_nll_T, store.onsets), own])


def _scalars(totals_C: Floats) -> dict[str, float]:
    values = as_scalars(totals_C[:-NUM_OWN])
    greedy, sampled, num = totals_C[-NUM_OWN:].tolist()
    if num > 0:
        values["heldout/enters_error_greedy"] = greedy / num
        values["heldout/enters_error_sampled"] = sampled / num
    return values
