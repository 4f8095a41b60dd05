"""Hostile checkpoints, names and model folders: nothing of it is run, nothing written outside.

Shell strings have a file of their own (tests/unit/test_job_scripts.py): they need no ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import payloads
import pytest
from common import Prepared, newest_step, python
from fork_server import ForkServer
from test_failures import one_line

from launcher import export, generate

FIRST = "training.steps=2"


@pytest.fixture(scope="module")
def stopped(prepared: Prepared, server: ForkServer) -> Path:
    """A run that was killed after step 6; its newest checkpoint is that of step 6."""
    run = prepared.folder / "stopped"
    fault = {"where": "boundary", "step": 7, "rank": 0, "how": "kill"}
    assert -9 in server.run(f"output={run}", fault=fault)["codes"]
    return run


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of somebody else's that hostile names lead to."""
    folder = tmp_path / "outside"
    (folder / "folder").mkdir(parents=True)
    (folder / "file").write_text("precious\n")
    (folder / "folder" / "file").write_text("precious too\n")
    return folder


# -- 6 pickles in checkpoints ----------------------------------------------------------------


@pytest.fixture(scope="module")
def proven(stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The payloads are payloads: a careless load runs each (torchscript is refused as a program)."""
    folder = tmp_path_factory.mktemp("proven")
    styles = [style for style in payloads.STYLES if style != "torchscript"]
    for style in styles:
        name, write = payloads.STYLES[style]
        shutil.copyfile(stopped / "checkpoints/step-00000006" / name, folder / style)
        write(folder / style, folder / f"{style} canary")
    code = (
        "import sys, pickle, torch\nfor file in sys.argv[1:]:\n try: torch.load(file, weights_only="
        "False)\n except Exception: pass"
    )
    files = [str(folder / style) for style in styles]
    careless = {k: v for k, v in os.environ.items() if k != "TORCH_FORCE_WEIGHTS_ONLY_LOAD"}
    subprocess.run([sys.executable, "-c", code, *files], check=True, timeout=120, env=careless)
    assert [s for s in styles if not (folder / f"{s} canary").exists()] == []


@pytest.mark.usefixtures("proven")
@pytest.mark.parametrize("style", payloads.STYLES)
def test_a_pickle_in_a_checkpoint_is_refused_in_one_line(
    style: str, run: Path, server: ForkServer, capfd: pytest.CaptureFixture[str]
) -> None:
    poisoned, canary = run / "checkpoints" / "step-00000006", run.parent / "canary"
    payloads.poison(poisoned, style, canary)
    why = "holds pickled code or is damaged, expected tensors and plain values"
    resumed = server.run(f"output={run}")
    assert resumed["codes"] == [2, 2], resumed
    one_line(resumed["outputs"], str(poisoned / payloads.STYLES[style][0]), why)
    assert export.main(["--run", str(run), "--output", str(run / "export")]) == 2
    one_line(["".join(capfd.readouterr())], str(poisoned / payloads.STYLES[style][0]), why)
    assert not (run / "export").exists() and not canary.exists()


# -- 30 hostile names ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../evil", "/tmp/evil", "a/b", "..", "", "a\0b", "run\n", "x" * 65, "ｒｕｎ", "a∕b"],  # noqa: RUF001
)
def test_a_hostile_run_name(name: str, server: ForkServer, tmp_path: Path) -> None:
    refused = server.run(
        f"output={tmp_path}/run", f"name={json.dumps(name)}", FIRST, num_ranks=1
    )  # fmt: skip
    assert refused["codes"] == [2], refused
    one_line(refused["outputs"], "override: name: ", "is no run name")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "\ud800", ""])
def test_a_hostile_output(name: str, server: ForkServer, tmp_path: Path) -> None:
    output = json.dumps(f"{tmp_path}/{name}" if name else "")
    refused = server.run(f"output={output}", FIRST, num_ranks=1)
    assert refused["codes"] == [2], refused
    one_line(refused["outputs"], "File name too long" if "x" in name else "cannot be a path")
    assert list(tmp_path.iterdir()) == []


# Where a run writes, and whether a link there is refused or replaced.
LINKS = {
    "attempts.jsonl": True, "outcome.tmp": True, "run.lock": True, "checkpoints": True,
    "tensorboard": True, "tokenizer": True, "config.yaml.tmp": False,
    "checkpoints/latest.tmp": False, "checkpoints/step-00000002.partial": False,
}  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
def test_a_link_in_the_run_folder(
    name: str, server: ForkServer, outside: Path, tmp_path: Path
) -> None:
    folders = ("checkpoints", "tensorboard", "tokenizer", "checkpoints/step-00000002.partial")
    link, before = tmp_path / "run" / name, contents(outside)
    link.parent.mkdir(parents=True)
    link.symlink_to(outside / ("folder" if name in folders else "file"))
    done = server.run(f"output={tmp_path}/run", FIRST)
    assert contents(outside) == before
    if LINKS[name]:
        assert done["codes"] == [2, 2], done
        one_line(done["outputs"], str(link))
        assert link.is_symlink() and len(contents(tmp_path / "run")) <= 2  # the lock, and the link
    else:
        assert done["codes"] == [0, 0], done
        assert newest_step(tmp_path / "run") == 2 and not link.is_symlink()


@pytest.mark.parametrize("name", ["../../../outside/file", "/etc/hostname", "a\nb"])
def test_a_hostile_name_in_a_checkpoint(
    name: str, run: Path, outside: Path, server: ForkServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """The manifest vouches for it; the checkpoint is refused all the same and the older one used."""
    checkpoint, before = run / "checkpoints" / "step-00000006", contents(outside)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    content = (outside / "file").read_bytes()
    manifest["files"][name] = {
        "size": len(content), "sha256": hashlib.sha256(content).hexdigest()
    }  # fmt: skip
    payloads.seal(checkpoint, manifest)
    assert export.main(["--run", str(run), "--output", str(run / "export"), "--step", "6"]) == 2
    one_line(["".join(capfd.readouterr())], str(checkpoint), "is missing")
    done = server.run(f"output={run}")
    assert done["codes"] == [0, 0], done
    assert sum("refused step-00000006" in line for line in done["outputs"][0].splitlines()) == 1
    assert "after step 4" in done["outputs"][0] and contents(outside) == before


def test_a_checkpoint_that_is_a_link(run: Path, outside: Path, server: ForkServer) -> None:
    checkpoint = run / "checkpoints" / "step-00000006"
    checkpoint.rename(outside / checkpoint.name)
    checkpoint.symlink_to(outside / checkpoint.name)
    before = contents(outside)
    done = server.run(f"output={run}")
    assert done["codes"] == [0, 0] and "after step 4" in done["outputs"][0], done
    assert "is reached through a link" in done["outputs"][0] and contents(outside) == before


def test_a_hostile_name_in_a_store(prepared: Prepared, server: ForkServer, tmp_path: Path) -> None:
    from nmar_ds.data.store import manifest_checksum

    shutil.copytree(prepared.folder / "store", tmp_path / "store")
    file = tmp_path / "store/train/manifest.json"
    manifest = json.loads(file.read_text())
    (tmp_path / "secret").write_text("secret")
    digest = hashlib.sha256(b"secret").hexdigest()
    manifest["files"]["tokenizer/../../../secret"] = {"size": 6, "sha256": digest}
    file.write_text(json.dumps({**manifest, "checksum": manifest_checksum(manifest)}))
    refused = server.run(f"output={tmp_path}/run", f"data.store={tmp_path}/store", num_ranks=1)
    assert refused["codes"] == [2], refused
    one_line(refused["outputs"], str(file), "'tokenizer/../../../secret', expected names inside")
    assert not (tmp_path / "run").exists()


def test_a_link_where_a_store_is_prepared(prepared: Prepared, outside: Path) -> None:
    before, store = contents(outside), outside.parent / "store"
    store.mkdir()
    (store / "train.partial").symlink_to(outside / "folder")
    done = python("launcher/prepare.py", "--config", str(prepared.config), f"data.store={store}")
    assert done.returncode == 2, done.stderr
    one_line([done.stdout, done.stderr], str(store / "train"))
    assert contents(outside) == before


def test_a_link_where_a_model_is_exported(
    run: Path, outside: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before, output = contents(outside), run / "export"
    output.with_name("export.partial").symlink_to(outside / "folder")
    assert export.main(["--run", str(run), "--output", str(output)]) == 2
    one_line(["".join(capfd.readouterr())], str(output))
    assert contents(outside) == before and not output.exists()


# -- 3 model folders with code ---------------------------------------------------------------

CODE = "open({canary!r}, 'w').close()\nclass Hostile: pass\n"


def _auto_map(file: str, **more: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        settings = json.loads((folder / file).read_text())
        classes = {"AutoConfig": "hostile.Hostile", "AutoModelForCausalLM": "hostile.Hostile"}
        if file != "config.json":
            classes = {"AutoTokenizer": ["hostile.Hostile", None]}
        (folder / file).write_text(json.dumps({**settings, **more, "auto_map": classes}))

    return spoil


@pytest.fixture(scope="module")
def exported(prepared: Prepared) -> Path:
    folder = prepared.folder / "exported"
    assert export.main(["--run", str(prepared.whole), "--output", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(_auto_map("config.json"), id="a known architecture"),
        pytest.param(_auto_map("config.json", model_type="hostile"), id="one of its own"),
        pytest.param(_auto_map("tokenizer_config.json"), id="a tokenizer"),
    ],
)
def test_a_model_folder_with_code(
    spoil: Callable[[Path], None],
    exported: Path,
    server: ForkServer,
    capfd: pytest.CaptureFixture[str],
) -> None:
    tmp_path = Path(tempfile.mkdtemp(prefix="hostile-", dir=exported.parent))
    canary, folder = tmp_path / "canary", tmp_path / "model"
    shutil.copytree(exported, folder)
    (folder / "hostile.py").write_text(CODE.format(canary=str(canary)))
    spoil(folder)
    refused = server.run(
        f"output={tmp_path}/run", f"model={{path: {folder}, dtype: float32}}", FIRST
    )  # fmt: skip
    assert refused["codes"] == [2, 2], refused
    one_line(refused["outputs"], str(folder), "wants code of its own run (auto_map)")
    code = generate.main(
        ["--model", str(folder), "--prompt", "turn abc: ", "--max-new-tokens", "2"]
    )
    said = "".join(capfd.readouterr())
    assert code == 2 and said.startswith(f"error: {folder}") and said.count("\n") == 1, said
    assert not canary.exists()
