"""What a person sees of a run: TensorBoard, a progress bar in a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


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
        if is_writer:
            purge = first_step + 1 if first_step else None
            self._writer = SummaryWriter(str(folder), purge_step=purge)
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
            self._writer.close()

    def advance(self) -> None:
        """One optimizer step is done."""
        if self._bar is not None:
            self._bar.update(1)

    def say(self, text: str) -> None:
        """One line for people, on rank 0."""
        if self._writer is not None:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write scalars by tag at an optimizer step."""
        if self._writer is not None:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)
            self._writer.flush()

    def progress(self, step: int, values: dict[str, float]) -> None:
        """One line of progress, with the time left at the pace so far."""
        if self._writer is None:
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
