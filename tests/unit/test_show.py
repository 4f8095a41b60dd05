"""The view of packed rows, and its launcher."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.text import Text

from nmar_ds.data.packing import pack
from nmar_ds.data.store import Store, write_store
from nmar_ds.data.view import counts_view, print_store, row_view, visible
from nmar_ds.errors import StoreError
from nmar_ds.model.weighting import role_weights
from nmar_ds.traces.boundaries import machine_of
from nmar_ds.traces.builders import Deviation, Turn, assemble, move_starts
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.reduction import Machine
from nmar_ds.traces.schema import Role, Trace

LAUNCHER = Path(__file__).parents[2] / "launcher" / "show.py"


def trace(tokenizer: Tokenizer, line: int, prompt: str, reference: str, wrong: str = "") -> Trace:
    """A trace with one deviation after the first reference token, or a clean one."""
    ids = np.append(tokenizer.encode(reference, continuation=True), tokenizer.eos_id)
    cut = tokenizer.encode(wrong, continuation=True)
    turn = Turn(
        prompt_ids=tokenizer.encode(prompt, continuation=False),
        reference_ids=ids.astype(np.int32),
        deviations=(Deviation(1, cut, 0),) if wrong else (),
    )
    return assemble([turn], machine=Machine(tokenizer.undo_id), line=line, source=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    path = tmp_path_factory.mktemp("data") / "store"
    traces = [
        trace(tokenizer, 1, "Reverse: sun mat\n", "mat sun", " lamp"),
        trace(tokenizer, 2, "Reverse: river\n", "river"),
        trace(tokenizer, 3, "Reverse: tree lamp\n", "lamp tree", " sun lamp"),
    ]
    write_store(path, traces, tokenizer=tokenizer, sources=[{"path": "a.jsonl", "sha256": "0"}])
    return path


def plain(lines: list[Text]) -> list[str]:
    return [line.plain for line in lines]


def test_row_view_shows_every_token_with_role_weight_border_and_position(
    folder: Path, tokenizer: Tokenizer
) -> None:
    store, weights = Store(folder), role_weights("msft")
    traces = np.array([0, 1])
    sizes = store.lengths[traces].tolist()
    length = sum(sizes) + 5
    lines = list(
        row_view(
            store, traces, title="row 0", length=length, weights=weights, tokenizer=tokenizer,
            origin={0: "source 0, line 1", 1: "source 0, line 2"},
        )
    )  # fmt: skip
    text = plain(lines)
    assert text[0].startswith(f"row 0: 2 traces, {sum(sizes)} of {length} tokens")
    assert text[-1] == "+-- padding: 5 tokens"
    borders = [line for line in text if line.startswith("+-- trace")]
    num_trained = sizes[0] - len(tokenizer.encode("Reverse: sun mat\n", continuation=False)) - 1
    assert borders[0] == (
        f"+-- trace 0 (source 0, line 1): {sizes[0]} tokens at 0-{sizes[0] - 1}, "
        f"positions 0-{sizes[0] - 1}, {num_trained} trained targets"
    )
    assert f"at {sizes[0]}-{sum(sizes) - 1}, positions 0-{sizes[1] - 1}" in borders[1]
    segments = [line.split() for line in text if line.startswith("|")]
    assert [(parts[1], parts[2]) for parts in segments] == [
        ("x", "."), ("p", "+"), ("e", "."), ("b", "+"), ("c", "+"), ("x", "."), ("p", "+"),
    ]  # fmt: skip
    num_prompt = len(tokenizer.encode("Reverse: sun mat\n", continuation=False))
    assert [int(parts[3]) for parts in segments[:5]] == [0, *range(num_prompt, num_prompt + 4)]
    assert int(segments[5][3]) == 0, "positions restart with the second trace"
    shown = "".join(line[line.index("|", 1) :] for line in text if line.startswith("|"))
    pieces = [visible(tokenizer.piece(int(token))) for i in traces for token in store.ids(int(i))]
    assert [part for part in shown.split("|") if part] == pieces


def test_row_view_marks_follow_the_objective_and_colours_the_role(
    folder: Path, tokenizer: Tokenizer
) -> None:
    store = Store(folder)
    marks = {}
    for name in ("msft", "sft"):
        lines = list(
            row_view(
                store, np.array([0]), title="t", length=64, weights=role_weights(name),
                tokenizer=tokenizer, origin={},
            )
        )  # fmt: skip
        (deviation,) = [line for line in lines if line.plain.startswith("|   e")]
        marks[name] = deviation.plain.split()[2]
        assert any(str(span.style) == "red strike" for span in deviation.spans)
    assert marks == {"msft": ".", "sft": "+"}


def test_counts_view_adds_up() -> None:
    counts = np.array([50, 10, 20, 15, 5])
    text = plain(list(counts_view(counts, role_weights("msft"))))
    assert text[0] == "targets in the whole store: 100, trained: 30"
    assert [line.split()[2:4] for line in text[1:]] == [
        ["50", "50.0"], ["10", "10.0"], ["20", "20.0"], ["15", "15.0"], ["5", "5.0"],
    ]  # fmt: skip
    assert len(text) == 1 + len(Role)


def test_visible_keeps_one_line() -> None:
    assert visible("a\nb\tc \x1b[1m") == "a\\nb\\tc \\x1b[1m"


def test_print_store_shows_rows_of_the_real_plan(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(folder)
    length = int(store.lengths.max()) + 2
    plan = pack(store.lengths, length)
    weights = role_weights("msft")
    print_store(
        store, num_shown=99, sequence_length=length, weights=weights, seed=None, single=False
    )
    out = capsys.readouterr().out
    assert out.count("\nrow ") == plan.num_rows > 1
    for index in range(store.num_traces):
        assert f"trace {index} (source 0, line {index + 1})" in out
    assert f"targets in the whole store: {store.role_counts.sum()}" in out
    print_store(store, num_shown=1, sequence_length=None, weights=weights, seed=None, single=True)
    out = capsys.readouterr().out
    assert out.count("+-- trace") == 1 and "padding" not in out and "\ntrace 0: 1 traces" in out


def test_print_store_says_the_semantics_and_marks_the_first_wrong_token(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = np.append(tokenizer.encode("mat sun", continuation=True), tokenizer.eos_id)
    turn = Turn(
        prompt_ids=tokenizer.encode("Reverse: sun mat\n", continuation=False),
        reference_ids=reference.astype(np.int32),
        deviations=(Deviation(2, tokenizer.encode("tree", continuation=True), 0),),
    )
    shown = {}
    for semantics, texts in (("token", []), ("span", ["t"]), ("reset", [])):
        machine = machine_of(tokenizer, semantics, texts)
        woven = assemble([move_starts(turn, machine)], machine=machine, line=1, source=0)
        folder = tmp_path / semantics
        write_store(folder, [woven], tokenizer=tokenizer, machine=machine, boundaries=texts)
        print_store(
            Store(folder), num_shown=1, sequence_length=None, weights=role_weights("msft"),
            seed=None, single=True,
        )  # fmt: skip
        shown[semantics] = capsys.readouterr().out
        (deviation,) = [line for line in shown[semantics].splitlines() if line[:5] == "|   e"]
        num_right = woven.onsets[0] - int(np.flatnonzero(woven.roles == Role.DEVIATION)[0])
        before, _, after = deviation.partition("||")
        assert bool(after) == (num_right > 0) == (semantics != "token")
        if after:
            assert before.count("|") - 1 == num_right
    assert "\nundo: token, one takes back one token\n" in shown["token"]
    num_ids = len(machine_of(tokenizer, "span", ["t"]).boundary_ids)
    assert (
        "\nundo: span, one takes back the last token and on back to a boundary; "
        f"{num_ids} boundary ids end with 't'\n"
    ) in shown["span"]
    assert "\nundo: reset, one takes back the whole response\n" in shown["reset"]


def test_print_store_seed_draws_other_rows(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outs = set()
    for seed in range(6):
        print_store(
            Store(folder), num_shown=1, sequence_length=None, weights=role_weights("msft"),
            seed=seed, single=True,
        )  # fmt: skip
        outs.add(capsys.readouterr().out)
    assert len(outs) > 1


def test_print_store_refuses_rows_shorter_than_a_trace(folder: Path) -> None:
    with pytest.raises(StoreError, match="expected at most --sequence-length 4"):
        print_store(
            Store(folder), num_shown=1, sequence_length=4, weights=role_weights("msft"),
            seed=None, single=False,
        )  # fmt: skip


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(LAUNCHER), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_launcher_shows_and_verifies_without_torch(folder: Path) -> None:
    code = (
        "import sys, runpy, contextlib\n"
        f"sys.argv = {[str(LAUNCHER), '--store', str(folder), '--rows', '1', '--verify']!r}\n"
        "with contextlib.suppress(SystemExit):\n"
        f"    runpy.run_path({str(LAUNCHER)!r}, run_name='__main__')\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "every file matches its checksum" in done.stdout and "row 0: " in done.stdout
    assert done.stdout.endswith("False\n") and "\x1b" not in done.stdout


def test_launcher_verify_finds_a_flipped_bit(folder: Path, tmp_path: Path) -> None:
    import shutil

    damaged = tmp_path / "store"
    shutil.copytree(folder, damaged)
    file = next(damaged.glob("*onsets.bin"))
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    done = launch("--store", str(damaged), "--verify")
    assert done.returncode == 2 and done.stdout == ""
    assert file.name in done.stderr and done.stderr.count("\n") == 1


def test_launcher_names_a_missing_store(tmp_path: Path) -> None:
    done = launch("--store", str(tmp_path / "none"))
    assert done.returncode == 2 and "expected a trace store" in done.stderr
    assert done.stderr.count("\n") == 1


def test_launcher_survives_a_closed_pipe(folder: Path) -> None:
    command = f"{sys.executable} {LAUNCHER} --store {folder} --rows 3 | true"
    done = subprocess.run(
        ["bash", "-c", command], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
