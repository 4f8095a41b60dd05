"""Break the code on purpose and see a named test fail.

    python tests/mutants/run.py [--only TEXT] [--list]

Each entry of the .toml files here replaces one place of one file in a copy of the tree and runs the tests
it names. A mutant survives when they all pass: then the proof it stands for proves nothing. A
place that is no longer found exactly once is an error too, so the list cannot rot unseen.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("nmar_ds", "launcher", "configs", "examples", "tests", "docs", "benchmarks", "slurm")
COPIED_FILES = ("pyproject.toml", "README.md", "Makefile", "CHANGELOG.md", "constraints.txt")


def load_mutants() -> list[dict[str, object]]:
    """All entries, in order of their files' names."""
    files = sorted(Path(__file__).parent.glob("*.toml"))
    return [entry for file in files for entry in tomllib.loads(file.read_text("utf-8"))["mutant"]]


def copy_tree(target: Path) -> None:
    """A copy of what tests need, without runs and environments."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in COPIED_FILES:
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, target / name)


def run_tests(tree: Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
    """Run tests against the copy: its folder precedes the installed package."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
        cwd=tree, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


def verdict(mutant: dict[str, object], tree: Path) -> str:
    """`caught`, or what is wrong."""
    file = tree / str(mutant["file"])
    original = file.read_text(encoding="utf-8")
    find = str(mutant["find"])
    if original.count(find) != 1:
        return f"STALE: its place occurs {original.count(find)} times in {mutant['file']}"
    tests = mutant["tests"]
    assert isinstance(tests, list)
    file.write_text(original.replace(find, str(mutant["replace"])), encoding="utf-8")
    try:
        result = run_tests(tree, tests)
    except subprocess.TimeoutExpired:
        return "caught (it hangs)"
    finally:
        file.write_text(original, encoding="utf-8")
    if result.returncode == 1 and "FAILED " in result.stdout:
        return "caught"
    if result.returncode == 0:
        return "SURVIVED"
    return f"BROKEN: pytest exit {result.returncode}: {result.stdout[-300:]}{result.stderr[-300:]}"


def main() -> int:
    """Returns 0 when every mutant is caught."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="*", default=[""], help="run mutants whose name contains one of these"
    )
    parser.add_argument("--list", action="store_true", help="list the mutants and stop")
    arguments = parser.parse_args()
    mutants = [m for m in load_mutants() if any(o in m["name"] for o in arguments.only)]
    if not mutants:
        parser.error(
            f"--only {' '.join(arguments.only)}: no such mutant, expected a part of a name; "
            "see --list"
        )
    if arguments.list:
        for mutant in mutants:
            print(f"{mutant['name']:32} {mutant['why']}")
        return 0
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        tests = sorted({test for mutant in mutants for test in mutant["tests"]})
        healthy = run_tests(tree, tests)
        if healthy.returncode != 0:
            print(healthy.stdout[-3000:])
            print("the named tests fail without any mutant")
            return 1
        for mutant in mutants:
            started = time.monotonic()
            result = verdict(mutant, tree)
            bad += not result.startswith("caught")
            print(f"{mutant['name']:32} {result}  ({time.monotonic() - started:.0f} s)", flush=True)
    print(f"{len(mutants) - bad} caught, {bad} not")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
