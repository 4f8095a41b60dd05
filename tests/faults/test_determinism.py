"""Three other machines' moods: the same data, weights, moments and random state, byte for byte."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from common import ROOT, Prepared, digest_of, environment, state_of
from fork_server import ForkServer

# Hash seed, clock, time zone, locale, and the mask and folder that a process starts with.
MOODS: dict[str, tuple[dict[str, str], int]] = {
    "yesterday's year": (
        {"PYTHONHASHSEED": "1", "CLOCK_SHIFT": "-1000000000", "TZ": "Pacific/Kiritimati",
         "LC_ALL": "C"}, 0o077,
    ),
    "a hasty clock": (
        {"PYTHONHASHSEED": "4294967295", "CLOCK_PACE": "7", "TZ": "America/St_Johns",
         "LC_ALL": "POSIX"}, 0o002,
    ),
    "the next century": (
        {"PYTHONHASHSEED": "random", "CLOCK_SHIFT": "2500000000", "CLOCK_PACE": "0.5",
         "TZ": "UTC+12", "LC_ALL": "C.UTF-8"}, 0o027,
    ),
}  # fmt: skip
PREPARE = (
    "import sys, clock; clock.shift_as_told(); from launcher import prepare; "
    "sys.exit(prepare.main(sys.argv[1:]))"
)


def contents(folder: Path) -> str:
    """sha256 over names and bytes of all files below, but the note of who prepared them."""
    digest = hashlib.sha256()
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    for file in sorted(files):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


@pytest.mark.parametrize("mood", MOODS)
def test_another_mood_of_the_machine_changes_no_bit(
    mood: str, prepared: Prepared, tmp_path: Path
) -> None:
    more, umask = MOODS[mood]
    own = [f"data.store={tmp_path}/store", f"tokenizer.path={tmp_path}/tokenizer.model"]
    elsewhere = tmp_path / "started here"
    elsewhere.mkdir()
    folders = f"{ROOT}:{ROOT}/tests/faults"
    made = subprocess.run(
        [sys.executable, "-c", PREPARE, "--config", str(prepared.config), *own], cwd=elsewhere,
        env=environment(**{**more, "PYTHONPATH": folders}), umask=umask, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert contents(tmp_path / "store") == contents(prepared.folder / "store")
    server = ForkServer(prepared.config, cwd=elsewhere, umask=umask, more=more)
    try:
        done = server.run(f"output={tmp_path}/run", *own)
    finally:
        server.close()
    assert done["codes"] == [0, 0], done["outputs"]
    assert digest_of(tmp_path / "run") == prepared.digest
    assert state_of(tmp_path / "run") == state_of(prepared.whole)
    shutil.rmtree(tmp_path)
