"""docs/how-it-works.md shows what the code does: its numbers and pictures are those of a fresh run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/how-it-works.md"
SCRIPT = ROOT / "examples/how_it_works/write_page.py"


def test_the_page_and_its_pictures_are_those_of_a_fresh_run() -> None:
    # A process of its own: it trains with the launcher and changes the working folder.
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=600, check=False
    )
    hint = "if that is meant: python examples/how_it_works/write_page.py --write"
    assert done.returncode == 0, f"{hint}\n{done.stdout}{done.stderr[-3000:]}"
    assert done.stdout == ""


def test_every_block_of_values_is_between_markers() -> None:
    """A number typed by hand beside the markers would be compared with nothing."""
    page = PAGE.read_text("utf-8")
    outside = re.sub(r"<!-- begin: [\w-]+ -->\n.*?<!-- end -->", "", page, flags=re.S)
    assert "```" not in outside
    assert len(re.findall("<!-- begin: ", page)) > 10


def test_every_stage_names_a_file_and_every_picture_is_shown() -> None:
    page = PAGE.read_text("utf-8")
    stages = re.split(r"^## ", page, flags=re.M)[1:]
    for stage in stages:
        if not stage.startswith("10. "):  # no file of its own: two calls of stages 8 and 9
            assert "](../nmar_ds/" in stage, stage.splitlines()[0]
    shown = set(re.findall(r"\]\((pictures/[\w-]+\.svg)\)", page))
    assert shown == {f"pictures/{path.name}" for path in (PAGE.parent / "pictures").glob("*.svg")}


def test_the_loop_stands_on_one_screen() -> None:
    source = (ROOT / "nmar_ds/training/loop.py").read_text("utf-8")
    loop = source[source.index("    def run(") :]
    following = [found.start() for found in re.finditer(r"^    def ", loop, re.M)]
    assert loop[following[1] :].startswith("    def forward_backward(")
    assert loop[: following[2]].count("\n") <= 60, "docs/how-it-works.md says so"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs/pictures").glob("*.svg")), ids=lambda p: p.name
)
def test_pictures_are_whole_and_large_enough_to_read(path: Path) -> None:
    picture = ElementTree.parse(path).getroot()
    width = float(picture.attrib["width"])
    texts = [node for node in picture.iter() if node.tag.endswith("text")]
    assert texts, "no words"
    # A page is about 850 pixels wide: a wider picture is shown smaller.
    shrunk = min(1.0, 850 / width)
    assert min(float(node.attrib["font-size"]) for node in texts) * shrunk >= 8
    assert next(iter(picture)).text, "a title for those who do not see it"
