"""One optimizer step under ZeRO-3 against independent, unpacked, single-process autograd.

Proof 2 and the ZeRO-3 half of proof 3: gradients are compared unclipped and in full, because a
lost factor hides from AdamW (a 4x error moves the weights by 3e-6) and from clipping.
"""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import pytest
import torch
from pool import RankPool

from nmar_ds.acceptance.reference import combine, gap

MSFT = [0.0, 1.0, 0.0, 1.0, 1.0]
SFT = [0.0, 1.0, 1.0, 1.0, 1.0]
DEVIATION = 2
TOLERANCE = 1e-5


def on_first(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Rank 0's result, once all ranks are seen to agree."""
    for other in results[1:]:
        assert other["norm"] == results[0]["norm"]
        for kind in ("gradients", "after"):
            for name, value in results[0][kind].items():
                np.testing.assert_array_equal(value, other[kind][name])
    return results[0]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("persistence", [0, 100_000], ids=["partitioned", "persistent"])
def test_one_rank_gas_4_equals_two_ranks_gas_2_equals_one_big_batch(
    one_rank: RankPool, two_ranks: RankPool, tied: bool, persistence: int
) -> None:
    arguments = {"tied": tied, "weights": MSFT, "persistence": persistence}
    single = on_first(one_rank.run(cases.train_step, **arguments))
    double = on_first(two_ranks.run(cases.train_step, **arguments))
    assert (single["micro_batches"], double["micro_batches"]) == (4, 2)
    assert single["traces"] == double["traces"]
    for name, value in single["before"].items():
        np.testing.assert_array_equal(value, double["before"][name])

    parts, sums, counts = cases.reference_gradients(
        single["before"], tied=tied, traces=single["traces"], dtype=torch.float64
    )
    assert counts[0] >= cases.LENGTH - 1, "a micro-batch with nothing trained belongs to the step"
    divisor = float(counts[1:].sum())
    expected = combine(parts, MSFT, divisor)
    loss = float(np.dot(MSFT, sums)) / divisor
    for result in (single, double):
        assert gap(result["gradients"], expected) < TOLERANCE
        assert result["loss"] == pytest.approx(loss, rel=TOLERANCE)
        norm = np.sqrt(sum(float((value**2).sum()) for value in expected.values()))
        assert result["norm"] == pytest.approx(norm, rel=TOLERANCE)
        stepped = {n: single["before"][n] - 0.05 * expected[n] for n in expected}
        moved = {n: result["after"][n] - result["before"][n] for n in expected}
        should_move = {n: stepped[n] - single["before"][n] for n in expected}
        # The weights are about 0.2 and move by less, so their rounding shows in the difference.
        assert gap(moved, should_move) < 20 * TOLERANCE
        assert gap(result["after"], stepped) < TOLERANCE


@pytest.mark.parametrize("broken", ["gas", "world"])
def test_a_lost_factor_is_seen(two_ranks: RankPool, broken: str) -> None:
    result = on_first(two_ranks.run(cases.train_step, tied=True, weights=MSFT, break_it=broken))
    parts, _, counts = cases.reference_gradients(
        result["before"], tied=True, traces=result["traces"], dtype=torch.float64
    )
    expected = combine(parts, MSFT, float(counts[1:].sum()))
    assert gap(result["gradients"], expected) > 0.4


@pytest.mark.parametrize("whole_layers", [True, False])
def test_activation_checkpointing_and_gathering_change_nothing(
    two_ranks: RankPool, whole_layers: bool
) -> None:
    plain = on_first(two_ranks.run(cases.train_step, tied=True, weights=MSFT))
    spared = on_first(
        two_ranks.run(
            cases.train_step,
            tied=True,
            weights=MSFT,
            gradient_checkpointing=True,
            whole_layers=whole_layers,
        )
    )
    assert gap(spared["gradients"], plain["gradients"]) < 1e-6


def test_safety_gap_b_holds_under_zero3_with_the_common_denominator(two_ranks: RankPool) -> None:
    """g_SFT - g_mSFT = G_e / D, with 2 ranks and 2 accumulation steps (SPEC section 4)."""
    sft = on_first(two_ranks.run(cases.train_step, tied=True, weights=SFT))
    msft = on_first(two_ranks.run(cases.train_step, tied=True, weights=MSFT))
    assert sft["traces"] == msft["traces"]
    parts, _, counts = cases.reference_gradients(
        sft["before"], tied=True, traces=sft["traces"], dtype=torch.float64
    )
    divisor = float(counts[1:].sum())
    seen = {n: sft["gradients"][n] - msft["gradients"][n] for n in sft["gradients"]}
    expected = {n: value / divisor for n, value in parts[DEVIATION].items()}
    assert gap(seen, expected) < TOLERANCE


def test_safety_gap_a_holds_under_zero3_with_the_common_denominator(two_ranks: RankPool) -> None:
    """The terms of b and c have one gradient, whichever objective they stand in (SPEC section 4)."""
    prefix_only, prefix_and_error = [0.0, 1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0, 0.0]
    parts_of = {}
    for name, weights, without in (("sft", SFT, prefix_and_error), ("msft", MSFT, prefix_only)):
        whole = on_first(two_ranks.run(cases.train_step, tied=True, weights=weights))
        rest = on_first(two_ranks.run(cases.train_step, tied=True, weights=without))
        parts_of[name] = {
            n: whole["gradients"][n] - rest["gradients"][n] for n in whole["gradients"]
        }
    parts, _, counts = cases.reference_gradients(
        whole["before"], tied=True, traces=whole["traces"], dtype=torch.float64
    )
    expected = combine(parts, [0.0, 0.0, 0.0, 1.0, 1.0], float(counts[1:].sum()))
    for seen in parts_of.values():
        assert gap(seen, expected) < TOLERANCE


def test_safety_gap_b_fails_by_the_predicted_amount_under_trained(two_ranks: RankPool) -> None:
    """g_SFT - g_mSFT = G_e/N - [N_e / (N (N - N_e))] (G_p + G_b + G_c) under `trained`."""
    arguments = {"tied": True, "denominator": "trained"}
    sft = on_first(two_ranks.run(cases.train_step, weights=SFT, **arguments))
    msft = on_first(two_ranks.run(cases.train_step, weights=MSFT, **arguments))
    parts, _, counts = cases.reference_gradients(
        sft["before"], tied=True, traces=sft["traces"], dtype=torch.float64
    )
    total, wrong = float(counts[1:].sum()), float(counts[DEVIATION])
    seen = {n: sft["gradients"][n] - msft["gradients"][n] for n in sft["gradients"]}
    others = combine(parts, MSFT, 1.0)
    predicted = {
        n: parts[DEVIATION][n] / total - wrong / (total * (total - wrong)) * others[n]
        for n in others
    }
    assert gap(seen, predicted) < TOLERANCE
    plain = {n: value / total for n, value in parts[DEVIATION].items()}
    assert gap(seen, plain) > 0.01, "the two denominators must be told apart"


OPTIONS = {
    "negative": ([0.0, 1.0, -0.5, 1.0, 2.0], {"nll_clip": 4.0}, "common"),
    "unlikelihood": (MSFT, {"unlikelihood": 0.7}, "trained"),
    "both": ([0.0, 1.0, -0.5, 1.0, 1.0], {"nll_clip": 4.0, "unlikelihood": 0.7}, "sum"),
    "traces": (MSFT, {}, "traces"),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("case", OPTIONS)
def test_objective_options_on_one_rank_and_on_two(
    one_rank: RankPool, two_ranks: RankPool, case: str, tied: bool
) -> None:
    """1 rank x GAS 4 = 2 ranks x GAS 2 = one trace at a time, in full and unclipped gradients."""
    weights, options, kind = OPTIONS[case]
    arguments = {"tied": tied, "weights": weights, "options": options, "denominator": kind}
    single = on_first(one_rank.run(cases.train_step, **arguments))
    double = on_first(two_ranks.run(cases.train_step, **arguments))
    assert (single["micro_batches"], double["micro_batches"]) == (4, 2)
    assert single["traces"] == double["traces"]
    expected = cases.reference_objective(
        single["before"], tied=tied, traces=single["traces"], weights=weights, **options
    )
    _, prefix, wrong, undo, right = expected["counts"].tolist()
    divisor = {
        "common": prefix + wrong + undo + right,
        "trained": prefix + undo + right + 0.7 * wrong,
        "sum": 1,
        "traces": len(single["traces"]),
    }[kind]
    if "nll_clip" in options:
        assert 0 < expected["num_beyond"] < wrong, "some beyond the clip, some not"
    gradients = {name: value / divisor for name, value in expected["gradients"].items()}
    for result in (single, double):
        assert gap(result["gradients"], gradients) < TOLERANCE
        assert result["loss"] == pytest.approx(expected["loss"] / divisor, rel=TOLERANCE)
        logged = result["logged"]
        assert logged["loss/total"] == pytest.approx(expected["loss"] / divisor, rel=TOLERANCE)
        assert ("loss/unlikelihood" in logged) == ("unlikelihood" in options)
        if options:
            plain = expected["sums"][DEVIATION]
            assert logged["sums/deviation"] == pytest.approx(plain, rel=TOLERANCE)
        if "unlikelihood" in options:
            mean = expected["unlikelihood"] / wrong
            assert logged["loss/unlikelihood"] == pytest.approx(mean, rel=TOLERANCE)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("persistence", [0, 100_000], ids=["partitioned", "persistent"])
def test_undo_row_norms_are_those_of_the_weights(
    two_ranks: RankPool, tied: bool, persistence: int
) -> None:
    """Before and after a step, on every rank, while the rows are partitioned."""
    results = two_ranks.run(cases.train_step, tied=tied, weights=MSFT, persistence=persistence)
    for result in results:
        assert result["norms"] == results[0]["norms"]
        for weights, norms in zip(
            (result["before"], result["after"]), result["norms"], strict=True
        ):
            embedding = weights["lm.model.embed_tokens.weight"].astype(np.float64)
            head = weights.get("lm.lm_head.weight", embedding).astype(np.float64)
            lengths = [np.linalg.norm(matrix, axis=1) for matrix in (embedding, head)]
            undo = [each[cases.UNDO] for each in lengths]
            known = [each[: cases.UNDO].mean() for each in lengths]
            assert norms == pytest.approx([*undo, *known], rel=1e-6)
    assert results[0]["norms"][0] != results[0]["norms"][1], "the step moved the row"
