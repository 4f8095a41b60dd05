"""The experiment runner: what is run, skipped and done again, and what is concluded from results."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_documents import launcher

from nmar_ds.config import load_config
from nmar_ds.errors import ConfigError, LaunchError
from nmar_ds.traces.records import read_records

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples/experiments"
sys.path.insert(0, str(FOLDER))

import cells  # noqa: E402
import figures  # noqa: E402
import findings  # noqa: E402
import records  # noqa: E402
import run  # noqa: E402
import studies  # noqa: E402

FOUND = {"greedy": {"reduced": 0.5}, "store": {"checksum": "x"}}


def writes(text: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """A run whose only command adds a text to a file of its folder."""
    return (("write", ("-c", f"open('{{cell}}/written', 'a').write('{text}')")),)


def cell(name: str = "one", **changes: Any) -> cells.Cell:
    settings: dict[str, Any] = {
        "condition": "none", "objective": "base", "seed": 0, "config": studies.SUMS,
        "overrides": (), "commands": writes("x"),
    }  # fmt: skip
    return cells.Cell(name=name, **(settings | changes))


def do(one: cells.Cell, output: Path, timeout_seconds: float = 60) -> dict[str, Any]:
    return cells.run_cell(
        one, output, timeout_seconds=timeout_seconds, read_result=lambda folder: FOUND
    )


def study(*of: cells.Cell, **changes: Any) -> studies.Study:
    settings: dict[str, Any] = {
        "name": "toy", "question": "Is it so?", "design": "Some.", "cells": of,
        "base": ("none", "base"), "differences": (),
    }  # fmt: skip
    return studies.Study(**(settings | changes))


def digest(one: cells.Cell) -> str:
    return cells.hash_of(cells.settings_of(one))


def test_the_hash_covers_what_a_run_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = tmp_path / "read.jsonl"
    read.write_text("{}\n")
    needs = {"base": cell("base")}
    one = cell(reads=(str(read),), needs=needs)
    before = digest(one)
    assert before == digest(cell(reads=(str(read),), needs={"base": cell("base")}))
    others = [
        cell(reads=(str(read),), needs=needs, overrides=("seed=1",)),
        cell(reads=(str(read),), needs=needs, commands=writes("y")),
        cell(reads=(str(read),), needs=needs, seed=1),
        cell(reads=(str(read),), needs={"base": cell("base", overrides=("seed=1",))}),
        cell(reads=(str(read),)),
    ]
    assert len({before, *map(digest, others)}) == 6
    read.write_text("{} \n")
    assert digest(one) != before
    read.write_text("{}\n")
    assert digest(one) == before
    monkeypatch.setattr(cells, "__version__", "9")
    assert digest(one) != before


def test_the_code_of_a_result_is_that_of_the_product(tmp_path: Path) -> None:
    """Every module, by name and bytes; nothing that Python leaves beside them."""
    for name in ("nmar_ds/a.py", "nmar_ds/deep/b.py", "launcher/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    seen = [cells.code_sha256(tmp_path)]
    (tmp_path / "nmar_ds/a.pyc").write_text("")
    assert cells.code_sha256(tmp_path) == seen[0]
    for name, text in (
        ("nmar_ds/deep/b.py", "x = 2\n"),
        ("launcher/c.py", ""),
        ("nmar_ds/d.py", ""),
    ):
        (tmp_path / name).write_text(text)
        seen.append(cells.code_sha256(tmp_path))
    (tmp_path / "nmar_ds/a.py").rename(tmp_path / "nmar_ds/e.py")
    seen.append(cells.code_sha256(tmp_path))
    assert len(set(seen)) == 5
    patterns = [set(ROOT.glob(pattern)) for pattern in cells.CODE]
    assert all(patterns) and ROOT / "nmar_ds/inference/decoding.py" in patterns[0]


def test_runs_of_other_code_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The settings are today's, so they are kept; the list, the page and its last lines say it."""
    output, today = tmp_path / "out", cells.code_sha256()
    toy = toy_study(output, 0.5)
    monkeypatch.setitem(run.STUDIES, "masking", lambda: toy)
    words = ["--experiment", "masking", "--output", str(output)]

    def seen() -> tuple[list[str], str, dict[str, Any]]:
        capsys.readouterr()
        assert run.main([*words, "--list"]) == 0
        lines = capsys.readouterr().out.splitlines()[:-1]
        assert run.main([*words, "--summary", "--pages", str(tmp_path)]) == 0
        return (
            lines,
            (tmp_path / "toy.md").read_text(),
            json.loads((tmp_path / "toy.json").read_text()),
        )

    def say(code: str, *names: str) -> None:
        for name in names:
            file = output / name / "result.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"code_sha256": code}))

    names = [one.name for one in toy.cells]
    lines, page, _ = seen()
    assert lines == [f"done  {name}  (code: not recorded)" for name in names]
    assert "Code (sha256 of its files): not recorded." in page
    say(today, *names)
    lines, page, found = seen()
    assert lines == [f"done  {name}" for name in names] and found["code"] == {
        today: found["code"][today]
    }
    assert f"Code (sha256 of its files): {today[:12]}." in page and "different code" not in page
    say("ab" * 32, "sft1")
    say(cells.CHANGED, "base2")
    lines, page, found = seen()
    assert "done  sft1  (code: abababababab)" in lines and "done  sft0" in lines
    assert "; changed during the run: base2; abababababab: sft1." in page
    assert found["code"]["ab" * 32] == ["sft1"] and len(found["code"][today]) == 7
    assert any("the runs were made by different code" in text for text in found["not_shown"])


def test_a_run_keeps_the_code_that_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert do(cell(), tmp_path)["code_sha256"] == cells.code_sha256()
    digests = iter(["a", "b"])
    monkeypatch.setattr(cells, "code_sha256", lambda: next(digests))
    assert do(cell("two"), tmp_path)["code_sha256"] == "changed during the run"


def test_a_finished_run_is_kept_while_its_settings_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "read_figures", lambda folder: FOUND)
    toy = study(cell(), cell("two", needs={"base": cell()}))
    monkeypatch.setitem(run.STUDIES, "masking", lambda: toy)
    words = ["--experiment", "masking", "--output", str(tmp_path / "out")]
    assert run.main([*words, "--max-seconds", "1e-9"]) == 3
    assert run.main(words) == 0
    files = [tmp_path / f"out/{name}/written" for name in ("one", "two")]
    assert [file.read_text() for file in files] == ["x", "x"]
    times = [file.stat().st_mtime_ns for file in files]
    assert run.main(words) == 0
    assert [file.stat().st_mtime_ns for file in files] == times
    changed = study(cell(overrides=("seed=3",)), cell("two", needs={"base": cell()}))
    monkeypatch.setitem(run.STUDIES, "masking", lambda: changed)
    capsys.readouterr()
    assert run.main([*words, "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["left  one", "done  two"]
    assert run.main(words) == 0
    assert files[0].stat().st_mtime_ns != times[0] and files[1].stat().st_mtime_ns == times[1]
    assert yaml.safe_load((tmp_path / "out/one/run.yaml").read_text())["seed"] == 3


def test_a_killed_run_is_done_again_from_its_beginning(tmp_path: Path) -> None:
    """SIGKILL in the middle of a command: no result, no claim, and nothing of it is left after."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import cells\nfrom pathlib import Path\n"
        "words = '''open('{cell}/written', 'a').write('half'); import time; time.sleep(600)'''\n"
        "one = cells.Cell(name='one', condition='none', objective='base', seed=0,\n"
        "    config=sys.argv[3], overrides=(), commands=(('wait', ('-c', words)),))\n"
        "output = Path(sys.argv[2])\n"
        "with cells.claimed(one, output) as mine:\n"
        "    assert mine\n"
        "    cells.run_cell(one, output, timeout_seconds=600, read_result=dict)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(FOLDER), str(tmp_path), studies.SUMS],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
    )  # fmt: skip
    written = tmp_path / "one/written"
    try:
        until = time.monotonic() + 60
        while not (written.exists() and written.read_text()) and time.monotonic() < until:
            assert process.poll() is None
            time.sleep(0.05)
            if written.exists():
                break
        with cells.claimed(cell(), tmp_path) as mine:
            assert not mine
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert (tmp_path / "one/settings.json").exists()
    assert cells.finished(cell(), tmp_path) is None
    with cells.claimed(cell(), tmp_path) as mine:
        assert mine
        do(cell(), tmp_path)
    assert written.read_text() == "x"
    result = cells.finished(cell(), tmp_path)
    assert result is not None and result["greedy"] == FOUND["greedy"]


def test_a_run_that_another_call_is_at_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "read_figures", lambda folder: FOUND)
    monkeypatch.setitem(run.STUDIES, "masking", lambda: study(cell(), cell("two")))
    with cells.claimed(cell(), tmp_path) as mine:
        assert mine
        assert run.main(["--experiment", "masking", "--output", str(tmp_path)]) == 3
    assert not (tmp_path / "one").exists() and (tmp_path / "two/result.json").exists()


def test_a_run_that_fails_or_takes_too_long_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = cell(commands=(("fail", ("-c", "import sys; sys.exit('no good')")),))
    with pytest.raises(LaunchError, match=r"one/log\.txt: -c ended with code 1"):
        do(bad, tmp_path)
    assert "no good" in (tmp_path / "one/log.txt").read_text()
    slow = cell(commands=(("wait", ("-c", "import time; time.sleep(60)")),))
    with pytest.raises(LaunchError, match="took too long"):
        do(slow, tmp_path, timeout_seconds=0.5)
    assert cells.finished(bad, tmp_path) is None and cells.finished(slow, tmp_path) is None
    monkeypatch.setitem(run.STUDIES, "masking", lambda: study(bad))
    assert run.main(["--experiment", "masking", "--output", str(tmp_path)]) == 1
    assert "log.txt" in capsys.readouterr().err
    (tmp_path / "one/result.json").write_text("{")
    with pytest.raises(ConfigError, match=r"result\.json: is not JSON"):
        cells.finished(bad, tmp_path)


@pytest.mark.parametrize("name", sorted(studies.STUDIES))
def test_every_experiment_is_what_it_says(name: str, tmp_path: Path) -> None:
    """At most 24 runs, three seeds of each arm, needs first, commands and configurations valid."""
    one = studies.STUDIES[name]()
    assert one.name == name and len(one.cells) <= 24
    arms: dict[Any, set[int]] = {}
    seen: set[str] = set()
    for each in one.cells:
        assert each.name not in seen and {need.name for need in each.needs.values()} <= seen
        seen.add(each.name)
        arms.setdefault((each.condition, each.objective), set()).add(each.seed)
        places = {"cell": tmp_path, **dict.fromkeys(each.needs, tmp_path / "need")}
        config = tmp_path / "run.yaml"
        config.write_text(yaml.safe_dump(cells.filled(cells.settings_of(each)["config"], places)))
        loaded = load_config(config)
        loaded.accumulation_steps(1)
        assert loaded.seed == each.seed
        for _, command in each.commands:
            words = cells.filled(list(command), places)
            assert "{" not in "".join(words)
            parse = records.parse if "records.py" in words[0] else launcher(words[0]).parse
            parse(words[1:])
    assert set(map(len, arms.values())) == {3}
    assert one.base in arms
    assert {arm for pair in one.differences for arm in pair} <= set(arms)
    assert all((gap, objective) in arms for gap in one.gaps for objective in ("sft", "msft"))


def test_steps_are_examined_as_they_are_trained() -> None:
    """Problems of the same kind, of another seed; every name a piece of its own."""
    for each in studies.STUDIES["retry"]().cells:
        config = cells.settings_of(each)["config"]
        trained = config["data"]["train"][0]["generator"]
        examined = records.parse(list(dict(each.commands)["heldout"][1:]))
        for key in ("operations", "distractors", "operators"):
            assert trained[key] == getattr(examined, key)
        assert trained["seed"] != examined.seed
        phrases = config["tokenizer"]["train"]["phrases"]
        assert {"Bern bags", "Turin toys", "22", " + "} <= set(phrases)
        assert len(phrases) == len(set(phrases)) == 5 + 13 + 256


@pytest.mark.parametrize("name", ["masking", "entropy", "retry"])
def test_sft_and_msft_differ_in_the_objective_alone(name: str) -> None:
    by_name = {each.name: each for each in studies.STUDIES[name]().cells}
    pairs = [(each, by_name[key.replace("-sft", "-msft")]) for key, each in by_name.items()
             if "-sft" in key]  # fmt: skip
    assert len(pairs) == 9
    for sft, msft in pairs:
        a, b = (cells.settings_of(each) for each in (sft, msft))
        assert a["config"].pop("objective")["preset"] == "sft"
        assert b["config"].pop("objective")["preset"] == "msft"
        for key in ("config", "commands", "reads", "needs"):
            assert a[key] == b[key]


def result_of(greedy: float, log_p: float = -1.0, checksum: str = "x") -> dict[str, Any]:
    return {
        "greedy": {"reduced": greedy, "banned": 0.25}, "store": {"checksum": checksum},
        "end": {"log_p_deviation_per_token": log_p},
    }  # fmt: skip


def finish(one: cells.Cell, output: Path, result: dict[str, Any]) -> None:
    folder = output / one.name
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"settings_sha256": digest(one), **result}))


def toy_study(output: Path, base: float, *, seeds: int = 3, **changes: Any) -> studies.Study:
    """Three arms: SFT at .4, .5, .6 and mSFT at .5, .7, .6, and what the base has."""
    made = []
    for seed in range(3):
        values = {"base": base, "sft": (0.4, 0.5, 0.6)[seed], "msft": (0.5, 0.7, 0.6)[seed]}
        for objective, greedy in values.items():
            condition = "none" if objective == "base" else "hard"
            one = cell(
                f"{objective}{seed}", condition=condition, objective=objective, seed=seed,
                overrides=(f"seed={seed}",),
            )  # fmt: skip
            made.append(one)
            if seed < seeds:
                log_p = {"base": -3.0, "sft": -1.0 - 0.1 * seed, "msft": -5.0 - 0.12 * seed}
                finish(one, output, result_of(greedy, log_p[objective]))
    pair = (("hard", "sft"), ("hard", "msft"))
    return study(*made, differences=(pair,), **changes)


def test_intervals_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    found = findings.summarize(toy_study(tmp_path, 0.5), tmp_path)
    assert found["status"] == "complete" and found["runs"] == {"finished": 9, "of": 9}
    sft = next(arm for arm in found["arms"] if arm["objective"] == "sft")
    # Mean .5, standard deviation .1, t(2) = 4.303.
    half = 4.303 * 0.1 / math.sqrt(3)
    reduced, gain = (sft["measures"][f"greedy.{name}"] for name in ("reduced", "undo_gain"))
    assert reduced.pop("by_seed") == {"0": 0.4, "1": 0.5, "2": 0.6}
    assert reduced == pytest.approx({"mean": 0.5, "low": 0.5 - half, "high": 0.5 + half})
    assert sft["measures"]["sampled.raw"] is None
    # The undo is worth .15, .25, .35; under mSFT .25, .45, .35.
    assert gain.pop("by_seed") == pytest.approx({"0": 0.15, "1": 0.25, "2": 0.35})
    assert gain == pytest.approx({"mean": 0.25, "low": 0.25 - half, "high": 0.25 + half})
    # Paired: -.1, -.2, 0, so mean -.1 and standard deviation .1 again: its interval holds 0.
    greedy, banned, log_p = found["differences"]
    # The same at every seed, which shows nothing.
    assert banned["measure"] == "greedy.banned" and banned["mean"] == 0.0
    assert banned["low"] is banned["high"] is None
    assert greedy["measure"] == "greedy.reduced" and greedy["seeds"] == 3
    assert (greedy["mean"], greedy["low"]) == pytest.approx((-0.1, -0.1 - half))
    # 4, 4.02 and 4.04.
    half = 4.303 * 0.02 / math.sqrt(3)
    assert (log_p["mean"], log_p["high"]) == pytest.approx((4.02, 4.02 + half))
    assert found["shown"] == [
        "greedy: accuracy of sft on hard with the undo minus that with it banned: "
        "0.250 [0.002, 0.498]",
        "greedy: accuracy of msft on hard with the undo minus that with it banned: "
        "0.350 [0.102, 0.598]",
        "log p(e\\|p): sft on hard minus msft on hard: 4.020 [3.970, 4.070]",
    ]
    assert "greedy undo-banned: sft on hard minus msft on hard: 0.000" in found["not_shown"]
    assert any(text.startswith("greedy reduced: sft on hard minus") for text in found["not_shown"])


def test_a_gap_of_gaps_is_paired_by_seed() -> None:
    results: findings.Results = {}
    for condition, sft, msft in (
        ("a", (0.1, 0.2, 0.3), (0.5, 0.6, 0.9)),
        ("b", (0.1, 0.1, 0.1), (0.2, 0.3, 0.2)),
    ):
        for objective, values in (("sft", sft), ("msft", msft)):
            results[condition, objective] = {i: result_of(v) for i, v in enumerate(values)}
    # Gains .4 .4 .6 and .1 .2 .1, so .3 .2 .5: mean 1/3, standard deviation .152753.
    found = findings.gap_of_gaps(results, "a", "b")
    assert found is not None
    half = 4.303 * 0.152753 / math.sqrt(3)
    assert (found["mean"], found["high"]) == pytest.approx((1 / 3, 1 / 3 + half), rel=1e-5)
    banned = findings.gap_of_gaps(results, "a", "b", ("greedy", "banned"))
    assert banned is not None and banned["mean"] == 0.0
    del results["b", "sft"][2]
    fewer = findings.gap_of_gaps(results, "a", "b")
    assert fewer is not None and fewer["mean"] == pytest.approx(0.25) and fewer["seeds"] == 2


@pytest.mark.parametrize(
    "base,status",
    [(0.19, "uninformative"), (0.2, "complete"), (0.9, "complete"), (0.91, "uninformative")],
)
def test_a_base_out_of_range_tells_nothing(tmp_path: Path, base: float, status: str) -> None:
    found = findings.summarize(toy_study(tmp_path, base), tmp_path)
    assert found["status"] == status
    text = findings.page(found)
    if status == "uninformative":
        assert found["shown"] == [] and "| errors |" not in text
        assert f"the base is right on {base:.3f}" in text and "**uninformative**" in text
    else:
        assert found["shown"] and "| hard | msft | 3 |" in text


def test_two_seeds_show_nothing(tmp_path: Path) -> None:
    found = findings.summarize(toy_study(tmp_path, 0.5, seeds=2), tmp_path)
    assert found["status"] == "incomplete" and found["shown"] == []
    assert any("(2 of 3 seeds)" in text for text in found["not_shown"])
    empty = findings.summarize(toy_study(tmp_path / "none", 0.5, seeds=0), tmp_path / "none")
    assert empty["status"] == "missing" and empty["shown"] == []


def test_a_run_that_stands_for_its_start_counts_by_it(tmp_path: Path) -> None:
    """One step at a full learning rate made P(undo) 0.9 of 0.03: it is no figure of the model."""
    one = cell("shown", condition="shown", objective="msft")
    finish(one, tmp_path, {**result_of(0.5, -1.0), "start": {"log_p_deviation_per_token": -5.0}})
    place = ("end", "log_p_deviation_per_token")
    for untrained, expected in (((), -1.0), (("shown",), -5.0)):
        results = findings.collect(study(one, untrained=untrained), tmp_path)
        assert findings.value(results["shown", "msft"][0], place) == expected
    parroting = studies.parroting()
    assert len(parroting.untrained) == 3
    assert all(
        (each.condition in parroting.untrained) == each.name.startswith("own-errors")
        for each in parroting.cells
    )


def test_runs_of_other_settings_do_not_count(tmp_path: Path) -> None:
    toy = toy_study(tmp_path, 0.5)
    file = tmp_path / "sft0/result.json"
    file.write_text(file.read_text().replace(digest(toy.cells[1]), "0" * 64))
    found = findings.summarize(toy, tmp_path)
    assert found["runs"]["finished"] == 8 and found["status"] == "incomplete"


def test_pairs_that_saw_other_traces_are_refused(tmp_path: Path) -> None:
    toy = toy_study(tmp_path, 0.5)
    file = tmp_path / "msft1/result.json"
    file.write_text(file.read_text().replace('"checksum": "x"', '"checksum": "y"'))
    with pytest.raises(ValueError, match="hard, seed 1: SFT and mSFT saw other traces"):
        findings.summarize(toy, tmp_path)


def test_the_summary_is_written_from_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(run.STUDIES, "masking", lambda: toy_study(tmp_path / "out", 0.5))
    words = ["--experiment", "masking", "--output", str(tmp_path / "out"), "--summary"]
    assert run.main([*words, "--pages", str(tmp_path / "pages")]) == 0
    text = (tmp_path / "pages/toy.md").read_text()
    assert "9 of 9 runs" in text and "| none | base | 3 | 0.500 |" in text
    assert json.loads((tmp_path / "pages/toy.json").read_text())["base_accuracy"]["mean"] == 0.5


def test_shares_are_pooled_over_families() -> None:
    def family(num: int, of: int) -> dict[str, Any]:
        rates = {name: {"num": num, "of": of} for name in figures.DECODED}
        return {"measures": rates | {"parrot": {"num": 0, "of": 0}}}

    found = figures.pooled({"families": {"a": family(1, 4), "b": family(5, 8)}})
    assert found["reduced"] == 0.5 and found["parrot"] is None


def test_first_and_last_heldout_figures(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "run")) as writer:
        for step, number in ((0, -3.0), (10, -2.0), (20, -1.5)):
            writer.add_scalar("heldout/log_p_deviation_per_token", number, step)
            writer.add_scalar("train/loss", 1.0, step)
    found = figures.heldout(tmp_path / "run")
    assert found == ({"log_p_deviation_per_token": -3.0}, {"log_p_deviation_per_token": -1.5})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no held-out figures"):
        figures.heldout(tmp_path / "empty")


@pytest.mark.parametrize(
    "right,wrong",
    [("14", ["15", "13", "16"]), ("9", ["10", "8", "11"]), ("1", ["2", "0", "3"]),
     ("-2", ["-1", "-3", "0"]), ("0", ["1", "-1", "2"])],
)  # fmt: skip
def test_wrong_values(right: str, wrong: list[str]) -> None:
    assert records.wrong_values(right, 3) == wrong
    many = records.wrong_values(right, 30)
    assert len(set(many)) == 30 and right not in many
    assert not any(text.startswith(right) or right.startswith(text) for text in many)


def test_wrong_results_are_drawn_evenly_at_places_of_their_own(tmp_path: Path) -> None:
    record = {"id": "r", "prompt": "7 - 9 + 17 =\n", "reference": "7-9=-2, -2+17=15"}
    for choices in (1, 3):
        seen: Counter[str] = Counter()
        for seed in range(600):
            marked = records.marked(record, choices=choices, share=0.5, seed=seed)
            for one in marked.get("deviations", []):
                seen[f"{one['at']} {one['text']}"] += 1
            places = [one["at"] for one in marked.get("deviations", [])]
            fewer = records.marked(record, choices=1, share=0.5, seed=seed).get("deviations", [])
            assert len(places) == len(fewer)
        # -1, -3, 0 in place of -2, and 16, 14, 17 in place of 15, from the letter that differs.
        expected = (
            {"5 1", "5 3", "4 0", "15 6", "15 4", "15 7"} if choices == 3 else {"5 1", "15 6"}
        )
        assert set(seen) == expected
        assert all(abs(num - 300 / choices) < 60 for num in seen.values())
    assert records.marked(record, choices=3, share=0.0, seed=0) == record
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps(records.marked(record, choices=3, share=1.0, seed=0)) + "\n")
    (read,) = read_records(file)
    assert len(read.turns[0].deviations) == 2


def test_the_entropy_of_errors_is_what_the_page_says() -> None:
    """A value's, given which result is wrong; less, given the letter at which it departs."""
    rights = Counter(
        match[0]
        for record in records.read(ROOT / studies.TRAIN, studies.NUM_SOURCES)
        for match in records.RESULT.finditer(record["reference"])
    )
    design = studies.entropy().design
    for choices in studies.CHOICES:
        left = 0.0
        for right, num in rights.items():
            record = {"id": "r", "reference": f"={right}"}
            errors = set()
            for seed in range(24 * choices):
                wrong = records.marked(record, choices=choices, share=1.0, seed=seed)
                errors |= {(one["at"], one["text"]) for one in wrong["deviations"]}
            assert len(errors) == choices
            places = Counter(at for at, _ in errors)
            left += num * sum(n / choices * math.log2(n) for n in places.values())
        assert f"{math.log2(choices):.3g}" in design.split("The error of a trace")[0]
        assert f"{left / rights.total():.3g}" in design.split("The error of a trace")[1]


def test_records_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "o.jsonl"
    source = str(ROOT / studies.HELDOUT)
    assert records.main(["first", "--records", source, "--num", "7", "--output", str(output)]) == 0
    assert output.read_text().splitlines() == Path(source).read_text().splitlines()[:7]
    words = ["steps", "--num", "5", "--seed", "2", "--operations", "1", "2"]
    assert records.main([*words, "--output", str(output)]) == 0
    assert len(list(read_records(output))) == 5 and " - " in output.read_text()
    assert records.main([*words, "--operators", "+", "--output", str(output)]) == 0
    assert " + " in output.read_text() and " - " not in output.read_text()
    words = ["first", "--records", source, "--num", "1000000", "--output", str(output)]
    assert records.main(words) == 2 and "expected at least 1000000" in capsys.readouterr().err
