"""One run of an experiment (a cell): its settings, its commands, its result.

A cell is a run configuration, a few overrides and the product's own launchers in order. Places are
written `{cell}` (its folder) and `{base}`, `{start}` (folders of cells it needs), so that settings
do not depend on where an experiment lies. What a run is told (configuration, commands, files that
they read, the version) is in the settings' hash; a result that carries the hash is kept, everything
else is done again from the beginning. The product's own code is not in it, or every edit would undo
hours of runs: a result says which code made it, and a page names results of different code.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nmar_ds import __version__
from nmar_ds.data.work import write_aside
from nmar_ds.errors import ConfigError, LaunchError
from nmar_ds.files import sha256_file
from nmar_ds.yaml_input import apply_override, read_yaml

ROOT = Path(__file__).resolve().parents[2]
RESULT, SETTINGS, LOG = "result.json", "settings.json", "log.txt"
# What trains, examines and reads the figures.
CODE = ("nmar_ds/**/*.py", "launcher/*.py", "examples/experiments/figures.py")
UNKNOWN, CHANGED = "not recorded", "changed during the run"
Command = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run.

    Attributes:
        name: of its folder, unique among all experiments that share an output.
        condition, objective, seed: what a summary groups by: where errors come from (or their
            entropy, or rate), what is trained on them, and the repetition.
        config: YAML run configuration, from the root of the tree.
        overrides: `a.b=c`, on top of `config`.
        commands: name and arguments after `python`, in order.
        reads: files of the tree that the commands read beside the configuration.
        needs: placeholder and the cell that has to be finished before.
    """

    name: str
    condition: str
    objective: str
    seed: int
    config: str
    overrides: tuple[str, ...]
    commands: tuple[tuple[str, Command], ...]
    reads: tuple[str, ...] = ()
    needs: Mapping[str, Cell] = field(default_factory=dict)


def settings_of(cell: Cell) -> dict[str, Any]:
    """Everything a cell is told, the cells it needs included (by their hash)."""
    data, _ = read_yaml(ROOT / cell.config)
    for text in cell.overrides:
        apply_override(data, text)
    return {
        "cell": {"name": cell.name, "condition": cell.condition, "objective": cell.objective,
                 "seed": cell.seed},
        "config": data,
        "commands": [[name, *words] for name, words in cell.commands],
        "reads": {path: sha256_file(ROOT / path) for path in cell.reads},
        "needs": {place: hash_of(settings_of(other)) for place, other in cell.needs.items()},
        "version": __version__,
    }  # fmt: skip


def hash_of(settings: Mapping[str, Any]) -> str:
    """Hex digest of settings, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def code_sha256(root: Path = ROOT) -> str:
    """Hex digest of the product's code as it is now: names and bytes of its files.

    Cost: about 160 files, some milliseconds.
    """
    files = {
        path.relative_to(root).as_posix(): sha256_file(path)
        for pattern in CODE
        for path in root.glob(pattern)
    }
    return hash_of(files)


def short(code: str) -> str:
    """The digest as it is shown; or in words, why there is none."""
    return code if code in (UNKNOWN, CHANGED) else code[:12]


def finished(cell: Cell, output: Path) -> dict[str, Any] | None:
    """A cell's result, if it is whole and its settings are those of today."""
    file = output / cell.name / RESULT
    try:
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise ConfigError(f"{file}: is not JSON; remove it to have the run done again") from None
    return result if result.get("settings_sha256") == hash_of(settings_of(cell)) else None


@contextmanager
def claimed(cell: Cell, output: Path) -> Iterator[bool]:
    """Whether this process may run the cell; the claim ends with the process, however it ends."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / f"{cell.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def run_cell(
    cell: Cell,
    output: Path,
    *,
    timeout_seconds: float,
    read_result: Callable[[Path], dict[str, Any]],
) -> dict[str, Any]:
    """Do a run from its beginning; what a killed one left is removed.

    Args:
        cell: whose needs are finished.
        output: folder of all cells.
        timeout_seconds: of the whole run.
        read_result: the figures of a cell's folder once its commands are done.

    Returns:
        What is in its result.json.

    Raises:
        LaunchError: a command failed or the time was up; the log has its words.
    """
    folder = output / cell.name
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    places = {"cell": folder, **{name: output / need.name for name, need in cell.needs.items()}}
    settings, code = settings_of(cell), code_sha256()
    config = filled(settings["config"], places)
    (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    write_aside(folder / SETTINGS, json.dumps(settings, indent=1).encode())
    begun = time.monotonic()
    seconds = {}
    for name, words in cell.commands:
        since = time.monotonic()
        _call(
            [sys.executable, *filled(list(words), places)], folder / LOG,
            timeout_seconds=timeout_seconds - (since - begun),
        )  # fmt: skip
        seconds[name] = round(time.monotonic() - since, 1)
    result = {
        "settings_sha256": hash_of(settings),
        "code_sha256": code if code == code_sha256() else CHANGED,
        **settings["cell"], "seconds": seconds, **read_result(folder),
    }  # fmt: skip
    write_aside(folder / RESULT, json.dumps(result, indent=1).encode())
    return result


def filled(value: Any, places: Mapping[str, Path]) -> Any:
    """The value with `{name}` in its texts replaced by folders."""
    if isinstance(value, dict):
        return {key: filled(item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, places) for item in value]
    if isinstance(value, str):
        for name, place in places.items():
            value = value.replace(f"{{{name}}}", str(place))
    return value


def _call(command: list[str], log: Path, *, timeout_seconds: float) -> None:
    """Run one command from the root of the tree, on the CPU and one thread."""
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=file, check=False,
                timeout=max(timeout_seconds, 0.1),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise LaunchError(f"{log}: the run took too long (--timeout-seconds)") from None
    if done.returncode:
        raise LaunchError(f"{log}: {Path(command[1]).name} ended with code {done.returncode}")
