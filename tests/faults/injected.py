"""Faults put into a rank from outside: the code under test holds nothing but the no-op `reached`.

A fault is a mapping:
    rank: who suffers it
    where: planning | building | evaluation | boundary (before a step) | forward | backward
        | optimizer | point | half_file | nonfinite (that rank's gradient, times `value`, nan
        or inf, for `num` steps; `how` is not needed) | probe (that rank's takes a second)
    step: optimizer step (1-based) or, in a save, the steps done; the number of the evaluation
    point: name given to `checkpoints.reached`, for `where: point`
    how: kill | sleep | full, or names of signals the rank sends itself ("SIGTERM", "SIGINT SIGINT")
    seconds: for sleep
    struck: a file to make when it happens (optional)
"""

from __future__ import annotations

import errno
import io
import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANK_0_POINTS = (
    "cleared", "before_manifest", "written_aside:manifest.json", "after_manifest", "after_rename",
    "written_aside:latest", "after_latest", "unmarked", "retained",
)  # fmt: skip
POINTS_OF_ALL = ("before_write", "after_write", "after_hash", "read_back", "committed")


def strike(fault: dict[str, Any]) -> None:
    """Carry the fault out on this very process; a stop only once, so that SIGCONT can end it."""
    how = fault["how"]
    if how == "SIGSTOP" and fault.setdefault("stopped", False):
        return
    fault["stopped"] = True
    if "struck" in fault:
        Path(fault["struck"]).touch()
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "sleep":
        Path(fault["mark"]).touch()
        time.sleep(fault["seconds"])
    elif how == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    else:
        for name in how.split():
            os.kill(os.getpid(), signal.Signals[name])


def install(fault: dict[str, Any] | None, rank: int) -> None:
    """Prepare this process to suffer the fault; before training starts."""
    if fault is None or fault["rank"] != rank:
        return
    if fault["where"] in ("boundary", "forward", "backward", "optimizer", "nonfinite"):
        _in_step(fault)
    elif fault["where"] in ("planning", "building"):
        _before_training(fault)
    elif fault["where"] == "evaluation":
        _in_evaluation(fault)
    elif fault["where"] == "probe":
        from nmar_ds.training import loop

        loop.probe_seconds = lambda device: 1.0
    else:
        _in_save(fault)


def _before_training(fault: dict[str, Any]) -> None:
    if fault["where"] == "planning":  # before torch is imported and the ranks meet
        from nmar_ds.training import planning as module

        name = "plan_run"
    else:
        from nmar_ds.training import run as module  # type: ignore[no-redef]

        name = "build_engine"
    original = getattr(module, name)

    def struck(*args: Any, **kwargs: Any) -> Any:
        strike(fault)
        return original(*args, **kwargs)

    setattr(module, name, struck)


def _in_evaluation(fault: dict[str, Any]) -> None:
    from nmar_ds.training import heldout

    original, numbers = heldout.measure, itertools.count()  # the first is before step 1

    def struck(*args: Any, **kwargs: Any) -> Any:
        if next(numbers) == fault["step"]:
            strike(fault)
        return original(*args, **kwargs)

    heldout.measure = struck


def _in_step(fault: dict[str, Any]) -> None:
    import torch
    from torch.nn.modules.module import register_module_forward_hook
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from nmar_ds.training.engine import Engine
    from nmar_ds.training.loop import TrainingLoop

    now: dict[str, int | None] = {"step": None}
    original = TrainingLoop.forward_backward

    def forward_backward(self: Any, step: int, **kwargs: Any) -> Any:
        if fault["where"] == "boundary" and fault["step"] == step + 1:
            strike(fault)
        now["step"] = step + 1  # nor the canary nor an evaluation is a step
        try:
            return original(self, step, **kwargs)
        finally:
            now["step"] = None

    TrainingLoop.forward_backward = forward_backward  # type: ignore[method-assign]

    def after_module(module: Any, args: Any, output: Any) -> None:
        if now["step"] != fault["step"] or not type(module).__name__.endswith("DecoderLayer"):
            return
        if fault["where"] == "forward":
            strike(fault)
        tensor = output if isinstance(output, torch.Tensor) else output[0]
        tensor.register_hook(lambda gradient: strike(fault))  # half way down

    def after_optimizer(optimizer: Any, args: Any, kwargs: Any) -> None:
        if now["step"] == fault["step"]:
            strike(fault)  # a first group of weights has moved, the others have not

    backward = Engine.backward

    def backward_of_nan(self: Any, loss: Any) -> None:
        bad = fault["step"] <= (now["step"] or 0) < fault["step"] + fault.get("num", 1)
        backward(self, loss * float(fault.get("value", "nan")) if bad else loss)

    if fault["where"] == "optimizer":
        register_optimizer_step_post_hook(after_optimizer)
    elif fault["where"] == "nonfinite":
        Engine.backward = backward_of_nan  # type: ignore[method-assign]
    elif fault["where"] != "boundary":
        register_module_forward_hook(after_module)


def _in_save(fault: dict[str, Any]) -> None:
    import torch

    from nmar_ds.training import checkpoints

    now: dict[str, int | None] = {"step": None}
    prepare: Callable[..., Any] = checkpoints.prepare

    def prepared(*args: Any, step: int, **kwargs: Any) -> Any:
        now["step"] = step  # until the next save begins, in the background too
        return prepare(*args, step=step, **kwargs)

    checkpoints.prepare = prepared

    def reached(point: str) -> None:
        if now["step"] == fault["step"] and point == fault["point"]:
            strike(fault)

    if fault["where"] == "point":
        checkpoints.reached = reached
        return
    save = torch.save

    def half(state: Any, file: Any, **kwargs: Any) -> None:
        if now["step"] != fault["step"] or "optim" not in str(getattr(file, "name", "")):
            save(state, file, **kwargs)
            return
        whole = io.BytesIO()
        save(state, whole, **kwargs)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        strike(fault)

    torch.save = half
