"""What a person sees of a run: TensorBoard, a progress bar in a terminal, lines in a log."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from nmar_ds.files import about

# TensorBoard's "Custom scalars": what one wants to know of a run, on one screen. One curve a chart:
# TensorBoard colours by run, so that curves of one chart are told apart only by opening a list.
SCREEN = {
    "Is it learning to undo?": {
        "P(UNDO) right after an error": ["Multiline", ["heldout/p_undo_at_first_place"]],
        "errors that get exactly their undos": ["Multiline", ["heldout/undo_count_accuracy"]],
        "P(UNDO) where all is right": ["Multiline", ["heldout/p_undo_elsewhere"]],
    },
    "Is it learning to err?": {
        "log p(error | prefix) per token": ["Multiline", ["heldout/log_p_deviation_per_token"]],
        "loss on right tokens (prefix)": ["Multiline", ["heldout/loss_prefix"]],
        "loss after an undo (correction)": ["Multiline", ["heldout/loss_correction"]],
    },
}


class Monitor:
    """Writes on rank 0 and is silent elsewhere.

    Args:
        folder: for TensorBoard events.
        is_writer: True on rank 0.
        total_steps: of the whole run.
        first_step: steps already done. Events of later steps, written by a run that died after
            its last checkpoint, are hidden from TensorBoard.
    """

    def __init__(
        self, folder: Path, *, is_writer: bool, total_steps: int, first_step: int = 0
    ) -> None:
        self._writer: SummaryWriter | None = None
        self._bar: Any = None  # a tqdm; its type wants a type of items, and there are none
        self._total_steps = total_steps
        self._started = time.monotonic()
        self._first_step = first_step
        self._is_writer, self._folder = is_writer, folder
        if is_writer:
            purge = first_step + 1 if first_step else None
            self._writer = SummaryWriter(str(folder), purge_step=purge)
            self._writer.add_custom_scalars(SCREEN)
            if sys.stderr.isatty():
                self._bar = tqdm(total=total_steps, initial=first_step, unit="step", smoothing=0.1)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            with contextlib.suppress(OSError):  # the curves' last lines, on a full disk
                self._writer.close()

    def advance(self) -> None:
        """One optimizer step is done."""
        if self._bar is not None:
            self._bar.update(1)

    def say(self, text: str) -> None:
        """One line for people, on rank 0.

        A Ctrl-C ends the `tee` of `deepspeed ... | tee log` too; a run whose next line then failed
        would lose the checkpoint it was about to save. So it goes on without a reader.
        """
        if not self._is_writer:
            return
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except OSError:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write scalars by tag at an optimizer step."""
        if self._writer is None:
            return
        try:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)
            self._writer.flush()
        except OSError as error:
            self._stop_curves(step, error)

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Write a page of TensorBoard's "Text" at an optimizer step."""
        if self._writer is None:
            return
        try:
            self._writer.add_text(tag, markdown, step)
            self._writer.flush()
        except OSError as error:
            self._stop_curves(step, error)

    def _stop_curves(self, step: int, error: OSError) -> None:
        """Curves are no reason to lose a run."""
        self._writer = None
        self.say(f"curves    stop at step {step}: {about(error, self._folder)}")

    def measured(self, step: int, values: dict[str, float]) -> None:
        """Write held-out scalars; the losses, P(`<UNDO>`) and the time that it took as one line."""
        self.scalars(step, values)
        shown = "  ".join(
            f"{tag.removeprefix('heldout/').removeprefix('loss_')} {value:.3f}"
            for tag, value in values.items()
            if tag.startswith(("heldout/loss_", "heldout/p_undo", "heldout/undo_count"))
        )
        took = f"{values['time/heldout_seconds']:.1f} s"
        if "time/heldout_share" in values:
            took += f", {values['time/heldout_share']:.1%} of the time so far"
        self.say(f"held-out after step {step}: {shown}  ({took})")

    def progress(self, step: int, values: dict[str, float]) -> None:
        """One line of progress, with the time left at the pace so far."""
        if not self._is_writer:
            return
        done = max(1, step - self._first_step)
        left = (time.monotonic() - self._started) / done * (self._total_steps - step)
        roles = "  ".join(
            f"{tag.removeprefix('loss/')} {value:.3f}"
            for tag, value in values.items()
            if tag.startswith("loss/")
        )
        self.say(
            f"step {step:>6}/{self._total_steps}  {roles}  "
            f"{values['throughput/tokens_per_second']:,.0f} tok/s  "
            f"{int(left // 60)}:{int(left % 60):02d} left"
        )
