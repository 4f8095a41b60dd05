"""Resumes that go wrong, each in a way of its own: the soak must find every one of them out.

A rank of the fork server calls one of these before it trains; the code under test is as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def forgets_moments() -> None:
    """The weights come back, the optimizer's first moments do not."""
    from nmar_ds.training.engine import Engine

    load = Engine.load_from

    def forgetful(self: Any, *args: Any) -> Any:
        state = load(self, *args)
        for moments in self._engine.optimizer.optimizer.state.values():
            moments["exp_avg"].zero_()
        return state

    Engine.load_from = forgetful  # type: ignore[method-assign]


def forgets_random_state() -> None:
    """Random numbers go on as in a new run; no weight tells, until something draws some."""
    from nmar_ds.training import run

    run.restore_random_state = lambda state: None


def skips_a_step() -> None:
    """A resumed run begins one step late: a step's rows are lost."""
    _begins(1)


def repeats_a_step() -> None:
    """A resumed run begins one step early: weights see a step's rows twice."""
    _begins(-1)


def reads_other_rows() -> None:
    """A resumed run reads the rows of other steps, as with a seed of its own."""
    from nmar_ds.training import run
    from nmar_ds.training.checkpoints import step_folders

    loader_of = run.loader_of

    def loader(part: str, config: Any, *args: Any) -> Any:
        resumed = bool(step_folders(Path(config.output) / "checkpoints"))
        found = loader_of(part, config, *args)
        found.seed += int(resumed)
        return found

    run.loader_of = loader


def _begins(late: int) -> None:
    from nmar_ds.training.loop import TrainingLoop

    original = TrainingLoop.run

    def shifted(self: Any, first_step: int) -> Any:
        return original(self, max(0, first_step + late) if first_step else 0)

    TrainingLoop.run = shifted  # type: ignore[method-assign]


BREAKS: dict[str, Callable[[], None]] = {
    "forgets moments": forgets_moments,
    "forgets random state": forgets_random_state,
    "skips a step": skips_a_step,
    "repeats a step": repeats_a_step,
    "reads other rows": reads_other_rows,
}
