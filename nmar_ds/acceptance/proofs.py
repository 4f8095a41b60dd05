"""The exactness proofs of the test suite, on the devices and ranks at hand (SPEC 3, 4 and 6).

Every rank takes part in every call. The reference is computed by rank 0 alone, on its CPU and in
float64: neither a faulty device nor a faulty collective can be wrong in the same way.
"""

# W ranks, D denominator

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nmar_ds.acceptance import packed, step
from nmar_ds.acceptance.reference import Named, combine, gap, reference_gradients
from nmar_ds.acceptance.tiny import VOCAB
from nmar_ds.acceptance.verdict import Line, within
from nmar_ds.errors import IsolationError
from nmar_ds.model.canary import run_canary
from nmar_ds.model.weighting import role_weights
from nmar_ds.traces.schema import Role
from nmar_ds.training.engine import ProcessPeers

MSFT, SFT = (role_weights(preset).tolist() for preset in ("msft", "sft"))
# Of the largest gradient. The wide initial weights make bfloat16 (8 bits) err by about 2e-2.
STEP_BOUNDS = {"float32": 1e-5, "bfloat16": 1e-1}
LEAK = "packed traces see each other, or a kernel rounds wrongly: do not train on this device"
FACTOR = "a factor or a term of the loss is lost between ranks or micro-batches: do not train"


def check_isolation(peers: ProcessPeers) -> list[Line]:
    """The canary that starts every run, through ZeRO-3, in both dtypes."""
    lines = []
    for dtype in ("float32", "bfloat16"):
        tiny = step.tiny_run(dtype=dtype, micro_rows=2, **size_of(peers.world_size))
        tiny.engine.train()

        def call(mode: str, *inputs: Any, engine: Any = tiny.engine, **tensors: Any) -> Any:
            return engine(*inputs, mode=mode, **tensors)

        problem, num = "", 0
        try:
            report = run_canary(
                call,
                tiny.loader.batches_of_step(0)[0],
                weights=role_weights("msft"),
                vocab_size=VOCAB,
                dtype=getattr(torch, dtype),
                device=tiny.engine.device,
            )
            num = len(report.checks)
        except IsolationError as error:
            problem = f"{error}"
        problems = [f"rank {r}: {p}" for r, p in enumerate(peers.gather(problem)) if p]
        lines.append(
            Line(
                check=f"canary in {dtype}",
                passed=not problems,
                seen=problems[0]
                if problems
                else f"{num} checks on each of {peers.world_size} ranks",
                expected="no bit changes with a trace's neighbours, packed = alone, loss = naive",
                advice=LEAK,
            )
        )
    return lines


def check_exactness(peers: ProcessPeers, device: torch.device) -> list[Line]:
    """Proofs 1, 2 and 3."""
    lines = _packed_equals_alone(peers, device)
    lines += _whatever_ranks_and_accumulation(peers)
    return lines + check_safety_gap(peers)


def size_of(world_size: int) -> dict[str, Any]:
    """Two micro-batches a rank, and traces enough to fill a step."""
    rows = max(4, 2 * world_size)
    return {"global_rows": rows, "num_traces": max(9, 3 * rows)}


def _packed_equals_alone(peers: ProcessPeers, device: torch.device) -> list[Line]:
    """Proof 1, by every rank on its own device."""
    lines = []
    for dtype, bound in packed.BOUNDS.items():
        everyone = peers.gather(packed.packed_gaps(device, dtype))
        for name in everyone[0]:
            worst = float(np.max([gaps[name] for gaps in everyone]))  # NaN stays NaN
            kind = str(dtype).removeprefix("torch.")
            lines.append(within(f"packed = unpacked {name}, {kind}", worst, bound, advice=LEAK))
    return lines


@dataclass(frozen=True)
class _Step:
    """A step's outcome beside its reference; the latter on rank 0 only."""

    result: dict[str, Any]
    alike: bool

    @property
    def gradients(self) -> Named:
        gradients: Named = self.result["gradients"]
        return gradients


def _take_step(peers: ProcessPeers, weights: list[float], **more: Any) -> _Step:
    result = step.train_step(tied=True, weights=weights, **size_of(peers.world_size), **more)
    digest = hashlib.sha256()
    for part in ("gradients", "after"):
        for name in sorted(result[part]):
            digest.update(result[part][name].tobytes())
    return _Step(result, len(set(peers.gather(digest.hexdigest()))) == 1)


Reference = tuple[dict[int, Named], np.ndarray[Any, Any], np.ndarray[Any, Any]]


def _reference(peers: ProcessPeers, one: _Step) -> Reference | None:
    """G_k, S_k and N_k by independent autograd, on rank 0; None elsewhere."""
    if peers.rank != 0:
        return None
    return reference_gradients(
        one.result["before"], tied=True, traces=one.result["traces"], dtype=torch.float64,
        num_traces=size_of(peers.world_size)["num_traces"],
    )  # fmt: skip


def _whatever_ranks_and_accumulation(peers: ProcessPeers) -> list[Line]:
    """Proof 2: W ranks, with accumulation and without = one process, one trace at a time."""
    micro = size_of(peers.world_size)["global_rows"] // peers.world_size
    cases = [("float32", 1), ("float32", micro), ("bfloat16", 1)]
    lines = []
    for dtype, micro_rows in cases:
        one = _take_step(peers, MSFT, dtype=dtype, micro_rows=micro_rows)
        name = f"{peers.world_size} ranks x {one.result['micro_batches']} micro-batches, {dtype}"
        reference = _reference(peers, one)
        figures = None if reference is None else _step_gaps(one, reference)
        for what, figure in peers.broadcast(figures).items():
            bound = STEP_BOUNDS[dtype]
            lines.append(within(f"{name}: {what}", figure, bound, advice=FACTOR))
        lines.append(
            Line(
                check=f"{name}: gradients and weights alike on all ranks",
                passed=one.alike,
                seen="the same bits" if one.alike else "other bits",
                expected="the same bits",
                advice="a collective delivers other values to some ranks",
            )
        )
    return lines


def _step_gaps(one: _Step, reference: Reference) -> dict[str, float]:
    parts, sums, counts = reference
    divisor = float(counts[1:].sum())
    expected = combine(parts, MSFT, divisor)
    loss = float(np.dot(MSFT, sums)) / divisor
    stepped = {n: one.result["before"][n] - 0.05 * g for n, g in expected.items()}
    return {
        "gradients = independent autograd": gap(one.gradients, expected),
        "loss": abs(one.result["loss"] - loss) / abs(loss),
        "weights after a step": gap(one.result["after"], stepped),
    }


def check_safety_gap(peers: ProcessPeers) -> list[Line]:
    """Proof 3: g_SFT - g_mSFT = G_e / D, and how it fails under `trained` (SPEC 4 b)."""
    figures = safety_gap_figures(peers)
    told_apart = figures.pop("apart")
    lines = [within(name, seen, 1e-5, advice=FACTOR) for name, seen in figures.items()]
    lines.append(
        Line(
            check="the identity fails under `trained`",
            passed=told_apart > 0.01,
            seen=f"by {told_apart:.2e}",
            expected="by more than 1e-02: else the proof proves nothing",
            advice=FACTOR,
        )
    )
    return lines


def safety_gap_figures(peers: ProcessPeers) -> dict[str, float]:
    """Relative gaps of SPEC 4 b; `apart` is how far `trained` is from the identity. Collective."""
    take = functools.partial(_take_step, peers, dtype="float32")
    figures: dict[str, float] | None = {}
    for kind in ("common", "trained"):
        sft, msft = (take(weights, denominator=kind) for weights in (SFT, MSFT))
        reference = _reference(peers, sft)
        if reference is not None and figures is not None:
            figures |= _identity_gaps(kind, sft, msft, reference)
    figures = peers.broadcast(figures)
    assert figures is not None
    return figures


def same_term_figures(peers: ProcessPeers) -> dict[str, float]:
    """Relative gaps of SPEC 4 a: what b and c give to the gradient of SFT and of mSFT. Collective.

    The step is taken with and without the weights of b and c; the difference is theirs.
    """
    take = functools.partial(_take_step, peers, dtype="float32")
    figures: dict[str, float] | None = {}
    for name, weights in (("SFT", SFT), ("mSFT", MSFT)):
        without = [0.0 if role in (Role.UNDO, Role.CORRECTION) else weights[role] for role in Role]
        whole, rest = take(weights), take(without)
        reference = _reference(peers, whole)
        if reference is not None and figures is not None:
            parts, _, counts = reference
            seen = {n: whole.gradients[n] - rest.gradients[n] for n in whole.gradients}
            expected = combine(parts, [0.0, 0.0, 0.0, 1.0, 1.0], float(counts[1:].sum()))
            figures[f"gradient of undo and correction in {name} = (G_b + G_c) / D"] = gap(
                seen, expected
            )
    figures = peers.broadcast(figures)
    assert figures is not None
    return figures


def _identity_gaps(kind: str, sft: _Step, msft: _Step, reference: Reference) -> dict[str, float]:
    parts, _, counts = reference
    num, num_e = float(counts[1:].sum()), float(counts[Role.DEVIATION])
    seen = {n: sft.gradients[n] - msft.gradients[n] for n in sft.gradients}
    plain = {n: g / num for n, g in parts[Role.DEVIATION].items()}
    if kind == "common":
        return {"g_SFT - g_mSFT = G_e / D": gap(seen, plain)}
    others = combine(parts, MSFT, 1.0)
    share = num_e / (num * (num - num_e))
    predicted = {n: plain[n] - share * others[n] for n in plain}
    return {
        "g_SFT - g_mSFT under `trained`, as predicted": gap(seen, predicted),
        "apart": gap(seen, plain),
    }
