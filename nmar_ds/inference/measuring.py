"""From decodes to the measures of SPEC 7, as counts that an interval can be given to.

Shares of problems are `metrics.Rate` (Wilson); what is no share of problems is resampled by
problem (`intervals.Mean`, `intervals.Auroc`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nmar_ds.inference import metrics
from nmar_ds.inference.bars import AnyMeasure
from nmar_ds.inference.decoding import Decoded
from nmar_ds.inference.intervals import Mean
from nmar_ds.inference.metrics import Pops, Rate
from nmar_ds.inference.probes import Probe, Problem
from nmar_ds.traces.reduction import Machine, survivors

Measures = dict[str, AnyMeasure]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts:
    """Right or not, per problem, by how the response is read.

    Attributes:
        raw: undos ignored. reduced: undos carried out. banned: decoded with the undo impossible.
        exact: reduced, and equal to the reference to the character.
    """

    raw: Sequence[bool]
    reduced: Sequence[bool]
    banned: Sequence[bool]
    exact: Sequence[bool]


def measure_free(
    problems: Sequence[Problem], free: Sequence[Decoded], verdicts: Verdicts, machine: Machine
) -> Measures:
    """Free decodes: answers, undos judged against the unique reference, loops and cost."""
    pairs = list(zip(problems, free, strict=True))
    gained, lost = metrics.transitions(verdicts.banned, verdicts.reduced)
    pops = [metrics.judge_pops(d.raw_ids, p.reference_ids, machine) for p, d in pairs]
    onsets = [metrics.first_wrong(d.raw_ids, p.reference_ids, machine) for p, d in pairs]
    latencies = [
        None if onset is None else metrics.detection_latency(d.raw_ids, onset, machine.undo_id)
        for onset, d in zip(onsets, free, strict=True)
    ]
    return {
        "n": len(free),
        "raw": Rate.over(verdicts.raw),
        "reduced": Rate.over(verdicts.reduced),
        "banned": Rate.over(verdicts.banned),
        "exact": Rate.over(verdicts.exact),
        "wrong_to_right": gained,
        "right_to_wrong": lost,
        "with_undo": Rate.over(d.num_undos > 0 for d in free),
        "mean_undos": Mean.of(d.num_undos for d in free),
        "false_undo": Rate.over(pop.popped_right > 0 for pop in pops),
        "undo_precision": precision(pops),
        "undo_recall": recall(pops),
        "erred": Rate.over(onset is not None for onset in onsets),
        "free_noticed": Rate.over(
            latency is not None
            for onset, latency in zip(onsets, latencies, strict=True)
            if onset is not None
        ),
        "free_latency": Mean.of(latencies),
        "repaired": Rate.over(
            right for right, pop in zip(verdicts.reduced, pops, strict=True) if pop.popped_wrong
        ),
        "stray_undo": Rate.over(d.num_strays > 0 for d in free),
        "undo_limited": Rate.over(d.undo_limited for d in free),
        "loop": Rate.over(
            d.undo_limited or metrics.num_revisits(d.raw_ids, machine) > 0 for d in free
        ),
        "unfinished": Rate.over(d.stop_reason == "length" for d in free),
        "overhead": Mean.ratio(
            (len(d.raw_ids) for d in free), (len(d.reduced_ids) for d in free)
        ),
    }  # fmt: skip


def measure_forced(
    probes: Sequence[Probe], forced: Sequence[Decoded], right: Sequence[bool], machine: Machine
) -> Measures:
    """What was made of the forced deviations.

    Args:
        probes: P of them.
        forced: what was decoded after each.
        right: whether the reduced response is the right one.
        machine: what one undo pops.
    """
    pairs = list(zip(probes, forced, strict=True))
    recoveries = [
        metrics.judge_recovery(decoded.emitted_ids, probe.deviation_ids, machine)
        for probe, decoded in pairs
    ]
    pops = [metrics.judge_pops(d.raw_ids, p.problem.reference_ids, machine) for p, d in pairs]
    # Judged from the first wrong token: a deviation must be gone as well as the answer right,
    # or an answer that survives a wrong step would count as a correction.
    gone = [not survivors(d.raw_ids, machine)[probe.onset] for probe, d in pairs]
    latencies = [metrics.detection_latency(d.raw_ids, p.onset, machine.undo_id) for p, d in pairs]
    # Forced wrong ids are counted in the latency, so the quickest is their number.
    delays = [
        None if latency is None else latency - (len(probe.forced_ids) - probe.onset)
        for probe, latency in zip(probes, latencies, strict=True)
    ]
    corrected = [left and good for left, good in zip(gone, right, strict=True)]
    return {
        "num_probes": len(probes),
        "undone": Rate.over(recovery.undone for recovery in recoveries),
        "exact_k": Rate.over(recovery.exact for recovery in recoveries),
        "over_undo": Rate.over(recovery.over for recovery in recoveries),
        "corrected": Rate.over(corrected),
        "correction_success": Rate(sum(corrected), sum(gone)),
        "parrot": Rate.over(r.parroted for r in recoveries if r.parroted is not None),
        "forced_undo_precision": precision(pops),
        "forced_undo_recall": recall(pops),
        "noticed": Rate.over(latency is not None for latency in latencies),
        "mean_latency": Mean.of(latencies),
        "mean_delay": Mean.of(delays),
    }


def precision(pops: Sequence[Pops]) -> Rate:
    """Wrong tokens among those popped, of the responses that popped any."""
    return Rate.spread(
        (pop.popped_wrong for pop in pops), (pop.popped_wrong + pop.popped_right for pop in pops)
    )


def recall(pops: Sequence[Pops]) -> Rate:
    """Tokens popped among the wrong ones, of the responses that wrote any."""
    return Rate.spread((pop.popped_wrong for pop in pops), (pop.num_wrong for pop in pops))
