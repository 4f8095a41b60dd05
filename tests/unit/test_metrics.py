"""Measures over ids, each against a case counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from nmar_ds.inference.measuring import precision, recall
from nmar_ds.inference.metrics import (
    Pops,
    Rate,
    Recovery,
    auroc,
    detection_latency,
    first_wrong,
    judge_pops,
    judge_recovery,
    leading_undos,
    num_revisits,
    overhead,
    transitions,
    wilson,
)
from nmar_ds.traces.answers import answered
from nmar_ds.traces.reduction import Machine

U, EOS = 99, 2
DOT = 12  # the boundary
TOKEN, SPAN, RESET = Machine(U), Machine(U, "span", frozenset({DOT})), Machine(U, "reset")


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def test_wilson_matches_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3 (score, no correction).
    for num, of, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
                               (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]:  # fmt: skip
        assert wilson(num, of) == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_rate_counts_and_has_no_value_of_nothing() -> None:
    rate = Rate.over([True, False, True, True])
    assert (rate.num, rate.of, rate.value) == (3, 4, 0.75)
    report = rate.as_dict()
    assert (report["num"], report["of"], report["value"]) == (3, 4, 0.75)
    assert (report["low"], report["high"]) == wilson(3, 4)
    assert Rate.over([]).value is None


def test_an_interval_over_tokens_is_that_of_their_problems() -> None:
    """15 of 20 tokens out of 4 responses are known as well as 3 of 4 responses, no better."""
    report = Rate(15, 20, 4).as_dict()
    assert (report["value"], report["num"], report["of"]) == (0.75, 15, 20)
    assert (report["low"], report["high"]) == wilson(3, 4)
    assert Rate(1, 2, 9).as_dict()["low"] == wilson(1, 2)[0]  # never more problems than tokens
    assert Rate(0, 0, 0).as_dict()["high"] == 1.0


def test_an_interval_of_unequal_responses_is_that_of_the_large_ones() -> None:
    """19 responses pop their one wrong token; one writes 200 and pops none."""
    rate = Rate.spread([1] * 19 + [0], [1] * 19 + [200])
    assert (rate.num, rate.of) == (19, 219)
    # (19 + 200)^2 / (19 + 200^2): the large response alone decides.
    assert rate.units == pytest.approx(47961 / 40019)
    assert rate.bounds == wilson(19 / 219 * (47961 / 40019), 47961 / 40019)
    assert rate.bounds[1] > 0.75 and wilson(20 * 19 / 219, 20)[1] < 0.31
    assert Rate.spread([3, 0, 3], [3, 0, 3]).units == 2  # one without events is worth none
    assert Rate.spread([0, 0], [0, 0]) == Rate(0, 0, 0)
    assert Rate.spread([0, 0], [0, 0]).bounds == (0.0, 1.0)


def test_precision_and_recall_weigh_responses_by_their_tokens() -> None:
    one = Pops(popped_right=0, popped_along=7, popped_wrong=1, num_wrong=1)
    large = Pops(popped_right=2, popped_along=0, popped_wrong=1, num_wrong=5)
    none = Pops(popped_right=0, popped_along=0, popped_wrong=0, num_wrong=0)
    assert precision([one, large, none]) == Rate(2, 4, 4**2 / (1 + 9))
    assert recall([one, large, none]) == Rate(2, 6, 6**2 / (1 + 25))


def test_transitions_divide_by_their_own_side() -> None:
    banned = [True, True, True, False, False]
    reduced = [True, False, True, True, False]
    gained, lost = transitions(banned, reduced)
    assert (gained.num, gained.of) == (1, 2)
    assert (lost.num, lost.of) == (1, 3)


REFERENCE = ids(10, 11, 12, EOS)


@pytest.mark.parametrize(
    ("raw", "popped_right", "popped_wrong", "num_wrong"),
    [
        (REFERENCE, 0, 0, 0),
        (ids(10, 50, U, 11, 12, EOS), 0, 1, 1),  # found and repaired
        (ids(10, 50, 51, U, U, U, 10, 11, 12, EOS), 1, 2, 2),  # one pop too many
        (ids(10, 50, 51, U, 11, 12, EOS), 0, 1, 5),  # one too few: all that follows is wrong
        (ids(10, 11, U, 11, 12, EOS), 1, 0, 0),  # a false undo
        (ids(U, 10, 11, 12, EOS), 0, 0, 0),  # a stray pops nothing
        (ids(10, 11, 12, EOS, 13), 0, 0, 1),  # beyond the end
        (ids(10, 50, 12, EOS), 0, 0, 3),  # right places on a wrong stack are wrong
        (ids(11, 10), 0, 0, 2),  # a token of the reference at the wrong place is wrong
    ],
)
def test_judge_pops_by_hand(
    raw: np.ndarray, popped_right: int, popped_wrong: int, num_wrong: int
) -> None:
    assert judge_pops(raw, REFERENCE, TOKEN) == Pops(
        popped_right=popped_right, popped_along=0, popped_wrong=popped_wrong, num_wrong=num_wrong
    )


SPANS = ids(10, 11, DOT, 13, 14, DOT, EOS)  # two spans; what is wrong below is 50 and up


@pytest.mark.parametrize(
    ("machine", "raw", "right_along_wrong_written"),
    [
        # The right 13 has to go with the wrong 50.
        (SPAN, ids(10, 11, DOT, 13, 50, U, 13, 14, DOT, EOS), (0, 1, 1, 1)),
        (RESET, ids(10, 11, DOT, 13, 50, U, 10, 11, DOT, 13, 14, DOT, EOS), (0, 4, 1, 1)),
        # Wrong boundaries: the first undo takes wrong tokens only, the second the rest.
        (SPAN, ids(10, 11, DOT, 13, 50, DOT, 51, U, U, 13, 14, DOT, EOS), (0, 1, 3, 3)),
        # One undo too many: it finds nothing wrong, so the span it takes is a false undo.
        (SPAN, ids(10, 11, DOT, 50, U, U, 10, 11, DOT), (3, 0, 1, 1)),
        # Nothing wrong at all.
        (SPAN, ids(10, 11, DOT, 13, U, 13, 14), (1, 0, 0, 0)),
        (RESET, ids(10, 11, DOT, U, 10, 11), (3, 0, 0, 0)),
        # Too few: the wrong 50 stays below, what follows is wrong, and so is what goes.
        (SPAN, ids(10, 50, DOT, 13, 14, U, 13, 14), (0, 0, 2, 6)),
        # At base a stray takes nothing.
        (RESET, ids(U, 50, U, U, 10, 11), (0, 0, 1, 1)),
    ],
)
def test_judge_pops_where_right_tokens_have_to_go_along(
    machine: Machine, raw: np.ndarray, right_along_wrong_written: tuple[int, ...]
) -> None:
    found = judge_pops(raw, SPANS, machine)
    counts = (found.popped_right, found.popped_along, found.popped_wrong, found.num_wrong)
    assert counts == right_along_wrong_written


def test_judge_recovery_counts_the_undos_of_the_semantics() -> None:
    deviation = ids(13, 50, DOT, 51)  # a right 13 was moved to its head
    for machine, expected in ((TOKEN, 4), (SPAN, 2), (RESET, 1)):
        for run in range(6):
            found = judge_recovery(ids(*[U] * run, 13, 14), deviation, machine)
            assert (found.undone, found.exact, found.over) == (
                run > 0, run == expected, run > expected
            )  # fmt: skip
            assert found.parroted is (False if run else None)
        # The deviation as it was written, its right head included.
        again = judge_recovery(ids(*[U] * expected, *deviation), deviation, machine)
        assert again.parroted is True
        assert judge_recovery(ids(U, *deviation[1:], 60), deviation, machine).parroted is False


def test_first_wrong_is_the_first_mismatch_even_when_undone() -> None:
    assert first_wrong(ids(10, 50, U, 11, 12, EOS), REFERENCE, TOKEN) == 1
    assert first_wrong(ids(10, 11, U, 11, 60), REFERENCE, TOKEN) == 4
    assert first_wrong(REFERENCE, REFERENCE, TOKEN) is None


def test_leading_undos() -> None:
    assert leading_undos(ids(U, U, 10, U), U) == 2
    assert leading_undos(ids(10, U), U) == 0
    assert leading_undos(ids(U, U), U) == 2
    assert leading_undos(ids(), U) == 0


def test_detection_latency_counts_tokens_from_the_first_wrong_one() -> None:
    assert detection_latency(ids(10, 50, U), 1, U) == 1
    assert detection_latency(ids(10, U, 50, 51, 52, U), 2, U) == 3
    assert detection_latency(ids(10, 50, 51), 1, U) is None


@pytest.mark.parametrize(
    ("emitted", "undone", "exact", "over", "parroted"),
    [
        (ids(U, U, 11, 12), True, True, False, False),
        (ids(U, 11, U), True, False, False, False),
        (ids(U, U, U, 10), True, False, True, False),
        (ids(12, U, U), False, False, False, None),
        (ids(U, U, 50, 51, U, U), True, True, False, True),
        (ids(U, U, 50, 12), True, True, False, False),  # only its first token again
        (ids(U, U), True, True, False, False),
    ],
)
def test_judge_recovery_of_a_deviation_of_two(
    emitted: np.ndarray, undone: bool, exact: bool, over: bool, parroted: bool | None
) -> None:
    found = judge_recovery(emitted, ids(50, 51), TOKEN)
    assert found == Recovery(undone=undone, exact=exact, over=over, parroted=parroted)


def test_num_revisits_counts_returns_to_an_earlier_content() -> None:
    assert num_revisits(ids(10, 50, U, 11), TOKEN) == 0
    assert num_revisits(ids(10, 50, U, 50, U, 50, U, 11), TOKEN) == 2
    # The same token on another stack is another content.
    assert num_revisits(ids(10, 50, U, 11, 50), TOKEN) == 0
    # [10] after popping everything, then [10, 11]: both had been there.
    assert num_revisits(ids(10, 11, U, U, 10, 11), TOKEN) == 2


def test_writing_a_right_head_again_is_no_revisit() -> None:
    assert num_revisits(ids(10, 11, DOT, 13, 50, U, 13, 14), SPAN) == 0
    assert num_revisits(ids(10, 11, DOT, 13, 50, U, 10, 11, DOT, 13, 14), RESET) == 0
    # All that was taken back is written again, to where the undo struck.
    assert num_revisits(ids(10, 11, DOT, 13, 50, U, 13, 50, U, 13, 14), SPAN) == 1
    assert num_revisits(ids(10, 50, U, 10, 50, U, 10, 11), RESET) == 1
    # Two undos struck, at [13, 50, DOT, 51] and at [13, 50, DOT]; the latter comes again.
    assert num_revisits(ids(13, 50, DOT, 51, U, U, 13, 50, DOT, 52), SPAN) == 1


def test_overhead_is_emitted_over_kept() -> None:
    assert overhead([ids(10, 50, U, 11), ids(10, 11)], [ids(10, 11), ids(10, 11)]) == 6 / 4
    assert overhead([ids(10, U)], [ids()]) is None
    # Under `token`, 1 / (1 - 2u): one undo in five tokens.
    assert overhead([ids(10, 50, U, 11, 12)], [ids(10, 11, 12)]) == pytest.approx(1 / (1 - 2 / 5))


def test_auroc_counts_ties_half() -> None:
    # Of the 6 pairs the positive wins (.9>.1, .9>.5, .9>.2, .5>.1, .5>.2) and ties once.
    assert auroc([0.9, 0.5], [0.1, 0.5, 0.2]) == pytest.approx(5.5 / 6)
    assert auroc([0.0], [1.0]) == 0.0
    assert auroc([], [1.0]) is None


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("1+1=2", None, True),
        ("1+1=2 ", None, False),
        ("so 15+1=16", "16", True),
        ("so 15+1=16\n", "16", True),
        ("16", "16", True),
        ("so 15+1=116", "16", False),
        ("so it is -16", "16", False),
        ("so it is 1.16", "16", False),
        ("so it is 16.", "16", False),
        ("the answer is cat", "cat", True),
        ("the answer is bobcat", "cat", False),
        ("keep ['-27']", "['-27']", True),
        ("x = -27", "-27", True),
        ("x = 3-27", "-27", False),
        ("", "16", False),
    ],
)
def test_answered(text: str, answer: str | None, right: bool) -> None:
    assert answered(text, stopped=True, reference="1+1=2", answer=answer) is right
    assert not answered(text, stopped=False, reference="1+1=2", answer=answer)
