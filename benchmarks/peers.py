"""Other projects' own functions, unmodified, in a folder of their own, to compare packing with.

    python benchmarks/peers.py      # installs them below benchmarks/.peers; a minute, no torch

Only the benchmarks use this folder. It stands behind the project's own packages on the path, so
that both sides run with the same numpy, pyarrow and numba.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / ".peers"
WITH_DEPENDENCIES = ("datasets==5.2.0",)
PIP = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check",
       "--target", str(FOLDER)]  # fmt: skip
ALONE = ("trl==1.16.0", "llamafactory==0.9.5", "axolotl==0.19.0")  # they ask for torch and more


def install() -> None:
    """Install what is not there yet, and put it on the path."""
    install_datasets()
    if not (FOLDER / "installed").exists():
        subprocess.run([*PIP, "--no-deps", *ALONE], check=True)
        (FOLDER / "installed").touch()


def install_datasets() -> None:
    """Install `datasets` alone, and put it on the path."""
    if not (FOLDER / "datasets").exists():
        pins = ["-c", str(ROOT / "constraints.txt")]
        subprocess.run([*PIP, *pins, *WITH_DEPENDENCIES], check=True)
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))


def _module(place: str, stubs: dict[str, dict[str, Any]]) -> Any:
    """One file of a package, with stand-ins for what it imports of the rest of that package."""
    for name, members in stubs.items():
        stub = types.ModuleType(name)
        vars(stub).update(members)
        sys.modules[name] = stub
    spec = importlib.util.spec_from_file_location(Path(place).stem, FOLDER / place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def trl_pack() -> Any:
    """`pack_dataset` of TRL, and `Dataset` of `datasets`."""
    from datasets import Dataset, disable_progress_bars
    from trl.data_utils import pack_dataset

    disable_progress_bars()
    return pack_dataset, Dataset


def greedy_knapsack() -> Any:
    """LLaMA-Factory's packing of a list of lengths."""
    return _module("llamafactory/data/processor/processor_utils.py", {}).greedy_knapsack


def pack_group() -> Any:
    """Axolotl's packing of an array of lengths (numba)."""
    import logging

    stubs = {
        "axolotl": {}, "axolotl.utils": {},
        "axolotl.utils.distributed": {"reduce_and_broadcast": None},
        "axolotl.utils.logging": {"get_logger": logging.getLogger},
    }  # fmt: skip
    return _module("axolotl/utils/samplers/multipack.py", stubs).pack_group


if __name__ == "__main__":
    install()
    print(f"peers in {FOLDER}")
