"""The page a self-test ends with: one PASS or FAIL per line, and one for the whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PHASES = ("preflight", "isolation", "exactness", "resume", "bandwidth")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One check.

    Attributes:
        check: what was looked at.
        passed: whether it was as it must be.
        seen: the figure or fact.
        expected: what it must be.
        advice: what to do where it is not.
    """

    check: str
    passed: bool
    seen: str
    expected: str
    advice: str = ""


def within(check: str, seen: float, bound: float, *, advice: str = "") -> Line:
    """A number against its bound; NaN fails."""
    return Line(
        check=check, passed=seen <= bound, seen=f"{seen:.2e}", expected=f"at most {bound:.0e}",
        advice=advice,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PhaseResult:
    """What one phase found.

    Attributes:
        phase: one of PHASES.
        lines: its checks; a phase without any has failed.
        seconds: it took.
        facts: hosts, devices and versions it ran on.
    """

    phase: str
    lines: Sequence[Line]
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether there were checks and all of them passed."""
        return bool(self.lines) and all(line.passed for line in self.lines)

    def save(self, folder: Path) -> None:
        """Leave it for the page, which another process may write."""
        (folder / f"{self.phase}.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, phase: str) -> PhaseResult:
        """What a phase left, or that it left nothing, which is a failure."""
        try:
            kept = json.loads((folder / f"{phase}.json").read_text(encoding="utf-8"))
            lines = [Line(**line) for line in kept.pop("lines")]
            return cls(**kept, lines=lines)
        except (OSError, ValueError, TypeError, KeyError) as error:
            return died(phase, f"it left no result ({type(error).__name__})", 0.0)


def died(phase: str, why: str, seconds: float, done: Sequence[Line] = ()) -> PhaseResult:
    """A phase that did not come to its end."""
    line = Line(
        check="the phase itself", passed=False, seen=why, expected="to come to its end",
        advice="read what its ranks printed",
    )  # fmt: skip
    return PhaseResult(phase=phase, lines=[*done, line], seconds=seconds)


def page(results: Sequence[PhaseResult]) -> str:
    """The verdict as text, on one page."""
    facts = next((one.facts for one in results if one.facts), {})
    lines = ["nmar_ds self-test", ""]
    lines += [f"{name:<10}{value}" for name, value in facts.items()]
    for one in results:
        lines += ["", f"{one.phase} ({one.seconds:.0f} s)"]
        for line in one.lines:
            mark = "PASS" if line.passed else "FAIL"
            lines.append(f"  {mark}  {line.check}: {line.seen} (expected {line.expected})")
            if not line.passed and line.advice:
                lines.append(f"        {line.advice}")
    num_passed = sum(line.passed for one in results for line in one.lines)
    num = sum(len(one.lines) for one in results)
    good = bool(results) and all(one.passed for one in results)
    verdict = "PASS" if good else "FAIL"
    return "\n".join([*lines, "", f"VERDICT: {verdict} ({num_passed} of {num} checks)"])


def conclude(folder: Path, phases: Sequence[str]) -> tuple[bool, str]:
    """Read what the phases left and write `selftest.json` and `selftest.txt`.

    Returns:
        Whether all passed, and the page.
    """
    results = [PhaseResult.load(folder, phase) for phase in phases]
    text = page(results)
    good = bool(results) and all(one.passed for one in results)
    content = {"good": good, "phases": [asdict(one) | {"passed": one.passed} for one in results]}
    (folder / "selftest.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "selftest.txt").write_text(text + "\n", encoding="utf-8")
    return good, text
