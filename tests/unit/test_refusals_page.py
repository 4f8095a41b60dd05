"""docs/data.md names every refusal: what the bad lines of the tests are refused for is in its table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_records import BAD

from nmar_ds.errors import TraceError
from nmar_ds.traces.records import parse_line

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"


def patterns() -> list[re.Pattern[str]]:
    """First cells of the table, `…` standing for anything."""
    table = PAGE.read_text("utf-8").split("## 4. Refusals and their mends")[1]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    texts = [text for cell in cells for text in re.findall(r"`([^`]+)`", cell) if text != "…"]
    assert len(texts) > 30
    return [re.compile(".+".join(map(re.escape, text.split("…")))) for text in texts]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_a_refusal_is_on_the_page(number: int) -> None:
    line = BAD[number][0]
    raw = line.encode("utf-8", "surrogatepass") if isinstance(line, str) else line
    with pytest.raises(TraceError) as caught:
        parse_line(raw, path="f.jsonl", line=1)
    problem = caught.value.problem
    # "is a string" would match nearly anything; the others have to match whole.
    matching = [p.pattern for p in patterns() if p.fullmatch(problem) or p.match(problem)]
    assert matching, problem
