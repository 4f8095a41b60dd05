"""Tasks of lm-eval, loaded so that what is wrong with one is a line that names its file."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nmar_ds.errors import ConfigError
from nmar_ds.files import about


def find_tasks(names: Sequence[str], tasks_path: Path | None) -> Any:
    """lm-eval's manager of tasks, in which all names are known.

    lm-eval's own tasks are indexed only where a name asks for them: that takes ten seconds.

    Raises:
        ConfigError: no such folder, a name that nobody knows, or YAML that lm-eval passed over.
    """
    if tasks_path is not None and not tasks_path.is_dir():
        raise ConfigError(f"--tasks-path: {tasks_path}: no such folder, expected one with YAML")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=tasks_path, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        for file in sorted(tasks_path.rglob("*.yaml")) if tasks_path is not None else []:
            _check_yaml(file)
        manager = TaskManager(include_path=tasks_path)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f", the nearest is {near[0]!r}" if near else ""
            raise ConfigError(f"--tasks: {name!r}: no such task{hint}")
    return manager


def load_tasks(manager: Any, names: Sequence[str]) -> Any:
    """What lm-eval makes of the names, data included.

    Raises:
        ConfigError: a task's YAML or its data are not what lm-eval can use.
    """
    try:
        loaded = manager.load(list(names))
    except OSError as error:
        raise unreadable(error) from None
    except Exception as error:
        # Whatever lm-eval or the data's reader raises: nothing but tasks has been touched yet.
        raise _named(manager, names, error) from error
    for name, task in loaded["tasks"].items():
        for metric, function in getattr(task, "_metric_fn_list", {}).items():
            if function is None:
                raise ConfigError(
                    f"{_place(manager, name)}: metric_list: {metric!r}: no such metric, expected "
                    "one that lm-eval has"
                )
    return loaded


def unreadable(error: OSError) -> ConfigError:
    """The line for data sets that are not here, with or without a network."""
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ConfigError(f"--tasks: {line}, expected data that can be read here")


def check_documents(manager: Any, loaded: Any, limit: int | None) -> None:
    """Form every document's texts, to find the one that an evaluation ended at.

    Raises:
        ConfigError: a template and a document do not go together.
    """
    for name, task in loaded["tasks"].items():
        for number, document in enumerate(itertools.islice(task.eval_docs, limit)):
            try:
                task.doc_to_text(document)
                task.doc_to_target(document)
                if getattr(task, "OUTPUT_TYPE", None) == "multiple_choice":
                    task.doc_to_choice(document)
            except Exception as error:
                raise ConfigError(
                    f"{_place(manager, name)}: document {number}: {_reason(error)}, expected "
                    "doc_to_text, doc_to_target and doc_to_choice that each document's fields fill"
                ) from error


def _check_yaml(file: Path) -> None:
    """Raises: ConfigError, naming the line that is no YAML."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Takes lm-eval's `!function` for nothing."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    try:
        config = yaml.load(file.read_bytes(), Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" line {mark.line + 1}:"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{file}:{line} {problem}, expected a task in lm-eval's YAML") from None
    except OSError as error:
        raise ConfigError(about(error, file)) from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: expected a task in lm-eval's YAML, a mapping of its keys")


def _named(manager: Any, names: Sequence[str], error: Exception) -> ConfigError:
    """The line for what kept a task from being loaded."""
    culprit = names[0]
    for name in names if len(names) > 1 else []:
        try:
            manager.load([name])
        except Exception as own:
            culprit, error = name, own
            break
    place, config = _place(manager, culprit), manager.task_index[culprit].cfg or {}
    if config.get("dataset_path") == "json":
        for file in _files((config.get("dataset_kwargs") or {}).get("data_files")):
            problem = _bad_json(file)
            if problem is not None:
                return ConfigError(f"{file}: {problem}, expected one JSON object a line ({place})")
    return ConfigError(
        f"{place}: {_reason(error)}, expected keys, templates and splits that lm-eval and the "
        "data have"
    )


def _files(named: Any) -> Iterator[Path]:
    """The local ones of `data_files`: a path, a list of them, or either by split."""
    if isinstance(named, Mapping):
        named = list(named.values())
    if isinstance(named, list):
        for one in named:
            yield from _files(one)
    elif isinstance(named, str) and Path(named).is_file():
        yield Path(named)


def _bad_json(file: Path) -> str | None:
    """What is wrong with a file of JSON lines, or of one JSON text; None where nothing is."""
    data = file.read_bytes()
    if not data.strip():
        return "it has no documents"
    try:
        json.loads(data)
        return None
    except ValueError:
        pass
    for number, line in enumerate(data.splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            return f"line {number}: {error.msg}"
        except UnicodeDecodeError:
            return f"line {number}: not UTF-8"
        if not isinstance(row, dict):
            return f"line {number}: {type(row).__name__}"
    return None


def _place(manager: Any, name: str) -> str:
    """A task, and the file that describes it."""
    entry = manager.task_index.get(name)
    file = getattr(entry, "yaml_path", None)
    return f"--tasks: {name!r}" + ("" if file is None else f": {file}")


def _reason(error: BaseException) -> str:
    """The first line of what was raised first."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
