"""The training loop: batch, forward, backward, step, log, save, stop."""

# W ranks, D denominator of the step (SPEC section 3)

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nmar_ds.config import OptimizerSection, TrainingSection
from nmar_ds.data.loader import Batch, RowLoader
from nmar_ds.errors import DivergenceError
from nmar_ds.model.attention import SegmentLayout
from nmar_ds.model.objective import token_weights
from nmar_ds.model.training_model import MicroBatchLoss
from nmar_ds.model.weighting import PLAIN, LossOptions, denominator, trained_roles
from nmar_ds.traces.schema import NUM_ROLES, Role
from nmar_ds.training.engine import Engine, all_reduce
from nmar_ds.training.monitor import Monitor
from nmar_ds.training.saving import Saver
from nmar_ds.training.stragglers import PATIENCE, Stragglers, probe_seconds


def learning_rate(step: int, total_steps: int, section: OptimizerSection) -> float:
    """Linear warm-up, then cosine decay to `final_learning_rate_ratio` of the peak.

    Args:
        step: 0-based optimizer step about to be taken. The first step of a warm-up already moves.
        total_steps: of the run.
        section: peak, warm-up and floor.
    """
    warmup = section.warmup_steps
    if step < warmup:
        return section.learning_rate * (step + 1) / warmup
    span = max(1, total_steps - warmup)
    share = 0.5 * (1 + math.cos(math.pi * (step - warmup) / span))
    floor = section.final_learning_rate_ratio
    return section.learning_rate * (floor + (1 - floor) * share)


def forward_arguments(
    batch: Batch, weights: Any, device: torch.device, *, options: LossOptions | None = None
) -> dict[str, Any]:
    """A loader's batch as arguments of `UndoTrainingModel.forward`.

    Args:
        batch: of this rank.
        weights: float64[NUM_ROLES].
        device: where the model runs.
        options: of the loss. Where given, the trained targets are found here, from the host's
            arrays: to find them on a device the host would have to wait for it.
    """
    roles_N = torch.from_numpy(batch.target_roles).to(device)
    found: dict[str, Any] = {}
    if options is not None:
        is_trained = np.zeros(256, dtype=bool)  # by role, NO_ROLE among them
        is_trained[:NUM_ROLES] = trained_roles(weights, options)
        rows_M = np.flatnonzero(is_trained[batch.target_roles])
        found["rows_M"] = torch.from_numpy(rows_M).to(device)
    return found | {
        "input_ids_BT": torch.from_numpy(batch.input_ids).to(device),
        "position_ids_BT": torch.from_numpy(batch.position_ids).to(device),
        "layout": SegmentLayout.from_cu_seqlens(
            batch.cu_seqlens, device, padding=batch.trace_ids < 0
        ),
        "targets_N": torch.from_numpy(batch.targets).to(device),
        "weights_N": token_weights(roles_N, weights, torch.float32),
        "roles_N": roles_N,
    }


@dataclass(kw_only=True)
class StepSums:
    """Sums over the micro-batches of one step on this rank.

    Attributes:
        loss: this rank's share of the optimised loss.
        roles: float64[2, NUM_ROLES] loss sums and target counts by role.
        tokens: that are not padding.
        trained: targets that are trained.
        unlikelihood: sum of -log(1 - p) over deviation targets, where the objective has it.
    """

    loss: float = 0.0
    roles: torch.Tensor = field(
        default_factory=lambda: torch.zeros(2, NUM_ROLES, dtype=torch.float64)
    )
    tokens: int = 0
    trained: int = 0
    unlikelihood: float = 0.0
    _on_device: torch.Tensor | None = None

    def add(self, batch: Batch, result: MicroBatchLoss, is_trained: Any, divisor: float) -> None:
        """Count one micro-batch in; `is_trained` is bool[NUM_ROLES], `divisor` is D.

        What the device knows stays there until `settle`: the host need not wait for it.
        """
        sums = torch.cat(
            [
                result.role_sums.double(),
                result.role_counts.double(),
                (result.loss_sum.detach().double() / divisor).reshape(1),
                result.unlikelihood_sum.double().reshape(1),
            ]
        )
        self._on_device = sums if self._on_device is None else self._on_device + sums
        self.tokens += batch.num_tokens
        self.trained += int(is_trained[batch.target_roles[batch.targets >= 0]].sum())

    def settle(self) -> StepSums:
        """Fetch the sums, once per step."""
        if self._on_device is not None:
            sums = self._on_device.cpu()
            self.roles += sums[: 2 * NUM_ROLES].view(2, NUM_ROLES)
            loss, pushed = sums[2 * NUM_ROLES :].tolist()
            self.loss, self.unlikelihood = self.loss + loss, self.unlikelihood + pushed
            self._on_device = None
        return self


class TrainingLoop:
    """One run from its first to its last step.

    Args:
        engine: the model under ZeRO-3.
        loader: this rank's rows.
        weights: float64[NUM_ROLES] loss weights.
        denominator_kind: `objective.denominator`.
        options: clip and unlikelihood, as the model was given them.
        optimizer: schedule.
        training: logging, evaluation and divergence settings.
        total_steps: of the run.
        monitor: where figures go.
        saver: publishes checkpoints.
        save_every: steps between checkpoints, or None for the end only.
        measure_heldout: held-out scalars by tag. Collective.
        decode_heldout: decodes of held-out prompts as Markdown, "" for none. Collective.
        stop_requested: whether this rank was told to stop; asked once per step.
        enter_phase: told what begins, for the watchdog.
        hosts: of the ranks, for the line about a slow one; may be empty.
    """

    def __init__(
        self,
        engine: Engine,
        loader: RowLoader,
        *,
        weights: np.ndarray[Any, Any],
        denominator_kind: str,
        options: LossOptions = PLAIN,
        optimizer: OptimizerSection,
        training: TrainingSection,
        total_steps: int,
        monitor: Monitor,
        saver: Saver,
        save_every: int | None,
        measure_heldout: Callable[[], dict[str, float]],
        decode_heldout: Callable[[], str] = str,
        stop_requested: Callable[[], bool],
        enter_phase: Callable[[str], None] = lambda phase: None,
        hosts: Sequence[str] = (),
    ) -> None:
        self.engine = engine
        self.loader = loader
        self.weights = weights
        self.denominator_kind = denominator_kind
        self.options = options
        self.optimizer = optimizer
        self.training = training
        self.total_steps = total_steps
        self.monitor = monitor
        self.saver = saver
        self.save_every = save_every
        self.measure_heldout = measure_heldout
        self.decode_heldout = decode_heldout
        self.stop_requested = stop_requested
        self.enter_phase = enter_phase
        self.hosts = hosts
        self.stragglers = Stragglers()
        self.is_first_step = True  # of this attempt: it compiles and pages in
        self.nonfinite_total = 0
        self.nonfinite_in_a_row = 0
        # Seconds, tokens, trained tokens and steps on this rank since the last log, without the
        # time that evaluations and checkpoints take.
        self._pace = np.zeros(4)
        self._began = time.monotonic()
        self._heldout_seconds = 0.0  # of this attempt

    def run(self, first_step: int) -> bool:
        """Train from `first_step` (steps already done) to the end or to a stop signal.

        Returns:
            True when the run is complete, False when it was stopped and saved.

        Raises:
            DivergenceError: too many non-finite steps in a row.
            SaveError: a checkpoint that could not be written.
        """
        self._began = time.monotonic()
        if first_step == 0:
            self._evaluate(0)
        self.engine.train()
        for step in range(first_step, self.total_steps):
            started = time.monotonic()
            done = step + 1
            logged = done % self.training.log_every == 0 or done == self.total_steps
            sums = self.forward_backward(step, also_untrained=logged)
            stop = self._agree(done, sums, self.engine.step_was_applied())
            self.is_first_step = False
            self._pace += (time.monotonic() - started, sums.tokens, sums.trained, 1)
            if logged:
                self._log(done, sums)
            self.monitor.advance()
            at_end = done == self.total_steps
            every = self.training.eval_every
            if at_end or (every is not None and done % every == 0):
                self._evaluate(done)
            self._save_or_settle(done, last=at_end or stop)
            if stop and not at_end:
                self.monitor.say(f"stopped after step {done}; saved")
                return False
        return True

    def forward_backward(self, step: int, *, also_untrained: bool) -> StepSums:
        """All micro-batches of a step, and the optimizer step at the last of them.

        D is that of the whole global batch and is known beforehand. DeepSpeed averages gradients
        over W ranks, so a micro-batch returns S * W / D and no other factor (SPEC section 3).
        """
        counts, num_traces = self.loader.counts_of_step(step)
        kind, options = self.denominator_kind, self.options
        divisor = denominator(kind, counts, self.weights, num_traces, options)
        is_trained = trained_roles(self.weights, options)
        self.engine.set_learning_rate(learning_rate(step, self.total_steps, self.optimizer))
        sums = StepSums()
        for batch in self.loader.batches_of_step(step):
            self._enter("forward")
            result = self.engine(
                **forward_arguments(batch, self.weights, self.engine.device, options=self.options),
                also_untrained=also_untrained,
            )
            self._enter("backward")
            self.engine.backward(result.loss_sum * (self.engine.world_size / divisor))
            self._enter("optimizer")
            self.engine.step()
            sums.add(batch, result, is_trained, divisor)
        return sums.settle()

    def _enter(self, phase: str) -> None:
        self.enter_phase("first step" if self.is_first_step else phase)

    def _evaluate(self, done: int) -> None:
        """Measure and decode on held-out traces, and say what share of the time that takes."""
        self.enter_phase("evaluation")
        started = time.monotonic()
        values = self.measure_heldout()
        decodes = self.decode_heldout()
        now = time.monotonic()
        self._heldout_seconds += now - started
        values["time/heldout_seconds"] = now - started
        if done > 0:  # before the first step it is all there is
            values["time/heldout_share"] = self._heldout_seconds / (now - self._began)
        self.monitor.measured(done, values)
        if decodes:
            self.monitor.text(done, "heldout/decodes", decodes)
        self.engine.train()

    def _save_or_settle(self, done: int, *, last: bool) -> None:
        """Save where it is due; else look whether a save in the background can be announced."""
        due = last or bool(self.save_every and done % self.save_every == 0)
        if not due and not self.saver.pending:
            return
        self.enter_phase("save")
        if due:
            self.saver.save(done)
        else:
            self.saver.settle()
        if last:
            self.saver.finish()
        self._wait_for_all()

    def _wait_for_all(self) -> None:
        """Rank 0 deletes old checkpoints longer than the others may wait for it in a step."""
        all_reduce(torch.zeros(1, device=self.engine.device)).item()

    def _agree(self, done: int, sums: StepSums, applied: bool) -> bool:
        """Share what any rank saw: a stop signal, a non-finite loss. Returns whether to stop."""
        bad_loss = not math.isfinite(sums.loss)
        flags = torch.tensor(
            [int(self.stop_requested()), int(bad_loss), int(not applied)],
            dtype=torch.int32,
            device=self.engine.device,
        )
        stop, bad_loss_anywhere, skipped = (bool(flag) for flag in all_reduce(flags, "max"))
        if not (bad_loss_anywhere or skipped):
            self.nonfinite_in_a_row = 0
            return stop
        self.nonfinite_total += 1
        self.nonfinite_in_a_row += 1
        what = "loss" if bad_loss_anywhere else "gradient"
        rows = [int(row) for row in self.loader.rows_of_step(done - 1) if row >= 0]
        self.monitor.say(
            f"step {done}: non-finite {what}, {'skipped' if skipped else 'NOT skipped'} "
            f"({self.nonfinite_in_a_row} in a row, {self.nonfinite_total} in all); rows {rows}"
        )
        self.monitor.scalars(done, {"safety/nonfinite_steps": self.nonfinite_total})
        if self.nonfinite_in_a_row >= self.training.max_nonfinite_steps:
            error = DivergenceError(
                f"step {done}: {self.nonfinite_in_a_row} non-finite steps in a row "
                f"(training.max_nonfinite_steps); the last checkpoint is untouched"
            )
            error.shared = True
            raise error
        return stop

    def _log(self, done: int, sums: StepSums) -> None:
        """Reduce the step's sums, and the tokens since the last log, over the ranks. Collective."""
        seconds, tokens_here, trained_here, num_steps = self._pace
        self._pace = np.zeros(4)
        probes = torch.zeros(self.loader.world_size, dtype=torch.float64)
        probes[self.loader.rank] = probe_seconds(self.engine.device)
        packed = torch.cat(
            [
                sums.roles.flatten(),
                torch.tensor(
                    [sums.loss, tokens_here, trained_here, sums.unlikelihood], dtype=torch.float64
                ),
                probes,
            ]
        ).to(self.engine.device)
        totals = all_reduce(packed).cpu()
        role_sums, role_counts = totals[:NUM_ROLES], totals[NUM_ROLES : 2 * NUM_ROLES]
        loss, tokens, trained, pushed = (float(value) for value in totals[2 * NUM_ROLES :][:4])
        probe_of_rank = totals[2 * NUM_ROLES + 4 :].tolist()
        values = {"loss/total": loss}
        if self.options.unlikelihood and role_counts[Role.DEVIATION] > 0:
            values["loss/unlikelihood"] = pushed / float(role_counts[Role.DEVIATION])
        for role in Role:
            if role_counts[role] > 0:
                values[f"loss/{role.label}"] = float(role_sums[role] / role_counts[role])
                values[f"sums/{role.label}"] = float(role_sums[role])
                values[f"targets/{role.label}"] = float(role_counts[role])
        capacity = self.loader.global_batch_rows * self.loader.plan.capacity * num_steps
        values |= {
            "optimizer/learning_rate": learning_rate(done - 1, self.total_steps, self.optimizer),
            "optimizer/gradient_norm": self.engine.gradient_norm(),
            "throughput/tokens_per_second": tokens / seconds,
            "throughput/trained_tokens_per_second": trained / seconds,
            "throughput/step_seconds": seconds / num_steps,
            "throughput/probe_seconds_min": min(probe_of_rank),
            "throughput/probe_seconds_max": max(probe_of_rank),
            "packing/use": tokens / capacity,
        }
        self.monitor.scalars(done, values)
        self.monitor.progress(done, values)
        for rank, times in self.stragglers.note(probe_of_rank):
            host = f" on {self.hosts[rank]}" if self.hosts else ""
            self.monitor.say(
                f"slow      rank {rank}{host}: local arithmetic takes {times:.1f} times the "
                f"median over the ranks, {PATIENCE} logged steps in a row; all wait for it"
            )
