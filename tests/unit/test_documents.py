"""README, docs and configurations say what is so: commands parse, quick ones run, links lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from nmar_ds.config import load_config, reference_page
from nmar_ds.errors import ConfigError
from nmar_ds.theory.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
STUDIES = [ROOT / "configs/safety_gap.yaml"]  # another kind of configuration
CONFIGS = sorted(set((ROOT / "configs").glob("*.yaml")) - set(STUDIES))
QUICK = re.compile(r"\s+# quick$")


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every ```bash block."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, line) for line in lines if line.strip()]
    return found


def launcher(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"launcher_{Path(path).stem}", ROOT / path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str((ROOT / path).parent))  # where a script looks first
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def check_launch(words: list[str]) -> None:
    """Parse the arguments as the launcher would, and load the configuration they name."""
    scripts = ("launcher/", "examples/")
    script = next(i for i, word in enumerate(words) if word.startswith(scripts))
    options = launcher(words[script]).parse(words[script + 1 :])
    if getattr(options, "config", None):
        load = load_settings if "safety_gap" in words[script] else load_config
        load(ROOT / options.config, options.overrides)


def check_job(words: list[str]) -> None:
    """A script of slurm/ and the configuration it is given; Slurm's own flags stand before."""
    script = next(word for word in words if word.startswith("slurm/"))
    assert (ROOT / script).is_file(), script
    rest = words[words.index("--config") + 1 :]
    ours = rest[: rest.index("--")] if "--" in rest else rest
    load_config(ROOT / ours[0], ours[1:])


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    variables = set(re.findall(r"^([A-Z]+) \?=", makefile, re.M))
    for word in words[1:]:
        name, equals, value = word.partition("=")
        assert name in (variables if equals else targets), word
        if name == "OVERRIDES":
            load_config(ROOT / "configs/quickstart.yaml", value.split())


def test_there_are_commands() -> None:
    lines = [line for _, line in commands()]
    assert sum("launcher/train.py" in line for line in lines) >= 5
    assert sum(bool(QUICK.search(line)) for line in lines) >= 4


@pytest.mark.parametrize(("page", "line"), commands())
def test_every_command_parses(page: str, line: str) -> None:
    words = shlex.split(QUICK.sub("", line), comments=True)
    if words in (
        ["source", ".venv/bin/activate"],
        ["export", "DS_ACCELERATOR=cpu"],
        ["export", "NMAR_VENV=$PWD/.venv"],
    ):
        return
    if words[0] == "make":
        check_make(words)
    elif words[0] == "sbatch" or words[0].startswith("slurm/"):
        check_job(words)
    else:
        assert words[0] in ("python", "deepspeed", "torchrun"), f"{page}: {line}"
        check_launch(words)


def test_a_wrong_command_would_be_seen() -> None:
    with pytest.raises(SystemExit):
        check_launch("python launcher/export.py --runn x".split())
    with pytest.raises(AssertionError):
        check_make("make quickstrat".split())
    with pytest.raises(ConfigError):
        check_job("sbatch slurm/export.sh --config configs/quickstart.yaml outptu=x".split())


def test_quick_commands_run(tmp_path: Path) -> None:
    for folder in ("launcher", "configs", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    lines = [QUICK.sub("", line) for _, line in commands() if QUICK.search(line)]
    environment = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT))}
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "python"
        result = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert result.returncode == 0, f"{line}\n{result.stdout}{result.stderr}"
        assert result.stdout.strip()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_loads(path: Path) -> None:
    config = load_config(path)
    for source in map(str, [*config.data.train, *config.data.heldout]):
        assert (ROOT / source).is_file(), source
    for world_size in (1, 2):
        config.accumulation_steps(world_size)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_every_study_loads(path: Path) -> None:
    records = load_settings(path).records
    for source in map(str, [*records.train, *records.heldout]):
        assert (ROOT / source).is_file(), source


def test_the_configuration_page_is_up_to_date() -> None:
    page = (ROOT / "docs/configuration.md").read_text("utf-8")
    assert page == reference_page(), "run: python -m nmar_ds.config > docs/configuration.md"


def test_every_key_has_a_type_and_a_meaning() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*) \|$", reference_page(), re.M)
    assert len(rows) > 50
    for name, kind, _default, meaning in rows:
        assert meaning.strip(), name
        assert "Optional" not in kind and "Annotated" not in kind and "Field" not in kind, kind


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_named_tests_exist() -> None:
    page = (ROOT / "docs/verification.md").read_text("utf-8")
    existing = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    names = re.findall(r"`(?:tests/\w+/)?(test_\w+\.py)`", page)
    assert len(names) > 8
    for name in names:
        assert name in existing, name
    for path in re.findall(r"`(tests/[\w/.]+)`", page):
        assert (ROOT / path).exists(), path
