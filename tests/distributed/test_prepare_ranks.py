"""launcher/prepare.py by one process, its own workers, and ranks of a real mpirun; killed anywhere."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests/unit"))
from tiny_stores import digests  # noqa: E402
from tiny_tokenizers import sums  # noqa: E402

PIECES = str(ROOT / "tests/distributed/prepare_in_pieces.py")
NUM_KILLS = 12
pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records, a tokenizer trained on them, a configuration; and what one process makes of them."""
    place = tmp_path_factory.mktemp("ranks")
    for name, num, seed in (("train", 500, 1), ("heldout", 60, 2)):
        rows = [json.dumps(row) for row in sums(num, seed=seed)]
        if name == "train":
            rows[100] = "{"
        (place / f"{name}.jsonl").write_text("".join(row + "\n" for row in rows))
    config: dict[str, Any] = {
        "name": "ranks", "output": str(place / "run"),
        "tokenizer": {"path": str(place / "t.model"), "train": {"vocab_size": 44}},
        "data": {
            "train": [str(place / "train.jsonl")], "heldout": [str(place / "heldout.jsonl")],
            "store": str(place / "whole"), "sequence_length": 400, "refused": "drop",
            "traces": {"builder": "hard"},
        },
        "model": {"config": {"model_type": "llama"}}, "optimizer": {"learning_rate": 0.1},
        "training": {"steps": 1, "global_batch_rows": 1},
    }  # fmt: skip
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    result = prepare(place, "whole")
    assert result.returncode == 0, result.stderr
    return place


def command(how: str) -> tuple[list[str], list[str]]:
    """Words before and after the script: `2 ranks` of mpirun or `2 workers`."""
    num, _, kind = how.partition(" ")
    if kind == "ranks":
        return [str(Path(sys.executable).with_name("mpirun")), "-n", num], []
    return [], ["--workers", num] if how else []


def started(folder: Path, store: str, how: str, slow: float, *more: str) -> subprocess.Popen[str]:
    before, after = command(how)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "SLOW": str(slow),
               "EXECUTED": str(folder / f"{store}.executed")}  # fmt: skip
    return subprocess.Popen(
        [*before, sys.executable, PIECES, "--config", str(folder / "config.yaml"), *after,
         f"data.store={folder / store}", *more],
        env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
    )  # fmt: skip


def prepare(
    folder: Path, store: str, how: str = "", *more: str
) -> subprocess.CompletedProcess[str]:
    process = started(folder, store, how, 0.0, *more)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def executed(folder: Path, store: str) -> Counter[str]:
    """How often each unit was begun."""
    lines = (folder / f"{store}.executed").read_text().splitlines()
    return Counter(line.rpartition(" ")[0] for line in lines)


def stores(folder: Path, store: str) -> dict[str, dict[str, str]]:
    found = {part: digests(folder / store / part) for part in ("train", "heldout")}
    for left in ("work", "partial", "previous", "work.dropped-*"):
        assert not list((folder / store).glob(f"*.{left}"))
    return found


@pytest.mark.parametrize(
    "how", ["1 workers", "2 workers", "3 workers", "1 ranks", "2 ranks", "3 ranks"]
)
def test_the_same_bytes_and_counts(how: str, folder: Path) -> None:
    store = how.replace(" ", "-")
    result = prepare(folder, store, how)
    assert result.returncode == 0, result.stderr
    assert stores(folder, store) == stores(folder, "whole")
    once = executed(folder, "whole")
    assert len(once) > 40 and set(once.values()) == {1}
    assert executed(folder, store) == once, "nothing is done twice"
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["tokenizer", "train", "heldout", "parity"]
    assert "read 500, refused 1" in lines[1]
    manifest = json.loads((folder / store / "train/manifest.json").read_text())
    assert len(manifest["shards"]) > 3
    again = prepare(folder, store, how)
    assert again.returncode == 0 and again.stdout.count("up to date") == 2


@pytest.mark.parametrize("how", ["", "2 workers", "3 ranks"])
def test_the_first_bad_record_is_one_line(how: str, folder: Path) -> None:
    result = prepare(folder, f"bad{how}", how, "data.refused=error", "tokenizer.train=null",
                     f"tokenizer.path={folder / 't.model'}")  # fmt: skip
    assert result.returncode == 2, result.stderr
    said = [line for line in result.stderr.splitlines() if "error" in line]
    assert len(said) == 1 and f"error: {folder / 'train.jsonl'}:101: record: not JSON" in said[0]
    assert not (folder / f"bad{how}" / "train").exists()


@pytest.mark.parametrize("how", ["2 workers", "2 ranks"])
def test_input_that_the_leading_process_refuses_ends_all(how: str, folder: Path) -> None:
    result = prepare(folder, "refused", how, f"data.heldout=[{folder}/nowhere.jsonl]")
    assert result.returncode == 2 and result.stderr.count("nowhere.jsonl: no such file") == 1


def test_contradictions_end_every_rank(folder: Path) -> None:
    before, _ = command("2 ranks")
    result = subprocess.run(
        [*before, sys.executable, PIECES, "--config", str(folder / "config.yaml"), "--workers",
         "2", f"data.store={folder / 'two'}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2 and "--workers 2: with mpirun" in result.stderr
    assert not (folder / "two").exists()


def num_results(folder: Path, store: str) -> int:
    return len(list((folder / store).glob("*.work/*/*.result")))


def wait_for_results(process: subprocess.Popen[str], folder: Path, store: str, num: int) -> None:
    end = time.monotonic() + 60
    while num_results(folder, store) < num and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.005)


def kill_group(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)


@pytest.mark.parametrize("how", ["2 workers", "2 ranks"])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(how: str, folder: Path) -> None:
    """Everything at once, `kill -9`, again and again; each attempt goes on from the one before."""
    store, rng = f"killed-{how.replace(' ', '-')}", random.Random(how)
    for _ in range(NUM_KILLS // 2):
        process = started(folder, store, how, 0.02)
        wait_for_results(process, folder, store, num_results(folder, store) + rng.randint(1, 9))
        time.sleep(rng.random() * 0.03)
        assert process.poll() is None, "the kill comes in the middle"
        if how == "2 ranks":  # the ranks are in groups of their own
            for pid in pids_of(folder / store):
                os.kill(pid, signal.SIGKILL)
        kill_group(process)
    result = prepare(folder, store, how)
    assert result.returncode == 0, result.stderr
    assert stores(folder, store) == stores(folder, "whole")
    done = executed(folder, store)
    assert set(done) == set(executed(folder, "whole"))
    repeated = done.total() - len(done)
    assert repeated <= 2 * NUM_KILLS // 2, "one unit a process and kill"
    assert repeated <= len(done) / 2


def pids_of(store: Path) -> list[int]:
    """The processes that prepare a store."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if PIECES.encode() in words[:3] and f"data.store={store}".encode() in words:
            found.append(int(path.name))
    return sorted(found)


@pytest.mark.parametrize("leads", [False, True])
def test_one_killed_worker(leads: bool, folder: Path) -> None:
    store = f"one-killed-{leads}"
    process = started(folder, store, "2 workers", 0.12)
    log, end = folder / f"{store}.executed", time.monotonic() + 60
    child = process.pid
    while child == process.pid:  # until the last unit begun is the other's, so it is in it
        assert time.monotonic() < end
        time.sleep(0.005)
        if log.exists() and (lines := log.read_text().splitlines()):
            child = int(lines[-1].split()[-1])
    os.kill(process.pid if leads else child, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    if leads:
        end = time.monotonic() + 20
        while pids_of(folder / store):  # it sees at its next unit that nobody waits for it
            assert time.monotonic() < end
            time.sleep(0.02)
    else:
        assert process.returncode == 1
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert f"a worker (process {child}) ended with signal 9 (SIGKILL) in the middle of" in line
    result = prepare(folder, store, "3 workers")
    assert result.returncode == 0, result.stderr
    assert stores(folder, store) == stores(folder, "whole")


def test_a_second_preparation_is_kept_out(folder: Path) -> None:
    process = started(folder, "busy", "2 workers", 0.05)
    wait_for_results(process, folder, "busy", 2)
    second = prepare(folder, "busy")
    assert second.returncode == 4 and "is in use by pid" in second.stderr
    assert "choose another `data.store`" in second.stderr
    assert process.wait(60) == 0
    process.communicate()
    assert stores(folder, "busy") == stores(folder, "whole")
