"""What the soak can do to a run, and how one misfortune is drawn: from a seed and a number alone.

A misfortune is a list of acts, JSON all through. Acts are carried out one after the other, and then
the run is resumed until it is complete:

    {"do": "run", "fault": ..., "struck": ..., "overrides": [...]}   through the fork server;
        `struck` from outside, after a `share` of the seconds that a whole run takes
    {"do": "launch", "command": ..., "victim": ..., "fault": ...}    a real launcher, then its death
    {"do": "damage", "what": ..., "at": [x, y]}                      to files, while nothing runs

`at` holds two numbers in [0, 1) that choose a file and a place in it.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from injected import POINTS_OF_ALL, RANK_0_POINTS

from nmar_ds.training.checkpoints import LATEST, MANIFEST, step_folders
from nmar_ds.training.run_folder import LOCK

STEPS = 12  # two epochs of the tiny data
SAVES = range(2, STEPS + 1, 2)
# Two micro-batches of two rows per rank and step.
OVERRIDES = (f"training.steps={STEPS}", "training.global_batch_rows=8",
             "training.micro_batch_rows=2")  # fmt: skip
SHORT_TIMEOUTS = ("training.timeout_seconds=4", "training.slow_timeout_seconds=60")
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT")
INSIDE = ("boundary", "forward", "backward", "optimizer")

Act = dict[str, Any]


# -- interruptions ---------------------------------------------------------------------------


def _run(fault: dict[str, Any] | None = None, **more: Any) -> Act:
    return {"do": "run", "fault": fault, **more}


def _step(draw: random.Random, how: str, first: int = 1, last: int = STEPS) -> Act:
    where = draw.choice(INSIDE)
    step, rank = draw.randint(first, last), draw.randrange(2)
    return _run({"where": where, "step": step, "rank": rank, "how": how})


def killed_in_a_step(draw: random.Random) -> list[Act]:
    if draw.random() < 0.1:
        return [_run({"where": "building", "rank": draw.randrange(2), "how": "kill"})]
    return [_step(draw, "kill")]


def killed_in_a_save(draw: random.Random) -> list[Act]:
    rank, step = draw.randrange(2), draw.choice(SAVES)
    points = POINTS_OF_ALL + (RANK_0_POINTS if rank == 0 else ())
    point = draw.choice((*points, "half_file"))
    if point == "unmarked":  # only where an old one is deleted
        step = draw.choice(SAVES[2:])
    where = "half_file" if point == "half_file" else "point"
    return [_run({"where": where, "point": point, "step": step, "rank": rank, "how": "kill"})]


def killed_at_any_moment(draw: random.Random) -> list[Act]:
    ranks = draw.choice(([0], [1], [0, 1]))
    return [_run(struck={"ranks": ranks, "signal": "SIGKILL", "share": round(draw.random(), 3)})]


def told_to_stop(draw: random.Random) -> list[Act]:
    name = draw.choice(SIGNALS)
    if draw.random() < 0.5:
        return [_step(draw, name)]
    if draw.random() < 0.5:
        point, save = draw.choice(POINTS_OF_ALL), draw.choice(SAVES)
        fault = {"where": "point", "point": point, "step": save, "rank": draw.randrange(2)}
        return [_run({**fault, "how": name})]
    share = round(draw.random(), 3)
    return [_run(struck={"ranks": [draw.randrange(2)], "signal": name, "share": share})]


def launcher_dies(draw: random.Random) -> list[Act]:
    command = draw.choice(("deepspeed", "torchrun"))
    victim = draw.choice(("cli", "launch") if command == "deepspeed" else ("cli",))
    fault = {"where": draw.choice(("forward", "backward")), "step": draw.randint(2, STEPS - 2),
             "rank": draw.randrange(2), "how": "sleep", "seconds": 3}  # fmt: skip
    return [{"do": "launch", "command": command, "victim": victim, "fault": fault}]


def disk_full(draw: random.Random) -> list[Act]:
    step, rank = draw.choice(SAVES), draw.randrange(2)
    return [_run({"where": "half_file", "step": step, "rank": rank, "how": "full"})]


def stops_answering(draw: random.Random) -> list[Act]:
    act = _step(draw, "SIGSTOP", 2)  # the first step's limit is the long one
    # Nobody else ends them: the peer's watchdog does, and wakes the one that was stopped.
    return [{**act, "overrides": [*SHORT_TIMEOUTS], "codes": [5, 5]}]


# -- damage ----------------------------------------------------------------------------------


def _newest(run: Path) -> Path:
    return step_folders(run / "checkpoints")[0]


def _victim(run: Path, at: list[float]) -> Path:
    files = sorted(_newest(run).iterdir())
    return files[int(at[0] * len(files))]


def flip(run: Path, at: list[float]) -> None:
    victim = _victim(run, at)
    content = bytearray(victim.read_bytes())
    bit = int(at[1] * len(content) * 8)
    content[bit // 8] ^= 1 << bit % 8
    victim.write_bytes(content)


def truncate(run: Path, at: list[float]) -> None:
    victim = _victim(run, at)
    victim.write_bytes(victim.read_bytes()[: int(at[1] * victim.stat().st_size)])


def delete(run: Path, at: list[float]) -> None:
    _victim(run, at).unlink()


def swap(run: Path, at: list[float]) -> None:
    kind = ("optim", "model")[int(at[0] * 2)]
    first, second = (_newest(run) / f"zero_pp_rank_{r}_mp_rank_00_{kind}_states.pt" for r in (0, 1))
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def stray(run: Path, at: list[float]) -> None:
    (_newest(run) / "zero_to_fp32.py").write_text("raise SystemExit('run')\n")


def drop_latest(run: Path, at: list[float]) -> None:
    (run / "checkpoints" / LATEST).unlink(missing_ok=True)


def spoil_latest(run: Path, at: list[float]) -> None:
    text = ("step-00000099\n", "", "../../elsewhere\n", "\x00\xff")[int(at[0] * 4)]
    (run / "checkpoints" / LATEST).write_text(text)


def leave_partial_folders(run: Path, at: list[float]) -> None:
    """What saves that died may leave: whole, half and empty files, a manifest, temporary names."""
    checkpoints = run / "checkpoints"
    for number in range(1 + int(at[0] * 3)):
        step = 1 + int(at[1] * STEPS) + number
        folder = checkpoints / f"step-{step:08d}.partial"
        shutil.copytree(_newest(run), folder, dirs_exist_ok=True)
        (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"half")
        (folder / f"{MANIFEST}.tmp").write_text('{"step": ')
        (folder / "zero_pp_rank_7_mp_rank_00_model_states.pt").touch()
    (checkpoints / f"{LATEST}.tmp").write_text("step-0000")
    (run / "config.yaml.tmp").write_text("name: ")


def stale_lock(run: Path, at: list[float]) -> None:
    facts = {"host": "elsewhere", "pid": 1, "since": "2001-01-01T00:00:00", "job": "SLURM_JOB_ID=1"}
    text = (json.dumps(facts) * 3, "", "{", "\x00" * 100)[int(at[0] * 4)]
    (run / LOCK).write_text(text)


# Name -> (what it does, whether the newest checkpoint must then be refused).
DAMAGES: dict[str, tuple[Callable[[Path, list[float]], None], bool]] = {
    "one bit flipped": (flip, True),
    "a file truncated": (truncate, True),
    "a file deleted": (delete, True),
    "two ranks' files swapped": (swap, True),
    "a stray script": (stray, True),
    "`latest` dropped": (drop_latest, False),
    "`latest` spoilt": (spoil_latest, False),
    "partial folders left": (leave_partial_folders, False),
    "a stale lock": (stale_lock, False),
}


def _late_interruption(draw: random.Random) -> Act:
    """Two checkpoints are on the disk by then, also where the newest save was not finished."""
    return _step(draw, draw.choice(("kill", *SIGNALS)), 7, STEPS)


def damaged(what: str) -> Callable[[random.Random], list[Act]]:
    def drawn(draw: random.Random) -> list[Act]:
        at = [round(draw.random(), 6), round(draw.random(), 6)]
        return [_late_interruption(draw), {"do": "damage", "what": what, "at": at}]

    return drawn


def _within(
    draw: random.Random, kinds: list[Callable[[random.Random], list[Act]]], steps: range
) -> list[Act]:
    """A misfortune of one of these kinds that begins in one of these steps."""
    while True:
        acts = draw.choice(kinds)(draw)
        fault = acts[0]["fault"]
        if fault is not None and fault.get("step") in steps:
            return acts


def two_in_a_row(draw: random.Random) -> list[Act]:
    """Another misfortune before the run has got over the first."""
    half = STEPS // 2
    early = [killed_in_a_step, killed_in_a_save, told_to_stop, disk_full]
    late = [killed_in_a_step, killed_in_a_save, *map(damaged, DAMAGES)]
    return [*_within(draw, early, range(1, half + 1)),
            *_within(draw, late, range(half + 1, STEPS + 1))]  # fmt: skip


# Name -> (how it is drawn, how often among the others).
KINDS: dict[str, tuple[Callable[[random.Random], list[Act]], int]] = {
    "kill -9 in a step": (killed_in_a_step, 14),
    "kill -9 in a save": (killed_in_a_save, 14),
    "kill -9 at any moment": (killed_at_any_moment, 10),
    "told to stop": (told_to_stop, 12),
    "launcher dies": (launcher_dies, 4),
    "disk full in a save": (disk_full, 6),
    "a rank stops answering": (stops_answering, 4),
    **{what: (damaged(what), 6 if refused else 3) for what, (_, refused) in DAMAGES.items()},
    "two in a row": (two_in_a_row, 12),
}


# -- those that cannot end in the same bits --------------------------------------------------


def one_nan(draw: random.Random) -> list[Act]:
    fault = {"where": "nonfinite", "step": draw.randint(2, STEPS), "rank": draw.randrange(2)}
    return [_run(fault)]


def other_world_size(draw: random.Random) -> list[Act]:
    return [_step(draw, draw.choice(SIGNALS), 2, STEPS - 1), _run(num_ranks=draw.choice((1, 3)))]


OTHERS: dict[str, Callable[[random.Random], list[Act]]] = {
    "a non-finite gradient": one_nan,
    "another number of ranks": other_world_size,
}


def draw_misfortune(seed: int, number: int) -> tuple[str, list[Act]]:
    """The kind and the acts of the numbered misfortune; nothing else decides them."""
    draw = random.Random(f"soak {seed} {number}")
    kind = draw.choices(list(KINDS), [weight for _, weight in KINDS.values()])[0]
    return kind, KINDS[kind][0](draw)


def in_words(acts: list[Act]) -> str:
    """What is done, on one line."""
    from common import name_of

    words = []
    for act in acts:
        fault, struck = act.get("fault"), act.get("struck")
        if act["do"] == "damage":
            words.append(act["what"])
        elif act["do"] == "launch":
            words.append(f"kill -9 of the {act['command']} {act['victim']} in step {fault['step']}")
        elif fault is not None:
            words.append(f"{fault.get('how', 'NaN for')} {name_of(fault)}")
        elif struck is not None:
            ranks = " and ".join(map(str, struck["ranks"]))
            words.append(f"{struck['signal']} rank {ranks} {struck['share']:.0%} through a run")
        else:
            words.append(f"{act.get('num_ranks', 2)} ranks")
    return ", then ".join(words)
