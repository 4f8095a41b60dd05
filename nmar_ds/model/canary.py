"""The start-up check that packed traces do not see each other and that the loss is the loss.

It drives the very call that trains (engine, kernel, dtype, devices), on a real micro-batch, and
compares it with what cannot be wrong in the same way: itself with other neighbours, the trace
alone, and a naive cross-entropy on the wrapped model's own logits (SPEC section 6).
The number of calls is `NUM_CALLS` whatever the batch holds, because under ZeRO-3 every call is a
collective; failures are collected and raised only after the last call.
"""

# M chosen positions, N flattened tokens, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nmar_ds.data.loader import Batch
from nmar_ds.errors import IsolationError
from nmar_ds.model.objective import role_sums, token_weights
from nmar_ds.model.probe import Probe, other_ids, sampled_positions
from nmar_ds.model.weighting import PLAIN, FloatArray, LossOptions
from nmar_ds.traces.schema import NO_ROLE, Role

NUM_CALLS = 10

# Largest accepted max|a - b| / max|b|. float64 is held up by the float32 inside stock models.
_ALONE_BOUND = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_LOSS_BOUND = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@dataclass(frozen=True, kw_only=True)
class CanaryReport:
    """What was checked, and what could not be.

    Attributes:
        checks: one line per check that passed, with the number seen and its bound.
        notes: what was done differently or could not be checked, and why.
    """

    checks: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join([*self.checks, *(f"note: {note}" for note in self.notes)])


def run_canary(
    call: Callable[..., Any],
    batch: Batch,
    *,
    weights: FloatArray,
    options: LossOptions = PLAIN,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    backend: str = "segments",
    seed: int = 0,
) -> CanaryReport:
    """Check isolation and loss on one micro-batch, with `NUM_CALLS` forward calls.

    Args:
        call: `call(mode, input_ids_BT, position_ids_BT, layout, **tensors)`, which runs
            `UndoTrainingModel.forward(..., mode=mode, **tensors)` through whatever wraps it.
        batch: a real micro-batch of this rank; best the longest traces the run has.
        weights: float64[NUM_ROLES] of the run.
        options: clip and unlikelihood of the run; the model was told on its own.
        vocab_size: ids that may stand in for others are below it.
        dtype: of the model; chooses the bounds.
        device: where the model runs.
        backend: named in messages.
        seed: of the replacement ids.

    Returns:
        What was checked.

    Raises:
        IsolationError: a check failed; names it, the backend, the trace, the number and its bound.
    """
    rng = np.random.default_rng(seed)
    canary = _Canary(call, weights, options, vocab_size, dtype, device, rng)
    canary.check_batch(batch)
    probe = Probe.of_batch(batch)
    num_traces, length = len(probe.traces()), probe.shape[1]
    if num_traces < 2 and length < 2:
        canary.notes.append("rows of one token: isolation could not be checked")
    elif num_traces < 2:
        probe = Probe.twins(probe, vocab_size, canary.rng)
        num = int(probe.borders[1])
        canary.notes.append(f"{num_traces} traces in the batch: checked on {num} tokens, twice")
    with torch.no_grad():
        canary.check_isolation(probe)
        canary.check_loss(probe)
    if canary.failures:
        more = len(canary.failures) - 1
        place = f"attention {backend} on {torch.device(device).type} in {dtype}"
        rest = f" (and {more} more failed checks)" if more else ""
        raise IsolationError(f"canary: {place}: {canary.failures[0]}{rest}")
    return CanaryReport(checks=tuple(canary.checks), notes=tuple(canary.notes))


@dataclass
class _Canary:
    """The checks, and their outcomes so far. No check raises: other ranks are still calling."""

    call: Callable[..., Any]
    weights: FloatArray
    options: LossOptions
    vocab_size: int
    dtype: torch.dtype
    device: torch.device | str
    rng: np.random.Generator
    checks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def judge(self, check: str, seen: float, bound: float) -> None:
        """Book a number against its bound; NaN fails."""
        passed = seen <= bound
        line = f"{check}: {seen:.3g}, expected <= {bound:.3g}"
        (self.checks if passed else self.failures).append(line)

    def check_batch(self, batch: Batch) -> None:
        """Compare the loader's targets and positions with those found from ids and borders."""
        probe = Probe.of_batch(batch)
        targets, roles = probe.targets()
        wrong = (targets != batch.targets) | (roles != batch.target_roles)
        self.judge("targets that are not the next token of their trace", int(wrong.sum()), 0)
        wrong = probe.positions() != batch.position_ids.ravel()
        self.judge("position ids that do not restart with their trace", int(wrong.sum()), 0)

    def check_isolation(self, probe: Probe) -> None:
        """Other neighbours, and none, for the first, a middle and the last trace: 7 calls."""
        spans = probe.traces() or [(0, len(probe.ids))]
        picked = [0, len(spans) // 2, len(spans) - 1]
        chosen = [sampled_positions(*spans[index]) for index in picked]
        sizes = [len(places) for places in chosen]
        # the same positions in all packed calls: another shape may round differently in the head
        positions_M = torch.from_numpy(np.concatenate(chosen)).to(self.device)
        packed = self.call("logits", *probe.inputs(self.device), positions_M=positions_M)
        for turn, (index, places) in enumerate(zip(picked, chosen, strict=True)):
            start, end = spans[index]
            row, column = divmod(start, probe.shape[1])
            name = f"trace {index + 1} of {len(spans)} (row {row}, token {column} on)"
            ids = other_ids(probe.ids, self.vocab_size, self.rng)
            ids[start:end] = probe.ids[start:end]
            inputs = probe.inputs(self.device, ids)
            replaced = self.call("logits", *inputs, positions_M=positions_M)
            before, after = (part.split(sizes)[turn] for part in (packed, replaced))
            self.judge(f"{name}: change of its logits with its neighbours", _gap(after, before), 0)
            single = self.call(
                "logits",
                *probe.alone(start, end).inputs(self.device),
                positions_M=torch.from_numpy(places - start).to(self.device),
            )
            gap = _gap(before, single) / max(float(single.abs().max()), 1e-30)
            bound = _ALONE_BOUND[self.dtype]
            self.judge(f"{name}: packed against alone, relative logits", gap, bound)

    def check_loss(self, probe: Probe) -> None:
        """Our loss against a naive one on the model's own logits, twice: 3 calls.

        Once with the row's targets, and once with each place's likeliest id as target: in a fresh
        model all true targets cost about ln(V), and a shifted loss would hide within bf16's bound.
        """
        rows = [probe.row(index) for index in range(probe.shape[0])]
        best = int(np.argmax([self._is_trained(row).sum() for row in rows]))
        row, weights_N = rows[best], self._token_weights(rows[best])
        targets, roles = row.targets()
        if not self._is_trained(row).any():
            self.notes.append("no row has a trained target: loss checked with all weights 1")
            weights_N = (targets >= 0).astype(np.float64)
        places = np.flatnonzero(targets >= 0)
        if not len(places):
            self.notes.append("no trace has a second token: the loss could not be checked")
            places = np.zeros(1, dtype=np.int64)
        positions_M = torch.from_numpy(places).to(self.device)
        inputs = row.inputs(self.device)
        logits_MV = self.call("stock_logits", *inputs, positions_M=positions_M)
        log_p_MV = logits_MV.double().log_softmax(dim=1)
        true_M = torch.from_numpy(targets).to(self.device)[positions_M]
        best_M = torch.where(true_M >= 0, log_p_MV.argmax(dim=1), -1)
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        tensors = {
            "weights_N": torch.from_numpy(weights_N).to(self.device, exact),
            "roles_N": torch.from_numpy(roles).to(self.device),
        }
        for kind, target_M in (("its", true_M), ("the likeliest", best_M)):
            target_N = torch.full((len(targets),), -1, dtype=torch.int64, device=self.device)
            target_N[positions_M] = target_M
            ours = self.call("loss", *inputs, targets_N=target_N, also_untrained=True, **tensors)
            target_M1 = target_M.clamp(min=0)[:, None]
            nll_M = -log_p_MV.gather(1, target_M1)[:, 0]
            others_MV = log_p_MV.scatter(1, target_M1, -torch.inf)
            unlikelihood_M = -others_MV.logsumexp(dim=1)  # -log(1 - p) in double
            weights_M, roles_M = (part[positions_M] for part in tensors.values())
            naive = (nll_M, unlikelihood_M)
            name = f"row {best}, {kind} targets"
            self._compare(name, ours, naive, weights_M.double(), roles_M)

    def _token_weights(self, row: Probe) -> FloatArray:
        roles_N = torch.from_numpy(row.targets()[1])
        result: FloatArray = token_weights(roles_N, self.weights, torch.float64).numpy()
        return result

    def _is_trained(self, row: Probe) -> npt.NDArray[np.bool_]:
        pushed = (row.targets()[1] == Role.DEVIATION) & (self.options.unlikelihood != 0)
        trained: npt.NDArray[np.bool_] = pushed | (self._token_weights(row) != 0)
        return trained

    def _compare(
        self,
        name: str,
        ours: tuple[Tensor, Tensor, Tensor, Tensor],
        naive_M: tuple[Tensor, Tensor],
        weights_M: Tensor,
        roles_M: Tensor,
    ) -> None:
        """Book loss, sums and counts of `UndoTrainingModel` against the naive per-token ones."""
        loss_sum, sums, counts, unlikelihood_sum = ours
        nll_M, unlikelihood_M = naive_M
        bound = _LOSS_BOUND[self.dtype]
        counted_M = nll_M
        if self.options.nll_clip is not None:
            counted_M = torch.where(weights_M < 0, nll_M.clamp(max=self.options.nll_clip), nll_M)
        pushed_M = torch.where(roles_M == Role.DEVIATION, unlikelihood_M, 0.0)
        push = self.options.unlikelihood
        naive = float((weights_M * counted_M + push * pushed_M).sum())
        # at least one nat per token: the loss of a well-trained model may be all rounding
        size = float((weights_M.abs() * counted_M + push * pushed_M).sum())
        scale = max(size, float(weights_M.abs().sum()), 1.0)
        gap = abs(float(loss_sum) - naive) / scale
        self.judge(f"{name}: loss against naive cross-entropy, relative", gap, bound)
        unseen_M = (roles_M == Role.PROMPT) & (weights_M == 0)
        naive_sums, num = role_sums(nll_M, roles_M.masked_fill(unseen_M, NO_ROLE))
        self.judge(f"{name}: miscounted targets", int((counts - num).abs().sum()), 0)
        scales = torch.maximum(naive_sums, num.double()).clamp(min=1)
        gap = float(((sums.double() - naive_sums).abs() / scales).max())
        self.judge(f"{name}: loss sums per role, relative", gap, bound)
        if push:
            pushed = float(pushed_M.sum())
            gap = abs(float(unlikelihood_sum) - pushed) / max(pushed, 1.0)
            self.judge(f"{name}: unlikelihood of the deviations, relative", gap, bound)


def _gap(a: Tensor, b: Tensor) -> float:
    """Largest difference; NaN where anything is not finite, 0 only where all bits agree."""
    gap = float((a.double() - b.double()).abs().max())
    return gap if gap or torch.equal(a, b) else float("nan")
