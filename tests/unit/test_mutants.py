"""The mutants' places are still in the code; running them all is `make mutants`."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MUTANTS = [
    mutant
    for file in sorted((ROOT / "tests/mutants").glob("*.toml"))
    for mutant in tomllib.loads(file.read_text("utf-8"))["mutant"]
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant["name"])
def test_its_place_is_found_once_and_its_tests_exist(mutant: dict[str, str]) -> None:
    assert (ROOT / mutant["file"]).read_text("utf-8").count(mutant["find"]) == 1
    assert mutant["find"] != mutant["replace"]
    for test in mutant["tests"]:
        file, _, function = test.partition("::")
        assert f"def {function}" in (ROOT / file).read_text("utf-8")


def test_names_are_different() -> None:
    assert len({mutant["name"] for mutant in MUTANTS}) == len(MUTANTS) >= 20
