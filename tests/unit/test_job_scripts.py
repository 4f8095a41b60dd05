"""The job scripts with stand-ins for Slurm's commands: every word arrives whole, and none is run.

What needs a real Slurm (signals, requeues, lost nodes) is in tests/slurm.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "slurm"
# Each takes part in a file's name, a folder's, a value and an environment variable, so none has a
# slash, a zero byte or a colon.
HOSTILE = [
    "a;touch canary", "$(touch canary)", "`touch canary`", "a\ntouch canary\n", "a'b", 'a"b',
    "'; touch canary; '", '"; touch canary; "', "a b  c", "*", "?[a-z]*", "~", "&& touch canary",
    "| touch canary", "> canary", "${IFS}touch${IFS}canary", "\\", "-n", "--", "$((`touch canary`))",
]  # fmt: skip
STAND_INS = {
    "sbatch": 'printf "%s\\0" sbatch "$@" >> "$SAID"; n=$(cat "$SAID.n" 2> /dev/null || echo 0)\n'
    'echo $((n + 1)) > "$SAID.n"; [ "$n" != "${FAIL_AT:-}" ] || { echo refused >&2; exit 1; }\n'
    'echo "$((100 + n));cluster"\n',
    "srun": 'printf "%s\\0" srun "$@" >> "$SAID"; shift; exec "$@"\n',
    "scontrol": 'printf "%s\\0" scontrol "$@" >> "$SAID"; echo n1\n',
    "scancel": 'printf "%s\\0" scancel "$@" >> "$SAID"\n',
}
# An interpreter that answers for the configuration and writes down what else it is asked to run.
PYTHON = """#!/usr/bin/env bash
[ "$1" != -m ] || exec {python} "$@"
printf "%s\\0" python "$@" >> "$SAID"
[[ "$*" != *launcher/train.py* ]] || echo "complete step 1" > "$OUTCOME/outcome"
"""


class Desk:
    """A folder with the stand-ins, from which scripts are started."""

    def __init__(self, folder: Path, name: str = "plain") -> None:
        self.folder, self.said = folder, folder / "said"
        self.bin, self.work = folder / "bin", folder / "work"
        self.venv = folder / f"venv {name}"
        for place in (self.bin, self.work, self.venv / "bin", folder / f"home {name}"):
            place.mkdir(parents=True)
        self.home = folder / f"home {name}" / "project"
        self.home.symlink_to(ROOT)
        for command, text in STAND_INS.items():
            self.write(self.bin / command, "#!/usr/bin/env bash\n" + text)
        self.write(self.venv / "bin/python", PYTHON.format(python=sys.executable))

    def write(self, path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def start(self, script: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(self.work), "SAID": str(self.said),
            "NMAR_HOME": str(self.home), "NMAR_VENV": str(self.venv), "NMAR_PREFLIGHT": "0",
            "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "OUTCOME": str(self.folder), **more,
        }  # fmt: skip
        return subprocess.run(
            ["bash", str(SCRIPTS / script), *words], cwd=self.work, env=environment, check=False,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def heard(self) -> list[str]:
        """Words that the stand-ins were given since the last time."""
        words = self.said.read_text().split("\0")[:-1] if self.said.exists() else []
        self.said.unlink(missing_ok=True)
        return words


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def settings(config: Path, output: Path) -> list[str]:
    return ["--config", str(config), f"output={json.dumps(str(output))}"]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_string_is_a_word_and_nothing_else(text: str, tmp_path: Path) -> None:
    desk = Desk(tmp_path, text)
    config, output = tmp_path / f"{text}.yaml", tmp_path / f"run {text}"
    config.write_text((ROOT / "configs/quickstart.yaml").read_text())
    output.mkdir()
    asked = [*settings(config, output), f"data.heldout=[{json.dumps(text)}]"]

    done = desk.start("train_msft.sh", *asked, OUTCOME=str(output), MASTER_ADDR=text)
    assert done.returncode == 0, done.stdout + done.stderr
    train = [str(desk.venv / "bin/python"), "-u", f"{desk.home}/launcher/train.py", *asked]
    assert desk.heard() == ["srun", "--kill-on-bad-exit=1", *train, "python", *train[1:]]
    assert f"meeting at {text}:20007" in done.stdout

    done = desk.start("prepare_traces.sh", *asked)
    prepare = [f"{desk.home}/launcher/prepare.py", *asked]
    assert desk.heard() == ["python", *prepare], done
    desk.start("prepare_traces.sh", *asked, SLURM_NTASKS="3")
    words = desk.heard()
    assert words[:2] == ["srun", "--kill-on-bad-exit=1"] and words[-len(prepare) :] == prepare
    desk.start("export.sh", *asked)
    export = ["--run", str(output), "--output", f"{output}/export", "--overwrite"]
    assert desk.heard() == ["python", f"{desk.home}/launcher/export.py", *export]
    done = desk.start("evaluate.sh", *asked, "--", "--require", text)
    words = desk.heard()
    assert words[:4] == ["python", f"{desk.home}/launcher/evaluate_undo.py", "--model", f"{output}/export"]  # fmt: skip
    assert words[4:6] == ["--heldout", text] and words[-2:] == ["--require", text], done

    done = desk.start("submit_all.sh", f"--comment={text}", "--", *asked, "--", text)
    assert done.returncode == 0 and done.stdout.split() == ["100", "101", "102", "103"], done
    words, jobs = desk.heard(), []
    for word in words:
        jobs.append([]) if word == "sbatch" else jobs[-1].append(word)
    assert jobs[0] == ["--parsable", f"{ROOT}/slurm/prepare_traces.sh", *asked]
    chained = ["--parsable", "--dependency=afterok:100", "--kill-on-invalid-dep=yes"]
    assert jobs[1] == [*chained, f"--comment={text}", f"{ROOT}/slurm/train_msft.sh", *asked]
    assert jobs[3][-len(asked) - 2 :] == [*asked, "--", text]

    made = {path.name for path in tmp_path.rglob("*")} | {
        path.name for path in ROOT.glob("canary*")
    }
    assert not {name for name in made if name.startswith("canary")} and not any(desk.work.iterdir())


@pytest.mark.parametrize("at", ["1", "3"])
def test_a_chain_that_is_not_accepted_whole_is_withdrawn(desk: Desk, at: str) -> None:
    done = desk.start("submit_all.sh", "--", "--config", "c.yaml", FAIL_AT=at)
    words = desk.heard()
    assert done.returncode == 1 and done.stdout == "", done
    assert "refused" in done.stderr and "error: not all jobs were accepted" in done.stderr
    assert words.count("sbatch") == int(at) + 1
    assert words[words.index("scancel") :] == ["scancel", *(str(100 + n) for n in range(int(at)))]


def test_a_chain_of_which_nothing_is_accepted(desk: Desk) -> None:
    done = desk.start("submit_all.sh", "--", "--config", "c.yaml", FAIL_AT="0")
    assert done.returncode == 1 and desk.heard().count("sbatch") == 1 and done.stdout == ""


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"NMAR_MAX_FAILURES": "a[$(touch canary)]"}, "NMAR_MAX_FAILURES: is 'a[$(touch canary)]'"),
        ({"NMAR_MAX_INTERRUPTIONS": "-1"}, "NMAR_MAX_INTERRUPTIONS: is '-1', expected a whole number"),
        ({"SLURM_JOB_ID": "a[$(touch canary)]"}, "SLURM_JOB_ID: is 'a[$(touch canary)]'"),
        ({"NMAR_VENV": "/nowhere"}, "NMAR_VENV: no /nowhere/bin/python"),
        ({"NMAR_CONTAINER": "x.sif"}, "NMAR_CONTAINER is set, but there is no apptainer"),
        ({"SLURM_JOB_ID": ""}, "not inside a job: start this with sbatch"),
    ],
)  # fmt: skip
def test_bad_variables_end_the_job_before_anything(
    desk: Desk, more: dict[str, str], said: str
) -> None:
    output = desk.folder / "run"
    asked = settings(ROOT / "configs/quickstart.yaml", output)
    done = desk.start("train_msft.sh", *asked, **more)
    assert done.returncode == 2 and said in done.stdout, done
    assert not output.exists() and not any(desk.work.iterdir()) and "srun" not in desk.heard()


def test_a_link_in_the_place_of_the_scripts_notes(desk: Desk) -> None:
    output, outside = desk.folder / "run", desk.folder / "outside"
    output.mkdir()
    outside.mkdir()
    (output / "slurm").symlink_to(outside)
    done = desk.start("train_msft.sh", *settings(ROOT / "configs/quickstart.yaml", output))
    assert done.returncode == 2 and "is a link" in done.stdout, done
    assert not any(outside.iterdir()) and "srun" not in desk.heard()


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS.glob("*.sh") if path.name != "lib.sh"])  # fmt: skip
def test_help_says_how_it_is_used(desk: Desk, script: str) -> None:
    done = desk.start(script, "--help")
    assert done.returncode == 0 and f"slurm/{script}" in done.stdout, done
    assert desk.heard() == []
