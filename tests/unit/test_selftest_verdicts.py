"""The self-test's verdicts: what passes, what fails, and what one page says of it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import math
from pathlib import Path

import pytest
import torch

from nmar_ds.acceptance import reference
from nmar_ds.acceptance.resume import Outcome, judge
from nmar_ds.acceptance.verdict import Line, PhaseResult, conclude, died, within

GOOD = Outcome(
    whole=[0, 0],
    killed=[-9, -9],
    saved=16,
    refused=[],
    resumed=[0, 0],
    said="resumed   from run/step-00000016 after step 16\n",
    digests=("ab", "ab"),
)


def test_a_run_that_resumes_exactly_passes() -> None:
    assert all(line.passed for line in judge(GOOD)) and len(judge(GOOD)) == 6
    assert all(line.passed for line in judge(dataclasses.replace(GOOD, killed=[-9, 1])))


@pytest.mark.parametrize(
    ("wrong", "check"),
    [
        ({"whole": [0, 1]}, "let alone"),
        ({"killed": [0, 0]}, "kill -9"),
        ({"killed": [-9, 0]}, "kill -9"),
        ({"killed": [1, -9]}, "kill -9"),
        ({"resumed": [0, -9]}, "its continuation"),
        ({"said": "resumed   from run/step-00000008 after step 8\n"}, "newest checkpoint"),
        ({"said": ""}, "newest checkpoint"),
        ({"said": "refused step-00000016: sha256\n" + GOOD.said}, "newest checkpoint"),
        ({"refused": ["refused step-00000024: sha256"]}, "newest checkpoint"),
        ({"digests": ("ab", "cd")}, "bit by bit"),
        ({"digests": ("", "")}, "bit by bit"),
    ],
)
def test_each_fault_of_a_resumption_fails_alone(wrong: dict[str, object], check: str) -> None:
    failed = [line for line in judge(dataclasses.replace(GOOD, **wrong)) if not line.passed]  # type: ignore[arg-type]
    assert len(failed) == 1 and check in failed[0].check and failed[0].advice


def test_without_a_checkpoint_nothing_was_saved() -> None:
    failed = [
        x.check for x in judge(dataclasses.replace(GOOD, saved=None, said="")) if not x.passed
    ]
    assert failed == ["it left a valid checkpoint", "it goes on from the newest checkpoint"]


@pytest.mark.parametrize(
    ("seen", "passed"),
    [(1e-5, True), (1.1e-5, False), (float("nan"), False), (float("inf"), False)],
)
def test_a_number_beyond_its_bound_or_no_number_fails(seen: float, passed: bool) -> None:
    assert within("x", seen, 1e-5).passed is passed


def test_gaps_are_relative_to_the_reference_and_nan_stays_nan() -> None:
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])
    nan = torch.tensor([1.0, float("nan")])
    assert reference.worst_gap([one, two], [one, one]) == 1.0
    assert reference.worst_gap([two], [two]) == 0.0
    assert math.isnan(reference.worst_gap([nan, two], [two, two]))
    assert math.isnan(reference.worst_gap([two, nan], [two, two]))
    assert reference.gap({"a": two.numpy()}, {"a": one.numpy()}) == 1.0
    assert math.isnan(reference.gap({"a": nan.numpy()}, {"a": two.numpy()}))


def line(passed: bool) -> Line:
    return Line(check="sum", passed=passed, seen="3", expected="2", advice="mend it")


def test_the_page_says_pass_only_if_every_phase_left_good_lines(tmp_path: Path) -> None:
    names = ["preflight", "bandwidth"]
    for name in names:
        PhaseResult(phase=name, lines=[line(True)], seconds=1, facts={"nodes": "1: a"}).save(
            tmp_path
        )
    good, page = conclude(tmp_path, names)
    assert good and page.endswith("VERDICT: PASS (2 of 2 checks)")
    assert "mend it" not in page and "nodes     1: a" in page
    assert json.loads((tmp_path / "selftest.json").read_text())["good"] is True
    assert (tmp_path / "selftest.txt").read_text() == page + "\n"

    PhaseResult(phase="bandwidth", lines=[line(True), line(False)], seconds=1).save(tmp_path)
    good, page = conclude(tmp_path, names)
    assert not good and page.endswith("VERDICT: FAIL (2 of 3 checks)")
    assert "  FAIL  sum: 3 (expected 2)\n        mend it" in page
    assert json.loads((tmp_path / "selftest.json").read_text())["good"] is False


@pytest.mark.parametrize("content", [None, "", "{}", '{"phase": "bandwidth", "lines": []}'])
def test_a_phase_that_left_nothing_has_failed(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "bandwidth.json").write_text(content)
    good, page = conclude(tmp_path, ["bandwidth"])
    assert not good and "VERDICT: FAIL" in page and "left no result" in page


def test_a_phase_without_checks_has_failed_and_no_phases_is_no_pass(tmp_path: Path) -> None:
    PhaseResult(phase="bandwidth", lines=[], seconds=1).save(tmp_path)
    assert not conclude(tmp_path, ["bandwidth"])[0]
    assert not conclude(tmp_path, [])[0]
    assert not died("resume", "why", 1.0, [line(True)]).passed


def test_the_reference_shares_no_code_with_what_it_judges() -> None:
    imported = set()
    for node in ast.walk(ast.parse(inspect.getsource(reference))):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
    own = {name for name in imported if name.startswith("nmar_ds")}
    assert own == {"nmar_ds.acceptance.tiny", "nmar_ds.traces.schema"}
