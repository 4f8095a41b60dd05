"""One run of lm-eval on an exported model: tasks are found first, then it is loaded."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmar_ds.errors import ConfigError, NmarError
from nmar_ds.inference.harness_tasks import check_documents, find_tasks, load_tasks, unreadable


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessRun:
    """What to run.

    Attributes:
        model: an exported folder. model_args: further arguments of `harness.NmarLM`.
        tasks: names that lm-eval or `tasks_path` has.
        tasks_path: folder with tasks of one's own, in lm-eval's YAML.
        limit: documents per task; None takes all.
        batch_size: sequences side by side.
        temperature: instead of what the tasks say; None leaves it to them.
    """

    model: Path
    tasks: Sequence[str]
    tasks_path: Path | None = None
    limit: int | None = None
    batch_size: int = 32
    temperature: float | None = None
    model_args: dict[str, Any]


def require_lm_eval() -> None:
    """Make sure that lm-eval is there, without importing it.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "lm-eval: not installed, expected lm-eval 0.4: pip install 'nmar_ds[harness]'"
        )


def run_harness(run: HarnessRun) -> dict[str, Any]:
    """Evaluate.

    Returns:
        lm-eval's results, samples among them; `config.nmar` says how much was undone.

    Raises:
        ConfigError: a task is unknown, or its YAML or data are not in order; or as
            `harness.NmarLM`.
        VocabularyError: as `harness.NmarLM`.
    """
    require_lm_eval()
    manager = find_tasks(run.tasks, run.tasks_path)
    loaded = load_tasks(manager, run.tasks)
    manager.load = lambda names: loaded  # lm-eval need not load them once more
    from lm_eval import simple_evaluate

    import nmar_ds.inference.harness  # noqa: F401  (registers `nmar`)

    keywords: dict[str, Any] = {}
    if run.temperature is not None:
        keywords = {"do_sample": run.temperature > 0, "temperature": run.temperature}
    try:
        results: dict[str, Any] = simple_evaluate(
            model="nmar",
            model_args={"pretrained": str(run.model), **run.model_args},
            tasks=list(run.tasks),
            task_manager=manager,
            batch_size=run.batch_size,
            limit=run.limit,
            gen_kwargs=keywords or None,
        )
    except NmarError:
        raise
    except OSError as error:
        raise unreadable(error) from None
    except Exception:
        check_documents(manager, loaded, run.limit)  # raises where a task is the cause
        raise
    return results


def print_and_write(results: dict[str, Any], output: Path | None) -> None:
    """A table on the screen, what was undone, and everything as JSON."""
    from lm_eval.utils import handle_non_serializable
    from rich.console import Console

    from nmar_ds.inference.report import write_json

    Console().print(_table(results))
    generated = results["config"]["nmar"]["generated"]
    if generated:
        print(
            f"{generated['responses_with_undo']} of {generated['responses']} responses took "
            f"something back: {generated['undos']} undos ({generated['stray_undos']} stray), "
            f"{generated['tokens_emitted']} tokens emitted, {generated['tokens_kept']} kept, "
            f"{generated['cut_off']} responses cut off"
        )
    if output is not None:
        plain = json.dumps(results, default=handle_non_serializable)
        write_json(json.loads(plain), output)


def _table(results: dict[str, Any]) -> Any:
    """One line per task or group, measure and filter; `n` is its number of documents."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("task", "measure", "filter", "value", "error", "n"):
        table.add_column(name, justify="left" if name in ("task", "measure", "filter") else "right")
    for task, measures in {**results["results"], **results.get("groups", {})}.items():
        num = results["n-samples"].get(task, {}).get("effective", "")
        for key, value in measures.items():
            measure, comma, kept = key.partition(",")
            if not comma or measure.endswith("_stderr"):
                continue
            error = measures.get(f"{measure}_stderr,{kept}")
            numbers = [f"{n:.4f}" if isinstance(n, float) else str(n) for n in (value, error)]
            table.add_row(task, measure, kept, *numbers, str(num))
    return table
