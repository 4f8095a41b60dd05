"""Keep docs/how-it-works.md true: run its example, and compare or rewrite what it shows.

    python examples/how_it_works/write_page.py [--write]

Between `<!-- begin: NAME -->` and `<!-- end -->` the page holds what `blocks.py` makes of a fresh
run; the pictures under docs/pictures are drawn from the same run. Without --write the differences
are printed. Exit codes: 0 the page is true (or was rewritten), 1 it differs.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = Path("docs/how-it-works.md")
PICTURES = Path("docs/pictures")
BLOCK = re.compile(r"(<!-- begin: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)


def filled(page: str, texts: dict[str, str]) -> str:
    """The page with every block replaced.

    Raises:
        SystemExit: a block of the page is made by nothing, or one that is made is not shown.
    """
    shown = [name for _, name, _ in BLOCK.findall(page)]
    if sorted(shown) != sorted(texts):
        raise SystemExit(f"{PAGE}: shows the blocks {sorted(shown)}, expected {sorted(texts)}")
    return BLOCK.sub(lambda found: f"{found[1]}\n{texts[found[2]]}\n{found[3]}", page)


def fresh_files(page: str) -> dict[Path, str]:
    """Every file the example makes, by its path from the root of the tree."""
    # The same numbers with and without a GPU; torch asks for one when it is first imported.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    from blocks import blocks
    from example import run_example
    from pictures import pictures

    with tempfile.TemporaryDirectory() as folder:
        example = run_example(Path(folder))
        files = {PAGE: filled(page, blocks(example))}
        return files | {PICTURES / name: text for name, text in pictures(example).items()}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="rewrite page and pictures")
    write = parser.parse_args(argv).write
    differing = 0
    for path, text in fresh_files((ROOT / PAGE).read_text("utf-8")).items():
        file = ROOT / path
        old = file.read_text("utf-8") if file.is_file() else ""
        if old == text:
            continue
        differing += 1
        if write:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            print(f"{path}: written")
        else:
            lines = old.splitlines(), text.splitlines()
            print("\n".join(difflib.unified_diff(*lines, f"{path}", f"{path} (now)", lineterm="")))
    return 1 if differing and not write else 0


if __name__ == "__main__":
    sys.exit(main())
